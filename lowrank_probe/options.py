"""`Options`: which tensors are looked at, and how; the same for `spectrum` and `trajectory`. Imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypedDict

from lowrank_probe.errors import ProbeError

# Called with (what is finished, done, total).
Progress = Callable[[str, int, int], None]
# What `--dtype` may ask for, and what safetensors call it.
STORED: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Options:
    """The options of a run, as `spectra.spectrum` explains them, checked once.

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

    def __post_init__(self) -> None:
        if isinstance(self.include, str) or isinstance(self.exclude, str):
            raise ProbeError('include and exclude are lists of patterns, such as ["q_proj"]')
        span = self.layers
        if span is not None and not (isinstance(span, Sequence) and len(span) == 2 and 0 <= span[0] <= span[1]):
            raise ProbeError(f"layers={span}: expected (first, last) with 0 ≤ first ≤ last")
        if self.top is not None and self.top < 1:
            raise ProbeError(f"top={self.top}: expected at least 1 singular value, or None for all of them")
        if self.top is not None and self.exact_tail:
            raise ProbeError(
                f"top={self.top} and exact_tail=True: exact_tail computes every value; leave one of the two out"
            )

    def facts(self) -> dict[str, Any]:
        """As the facts of a run keep them, JSON's own types; devices have facts of their own, clusters change none."""
        known = asdict(self) | {"include": list(self.include), "exclude": list(self.exclude)}
        known["layers"] = list(self.layers) if self.layers else None
        del known["device"], known["ray"]
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
