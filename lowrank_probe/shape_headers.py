"""Safetensors headers against a config's shape, or as a shape where there is no config. No tensor is read, no torch.

Matrices are compared by what they are, layer type, number and stack (`layers.place`), since a file may name them
otherwise than the model in memory (a missing prefix, experts one by one).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from lowrank_probe.errors import CheckpointError
from lowrank_probe.layers import is_conv1d, module_of, place, starred
from lowrank_probe.quantization_codes import code_format
from lowrank_probe.remote_files import File
from lowrank_probe.safetensors_headers import read_header, read_index
from lowrank_probe.shape_families import is_known
from lowrank_probe.shape_mixtures import mixture_notes
from lowrank_probe.tensor_info import FLOATS, TensorInfo
from lowrank_probe.weight_shapes import Kind, ModelShape, Weight

_INDEX: Final = "model.safetensors.index.json"
# No parameters: frequencies of rotary positions and masks of attention, saved by old versions; scales of fp8 weights.
_BUFFERS: Final = re.compile(
    r"(?:inv_freq|masked_bias|position_ids)$|attn\.bias$|attention\.bias$|weight_scale(?:_inv)?$"
)
_OF_SEVERAL: Final = re.compile(r"-\d+-of-(\d+)\.safetensors$")
# (layer type, layer, stack)
_Key = tuple[str, int | None, str]


def headers_in(root: File) -> dict[str, TensorInfo]:
    """name → header of each tensor of a directory's model, one file or shards; {} where none is in safetensors."""
    if (root / _INDEX).exists():
        return read_index(root / _INDEX)
    return read_header(root / "model.safetensors") if (root / "model.safetensors").exists() else {}


def check_headers(shape: ModelShape, headers: Mapping[str, TensorInfo], path: File) -> tuple[str, ...]:
    """Compare the headers with what the config says; notes for the reader, () where there is nothing to tell.

    Raises `CheckpointError` naming the first matrix, in the order of the model, that has another shape, is missing, or
    belongs to a layer or expert that the config does not have; for an architecture that the table of families does not
    have, only one whose shape differs. Quantized weights are not compared.
    """
    matrices = {name: info for name, info in headers.items() if len(info.shape) > 1 and not _BUFFERS.search(name)}
    if shape.config.get("quantization_config") or any(info.dtype not in FLOATS for info in matrices.values()):
        return ("the weights in the files are quantized: their shapes were not compared with the config's",)
    expected = sorted(_expected(shape), key=lambda one: -1 if one.key[1] is None else one.key[1])
    if not is_known(shape.config):  # transformers may rename and put together what the files hold
        for one in (one for one in expected if one.name in matrices and matrices[one.name].shape not in one.shapes):
            raise _contradicts(path, one.name, one, str(matrices[one.name].shape))
        return ()
    stored: dict[_Key, list[TensorInfo]] = {}
    for name, info in matrices.items():
        stored.setdefault(_key(name), []).append(info)
    notes = []
    for one in expected:
        found = [info for key in one.keys for info in stored.get(key, ())]
        wrong = next((info for info in found if info.shape not in one.shapes), None)
        if wrong is not None:
            raise _contradicts(path, wrong.name, one, str(wrong.shape))
        if not one.tied and not _complete(one, found):
            raise _contradicts(path, one.name, one, "not all of it" if found else "none of it")
        if one.tied and found and one.key[0] == "lm_head":
            notes.append(f"{found[0].name} lies in the files, but the config ties it to the table: not counted")
    _no_more(shape, stored, {key for one in expected for key in one.keys}, path)
    return tuple(notes)


@dataclass(frozen=True)
class _Expected:
    """One matrix of the model: how files may name and shape it. experts: how many, where they may lie one by one."""

    name: str
    key: _Key
    keys: tuple[_Key, ...]
    shapes: frozenset[tuple[int, ...]]
    tied: bool
    experts: int = 0


