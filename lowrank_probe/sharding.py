"""How a training run is spread over cards: what of it a card holds, by ZeRO's and FSDP's stages.

Legend: N parameters, n cards. Stage 0 is plain data parallelism (DDP): a card holds everything. Stage 1 spreads the
optimizer's states and fp32 master weights, stage 2 the gradients too, stage 3 the weights too.
Source: Rajbhandari et al. 2020; DeepSpeed's estimate_zero2/3_model_states_mem_needs (stage 2: 4N + 16N/n, stage 3:
4·largest module + 18N/n in mixed precision); torch.distributed.fsdp (SHARD_GRAD_OP is 2, FULL_SHARD is 3).
"""

from dataclasses import dataclass
from typing import Final, Literal

from lowrank_probe.errors import ProbeError

STAGES: Final = {
    0: "DDP: every card holds everything",
    1: "ZeRO stage 1: optimizer states spread",
    2: "stage 2: optimizer states and gradients spread",
    3: "stage 3: optimizer states, gradients and weights spread",
}


@dataclass(frozen=True)
class Sharding:
    """stage on `gpus` cards, by DeepSpeed's ZeRO or PyTorch's FSDP."""

    gpus: int = 1
    stage: int = 0
    library: Literal["zero", "fsdp"] = "zero"

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ProbeError(f"{self.gpus} GPUs: expected at least 1")
        allowed = (2, 3) if self.library == "fsdp" else (0, 1, 2, 3)
        if self.stage not in allowed:
            kinds = "2 (SHARD_GRAD_OP) or 3 (FULL_SHARD)" if self.library == "fsdp" else "0, 1, 2 or 3"
            raise ProbeError(f"--{self.library} {self.stage}: expected {kinds}")

    @property
    def label(self) -> str:
        """Such as "ZeRO stage 3 over 8 cards"."""
        if self.gpus == 1:
            return "one card"
        how = "DDP" if self.stage == 0 else f"{'FSDP' if self.library == 'fsdp' else 'ZeRO'} stage {self.stage}"
        return f"{how} over {self.gpus} cards"

    @property
    def is_fsdp(self) -> bool:
        return self.library == "fsdp"

    def spreads(self, since: int) -> bool:
        """Whether what is spread from stage `since` on is spread here."""
        return self.gpus > 1 and self.stage >= since

    def on_card(self, n_bytes: float, since: int) -> float:
        """Bytes on one card of what is spread from stage `since` on."""
        return n_bytes / self.gpus if self.spreads(since) else n_bytes

    def over(self, since: int) -> str:
        """The end of a formula: how it is divided."""
        return f" / {self.gpus} cards" if self.spreads(since) else ""
