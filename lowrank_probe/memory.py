"""A model or a state dict in memory, or any tensors that are there already: name → `TensorInfo` and loader."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.errors import CheckpointError
from lowrank_probe.layers import place
from lowrank_probe.narrowing import dtype_word
from lowrank_probe.tensor_info import Loader, Opened, TensorInfo
from lowrank_probe.torch_dtypes import TORCH_DTYPES

_DTYPE_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip


def open_memory(source: Any) -> tuple[Opened, dict[str, Any], str]:
    """(tensors, config, description) of a state dict or of a model: anything with `state_dict()`.

    Raises `CheckpointError` for tensors without values, a model that wears PEFT adapters, or anything else.
    """
    config: dict[str, Any] = {}
    if hasattr(source, "state_dict"):
        described = type(source).__name__
        if getattr(source, "peft_config", None):
            raise CheckpointError(
                f"{described} wears a PEFT adapter: save it (save_pretrained) and give its directory, or merge it first"
            )
        to_dict = getattr(getattr(source, "config", None), "to_dict", None)
        config = to_dict() if callable(to_dict) else {}
        source = source.state_dict()
    elif isinstance(source, Mapping):
        described = "state dict"
        config = {"tie_word_embeddings": True} if _is_tied(source) else {}
    else:
        raise CheckpointError(
            f"expected a path, a model or a state dict (name → tensor), found {type(source).__name__}"
        )
    described = f"({described} in memory)"
    return tensors_in_memory(source, Path(described)), config, described


def _is_tied(tensors: Mapping[Any, Any]) -> bool:
    """Whether a state dict's output head and its table are one tensor, as of a model that ties them."""
    held: dict[tuple[int, torch.Size], set[str]] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            continue
        if tensor.ndim == 2 and tensor.layout == torch.strided and not tensor.is_meta:
            held.setdefault((tensor.data_ptr(), tensor.shape), set()).add(place(name).layer_type)
    return any({"embedding", "lm_head"} <= types for types in held.values())


def tensors_in_memory(tensors: Mapping[Any, Any], where: Path) -> Opened:
    """name → `TensorInfo` and loader of tensors that are there already. Raises `CheckpointError` naming `where`: a key
    that is no name, a value that is no tensor, is sparse, or has no values (the meta device).
    """
    infos: dict[str, TensorInfo] = {}
    loaders: dict[str, Loader] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{where}: its key {name!r} is of type {type(name).__name__}, expected a state dict (name → tensor)"
            )
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{where}: {name} is of type {type(tensor).__name__}, expected a tensor: give a state dict alone"
            )
        if tensor.layout != torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise CheckpointError(f"{where}: {name} is stored as {layout}, expected a dense tensor: use its to_dense()")
        if tensor.is_meta:
            raise CheckpointError(f"{where}: {name} is on the meta device and has no values; load the weights first")
        dtype = _DTYPE_NAMES.get(tensor.dtype, dtype_word(tensor.dtype))
        infos[name] = TensorInfo(name, tuple(tensor.shape), dtype, where, 0, tensor.numel() * tensor.itemsize)
        loaders[name] = _loader(tensor)
    return infos, loaders


def _loader(tensor: Tensor) -> Loader:
    return lambda start, stop: tensor.detach()[start:stop] if tensor.ndim else tensor.detach()
