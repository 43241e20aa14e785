"""`spectrum()`: two checkpoints (or one adapter) → singular values, metrics, storage noise, verdicts.

Legend: m out, n in, k = min(m, n); one row of the table a matrix, its columns documented in `columns.TABLE`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import torch

from lowrank_probe import metrics, svd
from lowrank_probe.checkpoints import Checkpoint, Source, open_checkpoint
from lowrank_probe.columns import LEDGER, TABLE
from lowrank_probe.deconvolution import deconvolve, with_tail
from lowrank_probe.deltas import (
    Delta,
    Matching,
    Pair,
    complete_ledger,
    find_tied,
    join_parts,
    ledger_line,
    match,
    read_pair,
)
from lowrank_probe.errors import OutputError, ProbeError
from lowrank_probe.facts import machine_facts, side_facts
from lowrank_probe.kinds import recognise
from lowrank_probe.layers import sort_key
from lowrank_probe.marks import measure
from lowrank_probe.metrics import Values
from lowrank_probe.precision import StorageNoise, assess
from lowrank_probe.runs import SCHEMA_VERSION, Result
from lowrank_probe.scheduling import interruptible, run_jobs

Progress = Callable[[str, int, int], None]

# Median cosine of the weights below which two checkpoints are not a base and its fine-tune.
UNRELATED_COSINE: Final = 0.1
# Share of ‖ΔW‖² that the stored entries must resolve for a number to be decidable, and how far the denoised energy
# curve may be off: SLACK[0] + SLACK[1]·(1 − resolved)², as a share of ‖ΔW‖². Calibrated by benchmarks/calibration.py.
RESOLVED_GATE: Final = 0.5
SLACK: Final = (0.006, 0.35)
# What an interrupted run must share with the one that resumes it.
_SAME_RUN: Final = ("base", "tuned", "options", "versions", "device")


class Interrupted(ProbeError):  # noqa: N818 - not a failure: it carries what was finished
    """Ctrl-C during a run; `result` holds what was finished."""

    def __init__(self, result: Result) -> None:
        super().__init__("interrupted")
        self.result = result


def spectrum(
    base: Source,
    tuned: Source | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: tuple[int, int] | None = None,
    split: bool = True,
    top: int | None = None,
    exact_tail: bool = False,
    base_rounded: bool = False,
    device: str = "auto",
    seed: int = 0,
    resume: Result | None = None,
    on_progress: Progress | None = None,
) -> Result:
    """Singular values, ranks and verdicts of ΔW = W_tuned − W_base for every matrix of two checkpoints.

    base, tuned: checkpoint directories or files, hub ids, models or state dicts in memory
    (`checkpoints.open_checkpoint` says what is read); tuned may be a PEFT LoRA adapter's directory, which may also be
    given alone as `base`.
    include, exclude: patterns (`q_proj`, `layers.3`, `*mlp*`, a layer type). layers: first and last layer number,
    inclusive. split: take fused projections (qkv, gate_up) apart where their layout is known. top: only the K largest
    values of each matrix, certified. exact_tail: float64 SVD of the matrix itself, for values below 2e-5·σ₁.
    base_rounded: training started from a wider base than the one stored. device: "auto", "cpu", "cuda", "cuda:1".
    resume: an interrupted run's result.

    Raises `CheckpointError`, `MatchError`, `NumericsError`; on Ctrl-C `Interrupted` with what was finished. On Linux it
    sets glibc's malloc for the whole process so that every matrix goes back to the system when it is freed.
    """
    if top is not None and top < 1:
        raise ProbeError(f"top={top}: expected at least 1 singular value, or None for all of them")
    if layers is not None and not (isinstance(layers, Sequence) and len(layers) == 2 and 0 <= layers[0] <= layers[1]):
        raise ProbeError(f"layers={layers}: expected (first, last) with 0 ≤ first ≤ last")
    if isinstance(include, str) or isinstance(exclude, str):
        raise ProbeError('include and exclude are lists of patterns, such as ["q_proj"]')
    started = time.perf_counter()
    where = choose_device(device)
    tuned_side = open_checkpoint(tuned if tuned is not None else base)
    base_side = open_checkpoint(base) if tuned is not None else None
    matching = match(base_side, tuned_side, include=include, exclude=exclude, layers=layers, split=split)
    options = {
        "include": list(include), "exclude": list(exclude), "layers": list(layers) if layers else None,
        "split": split, "top": top,
        "exact_tail": exact_tail, "base_rounded": base_rounded, "seed": seed,
    }  # fmt: skip
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "status": "complete",
        "base": side_facts(base_side),
        "tuned": side_facts(tuned_side),
        "options": options,
        "notes": list(matching.notes),
        **machine_facts(where),
    }
    if resume is not None and any(resume.facts.get(key) != facts[key] for key in _SAME_RUN):
        raise OutputError(
            "the unfinished run in --out compared other files, used other options, another version or another device; "
            "choose another --out"
        )
    run = _Run(matching, base_side, tuned_side, facts, resume)
    headers_s = time.perf_counter() - started
    try:
        run.work(_Settings(where, top, exact_tail, base_rounded, seed), on_progress)
    except KeyboardInterrupt:
        run.facts["status"] = "interrupted"
        raise Interrupted(run.result(headers_s)) from None
    return run.result(headers_s)


def choose_device(device: str) -> torch.device:
    """ "auto" is the first CUDA device, else the CPU. Raises `ProbeError` for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ProbeError(f"--device {device}: expected auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ProbeError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ProbeError(f"--device {device}: found {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return chosen


@dataclass(frozen=True)
class _Settings:
    """What a job needs to know beside its pair."""

    device: torch.device
    top: int | None
    exact_tail: bool
    base_rounded: bool
    seed: int


@dataclass(frozen=True)
class _Done:
    """One finished pair: its ledger line and, where it was a matrix that changed, its row and singular values.

    times: (phase, start, stop) of reading and computing it, in seconds since the work began.
    """

    pair: Pair
    line: dict[str, Any]
    row: dict[str, Any] | None = None
    values: Values | None = None
    denoised: Values | None = None
    times: Sequence[tuple[str, float, float]] = ()


@dataclass(frozen=True)
class _Loaded:
    """What reading a pair gave (a `Delta`, or its ledger line), and when, in seconds since the work began."""

    delta: Delta | dict[str, Any]
    start_s: float
    stop_s: float


class _Run:
    """The state of one run: what is finished, as it comes, so that Ctrl-C keeps it."""

    def __init__(
        self, matching: Matching, base: Checkpoint | None, tuned: Checkpoint, facts: dict[str, Any],
        resume: Result | None,
    ) -> None:  # fmt: skip
        self.matching, self.base, self.tuned, self.facts = matching, base, tuned, facts
        self.done: dict[str, _Done] = {} if resume is None else self._taken(resume)

    def _taken(self, earlier: Result) -> dict[str, _Done]:
        """What an interrupted run finished. Of a tensor that was taken apart, only the matrices that have a row."""
        rows = {row["name"]: row for row in earlier.table.to_dict("records")}
        lines = {line["name"]: line for line in earlier.ledger.to_dict("records") if line["status"] != "pending"}
        done = {}
        for pair in self.matching.pairs:
            row, line = rows.get(pair.key), lines.get(pair.name)
            if pair.part.label:
                line = ledger_line(pair, "analysed", "", row["fro_norm"], row["relative_update"]) if row else None
            if line is not None:
                values = earlier.singular_values.get(pair.key), earlier.denoised_values.get(pair.key)
                done[pair.key] = _Done(pair, line, row, *values)
        return done

    def work(self, settings: _Settings, on_progress: Progress | None) -> None:
        """Run what is not finished yet, largest matrix first."""
        tied = {}
        if self.base is not None and not self.tuned.is_adapter:
            tied = find_tied(self.matching.pairs, self.base, self.tuned)

        def size(pair: Pair) -> int:
            return pair.entries(self.base, self.tuned)

        started = time.perf_counter()

        def load(pair: Pair) -> _Loaded:
            clock = time.perf_counter() - started
            if pair.key in tied:
                line = ledger_line(pair, "tied", f"the same tensor as {tied[pair.key]} on both sides")
                return _Loaded(line, clock, clock)
            delta = read_pair(pair, self.base, self.tuned, settings.device)
            return _Loaded(delta, clock, time.perf_counter() - started)

        def compute(pair: Pair, loaded: _Loaded) -> _Done:
            return self._analyse(pair, loaded, settings, started)

        total = sum(size(pair) for pair in self.matching.pairs)
        done = sum(size(pair) for pair in self.matching.pairs if pair.key in self.done)
        todo = [pair for pair in self.matching.pairs if pair.key not in self.done]
        with interruptible() as asked_to_stop:
            for result in run_jobs(todo, size, load, compute, settings.device):
                self.done[result.pair.key] = result
                done += size(result.pair)
                if on_progress:
                    on_progress(result.pair.key, done, total)
                if asked_to_stop():
                    raise KeyboardInterrupt

    def _analyse(self, pair: Pair, loaded: "_Loaded", settings: _Settings, started: float) -> _Done:
        delta = loaded.delta
        times = [("read", loaded.start_s, loaded.stop_s)]
        if not isinstance(delta, Delta):
            return _Done(pair, delta, times=times)
        clock = [time.perf_counter() - started]
        found = singular_values(delta, top=settings.top, exact_tail=settings.exact_tail)
        marks = measure(delta)
        clock.append(time.perf_counter() - started)
        # After the raw values: it may overwrite `delta.dense` by the corrected update.
        noise = assess(delta, base_rounded=settings.base_rounded, seed=settings.seed)
        corrected = found.values if noise.corrected is None else svd.full_spectrum(noise.corrected).values
        clock.append(time.perf_counter() - started)
        row, denoised = describe(delta, found, noise, corrected)
        row |= marks
        times += [("spectrum", clock[0], clock[1]), ("noise", clock[1], clock[2])]
        row["seconds"] = sum(stop - start for _, start, stop in times)
        note = f"both factors, with {pair.lora.name_B}" if pair.lora is not None else ""
        line = ledger_line(pair, "analysed", note, delta.fro_norm, delta.relative_update)
        return _Done(pair, line, row, found.values, denoised, times)

    def _is_matrix(self, pair: Pair) -> bool:
        info = self.base.tensors.get(pair.name) if self.base is not None else None
        return info is not None and len(info.shape) == 2

    def result(self, headers_s: float) -> Result:
        """The table, ledger and facts of what is finished."""
        done = list(self.done.values())
        rows = [item.row for item in done if item.row is not None]
        table = pd.DataFrame(sorted(rows, key=_position), columns=list(TABLE))
        table["layer"] = table["layer"].astype("Int64")
        for column in ("decidable_signal_rank", "decidable_r50", "decidable_r90"):
            table[column] = table[column].astype(bool)
        lines = [(item.pair, item.line) for item in done] + self.matching.excluded
        lines += [
            (pair, ledger_line(pair, "pending", "interrupted before it"))
            for pair in self.matching.pairs
            if pair.key not in self.done
        ]
        place_in_file = {
            name: i for i, name in enumerate([*(self.base.tensors if self.base else ()), *self.tuned.tensors])
        }

        def position(line: dict[str, Any]) -> int:
            return place_in_file[line["name"] if line["name"] in place_in_file else line["tuned_name"]]

        ordered = sorted([*self.matching.ledger, *join_parts(lines)], key=position)
        ledger = pd.DataFrame(complete_ledger(ordered, self.base, self.tuned), columns=list(LEDGER))
        ledger["layer"] = pd.to_numeric(ledger["layer"]).astype("Int64")
        facts = dict(self.facts)
        facts["counts"] = {str(status): int(count) for status, count in ledger["status"].value_counts().items()}
        # A frozen matrix has cosine 1: a new head on an untouched body is a fine-tune.
        cosines = table["cosine"].dropna().to_list()
        cosines += [1.0 for item in done if item.line["status"] == "unchanged" and self._is_matrix(item.pair)]
        cosine = float(np.median(cosines)) if cosines else math.nan
        facts["median_cosine"] = cosine
        facts["related"] = not cosine < UNRELATED_COSINE
        if not facts["related"]:
            facts["warnings"] = [
                f"unrelated checkpoints: the median cosine of their weights is {cosine:+.3f}, so that their difference "
                "is no fine-tuning update"
            ]
        facts["seconds"] = {"headers": headers_s} | {
            phase: sum(stop - start for item in done for name, start, stop in item.times if name == phase)
            for phase in ("read", "spectrum", "noise")
        }
        timeline = pd.DataFrame(
            [(item.pair.key, *times) for item in done for times in item.times],
            columns=["name", "phase", "start_s", "stop_s"],
        )
        by_name = list(table["name"])
        found = Result(
            table, ledger,
            {name: values for name in by_name if (values := self.done[name].values) is not None},
            {name: values for name in by_name if (values := self.done[name].denoised) is not None}, facts,
            timeline.sort_values("start_s", ignore_index=True),
        )  # fmt: skip
        facts["findings"] = [asdict(finding) for finding in recognise(found)]
        return found


def singular_values(delta: Delta, *, top: int | None = None, exact_tail: bool = False) -> svd.SingularValues:
    """The singular values of one `Delta` by the tier asked for; `top` falls through to the whole spectrum."""
    if delta.factors is not None:
        return svd.factored_spectrum(*delta.factors)
    assert delta.dense is not None
    if exact_tail:
        return svd.exact_spectrum(delta.dense)
    if top is not None:
        found = svd.top_spectrum(delta.dense, top, delta.fro_norm)
        if found is not None:
            return found
    return svd.full_spectrum(delta.dense, delta.fro_norm)


def describe(
    delta: Delta, found: svd.SingularValues, noise: StorageNoise, corrected: Values
) -> tuple[dict[str, Any], Values | None]:
    """One row of the table (without `seconds`), and the denoised singular values where there is noise to take out.

    corrected: the singular values that are denoised: those of ΔW as stored, or of `noise.corrected`.
    """
    s, shape, norm = found.values, delta.shape, delta.fro_norm
    whole = len(s) == min(shape) or delta.factors is not None
    row: dict[str, Any] = {
        "name": delta.name, "layer_type": delta.place.layer_type, "layer": delta.place.layer,
        "stack": delta.place.stack, "rows": shape[0], "cols": shape[1], "base_dtype": delta.base_dtype,
        "tuned_dtype": delta.tuned_dtype, "storage": noise.storage, "method": found.method,
        "compute_dtype": found.dtype, "n_kept": len(s), "n_resolved": found.resolved,
        "sigma_error": float(found.error.max() / s[0]) if len(s) and s[0] > 0 else 0.0,
        "energy_error": found.energy_error, "fro_norm": norm, "base_norm": delta.base_norm,
        "relative_update": delta.relative_update, "cosine": delta.cosine, "spectral_norm": float(s[0]),
        "nuclear_norm": metrics.nuclear_norm(s) if whole else math.nan, "stable_rank": metrics.stable_rank(s, norm),
        "effective_rank": metrics.effective_rank(s) if whole else math.nan,
        "energy_effective_rank": metrics.energy_effective_rank(s) if whole else math.nan,
        "participation_ratio": metrics.participation_ratio(s) if whole else math.nan,
        "numerical_rank": metrics.numerical_rank(s, shape) if whole else math.nan,
        "hard_threshold_rank": metrics.hard_threshold_rank(s, shape) if len(s) == min(shape) else math.nan,
        "break_even_rank": metrics.break_even_rank(shape),
    }  # fmt: skip
    for p in metrics.ENERGY_LEVELS:
        name = f"r{100 * p:.0f}"
        row[name] = metrics.energy_rank(s, norm, p)
        row[f"null_{name}"] = metrics.null_energy_rank(shape, p)
    for r in metrics.ENERGY_RANKS:
        row[f"energy_{r}"] = metrics.energy(s, norm, r)
    denoised = _storage_columns(row, corrected, shape, noise)
    for rank in ("r50", "r90"):
        row[f"relative_{rank}"] = row.get(f"{rank}_denoised", math.nan) / row[f"null_{rank}"]
    return {name: row.get(name, math.nan) for name in TABLE}, denoised


def _storage_columns(row: dict[str, Any], s: Any, shape: tuple[int, int], noise: StorageNoise) -> Values | None:
    row.update(
        unchanged_fraction=noise.unchanged_fraction, noise_model=noise.model, noise_std=noise.noise_std,
        noise_edge=noise.noise_edge, edge_ratio=noise.edge_ratio, resolved=noise.resolved,
        denoised_fro_norm=noise.fro_norm,
    )  # fmt: skip
    if noise.model == "none":
        for rank in ("r50", "r90"):
            row[f"{rank}_low"] = row[f"{rank}_high"] = row[f"{rank}_denoised"] = row[rank]
        row["signal_rank"] = row["numerical_rank"]
        row.update(decidable_signal_rank=True, decidable_r50=True, decidable_r90=True)
        return None
    if not noise.fro_norm > 0.0 or not math.isfinite(noise.noise_std):
        row.update(decidable_signal_rank=False, decidable_r50=False, decidable_r90=False)
        return None
    shape = noise.shape  # rows that did not move carry neither update nor error
    k = min(shape)
    whole = len(s) >= k
    limit = metrics.SIGNAL_FACTOR[noise.model] * noise.noise_edge
    counted = whole or not float(s[-1]) > limit
    row["signal_rank"] = float(np.count_nonzero(s > limit)) if counted else math.nan
    seen = s[:k] if whole else with_tail(s, row["fro_norm"], k)
    denoised = deconvolve(seen, noise.noise_std, shape, noise.fro_norm)
    # The same with every direction taken for an isolated one: better where few stand out of uneven noise.
    isolated = metrics.denoise(seen, noise.noise_std, shape)
    noise_energy = float((metrics.denoise(noise.outliers, noise.noise_std, shape) ** 2).sum()) / noise.fro_norm**2
    slack = SLACK[0] + SLACK[1] * (1 - noise.resolved) ** 2
    for p in (0.5, 0.9):
        rank = f"r{100 * p:.0f}"
        row[f"{rank}_denoised"] = metrics.energy_rank(denoised, noise.fro_norm, p)
        row[f"{rank}_low"], row[f"{rank}_high"] = metrics.energy_rank_bracket(
            denoised, noise.fro_norm, p, slack=slack, noise_energy=noise_energy
        )
        alone = metrics.energy_rank(isolated, noise.fro_norm, p)
        if not math.isnan(alone):  # the bracket holds both estimates
            row[f"{rank}_low"], row[f"{rank}_high"] = min(row[f"{rank}_low"], alone), max(row[f"{rank}_high"], alone)
        if not whole and not row[f"{rank}_high"] <= len(s):
            # --top did not reach it
            row[f"{rank}_low"] = row[f"{rank}_high"] = row[f"{rank}_denoised"] = math.nan
    for name in ("signal_rank", "r50", "r90"):
        row[f"decidable_{name}"] = noise.resolved >= RESOLVED_GATE
    row["decidable_signal_rank"] &= counted
    # As long as the list of values as stored: zeros for rows that did not move.
    return np.pad(denoised, (0, max(0, row["n_kept"] - len(denoised))))[: row["n_kept"]]


def _position(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """As data flows: embeddings, the blocks layer by layer, then what comes after them."""
    kind = sort_key(row["layer_type"])
    if pd.isna(row["layer"]):
        return (row["stack"], 2 if kind > sort_key("q") else 0, 0, kind)
    return (row["stack"], 1, int(row["layer"]), kind)
