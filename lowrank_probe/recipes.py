"""Bytes a parameter: what a trained, a frozen and a quantized parameter takes, each recipe with its source.

A number such as "16 bytes a parameter" means nothing without its recipe: fp32 Adam and the ZeRO paper's mixed precision
both come to 16, by other parts. What grows with batch and sequence is not here but in `activations`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from lowrank_probe.errors import ProbeError


@dataclass(frozen=True)
class Recipe:
    """Bytes of one trained parameter: weights + master + gradients + optimizer (and transient during its step).

    weights: as the forward pass uses them. master: fp32 copies beside them. optimizer: states that stay. transient:
    what the optimizer's step takes beyond that while it runs.
    """

    name: str
    weights: float
    master: float
    gradients: float
    optimizer: float
    source: str
    transient: float = 0.0

    @property
    def total(self) -> float:
        """Bytes a parameter that stay: without the transient."""
        return self.weights + self.master + self.gradients + self.optimizer


@dataclass(frozen=True)
class Optimizer:
    """An optimizer's states: `copies` of the parameter in the states' type, or `fixed` bytes whatever the type.

    transient: further copies of the parameter, in its type, while the step runs.
    """

    label: str
    copies: int
    source: str
    fixed: float = 0.0
    transient: int = 0


ADAM: Final = "two moments, Kingma & Ba 2015"
# The states of 8-bit Adam: two bytes, and an fp32 scale for each block of 256 of either.
EIGHT_BIT: Final = 2 * (1 + 4 / 256)
OPTIMIZERS: Final[Mapping[str, Optimizer]] = MappingProxyType({
    "adamw": Optimizer("Adam", 2, f"{ADAM}; fused, the default of transformers with torch ≥ 2.8"),
    "adamw-foreach": Optimizer(
        "foreach Adam", 2, f"{ADAM}; torch's foreach: one more copy of all parameters in its step", transient=1
    ),
    "adamw-8bit": Optimizer(
        "8-bit Adam", 0, "Dettmers et al. 2022; bitsandbytes: blocks of 256 with an fp32 scale", fixed=EIGHT_BIT
    ),
    "sgd-momentum": Optimizer("SGD with momentum", 1, "one buffer, torch.optim.SGD"),
    "sgd": Optimizer("SGD", 0, "no state"),
})  # fmt: skip

# (weights, master, gradients, bytes of a state, name, source)
PRECISIONS: Final = MappingProxyType({
    "fp32": (4.0, 0.0, 4.0, 4.0, "fp32", "all in fp32"),
    "bf16": (2.0, 0.0, 2.0, 2.0, "pure bf16", "weights, gradients and states in bf16: no fp32 master weights"),
    "mixed": (
        2.0, 4.0, 4.0, 4.0, "mixed precision",
        "fp32 master weights and gradients beside bf16 copies: Hugging Face, Megatron, DeepSpeed ZeRO-3",
    ),
})  # fmt: skip

ZERO_PAPER: Final = Recipe(
    "ZeRO paper's mixed Adam", 2.0, 4.0, 2.0, 8.0,
    "Rajbhandari et al. 2020, § 3.1: 2 + 2 + 12, gradients stay in 16 bits",
)  # fmt: skip

# A 4-bit NormalFloat code, and its constants: an fp32 absmax for 64 codes; with double quantization an 8-bit one for 64
# and an fp32 one for 256 of those.
NF4_CODES: Final = 0.5
NF4_ABSMAX: Final = 4 / 64
NF4_DOUBLE_ABSMAX: Final = 1 / 64 + 4 / (64 * 256)
NF4_TENSOR: Final = 64  # bytes a tensor: the table of codes (16 floats)
NF4_DOUBLE_TENSOR: Final = 1092  # and that of the quantized constants (256 floats) with their offset
NF4_SOURCE: Final = "Dettmers et al. 2023: NF4 in blocks of 64, as bitsandbytes stores it"


def recipe(precision: str, optimizer: str) -> Recipe:
    """The recipe of a trained parameter. Raises `ProbeError` for a precision or an optimizer that has none."""
    if precision not in PRECISIONS:
        raise ProbeError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if optimizer not in OPTIMIZERS:
        raise ProbeError(f"optimizer {optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
    weights, master, gradients, state, name, source = PRECISIONS[precision]
    states = OPTIMIZERS[optimizer]
    return Recipe(
        f"{name} {states.label}", weights, master, gradients, states.copies * state + states.fixed,
        f"{source}; {states.source}", states.transient * (master or weights),
    )  # fmt: skip


def adapter_recipe(adapter_dtype: str, optimizer: str) -> Recipe:
    """The recipe of an adapter's parameter: PEFT keeps adapters in fp32, also beside a bf16 base."""
    if adapter_dtype not in ("float32", "bfloat16"):
        raise ProbeError(f"adapter dtype {adapter_dtype!r}: expected float32 or bfloat16")
    found = recipe("fp32" if adapter_dtype == "float32" else "bf16", optimizer)
    said = (
        "PEFT's default, autocast_adapter_dtype=True" if adapter_dtype == "float32" else "autocast_adapter_dtype=False"
    )
    return replace(found, name=f"{found.name} adapter", source=f"{said}; {found.source}")


def frozen_bytes(precision: str) -> float:
    """Bytes of a frozen parameter of the base as it is loaded: 4 in fp32, else 2."""
    return 4.0 if precision == "fp32" else 2.0
