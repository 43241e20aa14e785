"""`spectrum()`: two checkpoints (or one adapter) → singular values, metrics, storage noise, verdicts.

Legend: m out, n in, k = min(m, n); one row of the table a matrix, its columns documented in `columns.TABLE`.
"""

import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lowrank_probe.checkpoints import Checkpoint, Source, open_checkpoint
from lowrank_probe.deltas import find_tied
from lowrank_probe.devices import Choice, choose_device
from lowrank_probe.errors import ProbeError
from lowrank_probe.facts import machine_facts, same_machine, side_facts
from lowrank_probe.footprints import find_room
from lowrank_probe.matching import Matching, Pair, match
from lowrank_probe.options import Options, Progress
from lowrank_probe.outputs import check_free
from lowrank_probe.rows import Settings
from lowrank_probe.scheduling import interruptible, run_jobs
from lowrank_probe.spectrum_work import Done, Job
from lowrank_probe.strict_json import SCHEMA_VERSION
from lowrank_probe.unfinished import Unfinished

if TYPE_CHECKING:
    from lowrank_probe.runs import Result

# Options that say which matrices are looked at: what was found for one holds whatever they are.
_SELECTION: Final = ("include", "exclude", "layers")


class Interrupted(ProbeError):  # noqa: N818 - not a failure: it carries what was finished
    """Ctrl-C during a run; `result` holds what was finished."""

    def __init__(self, result: "Result") -> None:
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
    ray: str | None = None,
    memory: float | None = None,
    gpu_memory: float | None = None,
    out: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
) -> "Result":
    """Singular values, ranks and verdicts of ΔW = W_tuned − W_base for every matrix of two checkpoints.

    base, tuned: checkpoint directories or files, addresses, hub ids, models or state dicts in memory
    (`checkpoints.open_checkpoint` says what is read); tuned may be a PEFT LoRA adapter's directory, which may also be
    given alone as `base`.
    include, exclude: patterns (`q_proj`, `layers.3`, `*mlp*`, a layer type). layers: first and last layer number,
    inclusive. split: take fused projections (qkv, gate_up) apart where their layout is known. top: only the K largest
    values of each matrix, certified. exact_tail: float64 SVD of the matrix itself, for values below 2e-5·σ₁.
    base_rounded: training started from a wider base than the one stored. device: as
    `devices.choose_device`. ray: the address of a Ray cluster ("auto": this machine's) whose workers do the matrices.
    memory, gpu_memory: bytes that this process may take, and what it holds on each card (`footprints`): a matrix that
    is larger lies on disk while it is computed; one that is larger than a card is computed on the CPU.
    out: the run directory (`Result.save`), in which every finished matrix is kept at once, so that a run that was
    killed goes on there: with the same files, options (but for include, exclude and layers), version and device.

    Raises `CheckpointError`, `MatchError`, `NumericsError`, `OutputError`; on Ctrl-C `Interrupted` with what was
    finished. On Linux it sets glibc's malloc for the whole process so that every matrix goes back to the system when it
    is freed.
    """
    options = Options(
        include=include, exclude=exclude, layers=layers, split=split, top=top, exact_tail=exact_tail,
        base_rounded=base_rounded, device=device, seed=seed, ray=ray, memory=memory, gpu_memory=gpu_memory,
    )  # fmt: skip
    return probe_pair(base, tuned, options, out=out, on_progress=on_progress)


def probe_pair(
    base: Source,
    tuned: Source | None,
    options: Options,
    *,
    out: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
) -> "Result":
    """`spectrum` with its options in one value."""
    started = time.perf_counter()
    if out is not None:
        check_free(Path(out))
    choice = choose_device(options.device, options.ray)
    tuned_side = open_checkpoint(tuned if tuned is not None else base)
    base_side = open_checkpoint(base) if tuned is not None else None
    matching = match(base_side, tuned_side, options)
    store = None
    if out is not None:
        store = Unfinished(Path(out), identity({"base": base_side, "tuned": tuned_side}, options, choice))
    found = compare(
        base_side, tuned_side, matching, options, choice, store=store, started=started, on_progress=on_progress
    )
    if out is not None and store is not None:
        found.save(out)
        store.remove()
    return found


def identity(sides: Mapping[str, Checkpoint | None], options: Options, choice: Choice) -> dict[str, Any]:
    """What a run must share with the killed one that it goes on with."""
    told: dict[str, Any] = {name: side_facts(side) for name, side in sides.items()}
    files = [side["files"] for side in told.values() if side is not None]
    # What cannot be known again: a model in memory, and a server's file without a mark of its version.
    if not all(files) or any(set(file) == {"name", "n_bytes"} for of_side in files for file in of_side):
        told["run"] = uuid.uuid4().hex
    told["options"] = {name: value for name, value in options.facts().items() if name not in _SELECTION}
    return told | same_machine(machine_facts(choice))


