"""Text to run a model on: the built-in prompts or a user's file, and the token ids they become."""

import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.documents import json_lines, paragraphs, what_it_is
from lowrank_probe.errors import ProbeError

# Any of these is in a directory that has a tokenizer (transformers makes up an empty one where none is).
VOCABULARIES: Final = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "source.spm", "tekken.json", "tiktoken.model", "merges.txt",
)  # fmt: skip
# What is tokenized of one text: more than `n_tokens` tokens of any language, and not a whole book.
_CHARACTERS_A_TOKEN: Final = 32
N_SEQUENCES: Final = 20
SEQUENCE_LENGTH: Final = 64


def prompts() -> list[str]:
    """The 20 built-in paragraphs: prose, code, arithmetic, instructions, seven languages."""
    return list(paragraphs(files("lowrank_probe").joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()))


def read_texts(file: str | os.PathLike[str], limit: int | None = None) -> list[str]:
    """The first `limit` texts of a file: of `.jsonl` the "text" of each line, else paragraphs parted by blank lines.

    Raises `ProbeError` naming file and line: missing, empty, not UTF-8, a line without "text".
    """
    path = Path(file)
    try:
        with open(path, encoding="utf-8") as lines:
            texts = list(islice(_jsonl(path, lines) if path.suffix == ".jsonl" else paragraphs(lines), limit))
    except OSError as error:
        raise ProbeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ProbeError(
            f"{path}: is not UTF-8 text (expected paragraphs, or .jsonl with a text in each line)"
        ) from None
    if not texts:
        raise ProbeError(f"{path}: holds no text (expected paragraphs, or .jsonl with a text in each line)")
    return texts


def _jsonl(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, value in json_lines(path, lines):
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            found = what_it_is(value)
            raise ProbeError(f'{path}: line {number} has no text: expected a string or {{"text": "…"}}, found {found}')
        if text.strip():
            yield text


def token_sequences(
    texts: Sequence[str], directories: Sequence[Path], vocabulary: int, n_tokens: int
) -> tuple[list[Tensor], list[str]]:
    """Sequences of at most `n_tokens` ids below `vocabulary`, one a text, and notes on how they came about.

    The tokenizer is that of the first directory that has one; where none has, the sequences are random ids from a fixed
    seed. Raises `ProbeError` where no text gives a token.
    """
    tokenizer, notes = find_tokenizer(directories)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        length = min(SEQUENCE_LENGTH, n_tokens)
        notes.append(f"no tokenizer beside the weights: {N_SEQUENCES} sequences of {length} random token ids, no text")
        drawn = torch.randint(vocabulary, (N_SEQUENCES, length), generator=generator)
        return list(drawn), notes
    sequences, n_left_out = [], 0
    for text in texts:
        every = torch.tensor(tokenizer(text[: _CHARACTERS_A_TOKEN * n_tokens])["input_ids"], dtype=torch.long)
        known = every[every < vocabulary]
        n_left_out += len(every) - len(known)
        if len(known):
            sequences.append(known[:n_tokens])
    if not sequences:
        raise ProbeError(f"the {len(texts)} texts give no token that both models know; give other text with --data")
    if n_left_out:
        notes.append(f"{n_left_out} tokens that one of the models does not know are left out of the texts")
    return sequences, notes


def find_tokenizer(directories: Sequence[Path]) -> tuple[Any, list[str]]:
    """The tokenizer of the first directory that has one that loads, or None; notes on those that do not load."""
    from transformers import AutoTokenizer

    notes = []
    for directory in directories:
        if not any((directory / name).exists() for name in VOCABULARIES):
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # each of its backends raises what it likes
            notes.append(f"{directory}: its tokenizer cannot be loaded ({(str(error).splitlines() or [''])[0][:200]})")
            continue
        return tokenizer, notes
    return None, notes
