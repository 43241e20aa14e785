"""Values brought into the dtype they are stored in, never beyond its range, and what that dtype is called."""

from typing import Final

import torch
from torch import Tensor

from lowrank_probe.errors import NumericsError, ProbeError
from lowrank_probe.options import STORED
from lowrank_probe.torch_dtypes import DTYPES

CODES: Final = {dtype: code for code, dtype in DTYPES.items()}


def stored_dtype(word: str) -> str:
    """The safetensors code of a dtype for storage ("bfloat16" → "BF16"). Raises `ProbeError` for any other word."""
    if word not in STORED:
        raise ProbeError(f"dtype {word!r}: expected one of {', '.join(STORED)}")
    return STORED[word]


def dtype_word(dtype: torch.dtype) -> str:
    """torch.bfloat16 → "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or Inf, in one pass: the smallest and the largest entry are NaN where any is."""
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def narrowed(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """The tensor rounded to dtype; NaN and Inf stay. Raises `beyond` where a finite entry gets infinite."""
    cast = tensor.to(dtype)
    if dtype != tensor.dtype and not all_finite(cast) and bool((torch.isinf(cast) & torch.isfinite(tensor)).any()):
        raise beyond(what, tensor, dtype)
    return cast


def beyond(what: str, tensor: Tensor, dtype: torch.dtype) -> NumericsError:
    """The error for finite values that dtype does not hold. what: whose they are, and the verb."""
    largest = float(torch.where(torch.isfinite(tensor), tensor, 0).abs().max())
    mend = (
        "use --dtype float32 or bfloat16" if dtype == torch.float16 else "is the scale or weight of an adapter right?"
    )
    return NumericsError(f"{what} {largest:.3g}, beyond {dtype_word(dtype)}; {mend}")
