"""Accuracy: what `probe spectrum` and its kernels print, against a float64 SVD (LAPACK through numpy).

Planted spectra and real fp32 fine-tunes, by the whole spectrum, by `--exact-tail` and by `--top 16`. Prints the worst
errors beside their bars, and whether every printed bound holds; writes docs/benchmarks-accuracy.md. Exit 1 on a FAIL.

    python benchmarks/accuracy.py             # about 1 minute on 2 cores
    python benchmarks/accuracy.py --quick     # planted spectra only: no downloads
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import real_models
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tables import markdown
from torch import Tensor

import lowrank_probe as lp
from lowrank_probe import svd
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.devices import choose_device
from lowrank_probe.facts import machine_facts
from lowrank_probe.runs import Result

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
TOP: Final = 16
# Relative accuracy is promised down to this share of σ₁.
DOWN_TO: Final = 2e-5
BARS: Final = {
    "σ, relative, down to 2e-5·σ₁": 1e-6,
    "σ with --top, relative, down to 2e-5·σ₁": 1e-6,
    "σ with --exact-tail, absolute / σ₁": 1e-12,
    "energies, whole spectrum": 1e-9,
    "energies, width of the bracket of --top": 1e-6,
}

Values = NDArray[np.float64]


@dataclass
class Errors:
    """The worst errors of one matrix, or of several. NaN: not applicable."""

    relative: float = math.nan
    top: float = math.nan
    exact: float = math.nan
    energy: float = math.nan
    width: float = math.nan
    certified: int = 0
    fell_through: int = 0
    broken: tuple[str, ...] = ()

    def __or__(self, other: "Errors") -> "Errors":
        return Errors(
            *(float(np.fmax(a, b)) for a, b in zip(self.numbers(), other.numbers(), strict=True)),
            self.certified + other.certified, self.fell_through + other.fell_through, self.broken + other.broken,
        )  # fmt: skip

    def numbers(self) -> tuple[float, float, float, float, float]:
        """In the order of `BARS`."""
        return self.relative, self.top, self.exact, self.energy, self.width


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="planted spectra only, no downloads")
    quick = parser.parse_args().quick
    rows: list[tuple[str, int, Errors]] = []
    with tempfile.TemporaryDirectory() as scratch:
        found = dict(compare(*write_planted(Path(scratch)), Path(scratch)))
    rows += [(label(name), 1, found[f"{name}.weight"]) for name in planted()]
    for title, base, tuned in () if quick else real_pairs():
        total, count = Errors(), 0
        with tempfile.TemporaryDirectory() as scratch:
            for _, one in compare(base, tuned, Path(scratch)):
                total, count = total | one, count + 1
        rows.append((title, count, total))
    overall = Errors()
    for _, _, one in rows:
        overall |= one
    heads = ["update", "matrices", *BARS, f"--top {TOP}", "every printed bound holds"]
    cells = [
        [title, str(count), *(_cell(v) for v in one.numbers()), _tier1(one), _holds(one)] for title, count, one in rows
    ]
    verdicts = [
        (f"{name}: worst {_cell(worst)}, bar {bar:g}", worst <= bar)
        for (name, bar), worst in zip(BARS.items(), overall.numbers(), strict=True)
    ]
    verdicts.append((f"printed bounds that do not hold: {len(overall.broken)}", not overall.broken))
    for line in overall.broken:
        print("broken:", line)
    note = (
        "Worst error over the matrices of a row, of what the command prints and of what the kernels return; "
        f"`--top {TOP}` certifies the largest {TOP} or falls through to the whole spectrum. A bound that holds: "
        "|σ̂ − σ| ≤ its `error` for every value, ≤ `sigma_error`·σ₁ in the table, the first `n_resolved` within 1e-6 of "
        "themselves, energies within `energy_error`, the sum of the top values inside its bracket. Planted updates are stored in "
        "fp64 on a Gaussian base of standard deviation 0.02; σ₁ = 1."
    )
    publish("accuracy", "Accuracy against a float64 SVD", note, [("", heads, cells)], verdicts, write=not quick)
    return 0 if all(ok for _, ok in verdicts) else 1


def planted() -> dict[str, tuple[tuple[int, int], Values]]:
    """name → (shape, singular values with σ₁ = 1) of the planted updates."""
    i = np.arange(512, dtype=np.float64)
    spikes = np.concatenate([np.linspace(1.0, 0.3, 12), np.linspace(0.05, 0.001, 500)])
    return {
        "flat": ((512, 512), np.ones(512)),
        "steep": ((512, 512), 10.0 ** (-14 * i / 511)),
        "one_over_i": ((512, 512), 1 / (1 + i)),
        "spikes_and_noise": ((512, 512), spikes),
        "tall": ((2048, 256), 1 / (1 + i[:256])),
        "wide": ((256, 2048), 1 / (1 + i[:256])),
        "tall_steep": ((2048, 256), 10.0 ** (-14 * i[:256] / 255)),
        "rank_one": ((512, 384), np.ones(1)),
        "zero": ((256, 256), np.zeros(1)),
    }


def label(name: str) -> str:
    """A planted matrix's name with its shape."""
    (m, n), _ = planted()[name]
    words = {"steep": "steep, 1 → 1e-14", "tall_steep": "tall, steep", "one_over_i": "1/i", "rank_one": "rank 1"}
    return f"{words.get(name, name.replace('_', ' '))} {m}×{n}"


