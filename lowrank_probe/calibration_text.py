"""The calibration text in three parts that have no document in common: moments, choice, report; as token sequences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.errors import ProbeError
from lowrank_probe.texts import find_tokenizer, read_texts

# Of eight documents, by hash, six go to the moments and one each to the others.
PARTS: Final = ("moments", "choice", "report")
_EIGHTHS: Final = ("choice", "report", *["moments"] * 6)
AT_MOST: Final = {"moments": 1 << 15, "choice": 1 << 12, "report": 1 << 12}
AT_LEAST: Final = {"moments": 2048, "choice": 256, "report": 256}
N_TOKENS: Final = 256
# Text this long is cut into sequences; English has about four characters a token.
_CHARACTERS: Final = 4
_MOST_DOCUMENTS: Final = 1 << 17


@dataclass(frozen=True)
class CalibrationText:
    """part → its token sequences, and what it was made from. word: names text, tokens and sizes, for the store."""

    sequences: dict[str, list[Tensor]]
    n_documents: dict[str, int]
    word: str

    def n_tokens(self, part: str) -> int:
        """Tokens of one part."""
        return sum(map(len, self.sequences[part]))


def read_calibration(file: Path, directories: Sequence[Path], vocabulary: int, longest: int) -> CalibrationText:
    """The parts of a file's documents (`texts.read_texts`), in an order that is fixed by their hashes.

    Sequences of at most `N_TOKENS` and `longest` tokens; of each part the first `AT_MOST` tokens are taken.
    Raises `ProbeError` where there is no tokenizer, or too little text, saying how much is needed.
    """
    tokenizer, notes = find_tokenizer(directories)
    if tokenizer is None:
        told = f" ({notes[0]})" if notes else ""
        raise ProbeError(f"--calibration needs a tokenizer; found none in {' or '.join(map(str, directories))}{told}")
    length = min(N_TOKENS, longest)
    documents = sorted({sha256(text.encode()).digest(): text for text in read_texts(file, _MOST_DOCUMENTS)}.items())
    sequences: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    n_documents, n_tokens = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    mark = sha256(repr((length, AT_MOST)).encode())
    for digest, text in documents:
        part = _EIGHTHS[digest[-1] % 8]
        if n_tokens[part] >= AT_MOST[part]:
            continue
        room = AT_MOST[part] - n_tokens[part]
        found = _tokens(tokenizer, text, length, vocabulary, room)
        sequences[part] += found
        n_documents[part] += 1
        n_tokens[part] += sum(map(len, found))
        for ids in found:
            mark.update(ids.numpy().tobytes())
    if any(n_tokens[part] < AT_LEAST[part] for part in PARTS):
        raise ProbeError(_too_little(file, n_tokens, len(documents)))
    return CalibrationText(sequences, n_documents, mark.hexdigest()[:12])


def _tokens(tokenizer: Any, text: str, length: int, vocabulary: int, room: int) -> list[Tensor]:
    """Sequences of at most `length` tokens, until there are `room` tokens."""
    size = _CHARACTERS * length
    every: list[Tensor] = []
    for at in range(0, len(text), size):
        if sum(map(len, every)) >= room:
            break
        ids = torch.tensor(tokenizer(text[at : at + size], truncation=True, max_length=length)["input_ids"])
        ids = ids[ids < vocabulary].long()
        every += [ids] if len(ids) else []
    return every


def _too_little(file: Path, n_tokens: dict[str, int], n_documents: int) -> str:
    most = max(AT_LEAST[part] / max(1, n_tokens[part]) for part in PARTS)
    found = ", ".join(f"{n_tokens[part]} for {part}" for part in PARTS)
    least = ", ".join(str(AT_LEAST[part]) for part in PARTS)
    mend = "give it in more documents" if n_documents < 16 else f"give about {math.ceil(most)} times as much"
    return (
        f"{file}: too little text: {n_documents} documents (paragraphs, or lines of .jsonl) give tokens {found}; "
        f"expected at least {least}, about 20 kB in 20 documents; {mend}"
    )
