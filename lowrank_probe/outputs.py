"""Output directories: made exclusively, filled whole or not at all, and gone again where nothing came of them."""

import errno
import glob
import itertools
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from lowrank_probe.errors import OutputError, ProbeError, WorkerDiedError

ANOTHER_OUT: Final = "choose another --out"
# The log of what a run has finished, while it is not finished itself (`unfinished`).
UNFINISHED: Final = ".unfinished"
LOG: Final = "log"
# Which of them a run directory, a trajectory's or an extraction's holds, written last.
LAST: Final = ("facts.json", "trajectory.json", "probe/facts.json")
# What is being written in a directory: then the number of the process, and something random.
_PART: Final = f".part-{platform.node()}-"
_REASONS: Final = {
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "larger than a file may be here; raise the limit (ulimit -f)",
}


def why(error: OSError, elsewhere: str = ANOTHER_OUT) -> str:
    """Why a write failed, and the mend: what is the case, then `elsewhere`."""
    if error.errno not in _REASONS:
        return f"{error.strerror or error}; {elsewhere}"
    reason = _REASONS[error.errno]
    return f"{reason} or {elsewhere}" if ";" in reason else f"{reason}; {elsewhere}"


def check_writable(directory: Path, elsewhere: str = ANOTHER_OUT) -> None:
    """Raise `OutputError` where nothing can be written in a directory, or it cannot be made."""
    if directory.is_symlink() and not directory.exists():
        raise OutputError(f"{directory}: is a link to {os.readlink(directory)}, which is not there; {elsewhere}")
    above = next(path for path in (directory, *directory.absolute().parents) if os.path.exists(path))
    if not above.is_dir():
        raise OutputError(f"{above}: is a file (expected a directory); {elsewhere}")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f"{_PART}{os.getpid()}-", dir=above))
    except OSError as error:
        raise OutputError(f"{above}: {why(error, elsewhere)}") from None


def check_name(path: str | os.PathLike[str]) -> None:
    """Raise `OutputError` where a path is not UTF-8 text: Parquet, JSON and pages cannot name it."""
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        told = os.fsencode(name).decode(errors="backslashreplace")
        raise OutputError(
            f"{told}: its name is not UTF-8 (tables and pages have to hold it); rename it, or give a link to it"
        ) from None


def is_unfinished(root: Path) -> bool:
    """Whether a directory holds the log of a run that is not finished."""
    log = root / UNFINISHED / LOG
    return log.exists() and log.stat().st_size > 0


def is_finished(root: Path) -> bool:
    """Whether a directory holds a finished run, and not one that was killed in its last moment."""
    return any((root / name).exists() for name in LAST) and not is_unfinished(root)


def check_free(root: Path) -> None:
    """Raise `OutputError` unless a run may be written in a directory: absent, empty, or of a run that is unfinished."""
    check_name(root)
    check_writable(root)
    if not root.exists() or is_unfinished(root):
        return
    if is_finished(root):
        shutil.rmtree(root / UNFINISHED, ignore_errors=True)  # of a process that was killed while it removed that
        raise OutputError(f"{root}: already holds a finished run; {ANOTHER_OUT} or remove it")
    if any(path.name != UNFINISHED and not path.name.startswith(_PART) for path in root.iterdir()):
        raise OutputError(f"{root}: is not empty; {ANOTHER_OUT}")


@contextmanager
def made(root: Path, elsewhere: str = ANOTHER_OUT) -> Iterator[None]:
    """Make a directory and its parents; those made here are removed again where they are empty at the end."""
    fresh = [path for path in (root, *root.parents) if not os.path.exists(path)]
    try:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{root}: cannot be made: {why(error, elsewhere)}") from None
        yield
    finally:
        for path in fresh:
            with suppress(OSError):  # not empty, or never made
                path.rmdir()


@contextmanager
def new_directory(wanted: Path) -> Iterator[Path]:
    """A directory that was not there before, so that no other process has it: `wanted`, or with -2, -3, … added."""
    with made(wanted.parent):
        for number in itertools.count(1):
            root = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            try:
                root.mkdir()
                break
            except FileExistsError:
                continue
            except OSError as error:
                raise OutputError(f"{root}: cannot be made: {why(error)}") from None
        try:
            yield root
        except WorkerDiedError as error:
            raise WorkerDiedError(f"{error}; the same command with --out {root} goes on from there") from None
        except ProbeError:  # it would fail again
            shutil.rmtree(root / UNFINISHED, ignore_errors=True)
            raise
        finally:
            with suppress(OSError):
                root.rmdir()


