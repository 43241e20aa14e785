"""One training step: what of it decides how much memory it needs, and what was measured of it.

The closed forms and the measurements read it. It imports nothing heavy, and says
nothing of the model: that is a `ModelShape`, or a config.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from lowrank_probe.errors import ProbeError

Method = Literal["full", "lora", "qlora", "dora", "rslora"]
Precision = Literal["fp32", "bf16", "mixed"]
PHASES: Final = ("forward", "loss", "backward", "step")
# What is made in a phase and is no weight, gradient or state.
COMPONENTS: Final = {"forward": "activations", "loss": "logits", "backward": "working", "step": "step transient"}
# Head and loss go over the tokens in so many pieces with a chunked loss, each recomputed in the backward pass.
CHUNKS: Final = 8
# Granularity of CUDA's attention kernels: rows of the efficient one's log-sum-exp; rows and columns of flash's float32
# sums in its backward pass.
LSE_ROWS: Final = 32
ACCUMULATOR: Final = (128, 32)
_MOST: Final = {"batch": 2**24, "seq": 2**24, "rank": 10**6}  # more is a typing error


def up(n: int, multiple: int) -> int:
    """⌈n/multiple⌉·multiple."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Step:
    """One optimizer step on `batch` sequences of `seq` tokens without padding; seq None where it is not known.

    rank, targets, adapter_dtype: of the adapter, nothing for `full`; it is float32 by PEFT's default. precision: "fp32"
    and "bf16" hold weights, activations, gradients and states of what is trained in that dtype; "mixed" is autocast to
    bf16, over fp32 weights for `full` and over frozen bf16 ones for an adapter. "qlora" is always under autocast, over
    4-bit weights and all else in float32 (`prepare_model_for_kbit_training`, `Trainer(bf16=True)`). flash: PyTorch's
    fused attention against matrices of s² scores ("eager"). chunked_loss: head and loss in `CHUNKS` pieces.
    held_outputs: the caller keeps the model's outputs, and so the logits, through the backward pass. double_quant: of
    qlora: the constants of its 4-bit weights are quantized too.
    """

    batch: int = 1
    seq: int | None = None
    method: Method = "lora"
    rank: int = 16
    targets: str | Sequence[str] = "all-linear"
    precision: Precision = "bf16"
    optimizer: str = "adamw"
    checkpointing: bool = False
    flash: bool = True
    chunked_loss: bool = False
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    held_outputs: bool = False
    double_quant: bool = True

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            if (value := getattr(self, name)) is not None and value < 1:
                raise ProbeError(f"{name}: expected 1 or more, found {value}")
            if value is not None and value > most:
                raise ProbeError(f"{name}: expected at most {most:,}, found {value}")
        for name, allowed in (("method", get_args(Method)), ("precision", get_args(Precision))):
            if (value := getattr(self, name)) not in allowed:
                raise ProbeError(f"{name}: expected one of {', '.join(allowed)}, found {value}")

    @property
    def tokens(self) -> int:
        """T = batch·seq; `ProbeError` where seq is not known."""
        if self.seq is None:
            raise ProbeError("activations need the sequence length: give --seq")
        return self.batch * self.seq

    @property
    def needs_bitsandbytes(self) -> bool:
        """Whether it takes 4-bit weights or 8-bit states, for which bitsandbytes has kernels."""
        return self.method == "qlora" or self.optimizer == "adamw-8bit"

    @property
    def needs_bf16(self) -> bool:
        """Whether anything is computed in bfloat16."""
        return self.precision != "fp32" or self.method == "qlora"

    @property
    def adapted(self) -> bool:
        """Whether an adapter is trained over frozen weights."""
        return self.method != "full"


@dataclass(frozen=True)
class Measured:
    """One step's peaks in bytes.

    how: "fake tensors", or the GPU's name. peaks: phase → bytes. components: phase → component → bytes at that moment:
    weights, adapter, gradients, optimizer, inputs and those of `COMPONENTS`; on a GPU, where only sums are known, what
    is there before the step, and "the rest". n_trainable, n_parameters: entries. seconds: for the whole measurement.
    batch, seq: of the step.
    """

    how: str
    peaks: Mapping[str, int]
    components: Mapping[str, Mapping[str, int]]
    n_trainable: int
    n_parameters: int
    seconds: float
    batch: int = 1
    seq: int | None = None

    @property
    def phase(self) -> str:
        """The phase that peaks."""
        return max(self.peaks, key=lambda phase: self.peaks[phase])

    @property
    def peak(self) -> int:
        return self.peaks[self.phase]
