"""What of a model a recipe must know: parameters by how they are stored, the adapter's, the largest module.

A size without a model (`--params`) has the proportions of a typical model of that size; the adapter is that model's.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from lowrank_probe.errors import ProbeError
from lowrank_probe.recipes import NF4_CODES
from lowrank_probe.training_steps import Step
from lowrank_probe.typical_shapes import SIZES, is_size
from lowrank_probe.weight_shapes import ModelShape, Weight

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*([KMBT]?)", re.IGNORECASE)
_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Gathered:
    """Entries that a card gathers at once: `codes` stored in 4 bits, the `rest` as the base's other weights are."""

    codes: int
    rest: int

    def n_bytes(self, each: float) -> float:
        """Bytes, at `each` of what is not in 4 bits."""
        return NF4_CODES * self.codes + each * self.rest

    def formula(self, each: float) -> str:
        """How these bytes come about."""
        rest = f"{each:g} B × {self.rest:,}"
        both = f"({NF4_CODES:g} B × {self.codes:,} + {rest})" if self.rest else f"{NF4_CODES:g} B × {self.codes:,}"
        return both if self.codes else rest


@dataclass(frozen=True)
class Counts:
    """Parameters of a model and of its adapter.

    total: all of the model's. quantizable: entries of what bitsandbytes makes 4-bit, in n_quantizable tensors of which
    the largest has largest_quantizable: every Linear and Conv1D but the output head, no biases, no stacks of experts.
    stacks: entries of those. tables: entries of embedding tables. whole: of the model as the method stores it;
    largest_module: of the module with the most bytes; largest_block: of such a block, or of a table that has more.
    adapter: trainable parameters of the adapter, 0 for full fine-tuning. adapter_header: bytes of its file that are not
    parameters.
    """

    total: int
    quantizable: int
    n_quantizable: int
    largest_quantizable: int
    stacks: int
    tables: int
    whole: Gathered
    largest_module: Gathered
    largest_block: Gathered
    adapter: int
    adapter_header: int

    @property
    def trained(self) -> int:
        return self.adapter or self.total


def parse_params(text: str | float) -> int:
    """A number of parameters: 70B, 7e9, 135M, 70000000000. Raises `ProbeError` for what is none."""
    said = str(text).strip().replace("_", "").replace(",", "")
    found = _SIZE.fullmatch(said)
    number = float(found[1]) * _UNITS[found[2].upper()] if found else math.nan
    if not is_size(number):
        raise ProbeError(f"--params {text}: {SIZES}")
    return round(number)


def count(shape: ModelShape, step: Step, n_parameters: int | None = None) -> Counts:
    """The counts of a model; `n_parameters` scales all but the adapter's to another size. Errors as its LoRA count."""
    scale = 1.0 if n_parameters is None else n_parameters / shape.n_parameters
    quantizable = [w for w in shape.weights if w.kind in ("linear", "conv1d") and w.name != shape.head and not w.tied]
    stacks = sum(w.n_parameters for w in shape.weights if w.kind == "parameter" and len(w.shape) == 3)
    tables = [w for w in shape.weights if w.kind == "embedding" and not w.tied]
    packed = {w.name for w in quantizable} if step.method == "qlora" else set()
    per_layer: dict[int, list[Weight]] = {}
    for weight in shape.weights:
        for layer in weight.layers:
            per_layer.setdefault(layer, []).append(weight)

    def gathered(weights: Iterable[tuple[Weight, int]]) -> Gathered:
        """Of so many of each of these modules."""
        codes = rest = 0
        for weight, n in weights:
            inside = math.prod(weight.shape) if weight.name in packed else 0
            codes, rest = codes + n * inside, rest + n * (weight.n_parameters // weight.count - inside)
        return Gathered(round(scale * codes), round(scale * rest))

    def most(units: Iterable[Gathered]) -> Gathered:
        return max(units, key=lambda one: one.n_bytes(4.0))

    whole = gathered((w, w.count) for w in shape.weights)
    modules = [gathered([(w, 1)]) for w in shape.weights]
    blocks = [gathered((w, w.count // len(w.layers)) for w in weights) for weights in per_layer.values()]
    adapter, header = 0, 0
    if step.method != "full":
        dora = step.method == "dora"
        adapter = shape.lora_parameters(step.rank, step.targets, dora)
        header = sum(_header_bytes(weight, step.rank, dora, 4 * adapter) for weight in shape.adapted(step.targets))
    return Counts(
        total=round(scale * shape.n_parameters),
        quantizable=round(scale * sum(w.count * math.prod(w.shape) for w in quantizable)),
        n_quantizable=sum(w.count for w in quantizable),
        largest_quantizable=round(scale * max((math.prod(w.shape) for w in quantizable), default=0)),
        stacks=round(scale * stacks),
        tables=round(scale * sum(w.n_parameters for w in tables)),
        whole=whole,
        largest_module=most(modules),
        largest_block=most([*blocks, *(gathered([(w, w.count)]) for w in tables)]),
        adapter=adapter,
        adapter_header=header + 64 if adapter else 0,
    )


def _header_bytes(weight: Weight, rank: int, dora: bool, n_bytes: int) -> int:
    """Bytes of a safetensors header for the factors of all these modules, under PEFT's names."""
    m, n = weight.sides
    r = rank * weight.rank_factor * weight.copies
    shapes = {"lora_A.weight": [r, n], "lora_B.weight": [m, r]} | ({"lora_magnitude_vector": [m]} if dora else {})
    offset = "0" * max(1, len(str(n_bytes)) - 1)
    name = weight.name.replace("*", "00" if len(weight.layers) > 10 else "0")
    lines = (
        f'"base_model.model.{name}.{leaf}":{{"dtype":"F32","shape":{list(shape)},"data_offsets":[{offset},{offset}]}},'
        for leaf, shape in shapes.items()
    )
    return weight.count * sum(len(line) for line in lines)