def write_planted(root: Path) -> tuple[Path, Path]:
    """A pair of fp64 checkpoints that holds all planted updates."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for name, (shape, s) in planted().items():
        W = 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)
        base[f"{name}.weight"], tuned[f"{name}.weight"] = W, W + update(shape, torch.from_numpy(s), generator)
    return save(root / "base", base), save(root / "tuned", tuned)


def update(shape: tuple[int, int], s: Tensor, generator: torch.Generator) -> Tensor:
    """U·diag(s)·Vh in float64, U (m, r) and Vh (r, n) random and orthonormal."""
    U, V = (torch.linalg.qr(torch.randn(d, len(s), generator=generator, dtype=torch.float64)).Q for d in shape)
    return (U * s) @ V.T


def real_pairs() -> Iterator[tuple[str, Path, Path]]:
    """(title, base, tuned) of real full fine-tunes stored in fp32."""
    antibody, bert = real_models.anarcii(), real_models.rxnfp()
    yield "anarcii antibody → shark", antibody["antibody"], antibody["shark"]
    yield "anarcii antibody → tcr", antibody["antibody"], antibody["tcr"]
    yield "rxnfp BERT → 50 reaction classes", bert["bert_pretrained"], bert["bert_ft_10k_25s"]


def compare(base: Path, tuned: Path, scratch: Path) -> Iterator[tuple[str, Errors]]:
    """(matrix, errors) for every matrix of a pair: three commands and three kernels against numpy's float64 SVD."""
    runs = {
        "full": probe(scratch / "full", base, tuned, "--no-split"),
        "exact": probe(scratch / "exact", base, tuned, "--no-split", "--exact-tail"),
        "top": probe(scratch / "top", base, tuned, "--no-split", "--top", str(TOP)),
    }
    sides = open_checkpoint(base), open_checkpoint(tuned)
    for line in runs["full"].ledger.to_dict("records"):
        if line["status"] not in ("analysed", "unchanged") or "×" not in line["base_shape"]:
            continue
        name = line["name"]
        A = sides[1].read(line["tuned_name"]).double() - sides[0].read(name).double()
        true = np.linalg.svd(A.numpy(), compute_uv=False)
        kernels = {
            "full": svd.full_spectrum(A),
            "exact": svd.exact_spectrum(A),
            "top": svd.top_spectrum(A, TOP) or svd.full_spectrum(A),
        }
        yield (
            name,
            _matrix(name, true, kernels, {tier: run for tier, run in runs.items() if line["status"] == "analysed"}),
        )


