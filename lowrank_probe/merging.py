"""`merge`: base + Σ w·ΔW of adapters, written tensor by tensor into files like the base's own.

Legend: w an adapter's weight; ΔW = scaling·B·A of a LoRA module, T − W of a tensor that an adapter holds whole.
The merged model computes what the base with its adapters on computes. Where the output head is tied to a table and only
one of the two is adapted, both are written (peft's own merge would change both).
"""

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pandas as pd
import torch
from torch import Tensor

from lowrank_probe.adapters import read_factors
from lowrank_probe.changes import Change, Plan, plan, sections
from lowrank_probe.checkpoints import Checkpoint, Source, open_checkpoint
from lowrank_probe.columns import MERGED, OVERLAP
from lowrank_probe.errors import CheckpointError, OutputError, ProbeError
from lowrank_probe.layers import place
from lowrank_probe.merge_sides import other_bases, tokenizer_files
from lowrank_probe.narrowing import CODES, all_finite, dtype_word, narrowed, stored_dtype
from lowrank_probe.options import Progress
from lowrank_probe.outputs import copy_into, whole_directory, write_json
from lowrank_probe.overlaps import overlap_rows
from lowrank_probe.remote_files import refuse_addresses
from lowrank_probe.safetensors_files import write_file
from lowrank_probe.safetensors_headers import read_json
from lowrank_probe.strict_json import SCHEMA_VERSION, plain
from lowrank_probe.sums import merged, whole
from lowrank_probe.tensor_info import WIDTHS
from lowrank_probe.torch_dtypes import DTYPES

_NAMED: Final = 5  # tensors in a warning
_KEPT_FACTORS: Final = 8  # pairs of factors in memory: those of all experts of a layer lie in one


