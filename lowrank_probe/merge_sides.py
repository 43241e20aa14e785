"""What `merge` looks at beside the weights: whose tokenizer the model gets, and which base an adapter names."""

import filecmp
from collections.abc import Sequence
from pathlib import Path

from lowrank_probe.checkpoints import Checkpoint


def tokenizer_files(
    base: Checkpoint, adapters: Sequence[Checkpoint], resized: Checkpoint | None
) -> tuple[list[Path], list[str]]:
    """(the files that take the place of the base's own, what to tell): tokenizer and chat template of an adapter.

    resized: the adapter with another vocabulary, whose tokenizer goes with its table. Otherwise the files that the base
    lacks or has with other content, where the adapters that have any agree on them.
    """
    if resized is not None:
        return resized.tokenizer_files, []
    found: dict[str, Path] = {}
    clash: list[str] = []
    for adapter in adapters:
        for file in adapter.tokenizer_files:
            if _same(file, base.local_path / file.name):
                continue
            if not _same(file, found.setdefault(file.name, file)):
                clash.append(file.name)
    if clash:
        return [], [f"the adapters have different tokenizers ({clash[0]}): the base's is kept"]
    if not found:
        return [], []
    where = ", ".join(dict.fromkeys(str(file.parent) for file in found.values()))
    return list(found.values()), [f"{', '.join(found)}: of {where}; the base has none, or another one"]


def other_bases(base: Checkpoint, adapters: Sequence[Checkpoint]) -> list[str]:
    """A note for each adapter whose config names a model of another name than the base's, where both have one."""
    root = base.local_path
    places = [root.parent, root.with_suffix("")] if root.is_file() else [root]
    known = [str(base.config.get("_name_or_path") or ""), *(str(path) for path in places if root.exists())]
    own = {_name(path) for path in known} - {""}
    notes = []
    for adapter in adapters:
        trained_on = str(adapter.config.get("base_model_name_or_path") or "")
        if own and _name(trained_on) and _name(trained_on) not in own:
            notes.append(f"{adapter.path} names {trained_on} as its base; are the weights of {base.path} the same?")
    return notes


def _same(file: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(file, other, shallow=False)


def _name(path: str) -> str:
    """The model's own name in a path, a hub id or a hub's snapshot, in lower case.

    >>> _name("org/Llama-8B@main"), _name("hub/models--org--Llama-8B/snapshots/4f0a"), _name("runs/llama-8b/")
    ('llama-8b', 'llama-8b', 'llama-8b')
    """
    parts = Path(path).parts
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].rpartition("--")[2].lower()
    return parts[-1].partition("@")[0].lower() if parts else ""
