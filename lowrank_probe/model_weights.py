"""A running model's weights as targets see them: views, and putting other values in place.

Legend: m out, n in. A view is the (m, n) matrix of one copy of a target inside the parameter in memory.
"""

from typing import Any

import torch
from torch import Tensor

from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.deltas import read_part
from lowrank_probe.modules import Slot
from lowrank_probe.targets import Selection, Target


def view_of(model: Any, target: Target, copy: int) -> Tensor:
    """The (m, n) view of one copy of a target; writing to it changes the model. Raises `AttributeError`: no such."""
    W: Tensor = model.get_parameter(target.name if target.by_parameter else f"{target.name}.weight").data
    if target.by_parameter and W.ndim == 3:
        W = W[copy]
    W = W.flatten(1) if W.ndim > 2 else W
    return W.T if target.transposed or target.kind == "conv1d" else W


def stored_matrix(target: Target, copy: int, base: Checkpoint, device: torch.device) -> Tensor:
    """W_base (m, n) of one copy, in float32."""
    pieces = [read_part(base, pair.name, pair.part, device).float() for pair in target.pieces[copy]]
    return torch.cat(pieces)


def put_back(model: Any, selection: Selection, base: Checkpoint, device: torch.device) -> list[str]:
    """Give the fine-tuned model the base's values of all that no adapter carries.

    Returns the names of those that stay the fine-tune's: the base has none of their shape, or transformers loads them
    in a form of its own.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    carried = {pair.tuned_name for target in selection.chosen for pairs in target.pieces for pair in pairs}
    carried |= {name for whole in selection.whole for name in whole.tensors.values()}
    source = {pair.tuned_name: pair.name for pair, _ in selection.left_out if pair is not None}
    kept = []
    for name, slot in selection.modules.slots.items():
        if name in carried or slot.parameter not in parameters:
            continue
        rows = None
        if source.get(name, name) in base.tensors:
            W = base.read(source.get(name, name), device)
            rows = _rows(_view(parameters[slot.parameter], slot), slot, W)
        if rows is None:
            kept.append(name)
        else:
            rows.copy_(W)
    return kept


def _view(parameter: Tensor, slot: Slot) -> Tensor:
    return parameter.data if slot.expert is None else parameter.data[slot.expert]


def _rows(view: Tensor, slot: Slot, W: Tensor) -> Tensor | None:
    """The part of a parameter that one stored tensor fills; None where it is not laid out as it is stored."""
    if view.ndim != W.ndim or view.shape[1:] != W.shape[1:]:
        return None
    if len(view) == len(W):
        return view
    if slot.expert is None or len(view) % len(W):
        return None
    return view[slot.piece * len(W) : (slot.piece + 1) * len(W)]
