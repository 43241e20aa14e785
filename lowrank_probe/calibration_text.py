"""The calibration text in three parts that have no document in common: moments, choice, report; as token sequences.

The parts are made alike: documents are sorted by their lengths, and of every four neighbours two go to the moments and
one each to the others, by hash. Of long text a part takes a piece of every document before it takes a second one of
any, so that it is not of the first documents alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.errors import ProbeError
from lowrank_probe.texts import find_tokenizer, read_texts

PARTS: Final = ("moments", "choice", "report")
_QUARTERS: Final = ("moments", "choice", "moments", "report")
AT_MOST: Final = {"moments": 1 << 15, "choice": 1 << 13, "report": 1 << 13}
AT_LEAST: Final = {"moments": 2048, "choice": 256, "report": 256}
# Of each of the two others. That six documents agree has a chance of 2⁻⁶, 1.6 %; with five, no gain is beyond chance.
LEAST_DOCUMENTS: Final = 6
N_TOKENS: Final = 256
# Text this long is cut into sequences; English has about four characters a token.
_CHARACTERS: Final = 4
_MOST_DOCUMENTS: Final = 1 << 17


@dataclass(frozen=True)
class CalibrationText:
    """part → its token sequences, and the number of each one's document; word: names text, tokens and sizes, for the
    store."""

    sequences: dict[str, list[Tensor]]
    documents: dict[str, list[int]]
    word: str

    def n_tokens(self, part: str) -> int:
        """Tokens of one part."""
        return sum(map(len, self.sequences[part]))

    def n_documents(self, part: str) -> int:
        """Documents that one part has sequences of."""
        return len(set(self.documents[part]))


def read_calibration(file: Path, directories: Sequence[Path], vocabulary: int, longest: int) -> CalibrationText:
    """The parts of a file's documents (`texts.read_texts`), without duplicates.

    Sequences of at most `N_TOKENS` and `longest` tokens, and of each part at most `AT_MOST` tokens.
    Raises `ProbeError` where there is no tokenizer, or too little text, saying how much is needed.
    """
    tokenizer, notes = find_tokenizer(directories)
    if tokenizer is None:
        told = f" ({notes[0]})" if notes else ""
        raise ProbeError(f"--calibration needs a tokenizer; found none in {' or '.join(map(str, directories))}{told}")
    length = min(N_TOKENS, longest)
    documents = {_digest(text): text for text in read_texts(file, _MOST_DOCUMENTS)}
    parted = _parted(documents)
    found = CalibrationText({}, {}, "")
    mark = sha256(repr((length, AT_MOST)).encode())
    for part in PARTS:
        sequences, numbers = _sequences(parted[part], tokenizer, length, vocabulary, AT_MOST[part])
        found.sequences[part], found.documents[part] = sequences, numbers
        for ids in sequences:
            mark.update(ids.numpy().tobytes())
    if any(found.n_tokens(part) < AT_LEAST[part] for part in PARTS) or any(
        found.n_documents(part) < LEAST_DOCUMENTS for part in PARTS[1:]
    ):
        raise ProbeError(_too_little(file, found, len(documents)))
    return replace(found, word=mark.hexdigest()[:12])


def _digest(text: str) -> bytes:
    return sha256(text.encode()).digest()


def _parted(documents: Mapping[bytes, str]) -> dict[str, list[str]]:
    """part → its documents, in the order of their hashes."""
    by_length = sorted(documents, key=lambda digest: (len(documents[digest]), digest))
    parted: dict[str, list[bytes]] = {part: [] for part in PARTS}
    for first in range(0, len(by_length), len(_QUARTERS)):
        for part, digest in zip(_QUARTERS, sorted(by_length[first : first + len(_QUARTERS)]), strict=False):
            parted[part].append(digest)
    return {part: [documents[digest] for digest in sorted(digests)] for part, digests in parted.items()}


def _sequences(
    texts: Sequence[str], tokenizer: Any, length: int, vocabulary: int, most: int
) -> tuple[list[Tensor], list[int]]:
    """(sequences of at most `length` tokens, the document of each), until there are `most` tokens.

    A piece of every document, then another of every one that has more; which piece, by hash: the first ones of many
    documents are all alike.
    """
    size = _CHARACTERS * length
    pieces = []
    for number, text in enumerate(texts):
        cut = sorted((text[at : at + size] for at in range(0, len(text), size)), key=_digest)
        pieces += [(turn, number, piece) for turn, piece in enumerate(cut)]
    found: list[Tensor] = []
    numbers: list[int] = []
    n_tokens = 0
    for _, number, piece in sorted(pieces, key=lambda one: one[:2]):
        if n_tokens >= most:
            break
        ids = torch.tensor(tokenizer(piece, truncation=True, max_length=length)["input_ids"])
        ids = ids[ids < vocabulary].long()
        if len(ids):
            found.append(ids)
            numbers.append(number)
            n_tokens += len(ids)
    return found, numbers


def _too_little(file: Path, found: CalibrationText, n_documents: int) -> str:
    most = max(AT_LEAST[part] / max(1, found.n_tokens(part)) for part in PARTS)
    told = ", ".join(f"{found.n_tokens(part)} for {part}" for part in PARTS)
    least = ", ".join(str(AT_LEAST[part]) for part in PARTS)
    n_least = LEAST_DOCUMENTS * len(_QUARTERS)
    mend = "give it in more documents" if n_documents < n_least else f"give about {math.ceil(most)} times as much"
    return (
        f"{file}: too little text: {n_documents} documents (paragraphs, or lines of .jsonl) give tokens {told}; "
        f"expected at least {least}, about 20 kB, in {n_least} documents; {mend}"
    )
