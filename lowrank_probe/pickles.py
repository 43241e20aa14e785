"""PyTorch pickles: opened weights-only (never arbitrary code), and memory-mapped where their format allows it."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.errors import CheckpointError
from lowrank_probe.memory import tensors_in_memory
from lowrank_probe.safetensors_headers import what_begins_so
from lowrank_probe.tensor_info import Opened

# Under these keys training scripts put the state dict among other things.
_WRAPPERS: Final = ("state_dict", "model_state_dict", "model", "module")
_UNSAFE: Final = re.compile(r"\bGLOBAL ([\w.]+)")  # how torch names what it will not unpickle


def open_pickle(file: Path) -> Opened:
    """A state dict saved by `torch.save`. Raises `CheckpointError` where it holds anything but named tensors.

    The zip format (torch ≥ 1.6) is memory-mapped; older files are read whole.
    """
    content = _load(file)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: expected a state dict (name → tensor), found {type(content).__name__}")
    for key in _WRAPPERS:
        if isinstance(content.get(key), Mapping) and all(isinstance(v, Tensor) for v in content[key].values()):
            content = content[key]
            break
    return tensors_in_memory(content, file)


def _load(file: Path) -> Any:
    try:
        with open(file, "rb") as handle:
            prefix = handle.read(8)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    if prefix == b"version " or prefix.lstrip()[:1] == b"<" or len(prefix) < 8:
        raise CheckpointError(
            f"{file}: cannot be opened as PyTorch weights ({what_begins_so(prefix, file.stat().st_size)})"
        )
    try:
        with warnings.catch_warnings():  # of torch to whoever wrote the file
            warnings.simplefilter("ignore")
            return torch.load(
                file, map_location="cpu", weights_only=True, mmap=prefix.startswith(b"PK\x03\x04") or None
            )
    except Exception as error:  # damage raises ten kinds, AssertionError and struct.error among them
        said = str(error)
        unsafe = _UNSAFE.search(said)
        if unsafe:
            raise CheckpointError(
                f"{file}: holds {unsafe[1]}, not only tensors; unpickling that could run "
                "code, so it is refused: save the state dict alone, as safetensors"
            ) from None
        # Torch's first lines are advice to load the file unsafely.
        lines = [line.strip() for line in said.rpartition("WeightsUnpickler error:")[2].splitlines() if line.strip()]
        reason = lines[0][:200] if lines and "weights_only" not in lines[0] else type(error).__name__
        raise CheckpointError(
            f"{file}: cannot be opened as PyTorch weights ({reason}); not written by torch.save, or damaged: "
            "download it again, or save it as safetensors"
        ) from None