def _matrix(name: str, true: Values, kernels: dict[str, svd.SingularValues], runs: dict[str, Result]) -> Errors:
    """The errors of one matrix; without `runs`, the commands said that it is unchanged (zero)."""
    found, broken = Errors(), []
    if not runs:
        if true[0] != 0.0 or any(k.values.any() or k.error.any() for k in kernels.values()):
            broken.append(f"{name}: the command says unchanged, the SVD does not")
        return Errors(relative=0.0, top=0.0, exact=0.0, energy=0.0, broken=tuple(broken))
    total, energies = float((true**2).sum()), np.cumsum(true**2) / float((true**2).sum())
    for tier, kernel in kernels.items():
        row = runs[tier].table.set_index("name").loc[name]
        printed = runs[tier].singular_values[name]
        if row["method"] != kernel.method:
            broken.append(f"{name}: the command took {row['method']}, the kernel {kernel.method}")
        for source, s, bound, energy_bound in (
            ("kernel", kernel.values, kernel.error, kernel.energy_error),
            (
                "command",
                printed,
                np.full(len(printed), float(row["sigma_error"]) * printed[0]),
                float(row["energy_error"]),
            ),
        ):
            off, where = np.abs(s - true[: len(s)]), f"{name}, {tier}, {source}"
            energy_off = np.abs(np.cumsum(s**2) / total - energies[: len(s)])
            large = true[: len(s)] > DOWN_TO * true[0]
            relative = float((off[large] / true[: len(s)][large]).max())
            if tier == "exact":
                found |= Errors(exact=float(off.max()) / true[0])
            elif tier == "full" or kernel.method != "krylov":
                found |= Errors(relative=relative, energy=float(energy_off.max()))
            else:
                # Lower ends are what is printed; the upper end is the printed error above them.
                captured = float((true[: len(s)] ** 2).sum()) / total
                reached = float((s**2).sum()) / total
                found |= Errors(top=relative, width=energy_bound)
                if not reached - 1e-13 <= captured <= reached + energy_bound:
                    broken.append(f"{where}: Σσ² of the top {len(s)} is {captured!r}, printed from {reached!r}")
            if np.any(off > bound):
                worst = int(np.argmax(off - bound))
                broken.append(f"{where}: σ_{worst + 1} is off by {off[worst]:.2e}, bound {bound[worst]:.2e}")
            if float(energy_off.max()) > energy_bound:
                broken.append(f"{where}: an energy is off by {energy_off.max():.2e}, bound {energy_bound:.2e}")
        resolved = int(row["n_resolved"])
        shares = np.abs(printed - true[: len(printed)])[:resolved] / true[:resolved]
        if resolved and float(shares.max()) > svd.RELATIVE_BAR:
            broken.append(f"{name}, {tier}: n_resolved {resolved}, but one of them is off by {shares.max():.2e}")
    certified = kernels["top"].method == "krylov"
    return found | Errors(certified=int(certified), fell_through=int(not certified), broken=tuple(broken))


def probe(out: Path, base: Path, tuned: Path, *options: str) -> Result:
    """Run the command `probe spectrum BASE TUNED …` in its own process and load what it wrote."""
    command = [Path(sys.executable).with_name("probe"), "spectrum", base, tuned, "--out", out, "--quiet", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    if done.returncode:
        raise RuntimeError(f"probe spectrum: exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    return lp.load(out)


def save(directory: Path, tensors: dict[str, Tensor]) -> Path:
    """Write a checkpoint directory without a config."""
    directory.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def publish(
    name: str, title: str, note: str, tables: Iterable[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
    verdicts: Sequence[tuple[str, bool]], *, write: bool = True, page: str = "",
) -> None:  # fmt: skip
    """Print tables and verdicts, and write them to docs/<page or benchmarks-name>.md with machine, versions and date."""
    parts = [
        markdown(heads, cells) if not head else f"## {head}\n\n{markdown(heads, cells)}"
        for head, heads, cells in tables
    ]
    bars = "\n".join(f"- {'PASS' if ok else 'FAIL'}: {text}" for text, ok in verdicts)
    print("\n\n".join(parts) + "\n\n" + bars)
    if not write:
        return
    facts = machine_facts(choose_device("cpu"))
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    text = (
        f"# {title}\n\nWritten by `python benchmarks/{name}.py` on {facts['device']['name']}, {os.cpu_count()} cores, "
        f"{facts['time'][:10]}; {versions}.\n\n{note}\n\n{bars}\n\n" + "\n\n".join(parts) + "\n"
    )
    DOCS.mkdir(exist_ok=True)
    (DOCS / f"{page or f'benchmarks-{name}'}.md").write_text(text, encoding="utf-8")


def _cell(value: Any) -> str:
    return "–" if math.isnan(value) else f"{value:.1e}" if value else "0"


def _tier1(one: Errors) -> str:
    if not one.certified + one.fell_through:
        return "–"
    if one.certified + one.fell_through == 1:
        return "certified" if one.certified else "fell through"
    return f"{one.certified} certified, {one.fell_through} fell through"


def _holds(one: Errors) -> str:
    return f"no ({len(one.broken)})" if one.broken else "yes"


if __name__ == "__main__":
    raise SystemExit(main())
