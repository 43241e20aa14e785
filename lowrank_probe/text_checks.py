"""base, base+adapter and base+adapter merged against the tuned model, on text, through `transformers` and `peft`.

Four states of two models, one in memory at a time: the tuned model, the base, the base that wears the adapter, the base
with the adapter merged (in float32, then rounded to the dtype in which a merged checkpoint is held). Outputs of a state
that is needed again lie in temporary files, at most `STORED_BYTES` a state.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lowrank_probe import running_models as running
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.distances import Distance, Measure
from lowrank_probe.errors import OutputError
from lowrank_probe.narrowing import dtype_word
from lowrank_probe.outputs import why
from lowrank_probe.running_models import CannotRun, Kind, Weighted
from lowrank_probe.texts import prompts, token_sequences
from lowrank_probe.verification import ALLOWED_SHARE, ROWS, Verification, broken_rules
from lowrank_probe.words import some

N_TEXTS: Final = 64
N_TOKENS: Final = 256
STORED_BYTES: Final = 1 << 30
# What the order of float32 sums may change, relative to the outputs: 1.3e-6 was seen at 30 layers.
ARITHMETIC: Final = 1e-5


def compare_outputs(
    base: Path, tuned: Path, adapters: Sequence[Weighted], texts: Sequence[str] | None, device: torch.device,
    equal: bool = False,
) -> Verification:  # fmt: skip
    """The outputs of all states on `texts` (None: the built-in prompts); `equal`: the tuned side is the merged model.

    Raises `CannotRun` where transformers cannot load or run the pair, `ProbeError` where peft cannot load the adapter.
    """
    if find_spec("peft") is None:
        raise CannotRun("peft is not installed (pip install peft)")
    shared = len(adapters) > 1 or any(weight != 1 for _, weight in adapters)
    for path, _ in adapters if shared else ():
        if open_checkpoint(path).config.get("modules_to_save"):
            raise CannotRun(f"{path} holds whole modules, which peft neither weighs nor adds")
    with running.quiet() as said:
        found, ignored, notes = _through_peft(base, tuned, adapters, texts, device, equal)
    return _judged(found, ignored, [*notes, *said], equal)


def _through_peft(
    base: Path,
    tuned: Path,
    adapters: Sequence[Weighted],
    texts: Sequence[str] | None,
    device: torch.device,
    equal: bool,
) -> tuple["_Measured", list[str], list[str]]:
    """What was measured, the adapter tensors that peft ignores, notes."""
    kind = running.find_kind(base, tuned)
    sequences, notes = _sequences(kind, (tuned, base), texts)
    try:
        with tempfile.TemporaryDirectory(prefix="probe-verify-") as aside:
            measured, ignored = _measure(base, tuned, adapters, kind, sequences, device, Path(aside))
    except OSError as error:
        raise OutputError(f"{tempfile.gettempdir()}: {why(error, 'set TMPDIR to a larger disk')}") from None
    if measured.missing_head:
        lacking = measured.missing_head[0]
        notes.append(f"{tuned} has no {lacking}: last hidden states are compared, not the head's outputs")
    elif len(set(kind.n_labels)) > 1:
        notes.append("the heads have {} and {} labels: last hidden states are compared".format(*kind.n_labels))
    if ignored and not equal and kind.tuned_class != kind.cls.__name__:
        notes.append(
            f"not checked: {some(ignored)} of {kind.tuned_class}, which has no place in {kind.cls.__name__}, the class "
            "of the base, in which both sides were run"
        )
        ignored = []
    if kind.base_vocabulary != kind.tuned_vocabulary:
        notes.append(
            f"vocabularies differ ({kind.base_vocabulary} tokens in the base, {kind.tuned_vocabulary} in the tuned "
            f"side): compared on the {kind.vocabulary} common ones; the base needs "
            f"resize_token_embeddings({kind.tuned_vocabulary}) before an adapter with the whole table is loaded"
        )
    return measured, ignored, notes


def _sequences(kind: Kind, directories: Sequence[Path], texts: Sequence[str] | None) -> tuple[list[Tensor], list[str]]:
    chosen = prompts() if texts is None else list(texts[:N_TEXTS])
    n_tokens = min(N_TOKENS, kind.max_tokens)
    room = STORED_BYTES // (4 * max(kind.base_vocabulary, kind.tuned_vocabulary) * max(1, len(chosen)))
    sequences, notes = token_sequences(chosen, directories, kind.vocabulary, max(1, min(n_tokens, room)))
    if texts is not None and len(texts) > N_TEXTS:
        notes.append(f"of {len(texts)} texts the first {N_TEXTS} were used")
    if room < n_tokens:
        notes.append(f"texts were cut to {max(1, room)} tokens: more logits of a vocabulary this large are not kept")
    return sequences, notes


@dataclass(frozen=True)
class _Measured:
    """The distances of the three rows to the tuned model, and those that the rule needs."""

    measure: Measure
    rows: tuple[Distance, Distance, Distance]
    gap: Distance
    rounding: Distance
    storage: torch.dtype
    missing_head: list[str]


def _measure(
    base: Path, tuned: Path, adapters: Sequence[Weighted], kind: Kind, sequences: Sequence[Tensor],
    device: torch.device, aside: Path,
) -> tuple[_Measured, list[str]]:  # fmt: skip
    model, missing = running.load(tuned, kind, device)
    measure = running.find_measure(model, sequences[0], missing, kind, device)
    from_tuned = [Distance(measure) for _ in ROWS]
    gap, rounding = Distance(measure), Distance(measure)

    def states(model: object) -> Iterator[tuple[int, Tensor]]:
        for i, ids in enumerate(sequences):
            yield i, running.outputs(model, ids, measure, kind, device)

    def keep(state: str, i: int, values: Tensor) -> None:
        np.save(aside / f"{state}-{i}.npy", values.cpu().numpy())

    def kept(state: str, i: int) -> Tensor:
        return torch.from_numpy(np.load(aside / f"{state}-{i}.npy")).to(device)

    for i, values in states(model):
        keep("tuned", i, values)
    del model
    running.free(device)
    model, lacking = running.load(base, kind, device)
    if lacking:
        raise CannotRun(f"{base}: {kind.cls.__name__} needs {lacking[0]}, which the files lack")
    for i, values in states(model):
        from_tuned[0].add(kept("tuned", i), values)
    storage, exact = running.stored_exactly(model, base)
    running.resize(model, kind)
    model, ignored = running.wear(model, adapters, device)
    for i, values in states(model):
        from_tuned[1].add(kept("tuned", i), values)
        keep("worn", i, values)
    model = running.merge(model)
    if exact:
        for i, values in states(model):
            keep("merged", i, values)
        running.round_to(model, storage, exact)
    for i, values in states(model):
        from_tuned[2].add(kept("tuned", i), values)
        gap.add(kept("worn", i), values)
        rounding.add(kept("merged", i) if exact else values, values)
    a, b, c = from_tuned
    return _Measured(measure, (a, b, c), gap, rounding, storage, missing), ignored


def _judged(found: _Measured, ignored: Sequence[str], notes: Sequence[str], equal: bool) -> Verification:
    base, worn, _ = found.rows
    table = pd.DataFrame([row.figures() for row in found.rows], index=pd.Index(ROWS, name="model"))
    rounding = max(found.rounding.distance, ARITHMETIC * base.reference)
    gap, tolerance = worn.distance if equal else found.gap.distance, ALLOWED_SHARE * base.distance + rounding
    problems, notes = [], list(notes)
    if ignored:
        problems.append(f"peft does not load {len(ignored)} tensors of the adapter, such as {ignored[0]}")
    problems += broken_rules(gap, tolerance, equal)
    if equal and not found.gap.distance <= tolerance:
        notes.append(
            f"what peft itself merges differs from base+adapter by {found.gap.distance:.3g}: tied weights that are "
            "adapted at one end do that"
        )
    if not equal and worn.distance >= base.distance > rounding:
        notes.append(
            f"base+adapter is farther from the tuned model ({worn.distance:.3g}) than the base itself "
            f"({base.distance:.3g}): a wrong scaling or base, or too low a rank"
        )
    storage = dtype_word(found.storage)
    return Verification(found.measure, table, gap, storage, rounding, tolerance, tuple(problems), tuple(notes))
