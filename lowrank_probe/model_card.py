"""The README.md of an extracted adapter: what it is, its exact numbers, what it leaves out, how to load it.

Hugging Face's front matter, then GitHub's Markdown. Names come from strangers' files: those of plain characters are
written as code, all others as text whose every sign is an entity. Of a path only the last name is told.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from lowrank_probe import words
from lowrank_probe.check_tables import CheckTable, calibration_table, verification_table
from lowrank_probe.errors import printable
from lowrank_probe.extraction_summary import extraction_totals

if TYPE_CHECKING:
    from lowrank_probe.extraction_runs import Extraction

MOST_LINES: Final = 20  # of what is not carried
_PLAIN: Final = re.compile(r"[\w.,:/@+() \[\]-]+", re.ASCII)
_HUB: Final = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
_REPO: Final = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?", re.ASCII)


def card(extraction: "Extraction", label: str = "") -> str:
    """README.md of the adapter with that label."""
    facts, ledger = extraction.facts, extraction.ledger[extraction.ledger["adapter"] == label]
    base, tuned = model_name(facts["base"]["path"]), model_name(facts["tuned"]["path"])
    directory = extraction.adapters[label].absolute()
    total = extraction_totals(ledger).to_dict("records")[0]
    told = facts["adapters"][label]
    parts = [
        _front_matter(base),
        f"# {_inline(directory.name)}",
        f"The best LoRA adapter of its ranks in a fine-tune: {_made_by(facts, label)} of ΔW = "
        f"W({code(tuned)}) − W({code(base)}), written for [PEFT](https://github.com/huggingface/peft) by "
        "lowrank_probe.",
        f"**{code(base)} with this adapter carries {percent(told['carried'])} of the fine-tune's ‖ΔW‖²**: "
        f"{words.count(int(total['n_adapted']), 'matrix', 'matrices')} adapted, "
        f"{told['n_parameters']:,} parameters, {words.file_size(told['n_bytes'])} as {facts['dtype']}.",
        "## How near to the fine-tune",
        _numbers_table(extraction.summary[extraction.summary["adapter"] == label], total),
        "kept: share of these matrices' ‖ΔW‖² that the stored factors keep, weighted by ‖ΔW‖² over the matrices of a "
        "type. error: ‖ΔW − BA‖/‖ΔW‖ of the stored factors. optimum: no matrices of these ranks have a smaller error "
        "(Eckart–Young, with proven bounds of the singular values). Every matrix has its own line in "
        f"`{extraction_ledger(label)}`.",
        *_checks(facts, label),
        "## What it does not carry",
        _left_out(ledger, total, told),
        "## How to load it",
        _loading(facts, base, directory.name, carries_whole=bool((ledger["status"] == "carried whole").any())),
        *_warnings(ledger, facts),
        "## How it was made",
        _fenced("sh", command(facts, directory.parent.name if label else directory.name)),
        _versions(facts),
    ]
    return "\n\n".join(parts).encode("utf-8", "replace").decode("utf-8") + "\n"


def extraction_ledger(label: str) -> str:
    """The ledger's place, seen from the adapter."""
    return "../probe/ledger.csv" if label else "probe/ledger.csv"


def model_name(path: str) -> str:
    """What a path is called where nobody has it: the hub's id for a hub's snapshot, else its last name."""
    parts = PurePath(path).parts
    hub = next((found for part in parts if (found := _HUB.fullmatch(part))), None)
    return f"{hub[1]}/{hub[2]}" if hub else PurePath(path).name or "model"


def command(facts: Mapping[str, Any], out: str) -> str:
    """The command that wrote the adapter, from the facts of its run."""
    ranks, options = facts["ranks"], facts["options"]
    said = ["probe", "extract", model_name(facts["base"]["path"]), model_name(facts["tuned"]["path"])]
    if ranks.get("ranks"):
        said += ["--rank", ",".join(map(str, ranks["ranks"]))]
    if ranks.get("auto"):
        said += ["--rank", "auto"]
    if ranks.get("energy") is not None:
        said += ["--energy", f"{ranks['energy']:g}"]
    if ranks.get("budget"):
        n_bytes = ranks["budget"].get("budget_bytes")
        said += ["--budget", _amount(n_bytes, "B") if n_bytes else _amount(ranks["budget"]["parameters"])]
    said += ["--denoised"] * bool(ranks.get("denoised"))
    for key in ("max_rank", "rank_multiple"):
        if ranks.get(key):
            said += [f"--{key.replace('_', '-')}", str(ranks[key])]
    if facts["targets"] != ["all-linear"]:
        said += ["--targets", ",".join(facts["targets"])]
    for key in ("servable", "tied_lora"):
        said += [f"--{key.replace('_', '-')}"] * bool(facts.get(key))
    if facts["dtype"] != "float32":
        said += ["--dtype", facts["dtype"]]
    for key in ("include", "exclude"):
        for pattern in options.get(key) or ():
            said += [f"--{key}", pattern]
    if options.get("layers"):
        said += ["--layers", words.layer_span(options["layers"])]
    if facts.get("calibration"):
        said += ["--calibration", PurePath(facts["calibration"]["file"]).name]
    if options.get("seed"):
        said += ["--seed", str(options["seed"])]
    return shlex.join([*said, "--out", out])


