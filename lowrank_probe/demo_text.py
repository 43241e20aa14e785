"""Text that every Python has: code to learn first, and other text to be fine-tuned on."""

import random
import sysconfig
from pathlib import Path
from typing import Final

from lowrank_probe.errors import ProbeError

# Tests and data tables are not how people write code; pydoc_data is the fine-tuning text.
_NOT_CODE: Final = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings"}


def read_code(n_chars: int) -> list[str]:
    """Source files of the standard library, whole, in an order fixed by their names, until `n_chars` are together."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    paths = [p for p in paths if not _NOT_CODE & set(p.split("/"))]
    random.Random(0).shuffle(paths)  # or the cap would keep one end of the alphabet
    texts: list[str] = []
    total = 0
    for path in paths:
        if total >= n_chars:
            break
        try:
            text = (root / path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        texts.append(text)
        total += len(text)
    if total < min(n_chars, 200_000):
        raise ProbeError(
            f"{root}: has {total:,} characters of .py source, the demo needs 200,000; "
            "run it with a Python that keeps its standard library's source"
        )
    return texts


def read_prose(n_chars: int) -> list[str]:
    """The language reference's topics; a paragraph that came before is left out (chapters repeat their sections)."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ProbeError("this Python has no pydoc_data.topics, the demo's prose; install the full library") from None
    seen: set[str] = set()
    texts: list[str] = []
    for name in sorted(topics):
        fresh = [p for p in dict.fromkeys(topics[name].split("\n\n")) if p not in seen]
        seen.update(fresh)
        if fresh and sum(map(len, texts)) < n_chars:
            texts.append("\n\n".join(fresh))
    return texts