def compare(
    base_side: Checkpoint | None, tuned_side: Checkpoint, matching: Matching, options: Options, choice: Choice, *,
    store: Unfinished | None, started: float, prefix: str = "", on_progress: Progress | None = None,
) -> "Result":  # fmt: skip
    """`spectrum` of opened checkpoints. store: where finished matrices are kept, their names behind `prefix`."""
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "status": "complete",
        "base": side_facts(base_side),
        "tuned": side_facts(tuned_side),
        "options": options.facts(),
        "notes": [*matching.notes, *filter(None, [matching.unequal, choice.note])],
        **machine_facts(choice),
    }
    if store is not None and store.resumed:
        facts["resumed"] = store.resumed
    run = _Run(matching, base_side, tuned_side, facts, options, store, prefix)
    headers_s = time.perf_counter() - started
    try:
        run.work(choice, on_progress)
        for side in (base_side, tuned_side):
            if side is not None:
                side.check_unchanged()
    except KeyboardInterrupt:
        run.facts["status"] = "interrupted"
        with interruptible(patient=True):  # a second Ctrl-C must not lose what is finished
            kept = run.result(headers_s)
        raise Interrupted(kept) from None
    return run.result(headers_s)


@dataclass(frozen=True)
class _Kept:
    """The finished pairs of one run in its store, by their names behind a prefix."""

    store: Unfinished
    prefix: str

    def take(self, pairs: Sequence[Pair]) -> Iterator[Done]:
        """Those that are there."""
        for pair in pairs:
            key = self.prefix + pair.key
            if self.store.has(key):
                facts, held = self.store.facts(key), self.store.names(key)
                values, denoised = (
                    self.store.get(key, name).numpy() if name in held else None for name in ("values", "denoised")
                )
                times = [(phase, start, stop) for phase, start, stop in facts["times"]]
                yield Done(pair, facts["line"], facts["row"], values, denoised, times)

    def put(self, done: Done) -> None:
        arrays = {"values": done.values, "denoised": done.denoised}
        self.store.put(
            self.prefix + done.pair.key, {name: x for name, x in arrays.items() if x is not None},
            {"line": done.line, "row": done.row, "times": list(done.times)},
        )  # fmt: skip


class _Run:
    """The state of one run: what is finished, as it comes, so that Ctrl-C has it."""

    def __init__(
        self, matching: Matching, base: Checkpoint | None, tuned: Checkpoint, facts: dict[str, Any],
        options: Options, store: Unfinished | None, prefix: str,
    ) -> None:  # fmt: skip
        self.matching, self.base, self.tuned, self.facts, self.options = matching, base, tuned, facts, options
        self.tied: dict[str, str] = {}
        if base is not None and not tuned.is_adapter:
            self.tied = find_tied(matching.pairs, base, tuned)
        self.kept = _Kept(store, prefix) if store is not None else None
        # What is tied depends on what else is looked at, so it is found anew.
        free = [pair for pair in matching.pairs if pair.key not in self.tied]
        self.done = {done.pair.key: done for done in self.kept.take(free)} if self.kept else dict[str, Done]()
        # The clock goes on where the killed run left it.
        self.earlier_s = max((stop for item in self.done.values() for _, _, stop in item.times), default=0.0)

    def work(self, choice: Choice, on_progress: Progress | None) -> None:
        """Run what is not finished yet, largest matrix first."""

        def size(pair: Pair) -> int:
            return pair.entries(self.base, self.tuned)

        settings = Settings(choice.device, self.options)
        settings = settings if choice.cluster else settings.with_turns()
        folder = self.kept.store.folder if self.kept else None
        room = find_room(self.options.memory, self.options.gpu_memory, choice, folder)
        job = Job(self.base, self.tuned, self.tied, settings, time.time() - self.earlier_s, room)
        total = sum(size(pair) for pair in self.matching.pairs)
        done = sum(size(pair) for pair in self.matching.pairs if pair.key in self.done)
        todo = [pair for pair in self.matching.pairs if pair.key not in self.done]
        free = [pair for pair in self.matching.pairs if pair.key not in self.tied]
        running = run_jobs(
            todo, size, *job.card(), job.memory(free), every=[*map(size, self.matching.pairs)], cluster=choice.cluster,
            others=[job.on(other).card() for other in choice.others], host=job.host(free), forks=job.forks,
        )  # fmt: skip
        # Closed here: left to the garbage collector, what a second Ctrl-C raises would be printed and ignored.
        with interruptible() as asked_to_stop, closing(running) as jobs:
            for result in jobs:
                self.done[result.pair.key] = result
                if self.kept and result.pair.key not in self.tied:
                    self.kept.put(result)
                done += size(result.pair)
                if on_progress:
                    on_progress(result.pair.key, done, total)
                if asked_to_stop():
                    raise KeyboardInterrupt

    def result(self, headers_s: float) -> "Result":
        """The table, ledger and facts of what is finished."""
        from lowrank_probe.pair_results import assemble  # with pandas: imported while the first matrix is computed

        return assemble(self.matching, self.base, self.tuned, self.done, self.facts, headers_s)
