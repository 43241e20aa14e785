"""`TensorInfo`: what a header says of one tensor; the dtypes that can be read as weights; `Loader`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from lowrank_probe.errors import CheckpointError
from lowrank_probe.remote_files import File

if TYPE_CHECKING:
    from torch import Tensor

FLOATS: Final = ("F64", "F32", "F16", "BF16")
# Width in bytes of every dtype a safetensors header may name; only `FLOATS` can be read as weights.
WIDTHS: Final[dict[str, float]] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5, "F6_E2M3": 0.75,
    "F6_E3M2": 0.75, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: shape, dtype as the header names it, file, and byte range in the file.

    quantized: the stored numbers are codes, from which reading makes float32 values (GGUF, fp8 with its scale).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: File
    start: int
    stop: int
    quantized: bool = False

    @property
    def n_bytes(self) -> int:
        return self.stop - self.start

    @property
    def wide(self) -> bool:
        """Whether its values are float32 or wider, so that differences are taken in float64."""
        return self.quantized or self.dtype in ("F32", "F64")

    def check_dtype(self) -> None:
        """Raise `CheckpointError` for a dtype that is not a float of at least 16 bits, nor can be dequantized."""
        if self.dtype not in FLOATS and not self.quantized:
            raise CheckpointError(
                f"{self.name} in {self.file}: dtype {self.dtype} is not supported (expected one of "
                f"{', '.join(FLOATS)}); dequantize or convert the checkpoint first, or leave it out with --exclude"
            )


# (start, stop) → those rows of a tensor's first dimension, (stop − start, …) in its stored dtype, or float32 where that
# is quantized; of a scalar the scalar. What is opened: name → its header, name → its loader.
Loader: TypeAlias = "Callable[[int, int], Tensor]"
Opened: TypeAlias = tuple[dict[str, TensorInfo], dict[str, Loader]]
