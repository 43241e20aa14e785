"""The text that models are judged on: which documents, in what order, in blocks of what length."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import torch

from lowrank_probe.documents import Document, read_documents, split_documents
from lowrank_probe.errors import ProbeError
from lowrank_probe.evaluation_models import Sides
from lowrank_probe.excerpts import evenly
from lowrank_probe.token_blocks import Blocks, load_tokenizer, to_blocks

LENGTH: Final = 512
# A bootstrap over fewer sequences says little.
LEAST: Final = 4


@dataclass(frozen=True)
class Text:
    """blocks: what is judged. mask_id, special: of the tokenizer. facts: what it was made from."""

    blocks: Blocks
    mask_id: int | None
    special: tuple[int, ...]
    facts: dict[str, Any]


def read_data(data: Any) -> list[Document] | Blocks:
    """The documents of a file or directory (`read_documents`), of a list of texts or documents, or blocks."""
    if isinstance(data, Blocks):
        return data
    return read_documents(data) if isinstance(data, str | os.PathLike) else _documents(data)


def read_text(
    data: Any, found: list[Document] | Blocks, sides: Sides, *,
    length: int | None, sequences: int, held_out: float | None, packing: bool | None,
    tokenizer: Any = None,
) -> Text:  # fmt: skip
    """Blocks of what `read_data` found in `data`.

    Documents come without duplicates, in the order of their hashes, and the sequences are spread evenly over all of
    them (`to_blocks`). held_out: only the documents that `split_documents` with that share holds out. packing: None
    packs plain text for models that write or fill in, and gives every other document a sequence of its own. length:
    None is 512, or all positions that the model has.

    Raises `ProbeError` for a length beyond the model's positions, no tokenizer, or too little text.
    """
    if isinstance(found, Blocks):
        _check_length(found.ids.shape[1], sides)
        at = torch.from_numpy(evenly(len(found), sequences))
        kept = Blocks(found.ids[at], found.labels[at], found.lengths[at], found.n_documents)
        return Text(kept, *_special(tokenizer), _facts("(blocks in memory)", kept, None))
    if held_out == 0:
        raise ProbeError("--held-out 0: would leave no document to judge; expected a share above 0, or leave it out")
    path = os.fspath(data) if isinstance(data, str | os.PathLike) else "(documents in memory)"
    training, kept_out = split_documents(found, 1.0 if held_out is None else held_out)
    documents = sorted(kept_out, key=lambda one: one.digest)
    if tokenizer is None:
        if not sides.directories:
            raise ProbeError("models in memory come without a tokenizer; give tokenizer=")
        tokenizer = load_tokenizer(*sides.directories)
    if length is None:
        length = min(LENGTH, sides.positions or LENGTH)
    _check_length(length, sides)
    plain = not any(one.prompt or one.messages for one in documents)
    packed = plain and _writes(sides) if packing is None else packing
    if sequences < LEAST:
        raise ProbeError(
            f"sequences={sequences}: expected at least {LEAST}; the interval is a bootstrap over sequences"
        )
    try:
        blocks = to_blocks(
            documents, tokenizer, length, packing=packed, limit=sequences, least=LEAST, vocabulary=sides.vocabulary
        )
    except ProbeError as error:
        raise ProbeError(f"{path}: {error}") from None
    told = _facts(path, blocks, packed) | {"n_duplicates": len(found) - len(training) - len(kept_out)}
    return Text(blocks, *_special(tokenizer), told | {"held_out": held_out})


def _facts(path: str, blocks: Blocks, packed: bool | None) -> dict[str, Any]:
    mark = sha256(blocks.ids.numpy().tobytes() + blocks.labels.numpy().tobytes())
    return {
        "path": path, "n_documents": blocks.n_documents, "n_sequences": len(blocks), "length": blocks.ids.shape[1],
        "n_tokens": int(blocks.lengths.sum()), "packing": packed, "sha256": mark.hexdigest(),
    }  # fmt: skip


def _documents(data: Sequence[Document | str]) -> list[Document]:
    try:
        found = [Document(one) if isinstance(one, str) else one for one in data]
    except TypeError:
        found = []
    if not found or not all(isinstance(one, Document) for one in found):
        raise ProbeError("data: expected a file, a directory, a list of texts or documents, or blocks of tokens")
    return found


def _check_length(length: int, sides: Sides) -> None:
    if sides.positions is not None and length > sides.positions:
        raise ProbeError(
            f"--length {length}: the model has {sides.positions} positions; give at most that many tokens a sequence"
        )


def _writes(sides: Sides) -> bool:
    """Whether it is a model that writes text or fills it in, by its class's name."""
    name = type(sides.model).__name__
    return not sides.config or any(word in name for word in ("CausalLM", "LMHead", "MaskedLM", "ConditionalGeneration"))


def _special(tokenizer: Any) -> tuple[int | None, tuple[int, ...]]:
    return (tokenizer.mask_token_id, tuple(tokenizer.all_special_ids)) if tokenizer is not None else (None, ())