def write_directory(root: Path, files: dict[str, Callable[[Path], Any]], elsewhere: str = ANOTHER_OUT) -> Path:
    """Write every file aside, then rename them into place in order: the last one tells that all are there.

    They are on the disk before that. What a killed process of this host left there is removed. Raises `OutputError`
    naming what failed; then nothing of this call stays behind.
    """
    name = root.name
    with made(root, elsewhere):
        try:
            _remove_left(root, _PART)
            prefix = f"{_PART}{os.getpid()}-"
            with tempfile.TemporaryDirectory(prefix=prefix, dir=root, ignore_cleanup_errors=True) as aside:
                for name, write in files.items():
                    write(Path(aside) / name)
                    _sync(Path(aside) / name)
                for name in files:
                    os.replace(Path(aside) / name, root / name)
        except OSError as error:
            raise OutputError(f"{root}: cannot write {name}: {why(error, elsewhere)}") from None
    return root


@contextmanager
def whole_directory(root: Path) -> Iterator[Path]:
    """A directory beside `root` to be filled, which gets that name at the end: `root` is there whole or not at all.

    Where the body raises, nothing stays. What a killed process of this host left there is removed by the next one.
    Raises `OutputError` where `root` is not free (absent or empty), or something cannot be written.
    """
    check_writable(root)
    if root.is_dir() and any(root.iterdir()):
        raise OutputError(f"{root}: is not empty; {ANOTHER_OUT}")
    root = Path(os.path.realpath(root))  # a link is followed: its target is filled, and the link stays
    stem = f".{root.name}.part-{platform.node()}-"
    with made(root.parent):
        _remove_left(root.parent, stem)
        try:
            aside = Path(tempfile.mkdtemp(prefix=f"{stem}{os.getpid()}-", dir=root.parent))
            try:
                yield aside
                aside.chmod(0o777 & ~_umask())
                os.replace(aside, root)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        except OSError as error:
            where = Path(error.filename).name if isinstance(error.filename, str) else "it"
            raise OutputError(f"{root}: cannot write {where}: {why(error)}") from None


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """One JSON object, laid out as PEFT and transformers write their configs."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_into(directory: Path, files: Iterable[Path]) -> None:
    """Copy files (the content, where one is a link, as in a hub cache) into a directory; those already there stay."""
    for file in files:
        if not (directory / file.name).exists():
            shutil.copyfile(file, directory / file.name)


def own(root: Path, name: str) -> None:
    """Note in root/name which process works in root. Raises `OutputError` where another one does, and lives.

    A process that was killed leaves the file behind; the next one of this host takes it over.
    """
    file = root / name
    mine = f"{platform.node()} {os.getpid()}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "x", encoding="utf-8") as handle:
            handle.write(mine)
        return
    except FileExistsError:
        host, _, process = file.read_text(encoding="utf-8").partition(" ")
    except OSError as error:
        raise OutputError(f"{file.parent}: cannot be made: {why(error)}") from None
    if host == platform.node() and process != str(os.getpid()) and is_alive(process):
        raise OutputError(f"{root}: process {process} is at work there; {ANOTHER_OUT}")
    aside = file.with_name(f".part-{os.getpid()}-owner")
    try:
        aside.write_text(mine, encoding="utf-8")
        os.replace(aside, file)
    except OSError as error:
        raise OutputError(f"{root}: cannot write {name}: {why(error)}") from None


def is_alive(process: str) -> bool:
    """Whether a process of this number runs on this host, as far as can be told."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):  # not ours to judge, or of another user
        return True
    return True


def _remove_left(directory: Path, stem: str) -> None:
    """Remove from a directory what processes of this host that live no more left: stem, number of the process, …"""
    for left in directory.glob(f"{glob.escape(stem)}*"):
        if not is_alive(left.name.removeprefix(stem).partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)


def _sync(file: Path) -> None:
    """Have a written file on the disk."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
