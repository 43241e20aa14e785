"""A base model and its full fine-tune, made on the spot from text that every Python has; and the report on them.

No download: a small Llama learns the standard library's source, then every weight of it is fine-tuned on the prose of
the language reference (`pydoc_data.topics`). Both sides are stored in bfloat16, as published checkpoints are, so the
report meets what it meets in the field: updates of different rank by layer type, and storage rounding on top of them.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any, Final

from lowrank_probe.demo_training import Recipe, train_both
from lowrank_probe.errors import OutputError
from lowrank_probe.options import Progress
from lowrank_probe.outputs import ANOTHER_OUT, made, why

if TYPE_CHECKING:
    from lowrank_probe.runs import Result

RECIPE_VERSION: Final = 1  # raise it with any change that changes the weights: cached pairs are made anew
PAIR_FILE: Final = "pair.json"


def train_pair(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    on_progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Train a base on source code and fine-tune all of it on prose; returns (`out`/base, `out`/finetuned).

    Both are transformers directories in bfloat16. The fine-tune starts from the base as stored, keeps float32 masters
    and is rounded once, at the end. `out`/pair.json, written last, has the seed, the losses (nats a token, on held-out
    text, of the weights as stored), the seconds and the versions. The same seed gives the same bytes on one machine.

    Raises `OutputError` where `out` is not empty or cannot be written, `ProbeError` where this Python lacks the text.
    """
    root, recipe = Path(out), recipe or Recipe()
    report = on_progress or _silent
    try:
        with made(root):
            if any(root.iterdir()):
                raise OutputError(f"{root}: is not empty; choose another --out or remove what is in it")
            with tempfile.TemporaryDirectory(dir=root, prefix=".training-") as scratch:
                told = train_both(Path(scratch), seed, recipe, report)
                facts = {"key": _key(seed, recipe), **told, "versions": _versions()}
                (Path(scratch) / PAIR_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
                for name in ("base", "finetuned", PAIR_FILE):  # pair.json last: where it is, the pair is whole
                    os.replace(Path(scratch) / name, root / name)
    except OSError as error:
        raise _cannot_write(root, error) from None
    return root / "base", root / "finetuned"


def demo(
    out: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    on_progress: Progress | None = None,
) -> "Result":
    """`spectrum` of a pair trained here from nothing, saved as a run; the first call trains for about a minute.

    The pair is kept in $LOWRANK_PROBE_CACHE (or ~/.cache/lowrank_probe) for this seed, recipe and set of versions. With
    `out`: `out`/base, `out`/finetuned and `out`/run; without it the run lies beside the cached pair.
    `result.facts["demo"]` has the paths ("base", "finetuned", "run", "report") and what pair.json says ("pair").

    Raises `OutputError` where the cache or `out` cannot be written, or `out` holds anything but an earlier demo.
    """
    from lowrank_probe.spectra import spectrum

    recipe = recipe or Recipe()
    key = _key(seed, recipe)
    if out is not None:
        _check_out(Path(out), key)
    root = _cached_pair(seed, recipe, key, on_progress)
    if out is not None:
        root = _copy_pair(root, Path(out), key)
    base, tuned, run = root / "base", root / "finetuned", root / "run"
    result = spectrum(base, tuned, seed=seed, on_progress=on_progress)
    paths = {"base": base, "finetuned": tuned, "run": run, "report": run / "report.html"}
    told: dict[str, Any] = {name: str(path.absolute()) for name, path in paths.items()}
    told["pair"] = json.loads((root / PAIR_FILE).read_text(encoding="utf-8"))
    result = replace(result, facts={**result.facts, "demo": told})
    result.save(run)
    return result


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers")
    return {"python": python_version(), **{name: version(name) for name in names}}


def _key(seed: int, recipe: Recipe) -> str:
    """Name of a pair in the cache: everything that decides its bytes. The text is this Python's, so its version too."""
    told = json.dumps([RECIPE_VERSION, seed, asdict(recipe), _versions()], sort_keys=True)
    return f"pair-v{RECIPE_VERSION}-seed{seed}-torch{version('torch')}-{hashlib.sha256(told.encode()).hexdigest()[:10]}"


def _cache() -> Path:
    told = os.environ.get("LOWRANK_PROBE_CACHE")
    return Path(told) if told else Path.home() / ".cache" / "lowrank_probe"


def _is_pair(root: Path, key: str) -> bool:
    """Whether `root` holds the whole pair of this key."""
    try:
        told = json.loads((root / PAIR_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    files = (root / side / name for side in ("base", "finetuned") for name in ("config.json", "model.safetensors"))
    return isinstance(told, dict) and told.get("key") == key and all(file.is_file() for file in files)


def _cached_pair(seed: int, recipe: Recipe, key: str, on_progress: Progress | None) -> Path:
    """Directory of the pair in the cache; trained beside it and renamed, so that two demos at once do no harm."""
    home = _cache() / key
    if _is_pair(home, key):
        return home
    elsewhere = "set LOWRANK_PROBE_CACHE to a directory that can be written"
    try:
        with made(home.parent, elsewhere), tempfile.TemporaryDirectory(dir=home.parent, prefix=".training-") as scratch:
            fresh = Path(scratch) / "pair"
            train_pair(fresh, seed=seed, recipe=recipe, on_progress=on_progress)
            if not _is_pair(home, key):  # another demo may have finished first
                shutil.rmtree(home, ignore_errors=True)
                os.replace(fresh, home)
    except OSError as error:
        raise _cannot_write(home.parent, error, elsewhere) from None
    return home


def _check_out(out: Path, key: str) -> None:
    """Raise `OutputError` unless `out` is absent, empty, or holds this very demo from before."""
    if out.is_dir() and any(out.iterdir()) and not _is_pair(out, key):
        raise OutputError(f"{out}: is not empty and not this demo's; choose another --out or remove what is in it")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; --out is a directory")


def _copy_pair(pair: Path, out: Path, key: str) -> Path:
    """Copy a cached pair to `out`, pair.json last; returns `out`."""
    if _is_pair(out, key):
        return out
    try:
        with made(out), tempfile.TemporaryDirectory(dir=out, prefix=".copying-") as scratch:
            for side in ("base", "finetuned"):
                shutil.copytree(pair / side, Path(scratch) / side)
                os.replace(Path(scratch) / side, out / side)
            shutil.copy(pair / PAIR_FILE, Path(scratch) / PAIR_FILE)
            os.replace(Path(scratch) / PAIR_FILE, out / PAIR_FILE)
    except OSError as error:
        raise _cannot_write(out, error) from None
    return out


def _cannot_write(path: Path, error: OSError, elsewhere: str = ANOTHER_OUT) -> OutputError:
    name = Path(str(error.filename)).name if error.filename else "the pair"
    return OutputError(f"{path}: cannot write {name}: {why(error, elsewhere)}")


def _silent(phase: str, done: int, total: int) -> None:
    """Where nobody listens."""