def _expected(shape: ModelShape) -> Iterator[_Expected]:
    together: dict[_Key, set[tuple[int, ...]]] = {}
    listed = []
    for weight in shape.weights:
        if len(weight.shape) < 2:
            continue
        for module in weight.modules():
            name = module if weight.kind == "parameter" and weight.copies > 1 else f"{module}.weight"
            key = _key(name)
            as_stored = weight.shape[::-1] if weight.kind == "conv1d" else weight.shape
            shapes, keys, experts = {as_stored}, [key], 0
            if key[0].startswith("expert_") and len(weight.shape) == 3:
                experts = weight.shape[0]
                m, n = weight.sides
                parts = ("expert_gate", "expert_up") if key[0] == "expert_gate_up" else (key[0],)
                keys += [(part, *key[1:]) for part in parts if part != key[0]]
                shapes.add((m // len(parts), n))
            together.setdefault(key, set()).update(shapes)
            listed.append(_Expected(name, key, tuple(keys), frozenset(shapes), weight.tied, experts))
    for one in listed:
        yield _Expected(one.name, one.key, one.keys, frozenset(together[one.key]), one.tied, one.experts)


def _key(name: str) -> _Key:
    where = place(name)
    return where.layer_type, where.layer, where.stack


def _complete(one: _Expected, found: list[TensorInfo]) -> bool:
    numbers = {place(info.name).expert for info in found}
    if one.experts and numbers and None not in numbers:
        return numbers == set(range(one.experts))
    return bool(found)


def _contradicts(path: File, name: str, one: _Expected, found: str) -> CheckpointError:
    wanted = " or ".join(str(shape) for shape in sorted(one.shapes, key=len))
    experts = f" for each of {one.experts} experts" if one.experts else ""
    return CheckpointError(
        f"{path}: {name}: its config.json expects {wanted}{experts}, the headers of its files have {found}; is it "
        "another model's config.json, or is a file missing?"
    )


def _no_more(shape: ModelShape, stored: Mapping[_Key, list[TensorInfo]], known: set[_Key], path: File) -> None:
    """Raise for a matrix of a layer that the config does not have; other kinds of matrices may be there."""
    types = {layer_type for layer_type, layer, _ in known if layer is not None}
    for (layer_type, layer, stack), infos in stored.items():
        if layer is not None and layer_type in types and (layer_type, layer, stack) not in known:
            raise CheckpointError(
                f"{path}: {infos[0].name}: its config.json has {shape.n_layers} layers and no such matrix, the headers "
                f"of its files have {infos[0].shape}; is it another model's config.json?"
            )


def shape_of_headers(headers: Mapping[str, TensorInfo], path: File) -> ModelShape:
    """A shape from headers alone: names as in the file; heads, and whatever else no tensor tells, are 0.

    Raises `CheckpointError` where the weights are quantization codes, whose shapes are not the model's, and where there
    are no numbered layers.
    """
    packed, evidence = code_format(headers, {})
    matrices = (one for name, one in headers.items() if len(one.shape) > 1 and not _BUFFERS.search(name))
    odd = next((one for one in matrices if one.dtype not in FLOATS and not one.dtype.startswith("F8_")), None)
    if not packed and odd is not None:
        packed, evidence = "an unknown method", f"{odd.name} is {odd.dtype}"
    if packed:
        raise CheckpointError(
            f"{path}: is quantized with {packed} ({evidence}), so that shapes do not tell the model's; expected its "
            "config.json beside it: give that, or the model's hub id"
        )
    if not any(place(name).layer is not None for name in headers):
        names = ", ".join(list(headers)[:3]) + (", …" if len(headers) > 3 else "")
        raise CheckpointError(
            f"{path}: expected a model's weights, found no numbered layers ({names or 'no tensor'}); give the model's "
            "directory or its config.json"
        )
    found: dict[tuple[str, Kind, tuple[int, ...], int], list[int | None]] = {}
    for name, info in headers.items():
        biased = name.endswith(".bias") and f"{name[:-5]}.weight" in headers
        if biased or _BUFFERS.search(name) or not info.shape:
            continue
        bias = headers.get(f"{name[:-7]}.bias") if name.endswith(".weight") else None
        kind = _kind(name, info.shape)
        oriented = info.shape[::-1] if kind == "conv1d" else info.shape
        where = place(name)
        key = (starred(module_of(name)), kind, oriented, math.prod(bias.shape) if bias else 0)
        found.setdefault(key, []).append(where.layer)
    weights = tuple(
        Weight(name, kind, place(name.replace("*", "0")).layer_type, shape, bias, len(layers),
               tuple(sorted({layer for layer in layers if layer is not None})))
        for (name, kind, shape, bias), layers in found.items()
    )  # fmt: skip
    table = next((one for one in weights if one.layer_type == "embedding"), None)
    head = next((one.name for one in weights if one.layer_type == "lm_head" and len(one.shape) > 1), "")
    down = next((one for one in weights if one.layer_type in ("down", "expert_down")), None)
    several = _OF_SEVERAL.search(path.name)
    notes = ["counted from headers without a config: heads are not known, modules are named as in the file"]
    if several:
        notes.append(
            f"{path.name} is one of {int(several[1])} shards: only its own tensors are counted; give the directory"
        )
    return ModelShape(
        "", "safetensors headers", weights, table.shape[1] if table else 0,
        len({(place(name).stack, place(name).layer) for name in headers if place(name).layer is not None}), 0, 0, 0,
        down.sides[1] if down else 0, table.shape[0] if table else 0,
        any(one.layer_type in ("gate", "gate_up", "expert_gate", "expert_gate_up") for one in weights),
        bool(table) and not head, {}, sum(one.n_parameters for one in weights), head,
        (*notes, *mixture_notes("", weights, 0)),
    )  # fmt: skip


def _kind(name: str, shape: tuple[int, ...]) -> Kind:
    """By the names alone: what the module is when the model is loaded, as far as a name tells."""
    layer_type = place(name).layer_type
    if len(shape) < 2:
        return "norm"
    if layer_type == "router" or not name.endswith("weight") or (len(shape) == 3 and layer_type.startswith("expert_")):
        return "parameter"
    if len(shape) > 2:
        return "conv"
    if is_conv1d(name, None):
        return "conv1d"
    table = ("embedding" in layer_type and "projection" not in layer_type) or layer_type == "relative_attention_bias"
    return "embedding" if table else "linear"
