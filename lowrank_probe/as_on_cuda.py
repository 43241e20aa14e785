"""What PyTorch's CUDA kernels would keep, while fake tensors on the CPU stand in for them: a `TorchFunctionMode`.

Three calls save other things on the CPU than on CUDA, and are replaced: fused attention (its choice of kernel, its
log-sum-exp), dropout (a mask of 1 byte an entry, where the CPU keeps a noise of the input's dtype), and what autocast
runs in float32 on CUDA alone (LayerNorm, softmax, pow). Values are never right here, only sizes, dtypes and lifetimes.

Legend: b batch, n heads, s sequence, d head dimension.
Source: ATen/native/transformers/cuda/sdp_utils.cpp and attention.cu, flash_attn/flash_api.cpp, autocast_mode.cpp of
PyTorch 2.11; FlashAttention 2 (Dao, arXiv 2307.08691, section 3).
"""

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lowrank_probe.training_steps import ACCUMULATOR, LSE_ROWS, up

_FP32_ON_CUDA: Final = (functional.layer_norm, functional.softmax, torch.softmax, torch.pow, Tensor.pow, Tensor.softmax)


class AsOnCuda(TorchFunctionMode):
    """Within it, attention, dropout and autocast's float32 list save and return what they would on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func is functional.dropout:
            return _dropout(*args, **kwargs)
        if func in _FP32_ON_CUDA and torch.is_autocast_enabled("cpu") and args[0].dtype == torch.bfloat16:
            return func(args[0].float(), *args[1:], **kwargs)
        return func(*args, **kwargs)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(q·kᵀ)·v, (b, n, s, d): by the kernel that CUDA takes.

    flash: 16-bit, no mask, d ≤ 256; keeps q, k, v, the output and 4 bytes a row and head. efficient: the same and the
    mask, for float32 too, but not for grouped queries. math: every (s, s) matrix.
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(torch.bfloat16)
    if query.dtype != torch.float32 and attn_mask is None and query.shape[-1] <= 256:
        return _Attention.apply(query, key, value, None, True)  # type: ignore[no-untyped-call,no-any-return]
    if not enable_gqa:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask, 0.0)
        return _Attention.apply(query, key, value, attn_mask, False)  # type: ignore[no-untyped-call,no-any-return]
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )
    return found[0]


class _Attention(torch.autograd.Function):
    """The flash and the memory-efficient kernel: sizes alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, flash: bool) -> Tensor:
        b, n, s, _ = q.shape
        out = q.new_empty(b, s, n, v.shape[-1]).transpose(1, 2)
        rows = s if flash else up(s, LSE_ROWS)
        ctx.flash = flash
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(b, n, rows, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, _, _ = ctx.saved_tensors
        b, n, s, d = q.shape
        dq, dk, dv = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))
        if ctx.flash:
            rows, width = up(s, ACCUMULATOR[0]), up(d, ACCUMULATOR[1])
            held = [q.new_empty(b, n, rows, dtype=torch.float32), q.new_empty(b, rows, n, width, dtype=torch.float32)]
            if k.shape[1] != n:
                held += [k.new_empty(b, s, n, d), v.new_empty(b, s, n, d)]
            del held
        else:
            q.new_empty(b, n, up(s, LSE_ROWS), dtype=torch.float32)
        return dq, dk, dv, mask.new_empty(mask.shape) if ctx.needs_input_grad[3] else None, None


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if p == 0.0 or not training:
        return input
    kept: Tensor = torch.native_dropout(input, p, True)[0]
    return kept