@dataclass(frozen=True)
class Merged:
    """The answer of `merge`.

    path: the merged model. table: one row a tensor written, columns as `columns.MERGED`. overlap: one row a matrix and
    two adapters, as `columns.OVERLAP`; empty for one adapter. facts: what was merged, and how; notes in `facts`.
    """

    path: Path
    table: pd.DataFrame
    overlap: pd.DataFrame
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One JSON object with `schema_version`: path, facts, table and overlap; NaN becomes null."""
        payload = {
            "schema_version": SCHEMA_VERSION, "path": self.path, "facts": self.facts,
            "table": self.table.to_dict("records"), "overlap": self.overlap.to_dict("records"),
        }  # fmt: skip
        return json.dumps(plain(payload), ensure_ascii=False)


def merge(
    base: Source,
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    on_overlap: Callable[[pd.DataFrame], Any] | None = None,
    on_progress: Progress | None = None,
) -> Merged:
    """Write base + Σ w·scaling·B·A as a model of its own: shards, index, dtypes and config of the base.

    weights: one an adapter, default 1. A tensor that an adapter holds whole (`modules_to_save`, a bias) counts as
    T − W: with weight 1 it replaces the base's. dtype: for all floating-point tensors: float32, bfloat16, float16;
    default: as each is. Sums in float64, rounded at the end; each changed tensor is checked on the way by random
    vectors that never see the product B·A. The adapters are only read. on_overlap: gets the overlap of
    several adapters before they are summed.

    Of an adapter's files only tokenizer and chat template go along, where the base has none or others; all else is
    the base's. An adapter that names another base is told in `facts["notes"]`; tensors of the base with NaN or Inf that
    no adapter changes are copied, listed in `facts["not_finite"]` and told in `facts["warnings"]`.

    `out` must be free; it is there whole or not at all. Raises `MatchError` naming tensor and adapter for another
    base's adapter, `CheckpointError` for DoRA and other variants and for quantized bases, `NumericsError` for NaN and
    overflow, `OutputError` where nothing can be written.
    """
    paths = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    factors_of = [1.0] * len(paths) if weights is None else [float(weight) for weight in weights]
    if not paths or len(factors_of) != len(paths):
        raise ProbeError(f"expected one weight an adapter, found {len(factors_of)} for {len(paths)} adapters")
    if not all(math.isfinite(weight) for weight in factors_of):
        raise ProbeError(f"weights are {factors_of}, expected finite numbers")
    target = None if dtype is None else stored_dtype(dtype)
    refuse_addresses(base, *paths)
    side = open_checkpoint(base)
    if side.is_adapter:
        raise CheckpointError(f"{side.path}: is an adapter; give the base model first, then the adapters")
    coded = next((info for info in side.tensors.values() if info.quantized or info.dtype.startswith("F8")), None)
    if coded is not None:
        raise CheckpointError(
            f"{coded.name} in {coded.file}: is quantized ({coded.dtype}); dequantize the base first (load it with "
            "transformers and save it in bfloat16), or keep the adapter unmerged"
        )
    opened = [open_checkpoint(path) for path in paths]
    planned = plan(side, opened, factors_of)
    tokenizer, notes = tokenizer_files(side, opened, planned.tokenizer)
    notes = [*planned.notes, *notes, *other_bases(side, opened)]
    job = _Job(side, planned, tokenizer, target, on_progress)
    with whole_directory(Path(out)) as aside:
        overlap = pd.DataFrame(columns=list(OVERLAP))
        if len(opened) > 1:
            overlap = pd.DataFrame(overlap_rows(planned.changes, job.factors), columns=list(OVERLAP))
            overlap = overlap.astype({"layer": "Int64"})
            if on_overlap:
                on_overlap(overlap)
        table = job.write(aside)
    facts = {
        "base": str(side.path), "adapters": [str(adapter.path) for adapter in opened], "weights": factors_of,
        "dtype": target, "untied": planned.untied, "n_bytes": sum(job.sizes.values()), "notes": notes,
        "max_check": float(table["check"].max()), "n_changed": int(table["change"].ne("").sum()),
        "not_finite": job.not_finite, "warnings": _warnings(job.not_finite),
    }  # fmt: skip
    return Merged(Path(out), table, overlap, facts)


class _Job:
    """Writes the planned model, file by file."""

    def __init__(
        self, base: Checkpoint, planned: Plan, tokenizer: Sequence[Path], dtype: str | None,
        on_progress: Progress | None,
    ) -> None:  # fmt: skip
        self.base, self.planned, self.tokenizer, self.dtype = base, planned, tokenizer, dtype
        self.on_progress = on_progress
        self.rows: list[dict[str, Any]] = []
        self.sizes: dict[str, int] = {}  # bytes of the tensors of each file
        self.not_finite: list[str] = []  # those that are copied with NaN or Inf in them
        self._read: OrderedDict[tuple[int, str], tuple[Tensor, Tensor]] = OrderedDict()

    def factors(self, change: Change) -> tuple[Tensor, Tensor]:
        """(lora_A, lora_B) as stored; the last few stay in memory, as many experts lie in one pair."""
        assert change.module is not None
        key = (change.number, change.module.name_A)
        if key not in self._read:
            self._read[key] = read_factors(change.module, change.adapter)
            if len(self._read) > _KEPT_FACTORS:
                self._read.popitem(last=False)
        self._read.move_to_end(key)
        return self._read[key]

    def write(self, directory: Path) -> pd.DataFrame:
        """Files, index, what lies beside them, config; returns the table."""
        files: dict[str, list[str]] = {}
        order = sorted(self.base.tensors.values(), key=lambda info: (str(info.file), info.start))
        for info in order:
            members = files.setdefault(_file_name(Path(str(info.file))), [])
            members.append(info.name)
            members += [name for name, table in self.planned.added.items() if table == info.name]
        for file, names in files.items():
            infos = [self._info(name) for name in names]
            self.sizes[file] = sum(int(math.prod(shape) * WIDTHS[dtype]) for _, dtype, shape in infos)
            write_file(directory / file, infos, self._tensors(file, infos), {"format": "pt"})
        total = sum(map(len, files.values()))
        self._write_index(directory, files)
        copy_into(directory, [*self.tokenizer, *self.base.other_files])
        self._write_config(directory)
        written = open_checkpoint(directory if (directory / "config.json").exists() else directory / next(iter(files)))
        if len(written.tensors) != total:
            raise OutputError(f"{directory}: holds {len(written.tensors)} tensors, {total} were written")
        return pd.DataFrame(self.rows, columns=list(MERGED)).astype({"layer": "Int64"})

    def _info(self, name: str) -> tuple[str, str, tuple[int, ...]]:
        info = self.base.tensors[self.planned.added.get(name, name)]
        dtype = self.dtype if self.dtype is not None and info.dtype in DTYPES else info.dtype
        return name, dtype, self.planned.resized.get(name, info.shape)

    def _tensors(self, file: str, infos: Sequence[tuple[str, str, tuple[int, ...]]]) -> Iterator[Tensor]:
        for name, dtype, shape in infos:
            if self.on_progress:
                self.on_progress(name, len(self.rows), len(self.base.tensors) + len(self.planned.added))
            yield self._tensor(file, name, dtype, shape)

    def _tensor(self, file: str, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        source = self.planned.added.get(name, name)
        changes = self.planned.changes.get(name, [])
        where = place(name)
        row: dict[str, Any] = {
            "name": name, "layer_type": where.layer_type, "layer": where.layer, "dtype": dtype, "file": file,
            "shape": "×".join(map(str, shape)), "change": "+".join(dict.fromkeys(change.kind for change in changes)),
            "adapters": ", ".join(dict.fromkeys(str(change.number + 1) for change in changes)),
        }  # fmt: skip
        self.rows.append(row)
        if not changes:
            W = self.base.read_stored(source)
            if W.is_floating_point() and not all_finite(W):
                self.not_finite.append(name)
            return _cast(name, W, DTYPES.get(dtype))
        if name in self.planned.resized:
            return _cast(name, whole(changes[0]), DTYPES[dtype])
        found = merged(name, self.base.read(source), changes, DTYPES[dtype], self.factors)
        row |= {
            "fro_norm": found.fro_norm, "check": found.check,
            "relative_update": found.fro_norm / found.base_norm if found.base_norm else math.nan,
            "rounding": found.rounding / found.fro_norm if found.fro_norm else math.nan,
        }  # fmt: skip
        return found.tensor

    def _write_index(self, directory: Path, files: Mapping[str, Sequence[str]]) -> None:
        if len(files) == 1 and not any(self.base.local_path.glob("*.safetensors.index.json")):
            return
        old = next(iter(sorted(self.base.local_path.glob("*.index.json"))), None)
        index = read_json(old) if old is not None else {}
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": sum(self.sizes.values())}
        index["weight_map"] = {name: file for file, names in files.items() for name in names}
        write_json(directory / "model.safetensors.index.json", index)

    def _write_config(self, directory: Path) -> None:
        """The base's config, as it is where nothing in it changed."""
        old = self.base.local_path / "config.json"
        config = json.loads(json.dumps(dict(self.base.config), default=str))
        if not config:
            return
        for section in sections(config):
            assert isinstance(section, dict)
            if self.planned.untied and (section is config or "tie_word_embeddings" in section):
                section["tie_word_embeddings"] = False
            for name, shape in self.planned.resized.items():
                rows = self.base.tensors[self.planned.added.get(name, name)].shape[0]
                if section.get("vocab_size") == rows:
                    section["vocab_size"] = shape[0]
            for key in ("dtype", "torch_dtype"):
                if self.dtype is not None and key in section:
                    section[key] = dtype_word(DTYPES[self.dtype])
        if old.is_file() and config == self.base.config:
            copy_into(directory, [old])
        else:
            write_json(directory / "config.json", config)


def _file_name(file: Path) -> str:
    """The name of the file to write: the base's own, with the suffix of what is written."""
    if file.suffix == ".safetensors":
        return file.name
    if file.suffix in (".bin", ".pt", ".pth"):
        return f"{file.stem.replace('pytorch_model', 'model')}.safetensors"
    return "model.safetensors"


def _warnings(not_finite: Sequence[str]) -> list[str]:
    """What to say of tensors that were copied with NaN or Inf in them; all of them are in the facts."""
    if not not_finite:
        return []
    more = len(not_finite) - _NAMED
    named = ", ".join(not_finite[:_NAMED]) + (f" and {more} more" if more > 0 else "")
    return [
        f"{named}: NaN or Inf in the base, copied as {'it is' if len(not_finite) == 1 else 'they are'} because no "
        "adapter changes that; is the base damaged?"
    ]


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor that is only copied, in another dtype where that is asked for."""
    if dtype is None or tensor.dtype == dtype or tensor.dtype not in CODES:
        return tensor
    return narrowed(tensor, dtype, f"{name}: reaches")
