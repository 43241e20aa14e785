"""Which matrices a target names: all-linear, attention, mlp, everything, a layer type, a pattern. Names only."""

from typing import Final

from lowrank_probe.layers import matches
from lowrank_probe.weight_shapes import ATTENTION, MLP

# What LoRA on "all-linear" leaves out: tables, convolutions and the heads.
_NOT_LINEAR: Final = frozenset(
    {"embedding", "position_embedding", "token_type_embedding", "patch_embedding", "relative_attention_bias", "conv",
     "lm_head", "classifier", "score"}
)  # fmt: skip


def in_group(target: str, label: str, layer_type: str, name: str, is_expert: bool = False) -> bool:
    """Whether a target, or one of several parted by commas, picks a matrix.

    label: its layer type as shown, with its stack where that has to be told.
    """
    return any(_is_picked(one, label, layer_type, name, is_expert) for one in target.split(","))


def _is_picked(target: str, label: str, layer_type: str, name: str, is_expert: bool) -> bool:
    if target == "everything":
        return True
    if target == "all-linear":
        return layer_type not in _NOT_LINEAR and not is_expert
    if target in ("attention", "mlp"):
        return layer_type in (ATTENTION if target == "attention" else MLP)
    return target in (label, layer_type) or matches(name, target)