def _amount(n: int, unit: str = "") -> str:
    """As `allocation.parse_budget` reads it: 40M, 80MB."""
    power = max(p for p in range(4) if n % 1000**p == 0)
    if power or not unit:
        return f"{n // 1000**power}{' KMG'[power].strip()}{unit}"
    return f"{n / 1000:.15g}K{unit}"  # a single B may be a billion


def code(name: str) -> str:
    """A name as Markdown code, in a table too; one of other than plain characters as entities."""
    name = printable(name)
    return f"`{name}`" if _PLAIN.fullmatch(name) and name.strip() == name else f"<code>{_entities(name)}</code>"


def percent(share: float) -> str:
    """A share in per cent, four digits."""
    return "–" if pd.isna(share) else f"{100 * share:#.4g} %"


def _front_matter(base: str) -> str:
    # A base that is no repository's name would be refused by the hub.
    named = [f"base_model: {json.dumps(base)}"] if _REPO.fullmatch(base) else []
    tags = ["library_name: peft", "tags:", "- lora", "- peft", "- svd", "- lowrank_probe"]
    return "\n".join(["---", *named, *tags, "---"])


def _numbers_table(summary: pd.DataFrame, total: Mapping[Any, Any]) -> str:
    lines = ["| layer type | matrices | rank | kept | error | optimum | parameters |", "|---|--:|--:|--:|--:|--:|--:|"]
    names = [code(str(label)) for label in summary["layer_type"]]
    for name, row in zip([*names, "**all**"], [*summary.to_dict("records"), total], strict=True):
        if row["n_adapted"]:
            rank = words.bracket(row["rank_low"], row["rank_high"])
            lines.append(
                f"| {name} | {row['n_adapted']:,} | {rank} | {percent(row['energy'])} | "
                f"{percent(row['relative_error'])} | {percent(row['optimal_error_low'])} | {row['parameters']:,} |"
            )
    return "\n".join(lines)


def _made_by(facts: Mapping[str, Any], label: str) -> str:
    """Which singular value decomposition it is."""
    tried = facts.get("calibration", {}).get("tried", ())
    chosen = next((row for row in tried if row["adapter"] == label and row["chosen"]), None)
    if chosen is None or chosen["weighted_by"] == "plain SVD":
        return "the truncated SVD"
    return (
        f"the truncated SVD, weighted by the {chosen['weighted_by']} of a calibration text (ridge {chosen['ridge']}),"
    )


def _checks(facts: Mapping[str, Any], label: str) -> list[str]:
    """What was tried with a calibration text, and what a verification found; nothing where neither was asked for."""
    parts = []
    if calibration := facts.get("calibration"):
        found = calibration_table(calibration, [label])
        parts += [
            "## Chosen on text",
            _table(found),
            f'{found.line}. The plain SVD stays unless a gain in "to choose by" is beyond chance; of those the least '
            'distance was taken. "to report" decided nothing.',
        ]
    if told := (facts.get("verification") or {}).get(label):
        found = verification_table(told)
        notes = [f"- {_inline(text)}" for text in (*told["problems"], *told["notes"])]
        parts += ["## Against the fine-tune, on text" if told["measure"] != "weights" else "## Against the fine-tune",
                  _table(found), f"{found.line}.", *(["\n".join(notes)] if notes else [])]  # fmt: skip
    return parts


def _table(found: CheckTable) -> str:
    marks = ["---"] * found.n_words + ["--:"] * (len(found.heads) - found.n_words)
    rows = [found.heads, *found.rows]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]])


