"""What a training showed, for a terminal. Formatting only."""

from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.table import Table

from lowrank_probe import words
from lowrank_probe.console import console
from lowrank_probe.errors import printable
from lowrank_probe.evaluation_runs import interval_word, rank_word
from lowrank_probe.terminal import styled
from lowrank_probe.training_words import recommendation_words, summary_words, tolerance_words

if TYPE_CHECKING:
    from lowrank_probe.training_runs import Training


def print_training(found: "Training") -> None:
    """Loss at every rank and group; the verdicts with their evidence; the recommendation."""
    out = console()
    out.print(summary_words(found))
    out.print(_losses(found.runs.assign(loss=found.runs["loss"].mask(found.runs["diverged"].astype(bool)))))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    for i, head in enumerate(("type", "trained", "95 %", "functional", "95 %", "r90", "half break-even")):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for row in found.verdict.to_dict("records"):
        verdict = styled(str(row["verdict"]))
        verdict.append(f" ({row['decided_by']})" if row["decided_by"] else f" (missing: {row['missing']})")
        table.add_row(
            printable(row["layer_type"]), *_ranks(row, "trained"), *_ranks(row, "functional"),
            words.bracket(row["r90_low"], row["r90_high"]), words.rank(row["break_even_rank"] / 2), verdict,
        )  # fmt: skip
    out.print(table)
    out.print(
        f"trained: smallest rank from which on LoRA is within {tolerance_words(found)} of the full fine-tune; "
        "functional: the full run's ΔW truncated, likewise; 95 %: over seeds and sequences.",
        style="dim",
    )
    if recommended := recommendation_words(found):
        good = found.facts["recommendation"]["good_enough"]
        out.print(f"{'recommended' if good else 'best'}: {recommended}")
        out.print(found.facts["recommendation"]["lora_config"])


def _losses(runs: pd.DataFrame) -> Table:
    """Mean loss over seeds, one line a group, one column a rank."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    adapters = runs[runs["method"] != "full"]
    ranks = sorted(set(adapters["rank"]))
    for i, head in enumerate(("LoRA on", "lr", *(f"r{rank}" for rank in ranks), "± seeds")):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    several = len(set(adapters["method"])) > 1
    for (method, targets), group in adapters.groupby(["method", "targets"], sort=False):
        by_rank = group.groupby("rank")["loss"]
        means = by_rank.mean()
        spread = by_rank.std().max()
        table.add_row(
            printable(f"{method} {targets}" if several else str(targets)), f"{group['lr'].iloc[0]:g}",
            *(f"{means[rank]:.4f}" if rank in means and pd.notna(means[rank]) else "–" for rank in ranks),
            "–" if pd.isna(spread) else f"{spread:.4f}",
        )  # fmt: skip
    return table


def _ranks(row: dict[Any, Any], kind: str) -> tuple[str, str]:
    largest = row[f"{kind}_largest"]
    if pd.isna(largest):
        return "–", ""
    return rank_word(row[f"{kind}_rank"], largest), interval_word(row[f"{kind}_low"], row[f"{kind}_high"], largest)
