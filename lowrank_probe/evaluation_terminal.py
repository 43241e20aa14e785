"""What an evaluation found, for a terminal. Formatting only."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import pandas as pd
from rich import box
from rich.table import Table

from lowrank_probe import words
from lowrank_probe.console import console
from lowrank_probe.errors import printable
from lowrank_probe.evaluation_runs import interval_word, rank_word

if TYPE_CHECKING:
    from lowrank_probe.evaluation_runs import Evaluation

MOST_RANKS: Final = 9
_HOWS: Final = {"alone": "only", "all": "", "leave out": "all but"}


def print_evaluation(found: "Evaluation") -> None:
    """One line a group: functional rank, its interval, LoRA's parameters there, and the loss at every rank."""
    out = console()
    ranks = _shown_ranks(found)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    heads = ("truncated", "n", "rank", "95 %", "parameters", *(f"r{rank}" for rank in ranks), "full")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    rows = found.functional.to_dict("records")
    for i, row in enumerate(rows):
        group, how = row["group"], row["how"]
        part = found.table[(found.table["group"] == group) & (found.table["how"] == how)]
        losses = dict(zip(part["rank"].tolist(), part["loss"].tolist(), strict=True))
        full = part.loc[part["full"], "loss"]
        table.add_row(
            printable(f"{_HOWS[how]} {group}".strip()), str(row["n_matrices"]),
            rank_word(row["functional_rank"], row["largest_rank"]),
            interval_word(row["low"], row["high"], row["largest_rank"]),
            "–" if pd.isna(row["parameters"]) else f"{row['parameters']:,}",
            *(f"{losses[rank]:.4g}" if rank in losses else "" for rank in ranks),
            f"{full.iloc[0]:.4g}" if len(full) else "",
            end_section=i + 1 < len(rows) and rows[i + 1]["how"] != how,
        )  # fmt: skip
    out.print(table)
    for word in ("base", "tuned"):
        side = found.row(word)
        told = [f"{side['loss']:.4g}"]
        told += [] if pd.isna(side["perplexity"]) else [f"perplexity {words.number(side['perplexity'])}"]
        told += [f"KL to tuned {words.number(side['kl_nats'])} nats"] if word == "base" and side["kl_nats"] > 0 else []
        out.print(f"{word}: {', '.join(told)}")
    out.print(f"{_merit(found.facts)}; {text_line(found.facts)}")
    out.print(f"rank: {tolerance_line(found.facts)}; 95 %: over resampled sequences; parameters: LoRA's at that rank")


def text_line(facts: Mapping[str, Any]) -> str:
    """On what text."""
    told = facts["text"]
    return (
        f"{words.count(told['n_sequences'], 'sequence')} of {told['length']} tokens from "
        f"{words.count(told['n_documents'], 'document')} ({facts['n_tokens']:,} judged)"
    )


def tolerance_line(facts: Mapping[str, Any]) -> str:
    """What the functional rank is."""
    asked = str(facts["options"]["tolerance"])
    share = f" ({asked} of what tuned gained)" if asked.endswith("%") and facts["gain"] > 0 else ""
    return (
        f"the smallest from which on the loss is within {words.number(facts['tolerance'])}{share} of the tuned model's"
    )


def _merit(facts: Mapping[str, Any]) -> str:
    unit = ", nats a token" if str(facts["merit"]).endswith("loss") else ""
    return f"r0, r1, …: {facts['merit']}{unit}"


def _shown_ranks(found: "Evaluation") -> list[int]:
    """At most `MOST_RANKS` of the grid, evenly spaced."""
    rows = found.table[found.table["rank"].notna() & ~found.table["full"]]
    grid = sorted({int(rank) for rank in rows["rank"]})
    if len(grid) <= MOST_RANKS:
        return grid
    return [grid[round(i * (len(grid) - 1) / (MOST_RANKS - 1))] for i in range(MOST_RANKS)]