def _left_out(ledger: pd.DataFrame, total: Mapping[Any, Any], told: Mapping[str, Any]) -> str:
    lines = [f"- {percent(total['truncated'])} of ‖ΔW‖² is what the ranks cut away from the adapted matrices."]
    if total["carried_whole"] > 0 or ledger["status"].eq("carried whole").any():
        whole = ledger[ledger["status"] == "carried whole"]
        share = percent(total["carried_whole"])
        lines.append(f"- Carried whole, as in the fine-tune ({share} of ‖ΔW‖²): {_names(whole)}.")
    lost = ledger[ledger["status"].isin(["not carried", "rank 0"])]
    if len(lost):
        lines.append(f"- **Not carried at all: {percent(told['not_carried'])} of ‖ΔW‖²**, which stays as in the base:")
        reason = lost["note"].where(lost["note"] != "", lost["status"])
        groups = sorted(lost.groupby(reason, sort=False), key=lambda group: -group[1]["share"].sum())
        for why, rows in groups[:MOST_LINES]:
            unknown = "size unknown" if rows["share"].isna().all() else f"{percent(rows['share'].sum())} of ‖ΔW‖²"
            lines.append(f"  - {_inline(str(why))}: {_names(rows)} ({unknown})")
        if len(groups) > MOST_LINES:
            lines.append(f"  - and for {len(groups) - MOST_LINES} other reasons; the ledger has all")
    gone = ledger[ledger["status"] == "only in base"]
    if len(gone):
        lines.append(f"- Only in the base, and still there with the adapter: {_names(gone)}.")
    if not len(lost):
        lines.append("- Nothing else: every tensor that the fine-tune changed is in the adapter.")
    return "\n".join(lines)


def _names(rows: pd.DataFrame) -> str:
    """The first few names, largest share first."""
    names = rows.sort_values("share", ascending=False, na_position="last")["name"]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(code(str(name)) for name in names.head(3)) + more


def _loading(facts: Mapping[str, Any], base: str, directory: str, *, carries_whole: bool) -> str:
    """carries_whole: tensors as they are, such as a new head, which only the fine-tune's own class has a place for."""
    model, tuned = _class_of(facts["base"]), _class_of(facts.get("tuned") or {})
    labels = ""
    if carries_whole and tuned and tuned != model:
        model, n_labels = tuned, facts["tuned"].get("n_labels")
        labels = f", num_labels={int(n_labels)}" if n_labels else ""
    model = model or "AutoModelForCausalLM"
    lines = [
        "from peft import PeftModel",
        f"from transformers import {model}",
        "",
        f"base = {model}.from_pretrained({_python(base)}{labels})",
    ]
    sizes = facts.get("vocabulary")
    if sizes and sizes[0] != sizes[1]:
        lines.append(f"base.resize_token_embeddings({int(sizes[1])})  # the fine-tune's; the base has {int(sizes[0])}")
    lines.append(f"model = PeftModel.from_pretrained(base, {_python(directory)})")
    return _fenced("python", "\n".join(lines))


def _class_of(side: Mapping[str, Any]) -> str:
    """transformers' class of a checkpoint; "" where its config has none that could be one."""
    named = next((str(name) for name in side.get("architectures") or () if str(name).isidentifier()), "")
    return named if named.isascii() else ""


def _warnings(ledger: pd.DataFrame, facts: Mapping[str, Any]) -> list[str]:
    found = []
    unmerged = ledger[(ledger["status"] == "adapted") & ledger["note"].str.startswith("holds unmerged only")]
    if len(unmerged):
        found.append(f"**Do not merge it**: {_names(unmerged)} shares its weight with the output head.")
    if facts.get("servable"):
        found.append("Servers that take LoRA of one rank on linear layers, such as vLLM, take it as it is.")
    return found


def _versions(facts: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
    return f"With {code(versions)} on {code(str(facts['device']['name']))}, {code(facts['time'])}."


def _fenced(language: str, content: str) -> str:
    content = "\n".join(map(printable, content.split("\n")))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))
    return f"{fence}{language}\n{content}\n{fence}"


def _python(name: str) -> str:
    """A Python string of one line."""
    return json.dumps(printable(name), ensure_ascii=False)


def _inline(text: str) -> str:
    """Text that Markdown and HTML leave as it is."""
    return _entities(printable(text), keep=r"\w .,;+%()→–-")


def _entities(text: str, keep: str = r"\w .-") -> str:
    return re.sub(rf"[^{keep}]|_", lambda found: f"&#{ord(found[0])};", text)
