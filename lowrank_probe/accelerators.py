"""The accelerators that training runs on and the memory a process gets there; the table is `accelerators.csv`.

A spec sheet's "80 GB" is neither what a process gets nor a unit: cards are sold in GB of 2³⁰ bytes (H100: 80) or of 10⁹
(B200, H200), and the driver and error correction take some of it. `usable_from` says where the number comes from: the
total that PyTorch names on a real card (the least where cards differ), the HBM that XLA compiles for, or an estimate.
"""

import csv
import difflib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from lowrank_probe.errors import ProbeError

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G)", re.IGNORECASE)
_SAID: Final = re.compile(r"nvidia|geforce|tesla|amd|instinct|radeon|google|rtx|[^a-z0-9.]")
_OF_NOMINAL: Final = 0.94  # of a card of which only the size is known: the least share in the table's cards


@dataclass(frozen=True)
class Accelerator:
    """One card (or chip, or computer with unified memory).

    nominal_gb: as sold. usable_bytes: what a process can have. usable_from: where that number comes from. common:
    one of the dozen that stand for the rest where space is short. bf16: it computes in bfloat16 by hardware; a card of
    which only the size is known is taken to.
    """

    name: str
    vendor: str
    nominal_gb: float
    usable_bytes: int
    usable_from: str
    common: bool
    aliases: tuple[str, ...]
    bf16: bool = True

    @property
    def is_estimate(self) -> bool:
        return self.usable_from.startswith("estimate")

    @property
    def bitsandbytes(self) -> bool:
        """Whether bitsandbytes has kernels for it: NVIDIA's and AMD's, not Google's and Apple's."""
        return self.vendor not in ("Google", "Apple")

    @property
    def label(self) -> str:
        """The name with the size as sold, where the name does not say it: H100 (80 GB)."""
        size = f"{self.nominal_gb:g}"
        return self.name if f"{size}GB" in self.name.replace(" ", "") else f"{self.name} ({size} GB)"

    @property
    def plural(self) -> str:
        """The name of several: H100s, 48 GB cards."""
        return f"{self.name}s"

    @property
    def cards(self) -> str:
        """Several with their size: H100 (80 GB) cards, 48 GB cards."""
        return f"{self.label}s" if self.label.endswith(" card") else f"{self.label} cards"


@lru_cache(maxsize=1)
def accelerators() -> tuple[Accelerator, ...]:
    """Every row of the table, in its order."""
    with Path(__file__).with_name("accelerators.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Accelerator(
                row["name"], row["vendor"], float(row["nominal_gb"]), round(float(row["usable_gib"]) * 2**30),
                row["usable_from"], row["common"] == "yes", tuple(filter(None, row["aliases"].split("|"))),
                row["bf16"] != "no",
            )
            for row in csv.DictReader(file)
        )  # fmt: skip


def find_accelerator(name: str) -> Accelerator:
    """The accelerator of that name, or a card of that size ("48GB").

    Upper or lower case, makers' names and spaces make no difference: "NVIDIA H100 80GB" is H100. Raises `ProbeError`
    with the nearest names.
    """
    known: dict[str, Accelerator] = {}
    for one in accelerators():
        for said in (one.name, *one.aliases):
            known.setdefault(_plain(said), one)
    if (found := known.get(_plain(name))) is not None:
        return found
    if size := _SIZE.fullmatch(name.strip()):
        gb = float(size[1])
        if gb <= 0:
            raise ProbeError(f"GPU {name!r} has no memory; give a size such as 48GB, or a name such as H100")
        usable = round(gb * _OF_NOMINAL * 2**30)
        said = f"estimate: {100 * _OF_NOMINAL:.0f} % of the size"
        return Accelerator(f"{gb:g} GB card", "", gb, usable, said, False, ())
    names = _nearest(name, known)
    raise ProbeError(f"GPU {name!r} is not known; nearest: {', '.join(names)}; or give its memory, such as 48GB")


def _nearest(name: str, known: dict[str, Accelerator]) -> list[str]:
    """Names like an unknown one: of its series or maker where that is all it says, else those spelled alike."""
    said = name.strip().lower()
    series = [one.name for one in accelerators() if said and said in f"{one.vendor} {one.name}".lower()]
    near = difflib.get_close_matches(_plain(name), known, n=6, cutoff=0.4)
    alike = list(dict.fromkeys(known[one].name for one in near))[:3]
    return series[:6] or alike or ["H100", "RTX 4090", "MI300X"]


def _plain(name: str) -> str:
    return _SAID.sub("", name.lower())
