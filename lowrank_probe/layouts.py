"""What matrices lie inside one stored tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowrank_probe.layers import is_conv1d


@dataclass(frozen=True)
class Part:
    """One matrix (out, in) inside a stored tensor."""

    label: str = ""
    layer_type: str | None = None
    expert: int | None = None
    transposed: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        return (stored[1], stored[0]) if self.transposed else (stored[0], stored[1])

    def take(self, W: Tensor) -> Tensor:
        return W.T if self.transposed else W

    def span(self, stored: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]] | None:
        return None


def parts(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any], *, split: bool = True
) -> tuple[list[Part], str]:
    """The matrices of one stored tensor and a note."""
    if len(shape) > 2:
        return [], f"{len(shape)}-D: not analysed"
    return [Part(transposed=is_conv1d(name, config.get("model_type")))], ""
