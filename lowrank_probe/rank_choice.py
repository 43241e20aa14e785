"""How the ranks of an extraction are chosen: a list of ranks, an energy, "auto" or a budget. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_probe import allocation
from lowrank_probe.allocation import Allotment, Budget, Unit
from lowrank_probe.errors import ProbeError


@dataclass(frozen=True)
class RankChoice:
    """One of ranks, energy, auto, budget; then what holds for all of them. Checked once; raises `ProbeError`.

    ranks: one adapter each. energy: share of each matrix's ‖ΔW‖² to keep. auto: `allocation.auto`. budget: of all
    matrices together; text, such as "40M" or "80MB", is read as `allocation.parse_budget` does. denoised: energies
    without storage noise. max_rank, rank_multiple: as in `allocation`, max_rank rounded down to a multiple.
    """

    ranks: tuple[int, ...] = ()
    energy: float | None = None
    auto: bool = False
    budget: Budget | str | None = None
    denoised: bool = False
    max_rank: int | None = None
    rank_multiple: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.budget, str):
            object.__setattr__(self, "budget", allocation.parse_budget(self.budget))
        given = [bool(self.ranks), self.energy is not None, self.auto, self.budget is not None]
        if sum(given) != 1:
            raise ProbeError("expected one of --rank, --energy and --budget; give one")
        for rank in self.ranks:
            if rank < 1:
                raise ProbeError(f"rank is {rank}, expected at least 1")
        if len(set(self.ranks)) < len(self.ranks):
            raise ProbeError(f"ranks {', '.join(map(str, self.ranks))}: one is given twice")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ProbeError(f"energy is {self.energy}, expected a share of ‖ΔW‖² above 0 and at most 1, such as 0.9")
        if self.denoised and (self.ranks or self.auto):
            raise ProbeError("--denoised goes with --energy or --budget: a given rank needs no spectrum, auto denoises")
        for word, value in (("max_rank", self.max_rank), ("rank_multiple", self.rank_multiple)):
            if value is not None and value < 1:
                raise ProbeError(f"{word} is {value}, expected at least 1")
        allocation.whole_steps(self.max_rank, self.rank_multiple)

    @property
    def needs_spectra(self) -> bool:
        """Whether ranks can be told only after the singular values of all matrices."""
        return not self.ranks

    @property
    def needs_noise(self) -> bool:
        """Whether the storage noise of every matrix has to be assessed."""
        return self.auto or self.denoised

    @property
    def most(self) -> int:
        """The largest rank that is asked for by number."""
        rounded = -(-max(self.ranks) // self.rank_multiple) * self.rank_multiple
        return min(rounded, self._cap or rounded)

    @property
    def _cap(self) -> int | None:
        return allocation.whole_steps(self.max_rank, self.rank_multiple)

    def facts(self) -> dict[str, Any]:
        """What was asked for, JSON's own types, without what was left open."""
        told = {key: value for key, value in vars(self).items() if value != getattr(RankChoice, key)}
        return told | ({"ranks": list(self.ranks)} if self.ranks else {})

    def allot(
        self, units: Sequence[Unit], bytes_per_parameter: int, other_bytes: int = 0
    ) -> dict[str, tuple[Allotment, ...]]:
        """Adapter → the rank of every unit; the adapter's label is "r4", "r8", … where there are several, else "".

        other_bytes: of the file, for what is no factor; a budget in bytes pays for them too. Raises `ProbeError` as
        the rules of `allocation`.
        """
        limits: dict[str, Any] = {"max_rank": self._cap, "rank_multiple": self.rank_multiple}
        if self.energy is not None:
            return {"": allocation.by_energy(units, self.energy, denoised=self.denoised, **limits)}
        if self.auto:
            return {"": allocation.auto(units, **limits)}
        if self.budget is not None:
            assert not isinstance(self.budget, str)  # read at the start
            spend: dict[str, Any] = {**self.budget, "bytes_per_parameter": bytes_per_parameter}
            spend["file_overhead"] = allocation.FILE_OVERHEAD + other_bytes
            return {"": allocation.by_budget(units, **spend, denoised=self.denoised, **limits)}
        labels = ["" if len(self.ranks) == 1 else f"r{rank}" for rank in self.ranks]
        return {label: allocation.fixed(units, rank, **limits) for label, rank in zip(labels, self.ranks, strict=True)}
