"""What an extraction has finished so far: one small file a matrix, durable at once, so that a killed run goes on.

`<out>/.unfinished/` holds run.json (what is being extracted, how) and per matrix a safetensors file of its spectrum or
its factors. A file is written aside and renamed: what is there is whole.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from lowrank_probe import outputs
from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.errors import CheckpointError, OutputError
from lowrank_probe.narrowing import CODES
from lowrank_probe.runs import plain
from lowrank_probe.safetensors_files import write_file
from lowrank_probe.safetensors_headers import read_header

FOLDER: Final = ".unfinished"


class Unfinished:
    """The folder of one extraction's finished matrices.

    identity: what a run that goes on must share with the one that began. Raises `OutputError` where the output
    directory holds anything else, or another run's work, or another process is at work there.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.folder = out / FOLDER
        told = json.dumps(plain(dict(identity)), indent=1, sort_keys=True)
        outputs.check_name(out)
        outputs.check_writable(out)
        found = sorted(path.name for path in out.iterdir()) if out.exists() else []
        if (self.folder / "run.json").exists():  # what else is there, this run was about to put in place
            if (self.folder / "run.json").read_text(encoding="utf-8") != told:
                raise OutputError(
                    f"{out}: holds the unfinished work of other files, options or another version; choose another "
                    f"--out, or remove {self.folder}"
                )
        elif found and found != [FOLDER]:
            raise OutputError(f"{out}: is not empty; {outputs.ANOTHER_OUT}")
        outputs.own(out, f"{FOLDER}/owner")
        if not (self.folder / "run.json").exists():
            self._write("run.json", lambda path: path.write_text(told, encoding="utf-8"))

    def has(self, key: str) -> bool:
        """Whether it is there, and whole: a machine that lost power may leave an empty file of that name."""
        file = self.folder / f"{key}.safetensors"
        try:
            return file.exists() and read_header(file) is not None
        except CheckpointError:
            return False

    def put(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep the tensors and facts of one matrix under a key, such as "factors-00012-003"."""
        infos = [(name, CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
        told = {"facts": json.dumps(plain(dict(facts)))}
        self._write(f"{key}.safetensors", lambda path: write_file(path, infos, iter(tensors.values()), told))

    def facts(self, key: str) -> dict[str, Any]:
        """The facts kept under a key; NaN comes back as None."""
        with open(self.folder / f"{key}.safetensors", "rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        facts: dict[str, Any] = json.loads(header["__metadata__"]["facts"])
        return facts

    def names(self, key: str) -> list[str]:
        """The tensors kept under a key."""
        return list(read_header(self.folder / f"{key}.safetensors"))

    def get(self, key: str, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """One tensor kept under a key; first, count: only so many of its rows."""
        file = self.folder / f"{key}.safetensors"
        side = Checkpoint(file, read_header(file))
        info = side.tensors[name]
        if len(info.shape) < 2 or count is None:
            return side.read(name)
        return side.read(name, span=(first * info.shape[1], count * info.shape[1])).reshape(count, info.shape[1])

    def remove(self) -> None:
        """Remove it, and the output directory where nothing else is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()

    def _write(self, name: str, write: Any) -> None:
        aside = self.folder / f".part-{os.getpid()}-{name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(aside)
            os.replace(aside, self.folder / name)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise OutputError(f"{self.folder}: cannot write {name}: {outputs.why(error)}") from None
