"""Quantized weights in safetensors' dtypes: fp8 with scales is dequantized.

Legend: m out, n in, E experts. W = codes·scale, with one scale a tensor, a row, or a block of rows and columns.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.errors import CheckpointError
from lowrank_probe.tensor_info import TensorInfo
from lowrank_probe.torch_dtypes import DTYPES

_SCALES: Final = ("_scale_inv", "_scale")
_FP8: Final = ("F8_E4M3", "F8_E5M2")


def fp8_scales(path: Any, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, str]:
    """fp8 weight → its scale tensor. Raises `CheckpointError` where a checkpoint with scales lacks one of them, or has
    one that is no float of at least 16 bits.
    """
    eights = [name for name, info in tensors.items() if info.dtype in _FP8]
    scales = {}
    for name in eights:
        scale = next((name + suffix for suffix in _SCALES if name + suffix in tensors), "")
        if scale:
            scales[name] = scale
    missing = [name for name in eights if name not in scales]
    if missing and (scales or "quantization_config" in config):
        raise CheckpointError(
            f"{path}: {missing[0]} is {tensors[missing[0]].dtype} but has no {missing[0]}{_SCALES[0]} or {_SCALES[1]} "
            f"beside it ({len(missing)} of {len(eights)} fp8 tensors); half-quantized? convert the checkpoint again"
        )
    for name, scale in scales.items():
        if tensors[scale].dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: {scale}, the scale of {name}, is {tensors[scale].dtype} (expected one of "
                f"{', '.join(DTYPES)}); dequantize the checkpoint first"
            )
    return scales


def dequantize_fp8(W: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """float32 W·scale for a scale of one number, one a row, one a column, or one a block of `block` entries (DeepSeek:
    128×128); of a stack, each expert by its own.

    W: (m, n) or (E, m, n) fp8. Raises `ValueError` where the scale's shape fits none of them.
    """
    if scale.numel() == 1:
        return W.float() * scale.float().reshape(())
    if W.ndim == 3 and scale.ndim > 0 and len(scale) == len(W):
        return torch.stack([dequantize_fp8(w, s, block) for w, s in zip(W, scale, strict=True)])
    values, scale = W.float(), scale.float()
    if scale.ndim == 1:
        scale = scale[:, None]
    if values.ndim != 2 or scale.ndim != 2:
        raise ValueError(_misfit(W, scale, block))
    (m, n), (rows, cols) = values.shape, scale.shape
    height = m if rows == 1 else 1 if rows == m else block[0] if block else _block(m, rows)
    width = n if cols == 1 else 1 if cols == n else block[1] if block else _block(n, cols)
    if -(-m // height) != rows or -(-n // width) != cols:
        raise ValueError(_misfit(W, scale, block))
    for i in range(rows):
        part = values[i * height : (i + 1) * height]
        part *= scale[i].repeat_interleave(width)[:n]
    return values


def _misfit(W: Tensor, scale: Tensor, block: tuple[int, int] | None) -> str:
    of = f" of {block[0]}×{block[1]}" if block else ""
    return (
        f"its scale is {tuple(scale.shape)} for a weight {tuple(W.shape)} (expected one number, one a row or column, "
        f"or one a block{of}); leave it out with --exclude, or convert the checkpoint again"
    )


def _block(length: int, count: int) -> int:
    """The power of two that cuts `length` into `count` blocks (scales come without their block size)."""
    size = 1
    while size * count < length:
        size *= 2
    return size
