"""What `probe extract --calibration` gains over the plain SVD, on text that decided nothing.

    python benchmarks/activation_aware.py [--only demo encoder]

Two real full fine-tunes that the script trains itself: the demo's Llama (4 layers × 128, next token) and an encoder
(6 layers × 192, masked token), both learnt on code and then fine-tuned on one half of the language reference; the
calibration text is the other half. For ranks 1 to 32 the KL from the fine-tune on the third part of the text: plain,
and as chosen on the second part. Then a budget by weighted energies against one rank for all matrices, at equal size.
Writes docs/benchmarks-activation-aware.md.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accuracy import publish
from real_models import cache_dir

import lowrank_probe as lp
from lowrank_probe.calibration import Calibration
from lowrank_probe.demo_text import read_code, read_prose
from lowrank_probe.demo_training import Recipe, _blocks, _train_tokenizer, train_both
from lowrank_probe.rank_choice import RankChoice
from lowrank_probe.running_models import quiet

RANKS = (1, 4, 8, 16, 32)
BUDGETS = (4, 8, 16)
HEADS = ("pair", "rank", "base", "plain SVD", "as chosen", "change", "weighted by", "λ")
BUDGET_HEADS = ("pair", "parameters", "one rank", "budget", "change")
MASK = "<mask>"


def halves() -> tuple[list[str], list[str]]:
    """The language reference's topics, every other one: to fine-tune on, to calibrate on."""
    topics = read_prose(1_000_000)
    return topics[::2], topics[1::2]


def demo(root: Path) -> None:
    """The demo's pair, fine-tuned on the first half alone, four times as long at a rate ten times as high."""
    import lowrank_probe.demo_training as training

    before = training.read_prose
    training.read_prose = lambda _: halves()[0]
    try:
        train_both(root, 0, Recipe(tuned_lr=3e-4), lambda *_: None)
    finally:
        training.read_prose = before


def encoder(root: Path) -> None:
    """base/ and finetuned/: BERT learnt on code, then fine-tuned on the first half of the prose."""
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    code = read_code(3_000_000)
    bpe = _train_tokenizer(code, 2048)
    bpe.add_special_tokens([MASK])
    mask = bpe.token_to_id(MASK)
    config = BertConfig(
        vocab_size=bpe.get_vocab_size(), hidden_size=192, num_hidden_layers=6, num_attention_heads=6,
        intermediate_size=768, max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, mask_token=MASK, model_max_length=128)
    for name, texts, steps, rate in (("base", code, 600, 1e-3), ("finetuned", halves()[0], 200, 3e-4)):
        _learn(model, _blocks(bpe, texts, 128)[0], mask, steps, rate)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)


def _learn(model: Any, blocks: torch.Tensor, mask: int, steps: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in range(steps):
        ids = blocks[torch.randint(len(blocks), (16,), generator=generator)]
        hidden = torch.rand(ids.shape, generator=generator) < 0.15
        model(input_ids=ids.masked_fill(hidden, mask), labels=ids.masked_fill(~hidden, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


PAIRS = {"demo": demo, "encoder": encoder}


def cached(name: str) -> Path:
    """The directory of a pair, trained on first use."""
    root = cache_dir() / f"activation-aware-{name}"
    if not (root / "finetuned").is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with quiet():
            PAIRS[name](root)
    return root


def compare(name: str, folder: Path) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """(a row a rank, a row a budget)."""
    root, text = cached(name), folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in halves()[1]), encoding="utf-8")
    sides = root / "base", root / "finetuned"
    found = lp.extract(*sides, folder / "ranks", ranks=RANKS, targets=("everything",), calibration=Calibration(text))
    told = found.facts["calibration"]
    rows, single = [], {}
    for rank in RANKS:
        tried = [one for one in told["tried"] if one["adapter"] == f"r{rank}"]
        plain = next(one for one in tried if one["weighted_by"] == "plain SVD")
        best = next(one for one in tried if one["chosen"])
        single[rank] = best["report"]
        change = best["report"] / plain["report"] - 1
        rows.append((
            name, rank, f"{told['base']['report']:.4f}", f"{plain['report']:.4f}", f"{best['report']:.4f}",
            f"{100 * change:+.0f} %", best["weighted_by"], best["ridge"],
        ))  # fmt: skip
    budgets = []
    for rank in BUDGETS:
        n = int(found.facts["adapters"][f"r{rank}"]["n_parameters"])
        choice = RankChoice(budget={"parameters": n})
        spent = lp.extract(
            *sides, folder / f"budget{rank}", ranks=choice, targets=("everything",), calibration=Calibration(text)
        )
        best = next(one for one in spent.facts["calibration"]["tried"] if one["chosen"])
        budgets.append((
            name, f"{n:,}", f"{single[rank]:.4f}", f"{best['report']:.4f}",
            f"{100 * (best['report'] / single[rank] - 1):+.0f} %",
        ))  # fmt: skip
    return rows, budgets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS))
    only = parser.parse_args().only
    rows, budgets = [], []
    for name in only:
        with tempfile.TemporaryDirectory() as folder:
            more, spent = compare(name, Path(folder))
        rows += more
        budgets += spent
    verdicts = []
    for name in only:
        changes = {row[1]: float(row[4]) / float(row[3]) - 1 for row in rows if row[0] == name}
        verdicts += [
            (f"{name}: {100 * changes[16]:+.0f} % at rank 16, {100 * changes[32]:+.0f} % at 32; bar −10 %",
             max(changes[16], changes[32]) <= -0.10),
            (f"{name}: never more than 3 % worse than the plain SVD (worst {100 * max(changes.values()):+.1f} %)",
             max(changes.values()) <= 0.03),
        ]  # fmt: skip
    publish(
        "activation_aware", "Activation-aware extraction", NOTE,
        [("KL from the fine-tune, nats a row", HEADS, rows), ("A budget against one rank", BUDGET_HEADS, budgets)],
        verdicts, write=len(only) == len(PAIRS), page="benchmarks-activation-aware",
    )  # fmt: skip
    return 0 if all(ok for _, ok in verdicts) else 1


NOTE = (
    "Two full fine-tunes (the demo's Llama, 4 layers × 128; a BERT of 6 layers × 192) from code to one half of the "
    "Python language reference; calibrated on the other half. KL(tuned ‖ base + adapter) on the third part of that "
    "text, which decided nothing. Budget: the same number of parameters, allotted by weighted energy a parameter."
)

if __name__ == "__main__":
    sys.exit(main())
