"""Every bar in one table: run the benchmarks of this machine, then collect what all pages in docs/ say.

    python benchmarks/run.py                        # all that a CPU can run, about an hour on 2 idle cores
    python benchmarks/run.py --gpu                  # those that need a GPU (peers: see gpu.py and budget_gpu.py)
    python benchmarks/run.py --only speed extract   # some of them
    python benchmarks/run.py --collect              # run nothing

Each script writes its page in docs/ and exits 1 where a bar is missed; the peers (modeldelta, WeightWatcher, mergekit,
PEFT, fitcheck-llm) run inside the scripts, beside ours. Writes docs/bars.md and docs/bars.json: every bar with PASS or
FAIL, the machine, the date and the page. Exit 1 where a script that ran missed a bar or failed.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from accuracy import DOCS
from tables import markdown

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Script:
    """area: what of the tool it judges. name: the script. pages: what it writes in docs/. gpu: whether it needs one."""

    area: str
    name: str
    pages: tuple[str, ...]
    gpu: bool = False
    arguments: tuple[str, ...] = ()


SCRIPTS = (
    Script("Spectrum", "accuracy", ("benchmarks-accuracy",)),
    Script("Spectrum", "speed", ("benchmarks-speed",)),
    Script("Spectrum", "traps", ("benchmarks-traps",)),
    Script("Spectrum", "calibration", ("calibration",)),
    Script("Spectrum", "smollm2_truth", ("smollm2-truth",), gpu=True, arguments=("runs",)),
    Script("Spectrum, Extract", "chaos", ("benchmarks-chaos",)),
    Script("Breadth", "against_weightwatcher", ("benchmarks-weightwatcher",)),
    Script("Breadth", "report", ("benchmarks-report",)),
    Script("Breadth, Extract, Scale", "gpu", ("benchmarks-gpu", "benchmarks-gpu-16-layers"), gpu=True),
    Script("Extract", "extract", ("benchmarks-extract",)),
    Script("Extract", "extract_edges", ("extract-edges",)),
    Script("Extract", "resize", ("benchmarks-resize",)),
    Script("Extract", "activation_aware", ("benchmarks-activation-aware",)),
    Script("Budget", "budget_start", ("benchmarks-budget",)),
    Script("Budget", "budget_grid", ("budget-grid",)),
    Script("Budget", "budget_estimates", ("benchmarks-budget-estimates",)),
    Script("Scale", "plan_405b", ("plan-405b", "plan-405b-cuda")),
    Script("Scale", "small_matrices", ("benchmarks-small-matrices",)),
    Script("Scale", "memory_contract", ("benchmarks-memory",)),
    Script("Scale", "several_gpus", ("benchmarks-several-gpus",), gpu=True),
    Script("Budget", "budget_gpu", ("benchmarks-budget-gpu",), gpu=True),
    Script("Hypothesis", "training_whole", ("benchmarks-training-whole",)),
    Script("Hypothesis", "planted_task", ("planted-task",)),
    Script("Hypothesis", "training_throughput",
           ("benchmarks-training-throughput-cpu", "benchmarks-training-throughput-cuda")),
    Script("Hypothesis", "training_health", ("training-health",)),
)  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """One line of a page: what was measured against which bar, and whether it held."""

    area: str
    text: str
    passed: bool
    machine: str
    date: str
    page: str


def bars_of(script: Script) -> list[Bar]:
    """The bars that the pages of a script state, none where it never ran."""
    found = []
    for page in script.pages:
        file = DOCS / f"{page}.md"
        if not file.exists():
            continue
        text = file.read_text(encoding="utf-8")
        head = text.partition("\n- PASS")[0].partition("\n- FAIL")[0]
        date = re.search(r"\d{4}-\d\d-\d\d", head)
        machine = re.search(r"(?:\w` on|only\.) ([^;\n]*?), (?:torch|\d{4}-)", head)
        cards = re.findall(r"NVIDIA \w+", text)[:1] if script.gpu or page.endswith("cuda") else []
        for ok, line in re.findall(r"^- (PASS|FAIL): (.*)$", text, re.MULTILINE):
            told = (
                ", ".join([*(one for one in cards if one not in machine[1]), machine[1]]) if machine else "",
                date[0] if date else "",
            )
            found.append(Bar(script.area, line, ok == "PASS", *told, page))
    return found


def collect() -> list[Bar]:
    """Every bar of every page, and docs/bars.md and docs/bars.json written from them."""
    bars = [bar for script in SCRIPTS for bar in bars_of(script)]
    missing = [script.name for script in SCRIPTS if not bars_of(script)]
    parts = ["# Every bar\n\nCollected by `python benchmarks/run.py` from the pages that the benchmarks wrote."]
    parts.append(f"{sum(bar.passed for bar in bars)} of {len(bars)} bars held.")
    if missing:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    for area in dict.fromkeys(script.area for script in SCRIPTS):
        rows = [
            ("PASS" if bar.passed else "FAIL", bar.text.replace("|", "\\|"), f"{bar.machine}, {bar.date}",
             f"[{bar.page}]({bar.page}.md)")
            for bar in bars if bar.area == area
        ]  # fmt: skip
        parts.append(f"## {area}\n\n{markdown(('', 'measured', 'machine, date', 'page'), rows)}")
    (DOCS / "bars.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    told = {"bars": [asdict(bar) for bar in bars], "not_run": missing}
    (DOCS / "bars.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return bars


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="the scripts that need a GPU in place of the others")
    parser.add_argument("--only", nargs="+", choices=[script.name for script in SCRIPTS], help="these scripts")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    asked = parser.parse_args()
    chosen = [one for one in SCRIPTS if one.name in asked.only] if asked.only else [
        one for one in SCRIPTS if one.gpu == asked.gpu
    ]  # fmt: skip
    failed = []
    for script in () if asked.collect else chosen:
        print(f"== {script.name}", flush=True)
        began = time.monotonic()
        command = [sys.executable, str(HERE / f"{script.name}.py"), *script.arguments]
        code = subprocess.run(command, check=False).returncode
        print(f"== {script.name}: exit {code} after {time.monotonic() - began:.0f} s", flush=True)
        if code:
            failed.append(script.name)
    bars = collect()
    for bar in bars:
        if not bar.passed:
            print(f"FAIL: {bar.area}: {bar.text} ({bar.page}, {bar.machine}, {bar.date})")
    print(f"{sum(bar.passed for bar in bars)} of {len(bars)} bars held; docs/bars.md")
    if failed:
        print(f"missed a bar or failed in this run: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
