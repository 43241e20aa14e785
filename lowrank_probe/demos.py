"""A base model and its full fine-tune, made on the spot from text that every Python has; and the report on them.

No download: a small Llama learns the standard library's source, then every weight of it is fine-tuned on the prose of
the language reference (`pydoc_data.topics`). Both sides are stored in bfloat16, as published checkpoints are, so the
report meets what it meets in the field: updates of different rank by layer type, and storage rounding on top of them.

The loop is plain PyTorch, not `transformers.Trainer`: Trainer needs accelerate, which nothing else here does, and takes
longer to start than a tenth of this training takes; and forty lines are easier to keep byte-identical for a seed.
"""

import hashlib
import json
import os
import random
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any, Final

import torch

from lowrank_probe.errors import OutputError, ProbeError
from lowrank_probe.outputs import ANOTHER_OUT, made, why

if TYPE_CHECKING:
    from lowrank_probe.runs import Result

Progress = Callable[[str, int, int], None]

RECIPE_VERSION: Final = 1  # raise it with any change that changes the weights: cached pairs are made anew
PAIR_FILE: Final = "pair.json"
END: Final = "<|endoftext|>"
# Tests and data tables are not how people write code; pydoc_data is the fine-tuning text.
_NOT_CODE: Final = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings"}


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


