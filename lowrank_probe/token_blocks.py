"""Documents → blocks of token ids with labels: what a model is trained or judged on.

Labels are the ids themselves where a loss is taken, else −100 (as transformers and torch ignore it); a causal model
shifts them. A loss is taken on all of a plain text, on the completion of a prompt, on the assistant's turns of a
conversation; never on padding or on the beginning-of-text token.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.documents import Document
from lowrank_probe.errors import ProbeError
from lowrank_probe.excerpts import evenly, excerpts
from lowrank_probe.texts import VOCABULARIES, find_tokenizer
from lowrank_probe.words import count

IGNORED: Final = -100
_OWN_MASK: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Blocks:
    """ids, labels: (n, length) int64; labels are −100 where no loss is taken. lengths: (n,) tokens that are no padding.

    n_documents: documents that are in them, whole or in part. notes: what a reader should know.
    """

    ids: Tensor
    labels: Tensor
    lengths: Tensor
    n_documents: int
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_tokens(self) -> int:
        """Number of tokens that have a label."""
        return int((self.labels != IGNORED).sum())

    @property
    def attention_mask(self) -> Tensor:
        """(n, length) int64: 0 on padding."""
        return (torch.arange(self.ids.shape[1]) < self.lengths[:, None]).long()


@dataclass(frozen=True)
class _Row:
    """One block, and the numbers of the documents that are in it."""

    ids: list[int]
    labels: list[int]
    sources: frozenset[int]


def load_tokenizer(*directories: str | os.PathLike[str]) -> Any:
    """The tokenizer of the first directory that has one that loads. Raises `ProbeError` where none has."""
    where = [Path(directory) for directory in directories]
    tokenizer, notes = find_tokenizer(where)
    if tokenizer is None:
        told = f" ({'; '.join(notes)})" if notes else f" (looked for {', '.join(VOCABULARIES[:4])}, …)"
        raise ProbeError(
            f"{' or '.join(map(str, where))}: has no tokenizer{told}; copy the model's tokenizer files there"
        )
    return tokenizer


def to_blocks(
    documents: Sequence[Document], tokenizer: Any, length: int, *, packing: bool = True, limit: int | None = None,
    least: int = 1, vocabulary: int | None = None,
) -> Blocks:  # fmt: skip
    """At least `least` and at most `limit` blocks of `length` tokens.

    packing: documents one after the other, each ended by the end-of-text token, cut into blocks of exactly `length`;
    what is left over at the end is dropped. Without: one document a block, cut at `length`, padded on the right. A
    block without any label is dropped. vocabulary: number of ids that the model has.

    Of a text that gives more than `limit`, they are spread evenly over all of it, in its order; of a very long one no
    more is tokenized than `excerpts` of it.

    Raises `ProbeError` for too little text, for ids beyond the vocabulary, and for conversations without a chat
    template, or with one that does not show where the assistant's turns are.
    """
    if length < 2:
        raise ProbeError(f"length={length}: expected at least 2 tokens, one to read and one to predict")
    if limit is not None and limit < least:
        raise ProbeError(f"{limit} sequences are too few; expected at least {least}")
    parts = list(enumerate(documents))
    if limit is not None:
        parts = excerpts(documents, limit, length) if packing else _spread_first(parts, limit)
    rows: list[_Row] = []
    ids: list[int] = []
    labels: list[int] = []
    sources: list[int] = []  # the document of each token
    n_documents = n_tokens = n_cut = n_silent = 0
    for source, part in parts:
        found, judged = _encoded(part, tokenizer)
        _check_vocabulary(found, vocabulary)
        n_documents, n_tokens = n_documents + 1, n_tokens + len(found)
        if packing:
            ids, labels, sources = ids + found, labels + judged, sources + [source] * len(found)
            whole = len(ids) - len(ids) % length
            fresh = [
                _Row(ids[at : at + length], labels[at : at + length], frozenset(sources[at : at + length]))
                for at in range(0, whole, length)
            ]
            ids, labels, sources = ids[whole:], labels[whole:], sources[whole:]
        else:
            n_cut += len(found) > length
            fresh = [_Row(found[:length], judged[:length], frozenset([source]))]
        kept = [row for row in fresh if any(label != IGNORED for label in row.labels[1:])]
        n_silent += len(fresh) - len(kept)
        rows += kept
        if not packing and limit is not None and len(rows) >= limit:
            break
    if len(rows) < least:
        raise ProbeError(_too_little(len(rows), least, length, len(documents), n_tokens, packing))
    if limit is not None:
        rows = (
            [rows[i] for i in evenly(len(rows), limit)] if packing else sorted(rows, key=lambda row: min(row.sources))
        )
    notes = []
    if n_cut:
        are = "is" if n_cut == 1 else "are"
        notes.append(f"{n_cut} of {count(n_documents, 'document')} {are} longer than {length} tokens and cut there")
    if n_silent:
        notes.append(f"{count(n_silent, 'sequence')} without any token to predict left out")
    pad = next((one for one in (tokenizer.pad_token_id, _end(tokenizer)) if one is not None), 0)
    return Blocks(
        torch.tensor([row.ids + [pad] * (length - len(row.ids)) for row in rows]),
        torch.tensor([row.labels + [IGNORED] * (length - len(row.labels)) for row in rows]),
        torch.tensor([len(row.ids) for row in rows]), len(frozenset().union(*(row.sources for row in rows))),
        tuple(notes),
    )  # fmt: skip


def _spread_first(parts: list[tuple[int, Document]], limit: int) -> list[tuple[int, Document]]:
    """All of them, those first that are spread evenly: the others serve where one of these has nothing to judge."""
    chosen = set(evenly(len(parts), limit).tolist())
    return [parts[i] for i in sorted(chosen)] + [part for i, part in enumerate(parts) if i not in chosen]


def _encoded(document: Document, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids, labels) of one document, ended by the end-of-text token where the tokenizer has one and it ends there."""
    end = None if document.cut else _end(tokenizer)
    if document.messages:
        ids, labels = _conversation(document.messages, tokenizer)
        return (ids, labels) if end is None or ids[-1] == end else ([*ids, end], [*labels, IGNORED])
    ids = _ids(tokenizer, document.prompt + document.text)
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    labels = list(ids)
    unjudged = _common(_ids(tokenizer, document.prompt), ids) if document.prompt else 0
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    unjudged = max(unjudged, int(bool(ids) and ids[0] == begin))
    labels[:unjudged] = [IGNORED] * unjudged
    return ids, labels


