"""Chaos: `probe spectrum` and `probe extract` killed (SIGKILL) at random moments, and started again until they finish.

A pair of 60 matrices, made here. A moment is any time of the run, or shortly after its files begin to be written, or
while it ends. After every kill nothing in the directory may look finished that is not; where a run finishes, its files
are compared with those of an undisturbed run, byte by byte but for the clock in them, and a new round begins. Also what
keeping costs: 10,000 records. Writes docs/benchmarks-chaos.md; exit 1 on a FAIL.

    python benchmarks/chaos.py               # 50 kills of each command, about 12 minutes on 2 cores
    python benchmarks/chaos.py --kills 5     # 5 of each, without the page
"""

import argparse
import filecmp
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from accuracy import publish, save

import lowrank_probe as lp
from lowrank_probe.errors import CheckpointError
from lowrank_probe.outputs import LOG, UNFINISHED
from lowrank_probe.record_log import scan
from lowrank_probe.unfinished import Unfinished

OPTIONS: Final = {"spectrum": ["--device", "cpu"], "extract": ["--device", "cpu", "--rank", "8"]}
SHAPES: Final = {
    "self_attn.q_proj": (512, 512), "self_attn.k_proj": (256, 512), "self_attn.v_proj": (256, 512),
    "self_attn.o_proj": (512, 512), "mlp.up_proj": (1024, 512), "mlp.down_proj": (512, 1024),
}  # fmt: skip
LAYERS: Final = 10
# Files that tell seconds or the hour, and what of them is compared.
CLOCK: Final = ("seconds", "time", "resumed", "files")
TIMED: Final = ("table.csv", "table.parquet", "timeline.csv", "facts.json", "report.html")
COST_BAR_MS: Final = 1.0
DEADLINE_S: Final = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each command (default 50); the page needs all 50")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows, verdicts = [], list[tuple[str, bool]]()
    with tempfile.TemporaryDirectory() as scratch:
        sides = make_pair(Path(scratch))
        for command in OPTIONS:
            chaos = Chaos(command, sides, Path(scratch) / command, random.Random(arguments.seed))
            chaos.run(arguments.kills)
            rows.append(
                [f"`probe {command}`", f"{chaos.whole_s:.1f}", str(sum(chaos.states.values())), str(chaos.rounds)]
                + [str(chaos.states[state]) for state in STATES] + [str(chaos.matrices)]
            )  # fmt: skip
            same = f"probe {command}: {chaos.rounds} runs, killed {sum(chaos.states.values())} times in all, end in the"
            verdicts += [
                (f"{same} files of an undisturbed one{_told(chaos.differ)}", not chaos.differ),
                (
                    f"probe {command}: nothing looks finished that is not{_told(chaos.half)}",
                    not chaos.half,
                ),
                (f"probe {command}: every record is taken over{_told(chaos.lost)}", not chaos.lost),
            ]
        cost_ms, open_s = cost(Path(scratch) / "cost")
        verdicts.append(
            (
                f"keeping one of 10,000 matrices takes {cost_ms:.2f} ms, bar {COST_BAR_MS:g}; to read them all back when "
                f"a run goes on takes {open_s:.1f} s",
                cost_ms < COST_BAR_MS,
            )
        )
    heads = ["command", "undisturbed, s", "kills", "runs", *STATES, "matrices taken over"]
    note = (
        f"A pair of {LAYERS * len(SHAPES)} bf16 matrices, one process after another, SIGKILL at random moments (seed "
        f"{arguments.seed}): two thirds of them at any time of a run, a sixth up to 50 ms after files begin to "
        "be written, a sixth up to 2 ms after the last of them is in place. The columns count what the kill left. Compared: every file "
        "byte by byte; of those that tell seconds or the hour (table, timeline, facts, page) the table without seconds, "
        "and the facts without seconds, time and what was taken over. Records of 10 kB: a row of the table, 512 "
        "singular values, twice."
    )
    publish("chaos", "Killed at random", note, [("", heads, rows)], verdicts, write=arguments.kills >= 50)
    return 0 if all(ok for _, ok in verdicts) else 1