def train_pair(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    on_progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Train a base on source code and fine-tune all of it on prose; returns (`out`/base, `out`/finetuned).

    Both are transformers directories in bfloat16. The fine-tune starts from the base as stored, keeps float32 masters
    and is rounded once, at the end. `out`/pair.json, written last, has the seed, the losses (nats a token, on held-out
    text, of the weights as stored), the seconds and the versions. The same seed gives the same bytes on one machine.

    Raises `OutputError` where `out` is not empty or cannot be written, `ProbeError` where this Python lacks the text.
    """
    root, recipe = Path(out), recipe or Recipe()
    report = on_progress or _silent
    try:
        with made(root):
            if any(root.iterdir()):
                raise OutputError(f"{root}: is not empty; choose another --out or remove what is in it")
            with tempfile.TemporaryDirectory(dir=root, prefix=".training-") as scratch:
                facts = _train_both(Path(scratch), seed, recipe, report)
                (Path(scratch) / PAIR_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
                for name in ("base", "finetuned", PAIR_FILE):  # pair.json last: where it is, the pair is whole
                    os.replace(Path(scratch) / name, root / name)
    except OSError as error:
        raise _cannot_write(root, error) from None
    return root / "base", root / "finetuned"


def demo(
    out: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    on_progress: Progress | None = None,
) -> "Result":
    """`spectrum` of a pair trained here from nothing, saved as a run; the first call trains for about a minute.

    The pair is kept in $LOWRANK_PROBE_CACHE (or ~/.cache/lowrank_probe) for this seed, recipe and set of versions. With
    `out`: `out`/base, `out`/finetuned and `out`/run; without it the run lies beside the cached pair.
    `result.facts["demo"]` has the paths ("base", "finetuned", "run", "report") and what pair.json says ("pair").

    Raises `OutputError` where the cache or `out` cannot be written, or `out` holds anything but an earlier demo.
    """
    from lowrank_probe.spectra import spectrum

    recipe = recipe or Recipe()
    key = _key(seed, recipe)
    if out is not None:
        _check_out(Path(out), key)
    root = _cached_pair(seed, recipe, key, on_progress)
    if out is not None:
        root = _copy_pair(root, Path(out), key)
    base, tuned, run = root / "base", root / "finetuned", root / "run"
    result = spectrum(base, tuned, seed=seed, on_progress=on_progress)
    paths = {"base": base, "finetuned": tuned, "run": run, "report": run / "report.html"}
    told: dict[str, Any] = {name: str(path.absolute()) for name, path in paths.items()}
    told["pair"] = json.loads((root / PAIR_FILE).read_text(encoding="utf-8"))
    result = replace(result, facts={**result.facts, "demo": told})
    result.save(run)
    return result


# ---- the text


def read_code(n_chars: int) -> list[str]:
    """Source files of the standard library, whole, in an order fixed by their names, until `n_chars` are together."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    paths = [p for p in paths if not _NOT_CODE & set(p.split("/"))]
    random.Random(0).shuffle(paths)  # or the cap would keep one end of the alphabet
    texts: list[str] = []
    total = 0
    for path in paths:
        if total >= n_chars:
            break
        try:
            text = (root / path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        texts.append(text)
        total += len(text)
    if total < min(n_chars, 200_000):
        raise ProbeError(
            f"{root}: has {total:,} characters of .py source, the demo needs 200,000; "
            "run it with a Python that keeps its standard library's source"
        )
    return texts


def read_prose(n_chars: int) -> list[str]:
    """The language reference's topics; a paragraph that came before is left out (chapters repeat their sections)."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ProbeError("this Python has no pydoc_data.topics, the demo's prose; install the full library") from None
    seen: set[str] = set()
    texts: list[str] = []
    for name in sorted(topics):
        fresh = [p for p in dict.fromkeys(topics[name].split("\n\n")) if p not in seen]
        seen.update(fresh)
        if fresh and sum(map(len, texts)) < n_chars:
            texts.append("\n\n".join(fresh))
    return texts


# ---- the training


def _train_both(root: Path, seed: int, recipe: Recipe, report: Progress) -> dict[str, Any]:
    """Write base/ and finetuned/ under `root`; returns what pair.json says."""
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
        "key": _key(seed, recipe),
        "seed": seed,
        "recipe": asdict(recipe),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_tokens": {"code": code_blocks.numel(), "prose": prose_blocks.numel()},
        "loss_prose_before": prose_before,
        "loss_prose_after": prose_after,
        "loss_code_before": code_before,
        "loss_code_after": code_after,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "versions": _versions(),
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


# ---- the cache


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers")
    return {"python": python_version(), **{name: version(name) for name in names}}


def _key(seed: int, recipe: Recipe) -> str:
    """Name of a pair in the cache: everything that decides its bytes. The text is this Python's, so its version too."""
    told = json.dumps([RECIPE_VERSION, seed, asdict(recipe), _versions()], sort_keys=True)
    return f"pair-v{RECIPE_VERSION}-seed{seed}-torch{version('torch')}-{hashlib.sha256(told.encode()).hexdigest()[:10]}"


def _cache() -> Path:
    told = os.environ.get("LOWRANK_PROBE_CACHE")
    return Path(told) if told else Path.home() / ".cache" / "lowrank_probe"


def _is_pair(root: Path, key: str) -> bool:
    """Whether `root` holds the whole pair of this key."""
    try:
        told = json.loads((root / PAIR_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    files = (root / side / name for side in ("base", "finetuned") for name in ("config.json", "model.safetensors"))
    return isinstance(told, dict) and told.get("key") == key and all(file.is_file() for file in files)


def _cached_pair(seed: int, recipe: Recipe, key: str, on_progress: Progress | None) -> Path:
    """Directory of the pair in the cache; trained beside it and renamed, so that two demos at once do no harm."""
    home = _cache() / key
    if _is_pair(home, key):
        return home
    elsewhere = "set LOWRANK_PROBE_CACHE to a directory that can be written"
    try:
        with made(home.parent, elsewhere), tempfile.TemporaryDirectory(dir=home.parent, prefix=".training-") as scratch:
            fresh = Path(scratch) / "pair"
            train_pair(fresh, seed=seed, recipe=recipe, on_progress=on_progress)
            if not _is_pair(home, key):  # another demo may have finished first
                shutil.rmtree(home, ignore_errors=True)
                os.replace(fresh, home)
    except OSError as error:
        raise _cannot_write(home.parent, error, elsewhere) from None
    return home


def _check_out(out: Path, key: str) -> None:
    """Raise `OutputError` unless `out` is absent, empty, or holds this very demo from before."""
    if out.is_dir() and any(out.iterdir()) and not _is_pair(out, key):
        raise OutputError(f"{out}: is not empty and not this demo's; choose another --out or remove what is in it")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; --out is a directory")


def _copy_pair(pair: Path, out: Path, key: str) -> Path:
    """Copy a cached pair to `out`, pair.json last; returns `out`."""
    if _is_pair(out, key):
        return out
    try:
        with made(out), tempfile.TemporaryDirectory(dir=out, prefix=".copying-") as scratch:
            for side in ("base", "finetuned"):
                shutil.copytree(pair / side, Path(scratch) / side)
                os.replace(Path(scratch) / side, out / side)
            shutil.copy(pair / PAIR_FILE, Path(scratch) / PAIR_FILE)
            os.replace(Path(scratch) / PAIR_FILE, out / PAIR_FILE)
    except OSError as error:
        raise _cannot_write(out, error) from None
    return out


def _cannot_write(path: Path, error: OSError, elsewhere: str = ANOTHER_OUT) -> OutputError:
    name = Path(str(error.filename)).name if error.filename else "the pair"
    return OutputError(f"{path}: cannot write {name}: {why(error, elsewhere)}")


def _silent(phase: str, done: int, total: int) -> None:
    """Where nobody listens."""