def _conversation(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """The rendered conversation, labelled by the template's own generation mask, else by the difference of prefixes."""
    told = [dict(one) for one in messages]
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ProbeError("the tokenizer has no chat template, which conversations (messages) need; give text instead")
    if isinstance(template, str) and _OWN_MASK.search(template):
        found = _applied(tokenizer, told, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(found["input_ids"]), list(found["assistant_masks"])
    else:
        ids = _rendered(tokenizer, told)
        mask = [0] * len(ids)
        for start, stop in _turns(tokenizer, told, ids):
            mask[start:stop] = [1] * (stop - start)
    if not any(mask):
        raise ProbeError("the chat template does not show where the assistant's turns are; give prompt and completion")
    return ids, [token if judged else IGNORED for token, judged in zip(ids, mask, strict=True)]


def _turns(tokenizer: Any, messages: list[dict[str, Any]], ids: list[int]) -> Iterator[tuple[int, int]]:
    """(first, end) of each of the assistant's turns in the ids of the whole conversation."""
    for i, one in enumerate(messages):
        if one["role"] == "assistant":
            start = _common(_rendered(tokenizer, messages[:i], add_generation_prompt=True), ids) if i else 0
            stop = len(ids) if i == len(messages) - 1 else _common(_rendered(tokenizer, messages[: i + 1]), ids)
            yield start, max(start, stop)


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], **how: bool) -> list[int]:
    text = _applied(tokenizer, messages, tokenize=False, **how)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _applied(tokenizer: Any, messages: list[dict[str, Any]], **how: bool) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except Exception as error:  # a template raises what it likes: roles that do not alternate, no system turn
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProbeError(f"the tokenizer's chat template does not take a conversation: {why[:200]}") from None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def _end(tokenizer: Any) -> int | None:
    end: int | None = tokenizer.eos_token_id
    return tokenizer.sep_token_id if end is None else end


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _check_vocabulary(ids: Sequence[int], vocabulary: int | None) -> None:
    if vocabulary is not None and ids and max(ids) >= vocabulary:
        raise ProbeError(
            f"the tokenizer gives the id {max(ids)}, the model has {vocabulary} (0 to {vocabulary - 1}); is it this "
            "model's tokenizer?"
        )


def _too_little(n: int, least: int, length: int, n_documents: int, n_tokens: int, packing: bool) -> str:
    needed = f"{least * length} tokens in sequences of {length}" if packing else count(least, "document")
    return (
        f"too little text: {count(n_documents, 'document')} {'gives' if n_documents == 1 else 'give'} "
        f"{count(n_tokens, 'token')} and {count(n, 'sequence')}; expected at least {needed}; give more text, or "
        "shorter sequences (--length)"
    )
