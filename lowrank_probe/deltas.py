"""Match two checkpoints strictly, or read one adapter; yield one `Delta` a matrix; keep the ledger.

Every tensor of both sides ends in exactly one line of the ledger. Nothing is guessed and nothing vanishes: names match
as they are, or after one base-model prefix (`bert.`, `model.`, …) that is said in the notes.

Legend: m out, n in; ΔW = W_tuned − W_base, upcast first and subtracted after: float64 where a side is stored in
float32 or wider, else float32 (the difference of two bf16 or two fp16 values of similar size is exact in float32).
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from lowrank_probe.adapters import LoraModule, read_modules
from lowrank_probe.checkpoints import Checkpoint, TensorInfo
from lowrank_probe.errors import MatchError, NumericsError
from lowrank_probe.layers import BASE_PREFIXES, Place, is_conv1d, matches, place
from lowrank_probe.svd import row_chunks

# Buffers that checkpoints carry beside their weights; anything else that is not a float is refused by name.
_BUFFERS: Final = re.compile(
    r"(?:position_ids|token_type_ids|num_batches_tracked|masked_bias|attn\.bias|attention\.bias|inv_freq|rotary_emb.*)$"
)


@dataclass(frozen=True)
class Delta:
    """One matrix of an update.

    shape: (m, n) as (out, in). dense: (m, n) float32 or float64, or None for an adapter, which stays `factors` =
    (B (m, r), A (r, n), scaling). base, tuned: the stored values as (m, n), None for an adapter or an absent base.
    """

    name: str
    place: Place
    shape: tuple[int, int]
    base_dtype: str
    tuned_dtype: str
    fro_norm: float
    base_norm: float
    cosine: float
    dense: Tensor | None = None
    factors: tuple[Tensor, Tensor, float] | None = None
    base: Tensor | None = None
    tuned: Tensor | None = None

    @property
    def relative_update(self) -> float:
        """‖ΔW‖_F / ‖W_base‖_F; NaN without a base or for a base of zeros."""
        return self.fro_norm / self.base_norm if self.base_norm > 0 else math.nan


@dataclass
class Matching:
    """What the headers say: the pairs to read, the ledger lines decided already, and what there is to tell."""

    pairs: list["Pair"] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """Two tensors to compare, or one LoRA module on its base tensor (None without a base)."""

    name: str
    tuned_name: str
    place: Place
    lora: LoraModule | None = None

    def entries(self, base: Checkpoint | None, tuned: Checkpoint) -> int:
        """Number of entries of the matrix (for progress)."""
        if self.lora is not None:
            return math.prod(self.lora.shape)
        side = base if base is not None and self.name in base.tensors else tuned
        return math.prod(side.tensors[self.name].shape) if self.name in side.tensors else 0


def match(
    base: Checkpoint | None,
    tuned: Checkpoint,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: tuple[int, int] | None = None,
) -> Matching:
    """Pair the tensors of two checkpoints from their headers alone.

    include, exclude: patterns as `layers.matches`; `layers`: first and last layer number, inclusive.
    Raises `MatchError` where the two have no tensor in common, or a pattern selects nothing; `CheckpointError` for a
    dtype that cannot be read.
    """
    result = Matching()
    if tuned.is_adapter:
        _match_adapter(base, tuned, result)
    else:
        if base is None:
            raise MatchError(f"{tuned.path}: is not an adapter, so a base is needed: probe spectrum BASE TUNED")
        if base.is_adapter:
            raise MatchError(f"{base.path}: is an adapter; give the base model first and the adapter second")
        _match_models(base, tuned, result)
    _select(result, include, exclude, layers)
    for pair in result.pairs:  # from the headers, before any work
        for side, name in ((base, pair.name), (tuned, pair.tuned_name)):
            if side is not None and name in side.tensors:
                side.tensors[name].check_dtype()
    return result


def _match_models(base: Checkpoint, tuned: Checkpoint, result: Matching) -> None:
    names = {name: name for name in base.tensors if name in tuned.tensors}
    rest_base = [name for name in base.tensors if name not in names]
    rest_tuned = [name for name in tuned.tensors if name not in names]
    renamed, note = _by_prefix(rest_base, rest_tuned)
    if note:
        result.notes.append(note)
    names.update(renamed)
    if not names:
        raise MatchError(
            f"{base.path} and {tuned.path} have no tensor in common (base has {_some(base.tensors)}; "
            f"tuned has {_some(tuned.tensors)}); are they the same architecture?"
        )
    taken = set(names.values())
    beyond = 0
    for name in base.tensors:
        if name not in names:
            result.ledger.append(_line(name, "", "only in base", base, tuned))
    for name in tuned.tensors:
        if name not in taken:
            result.ledger.append(_line("", name, "only in tuned", base, tuned))
    for name, other in names.items():
        a, b = base.tensors[name], tuned.tensors[other]
        if a.shape != b.shape:
            note = "vocabulary or head of another size?" if a.shape[1:] == b.shape[1:] else "not the same architecture?"
            result.ledger.append(_line(name, other, "shape differs", base, tuned, note))
        elif _BUFFERS.search(name) and len(a.shape) != 2:
            result.ledger.append(_line(name, other, "not a weight", base, tuned, "a buffer"))
        elif a.dtype in ("I64", "BOOL") or b.dtype in ("I64", "BOOL"):
            result.ledger.append(_line(name, other, "not a weight", base, tuned, "integer or bool"))
        elif len(a.shape) > 2:
            result.ledger.append(_line(name, other, "not a matrix", base, tuned, f"{len(a.shape)}-D: not analysed"))
            beyond += math.prod(a.shape)
        else:
            result.pairs.append(Pair(name, other, place(name)))
    if beyond:
        share = beyond / sum(math.prod(info.shape) for info in base.tensors.values())
        result.notes.append(
            f"{100 * share:.0f} % of the parameters are in tensors of 3 or more dimensions: not analysed"
        )


def _match_adapter(base: Checkpoint | None, adapter: Checkpoint, result: Matching) -> None:
    modules, others = read_modules(adapter)
    names = {module.name: module for module in modules}
    if base is None:
        for name, module in names.items():
            result.pairs.append(Pair(name, module.name_A, place(name), module))
        for name in others:
            result.ledger.append(_line("", name, "only in tuned", None, adapter, "no base given to compare with"))
        return
    plain = {re.sub(r"^base_model\.model\.", "", name).replace(".base_layer.", "."): name for name in others}
    wanted = [*names, *plain]
    found = {name: name for name in wanted if name in base.tensors}
    renamed, note = _by_prefix([n for n in base.tensors if n not in found], [n for n in wanted if n not in found])
    if note:
        result.notes.append(note)
    found.update({wanted_name: base_name for base_name, wanted_name in renamed.items()})
    if not any(name in found for name in names):
        raise MatchError(
            f"{adapter.path} adapts no tensor of {base.path} (adapter has {_some(names)}; base has "
            f"{_some(base.tensors)}); is this the base it was trained on?"
        )
    for name, module in names.items():
        if name not in found:
            result.ledger.append(_line("", module.name_A, "only in tuned", base, adapter, f"base has no {name}"))
            continue
        shape = base.tensors[found[name]].shape
        if shape != module.stored_shape(is_conv1d(name, base.config.get("model_type"))):
            line = _line(found[name], module.name_A, "shape differs", base, adapter, f"adapter is for {module.shape}")
            result.ledger.append(line)
            continue
        result.pairs.append(Pair(found[name], module.name_A, place(found[name]), module))
    adapted = {found[name] for name in names if name in found}
    for name, tensor in plain.items():
        if found.get(name) in adapted:
            note = f"the base's {name}, which peft stores beside its factors: not compared"
            result.ledger.append(_line("", tensor, "only in tuned", base, adapter, note))
        elif name not in found:
            result.ledger.append(_line("", tensor, "only in tuned", base, adapter))
        elif base.tensors[found[name]].shape != adapter.tensors[tensor].shape:
            result.ledger.append(_line(found[name], tensor, "shape differs", base, adapter))
        else:
            result.pairs.append(Pair(found[name], tensor, place(found[name])))
    touched = set(found.values())
    for name in base.tensors:
        if name not in touched:
            result.ledger.append(_line(name, "", "unchanged", base, adapter, "not adapted"))


def _by_prefix(rest_base: Sequence[str], rest_tuned: Sequence[str]) -> tuple[dict[str, str], str]:
    """base name → tuned name for the one prefix that matches most of what is left, and a sentence that says so."""
    in_base, in_tuned = set(rest_base), set(rest_tuned)
    best: dict[str, str] = {}
    note = ""
    for prefix in BASE_PREFIXES:
        added = {name: prefix + name for name in rest_base if prefix + name in in_tuned}
        dropped = {prefix + name: name for name in rest_tuned if prefix + name in in_base}
        for renamed, side in ((added, "tuned"), (dropped, "base")):
            if len(renamed) > len(best):
                best = renamed
                note = f"{len(renamed)} tensors matched after the prefix '{prefix}' that only the {side} side has"
    return best, note


def _select(result: Matching, include: Sequence[str], exclude: Sequence[str], layers: tuple[int, int] | None) -> None:
    kept = []
    every = [pair.name for pair in result.pairs] + [line["name"] or line["tuned_name"] for line in result.ledger]
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in every):
                raise MatchError(
                    f"{option} {pattern}: matches none of the {len(every)} tensors (such as {_some(every)})"
                )
    for pair in result.pairs:
        why = ""
        if include and not any(matches(pair.name, pattern) for pattern in include):
            why = "not in --include"
        elif any(matches(pair.name, pattern) for pattern in exclude):
            why = "--exclude"
        elif layers and not (pair.place.layer is not None and layers[0] <= pair.place.layer <= layers[1]):
            why = f"outside --layers {layers[0]}-{layers[1]}"
        if why:
            result.ledger.append(ledger_line(pair, "excluded", note=why))
        else:
            kept.append(pair)
    if layers and not kept:
        raise MatchError(f"--layers {layers[0]}-{layers[1]}: no tensor has such a layer number")
    if (include or exclude) and not kept:
        raise MatchError("--include and --exclude leave no tensor that both sides have in one shape")
    result.pairs[:] = kept


def ledger_line(
    pair: Pair, status: str, note: str = "", fro_norm: float = math.nan, relative: float = math.nan
) -> dict[str, Any]:
    """A ledger line for a pair; shapes and dtypes are filled in by `complete_ledger`."""
    return {
        "name": pair.name, "tuned_name": pair.tuned_name, "status": status, "layer_type": pair.place.layer_type,
        "layer": pair.place.layer, "fro_norm": fro_norm, "relative_update": relative, "note": note,
    }  # fmt: skip


def complete_ledger(lines: list[dict[str, Any]], base: Checkpoint | None, tuned: Checkpoint) -> list[dict[str, Any]]:
    """Add shapes and dtypes from the headers to every line."""
    for line in lines:
        a = base.tensors.get(line["name"]) if base else None
        b = tuned.tensors.get(line["tuned_name"])
        line["base_shape"], line["base_dtype"] = (_shape(a.shape), a.dtype) if a else ("", "")
        line["tuned_shape"], line["tuned_dtype"] = (_shape(b.shape), b.dtype) if b else ("", "")
    return lines


def read_pair(pair: Pair, base: Checkpoint | None, tuned: Checkpoint, device: torch.device) -> Delta | dict[str, Any]:
    """Read one pair: a `Delta` for a changed matrix, else its ledger line (unchanged, vector).

    Raises `NumericsError` naming tensor and file for NaN or Inf, `CheckpointError` for a dtype that is no float.
    """
    if pair.lora is not None:
        return _read_lora(pair, base, tuned, device)
    assert base is not None
    a, b = base.read(pair.name, device), tuned.read(pair.tuned_name, device)
    if a.ndim == 2 and is_conv1d(pair.name, base.config.get("model_type")):
        a, b = a.T, b.T
    wide = torch.float64 if max(a.dtype.itemsize, b.dtype.itemsize) >= 4 else torch.float32
    delta = torch.empty(b.shape, dtype=wide, device=device)
    for out, x, y in zip(_parts(delta), _parts(b), _parts(a), strict=True):
        torch.sub(x.to(wide), y.to(wide), out=out)
    base_sq, tuned_sq, delta_sq = _sum_squares(a), _sum_squares(b), _sum_squares(delta)
    if not math.isfinite(base_sq + tuned_sq + delta_sq):
        _raise_not_finite([(base, pair.name, a), (tuned, pair.tuned_name, b)])
    norm, base_norm = math.sqrt(delta_sq), math.sqrt(base_sq)
    relative = norm / base_norm if base_norm > 0 else math.nan
    if norm == 0.0:
        return ledger_line(pair, "unchanged", fro_norm=0.0, relative=0.0)
    if a.ndim < 2 or min(a.shape) == 1:
        return ledger_line(pair, "vector", fro_norm=norm, relative=relative)
    product = math.sqrt(base_sq * tuned_sq)
    cosine = max(-1.0, min(1.0, (base_sq + tuned_sq - delta_sq) / (2 * product))) if product > 0 else math.nan
    return Delta(
        pair.name, pair.place, (a.shape[0], a.shape[1]), base.tensors[pair.name].dtype,
        tuned.tensors[pair.tuned_name].dtype, norm, base_norm, cosine,
        dense=delta, base=a, tuned=b,
    )  # fmt: skip


def find_tied(pairs: Sequence[Pair], base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """name → the earlier tensor it equals on both sides: an lm_head that is a copy of the embedding."""
    tied: dict[str, str] = {}
    for head in (p for p in pairs if p.place.layer_type == "lm_head"):
        for table in (p for p in pairs if p.place.layer_type == "embedding"):
            a, b = (base.tensors[head.name], base.tensors[table.name]), (
                tuned.tensors[head.tuned_name], tuned.tensors[table.tuned_name])  # fmt: skip
            same_header = all(x.shape == y.shape and x.dtype == y.dtype for x, y in (a, b))
            if same_header and _same_bytes(*a) and _same_bytes(*b):
                tied[head.name] = table.name
    return tied


def _same_bytes(a: TensorInfo, b: TensorInfo, block: int = 1 << 22) -> bool:
    if a.n_bytes != b.n_bytes:
        return False
    with open(a.file, "rb") as file_a, open(b.file, "rb") as file_b:
        file_a.seek(a.start)
        file_b.seek(b.start)
        for start in range(0, a.n_bytes, block):
            size = min(block, a.n_bytes - start)
            if file_a.read(size) != file_b.read(size):
                return False
    return True


def _read_lora(
    pair: Pair, base: Checkpoint | None, adapter: Checkpoint, device: torch.device
) -> Delta | dict[str, Any]:
    assert pair.lora is not None
    module = pair.lora
    B, A = module.read(adapter, device)
    for factor, name in ((B, module.name_B), (A, module.name_A)):
        if not bool(torch.isfinite(factor).all()):
            raise NumericsError(f"{name} in {adapter.tensors[name].file}: contains NaN or Inf")
    # ‖BA‖_F² = tr((BᵀB)(AAᵀ)), r×r only.
    B64, A64 = B.double(), A.double()
    square = float(((B64.T @ B64) * (A64 @ A64.T)).sum())
    norm = abs(module.scaling) * math.sqrt(max(0.0, square))
    base_norm = math.nan
    if base is not None:
        W = base.read(pair.name, device)
        base_norm = math.sqrt(_sum_squares(W))
        if not math.isfinite(base_norm):
            _raise_not_finite([(base, pair.name, W)])
    if norm == 0.0:
        return ledger_line(pair, "unchanged", "the adapter's product B·A is zero", 0.0, 0.0)
    return Delta(
        pair.name, pair.place, module.shape, base.tensors[pair.name].dtype if base else "",
        adapter.tensors[module.name_A].dtype, norm, base_norm, math.nan, factors=(B, A, module.scaling),
    )  # fmt: skip


def _sum_squares(A: Tensor) -> float:
    total = 0.0
    for part in _parts(A):
        total += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
    return total


def _parts(A: Tensor) -> Iterable[Tensor]:
    return row_chunks(A.unsqueeze(1) if A.ndim == 1 else A) if A.ndim else (A,)


def _raise_not_finite(tensors: Sequence[tuple[Checkpoint, str, Tensor]]) -> NoReturn:
    for side, name, tensor in tensors:
        nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
        if nan or inf:
            what = " and ".join(f"{count} {word}" for count, word in ((nan, "NaN"), (inf, "Inf")) if count)
            raise NumericsError(
                f"{name} in {side.tensors[name].file}: contains {what} (expected finite weights); "
                f"leave it out with --exclude {name}"
            )
    raise NumericsError(f"{tensors[0][1]}: its norm or its difference overflows although every entry is finite")


def _line(
    name: str, tuned_name: str, status: str, base: Checkpoint | None, tuned: Checkpoint, note: str = ""
) -> dict[str, Any]:
    return ledger_line(Pair(name or tuned_name, tuned_name, place(name or tuned_name)), status, note)


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _some(names: Any, count: int = 2) -> str:
    listed = list(names)
    return ", ".join(listed[:count]) + (", …" if len(listed) > count else "")
