"""A small Llama trained on code, then fine-tuned on prose, both stored in bfloat16: the pair of the demo.

The loop is plain PyTorch, not `transformers.Trainer`: Trainer needs accelerate, which nothing else here does, and takes
longer to start than a tenth of this training takes; and forty lines are easier to keep byte-identical for a seed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from lowrank_probe.demo_text import read_code, read_prose
from lowrank_probe.options import Progress

END: Final = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Sizes and steps of the pair. Lengths in tokens, text in characters.

    tuned_lr is chosen so that storage matters and does not hide everything: bfloat16 swallows the update of 9-16 % of
    a block's entries and of about 45 % of the embedding's (at 1e-4, 5 and 28 %), while the loss on prose falls clearly.

    The output layer is not tied to the embedding: tied they are one tensor, and the report could not show that the two
    ends of a model move differently (rows of the embedding whose tokens never occur do not move at all).
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 352
    vocabulary: int = 2048
    length: int = 128
    batch: int = 8
    base_steps: int = 850
    base_lr: float = 4e-3
    tuned_steps: int = 200
    tuned_lr: float = 3e-5
    code_chars: int = 3_000_000
    prose_chars: int = 1_000_000
    threads: int = 2


def train_both(root: Path, seed: int, recipe: Recipe, report: Progress) -> dict[str, Any]:
    """Write base/ and finetuned/ under `root`; returns the recipe, the losses and the seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    seconds: dict[str, float] = {}
    with _repeatable(seed, recipe.threads), _quiet(), _clock(seconds, "text"):
        report("reading text", 0, 2)
        code = read_code(recipe.code_chars)
        report("reading text", 1, 2)
        prose = read_prose(recipe.prose_chars)
        report("reading text", 2, 2)
        report("training tokenizer", 0, 1)
        tokenizer = _train_tokenizer(code, recipe.vocabulary)
        code_blocks, code_held_out = _blocks(tokenizer, code, recipe.length)
        prose_blocks, prose_held_out = _blocks(tokenizer, prose, recipe.length)
        report("training tokenizer", 1, 1)
    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.length,
        tie_word_embeddings=False,
        initializer_range=recipe.hidden**-0.5 * 0.7,  # Llama's 0.02 is for widths in the thousands, and slow here
        bos_token_id=end,
        eos_token_id=end,
        use_cache=False,
    )
    with _repeatable(seed, recipe.threads), _quiet():
        order = torch.Generator().manual_seed(seed)
        with _clock(seconds, "pre-training"):
            model = LlamaForCausalLM(config)
            _fit(model, code_blocks, recipe.base_steps, recipe.base_lr, recipe.batch, order, "pre-training", report)
            _store(model, tokenizer, root / "base")
        with _clock(seconds, "evaluating"):
            code_before, prose_before = (_loss(model, held, report) for held in (code_held_out, prose_held_out))
        with _clock(seconds, "fine-tuning"):
            # The model now holds the stored base's values in float32: the fine-tune starts from what is on disk.
            _fit(model, prose_blocks, recipe.tuned_steps, recipe.tuned_lr, recipe.batch, order, "fine-tuning", report)
            _store(model, tokenizer, root / "finetuned")
        with _clock(seconds, "evaluating"):
            code_after, prose_after = (_loss(model, held, report) for held in (code_held_out, prose_held_out))
    return {
        "seed": seed,
        "recipe": asdict(recipe),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_tokens": {"code": code_blocks.numel(), "prose": prose_blocks.numel()},
        "loss_prose_before": prose_before,
        "loss_prose_after": prose_after,
        "loss_code_before": code_before,
        "loss_code_after": code_after,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def _train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """Byte-level BPE of the code: it writes any text, and prose costs it more tokens, as a new domain does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def _blocks(tokenizer: Any, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts → (n, length) token blocks to learn from, and every eighth text's blocks (at most 96) held out."""
    end = tokenizer.token_to_id(END)
    parts: list[list[int]] = [[], []]
    for i, encoding in enumerate(tokenizer.encode_batch(texts)):
        parts[i % 8 == 7] += [*encoding.ids, end]
    learn, held = (torch.tensor(p[: len(p) // length * length]).view(-1, length) for p in parts)
    return learn, held[:: max(1, -(-len(held) // 96))]


def _fit(
    model: Any,
    blocks: torch.Tensor,
    steps: int,
    lr: float,
    batch: int,
    order: torch.Generator,
    phase: str,
    report: Progress,
) -> None:
    """AdamW in float32, every parameter; blocks in a random order, again from the start when all were seen."""
    # No weight decay: it shrinks W itself, an update of W's own rank on top of what the text teaches.
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(1, min(20, steps // 10))
    queue = torch.empty(0, dtype=torch.long)
    model.train()
    for step in range(steps):
        report(phase, step, steps)
        while len(queue) < batch:
            queue = torch.cat([queue, torch.randperm(len(blocks), generator=order)])
        rows, queue = blocks[queue[:batch]], queue[batch:]
        for group in optimizer.param_groups:  # linear up, then linear down to a tenth
            group["lr"] = lr * min((step + 1) / warmup, 1 - 0.9 * (step - warmup) / max(1, steps - warmup))
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    report(phase, steps, steps)


@torch.no_grad()
def _loss(model: Any, blocks: torch.Tensor, report: Progress) -> float:
    """Mean cross-entropy in nats a token."""
    model.eval()
    total = 0.0
    for start in range(0, len(blocks), 32):
        report("evaluating", start, len(blocks))
        rows = blocks[start : start + 32]
        total += float(model(input_ids=rows, labels=rows).loss) * len(rows)
    report("evaluating", len(blocks), len(blocks))
    return total / len(blocks)


@torch.no_grad()
def _store(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write the model in bfloat16 with its tokenizer; the model keeps the stored values, in float32."""
    from transformers import PreTrainedTokenizerFast

    for p in model.parameters():  # not model.to(): it would round the rotary frequencies too, which are not stored
        p.data = p.data.to(torch.bfloat16)
    model.save_pretrained(directory)
    for p in model.parameters():
        p.data = p.data.to(torch.float32)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(directory)


@contextmanager
def _repeatable(seed: int, threads: int) -> Iterator[None]:
    """Seed torch and fix its threads (sums are taken in an order that follows their number); put both back after."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """No logging and no progress bars from transformers inside."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _clock(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