STATES: Final = ("before the log", "matrices", "writing files", "files in place", "finished")


@dataclass
class Chaos:
    """Runs of one command on one pair. states: what kills left, counted; matrices: taken over by runs that went on."""

    command: str
    sides: tuple[Path, Path]
    root: Path
    rng: random.Random
    whole_s: float = 0.0
    rounds: int = 0
    matrices: int = 0
    states: Counter[str] = field(default_factory=Counter)
    differ: list[str] = field(default_factory=list)
    half: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def run(self, kills: int) -> None:
        whole = self.root / "whole" / "run"
        started = time.perf_counter()
        process = self.start(whole)
        assert process.wait(DEADLINE_S) == 0
        self.whole_s = time.perf_counter() - started
        while sum(self.states.values()) < kills:
            self.rounds += 1
            self.round(self.root / f"{self.rounds}" / "run", whole, kills)
            print(f"{self.command}: {sum(self.states.values())} kills, {self.rounds} runs", file=sys.stderr)

    def round(self, out: Path, whole: Path, kills: int) -> None:
        """One run, killed and started again until it is finished."""
        before = 0
        while True:
            process = self.start(out)
            moment = self.moment(out, process.pid) if sum(self.states.values()) < kills else (lambda: False)
            deadline = time.monotonic() + DEADLINE_S
            try:
                while process.poll() is None and not moment():
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"{out}: not finished after {DEADLINE_S:.0f} s")
                    time.sleep(0.001)
                if process.poll() is not None:
                    break
            finally:
                process.kill()
                process.wait()
            state = self.state(out, process.pid)
            self.states[state] += 1
            before = kept(out)
            if state != "finished":
                self.check_half(out, whole)
        assert process.stderr is not None
        said = process.stderr.read()
        if process.returncode != 0 and "already holds a finished run" not in said:
            self.differ.append(f"{out.parent.name}: exit {process.returncode}: {said.strip()[-500:]}")
            return
        self.differ += difference(out, whole)
        if process.returncode == 0 and before:
            resumed = facts(out)["resumed"]
            self.matrices += resumed["n_finished"]
            if resumed != {"n_finished": before, "n_damaged": 0}:
                self.lost.append(f"{out.parent.name}: {before} kept, {resumed}")

    def start(self, out: Path) -> subprocess.Popen[str]:
        program = Path(sys.executable).with_name("probe")
        return subprocess.Popen(
            [program, self.command, *self.sides, "--out", out, "--quiet", *OPTIONS[self.command]],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def moment(self, out: Path, process: int) -> Callable[[], bool]:
        """A function that says when the moment to kill has come."""
        seen: list[float] = []

        def after(event: Callable[[], bool], wait_s: float) -> bool:
            if not seen and event():
                seen.append(time.monotonic())
            return bool(seen) and time.monotonic() >= seen[0] + wait_s

        kind = self.rng.choice(["any", "any", "any", "any", "writing", "ending"])
        if kind == "any":
            wait_s = self.rng.uniform(0, self.whole_s)
            return lambda: after(lambda: True, wait_s)
        if kind == "writing":
            wait_s = self.rng.uniform(0, 0.05)
            return lambda: after(lambda: writing(out, process), wait_s)
        wait_s = self.rng.uniform(0, 0.002)
        there = changed(last(out))
        return lambda: after(lambda: changed(last(out)) not in (0, there), wait_s)

    def state(self, out: Path, process: int) -> str:
        """What a kill left."""
        if (out / UNFINISHED / LOG).exists():
            if writing(out, process):
                return "writing files"
            return "files in place" if any(path.name != UNFINISHED for path in out.glob("*")) else "matrices"
        return "finished" if last(out).exists() else "before the log"

    def check_half(self, out: Path, whole: Path) -> None:
        """What loads must be whole."""
        try:
            lp.load(out)
        except CheckpointError:
            if self.command == "extract" and (out / "adapter_config.json").exists():
                self.half += [
                    f"{out.parent.name}: {name} beside adapter_config.json"
                    for name in ("adapter_model.safetensors",)
                    if not filecmp.cmp(out / name, whole / name, shallow=False)
                ]
            return
        self.half += [one for one in difference(out, whole) if UNFINISHED not in one and ".part-" not in one]


def writing(out: Path, process: int) -> bool:
    """Whether a process is writing files, or was when it was killed."""
    for folder in (out, out / "probe"):
        with suppress(FileNotFoundError):
            if any(name.startswith(".part-") and f"-{process}-" in name for name in os.listdir(folder)):
                return True
    return False


def last(out: Path) -> Path:
    """The file that is written last."""
    return out / ("facts.json" if out.parent.parent.name == "spectrum" else "probe/facts.json")


def changed(file: Path) -> int:
    """When a file was written; 0 where there is none."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def facts(out: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(last(out).read_text(encoding="utf-8"))
    return told


def kept(out: Path) -> int:
    """Matrices in the log."""
    try:
        log = os.open(out / UNFINISHED / LOG, os.O_RDONLY)
    except FileNotFoundError:
        return 0
    try:
        return max(0, len(scan(log)[0]) - 1)
    finally:
        os.close(log)


def difference(out: Path, whole: Path) -> list[str]:
    """Files that are not in both, or not the same but for the clock."""
    names = [{str(path.relative_to(root)) for path in root.rglob("*")} for root in (out, whole)]
    found = [f"{out.parent.name}: {name} is in one only" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        a, b = out / name, whole / name
        if a.is_file() and a.name not in TIMED and _untimed(a) != _untimed(b):
            found.append(f"{out.parent.name}: {name} differs")
    if last(out).exists() and _timeless(facts(out)) != _timeless(facts(whole)):
        found.append(f"{out.parent.name}: facts differ")
    if (out / "table.parquet").exists():
        tables = [pd.read_parquet(root / "table.parquet").drop(columns="seconds") for root in (out, whole)]
        if not tables[0].equals(tables[1]):
            found.append(f"{out.parent.name}: tables differ")
    return found


def _untimed(file: Path) -> bytes:
    """A file's bytes, of a model card without the hour."""
    data = file.read_bytes()
    return re.sub(rb"\d{4}-\d\d-\d\dT[\d:+]+", b"", data) if file.name == "README.md" else data


def _timeless(told: Any) -> Any:
    if isinstance(told, dict):
        return {key: _timeless(value) for key, value in told.items() if key not in CLOCK}
    return [_timeless(value) for value in told] if isinstance(told, list) else told


def make_pair(root: Path) -> tuple[Path, Path]:
    """(base, tuned): bf16, updates whose singular values decay."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for layer in range(LAYERS):
        for module, (m, n) in SHAPES.items():
            W = 0.02 * torch.randn(m, n, generator=generator)
            scale = 1 / torch.arange(1, 33)
            update = (torch.randn(m, 32, generator=generator) * scale) @ torch.randn(32, n, generator=generator)
            name = f"model.layers.{layer}.{module}.weight"
            base[name], tuned[name] = W.bfloat16(), (W.bfloat16() + 1e-3 * update).bfloat16()
    return save(root / "base", base), save(root / "tuned", tuned)


def cost(root: Path) -> tuple[float, float]:
    """(ms to keep one of 10,000 matrices, s to read them all back)."""
    row = {f"column_{i}": i / 7 for i in range(85)}
    values = torch.from_numpy(np.linspace(1, 0, 512))
    store = Unfinished(root, {})
    started = time.perf_counter()
    for i in range(10_000):
        store.put(f"model.layers.0.mlp.experts.{i}.weight", {"values": values, "denoised": values}, {"row": row})
    cost_ms = (time.perf_counter() - started) / 10
    started = time.perf_counter()
    again = Unfinished(root, {})
    for i in range(10_000):
        key = f"model.layers.0.mlp.experts.{i}.weight"
        again.facts(key), again.get(key, "values"), again.get(key, "denoised")
    return cost_ms, time.perf_counter() - started


def _told(found: list[str]) -> str:
    return f": {'; '.join(found[:5])}" if found else ""


if __name__ == "__main__":
    raise SystemExit(main())
