"""`Options`: which tensors are looked at, and how; the same for `spectrum` and `trajectory`. Imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypedDict

from lowrank_probe.errors import ProbeError
from lowrank_probe.words import file_size

# Called with (what is finished, done, total).
Progress = Callable[[str, int, int], None]
# Bytes: what Python and torch take, and room for a matrix with a short side of 4096 that lies on disk.
LEAST_MEMORY: Final = 1_500_000_000
# What `--dtype` may ask for, and what safetensors call it.
STORED: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Options:
    """The options of a run, as `spectra.spectrum` explains them, checked once. memory, gpu_memory: in bytes.

    Raises `ProbeError` for values that no run can have; whether a device is there, `devices.choose_device` finds.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    layers: tuple[int, int] | None = None
    split: bool = True
    top: int | None = None
    exact_tail: bool = False
    base_rounded: bool = False
    device: str = "auto"
    seed: int = 0
    ray: str | None = None
    memory: float | None = None
    gpu_memory: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.include, str) or isinstance(self.exclude, str):
            raise ProbeError('include and exclude are lists of patterns, such as ["q_proj"]')
        span = self.layers
        if span is not None and not (isinstance(span, Sequence) and len(span) == 2 and 0 <= span[0] <= span[1]):
            raise ProbeError(f"layers={span}: expected (first, last) with 0 ≤ first ≤ last")
        if self.top is not None and not (_is_whole(self.top) and self.top >= 1):
            raise ProbeError(f"top={self.top!r}: expected at least 1 singular value, or None for all of them")
        if not (_is_whole(self.seed) and self.seed >= 0):
            raise ProbeError(f"seed={self.seed!r}: expected a whole number from 0")
        if self.top is not None and self.exact_tail:
            raise ProbeError(
                f"top={self.top} and exact_tail=True: exact_tail computes every value; leave one of the two out"
            )
        for name, asked in (("--memory", self.memory), ("--gpu-memory", self.gpu_memory)):
            if asked is not None and not isinstance(asked, int | float):
                raise ProbeError(f"{name} {asked!r}: expected a number of bytes")
            if asked is not None and not asked >= LEAST_MEMORY:
                raise ProbeError(f"{name} {file_size(asked)}: expected at least {file_size(LEAST_MEMORY)}")
        if self.ray is not None and self.gpu_memory is not None:
            raise ProbeError("--gpu-memory with --ray: a task has a GPU for itself; leave one of the two out")

    def facts(self) -> dict[str, Any]:
        """As the facts of a run keep them, JSON's own types; devices have facts of their own, clusters change none."""
        known = asdict(self) | {"include": list(self.include), "exclude": list(self.exclude)}
        known["layers"] = list(self.layers) if self.layers else None
        for name in ("device", "ray", "memory", "gpu_memory"):
            del known[name]
        return known


class Keywords(TypedDict, total=False):
    """The fields of `Options` as keyword arguments."""

    include: Sequence[str]
    exclude: Sequence[str]
    layers: tuple[int, int] | None
    split: bool
    top: int | None
    exact_tail: bool
    base_rounded: bool
    device: str
    seed: int
    ray: str | None
    memory: float | None
    gpu_memory: float | None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
