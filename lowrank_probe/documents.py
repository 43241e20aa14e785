"""Text as documents: what files hold them, and a held-out part that no document of the other part is in. No torch.

A document is plain text, a prompt with its completion, or a conversation; which of its tokens are learnt and judged,
`token_blocks` says.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Final, TextIO

from lowrank_probe.errors import ProbeError

EXPECTED: Final = (
    'a string, {"text": "…"}, {"prompt": "…", "completion": "…"} or {"messages": [{"role": "…", "content": "…"}, …]}'
)
_COLUMNS: Final = ("text", "prompt", "completion", "messages")


@dataclass(frozen=True)
class Document:
    """text: what the loss is taken on. prompt: read first, without loss. messages: a conversation instead of both,
    each message a dict of at least "role" and "content"; the loss is taken on the assistant's turns. cut: it goes on
    where its text ends, so that no end of text follows."""

    text: str
    prompt: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    cut: bool = False

    @cached_property
    def digest(self) -> bytes:
        """sha256 of everything in it."""
        told = json.dumps([self.prompt, self.text, [dict(one) for one in self.messages]], sort_keys=True, default=str)
        return sha256(told.encode()).digest()


def read_documents(path: str | os.PathLike[str], limit: int | None = None) -> list[Document]:
    """The first `limit` documents of a file or a directory.

    - `.jsonl`: a line each, as `EXPECTED`. `.parquet`: a row each, by the columns of the same names.
    - any other file: paragraphs parted by blank lines.
    - a directory: every file in it and below, sorted by name, hidden ones left out; one that is neither of the first
      two is one document as a whole.
    A name that ends in `.gz` is unpacked on the way. Raises `ProbeError` naming file and line or row: missing, empty,
    not UTF-8, not as expected.
    """
    root = Path(path)
    if root.is_dir():
        files = sorted(p for p in root.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(root)))
        found: Iterator[Document] = (document for file in files for document in _read(file, whole=True))
    else:
        found = _read(root, whole=False)
    documents = list(islice(found, limit))
    if not documents:
        raise ProbeError(
            f"{root}: holds no text (expected paragraphs, .jsonl or .parquet, or a directory of text files)"
        )
    return documents


def split_documents(documents: Sequence[Document], held_out: float = 0.1) -> tuple[list[Document], list[Document]]:
    """(training, held out) by the digest alone: held out where its first 8 bytes, as a fraction of 1, are < `held_out`.

    So a document is on the same side in any file, in any order, in any run. Exact duplicates after the first are
    dropped: `len(documents)` less both lengths is how many.
    """
    if not 0.0 <= held_out <= 1.0:
        raise ProbeError(f"held_out={held_out}: expected a share of the documents, from 0 to 1")
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in _distinct(documents):
        sides[int.from_bytes(document.digest[:8], "big") < held_out * 2.0**64].append(document)
    return sides


def open_text(file: Path) -> TextIO:
    """A file as UTF-8 text, unpacked where its name ends in `.gz`."""
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8")


def json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of JSON. Raises `ProbeError` naming file and line."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ProbeError(
                    f"{path}: line {number} is not valid JSON ({error.msg} at column {error.colno}); expected one JSON "
                    "value a line: mend it or leave it out"
                ) from None
            except (ValueError, RecursionError) as error:
                raise ProbeError(f"{path}: line {number} is not JSON that can be read ({error})") from None


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Runs of lines that are not blank."""
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line.rstrip("\n"))
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


def _distinct(documents: Iterable[Document]) -> Iterator[Document]:
    seen: set[bytes] = set()
    for document in documents:
        if document.digest not in seen:
            seen.add(document.digest)
            yield document


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(file: Path, whole: bool) -> Iterator[Document]:
    kind = Path(file.stem if file.suffix == ".gz" else file.name).suffix
    try:
        if kind == ".parquet":
            yield from _parquet(file)
            return
        with open_text(file) as lines:
            if kind == ".jsonl":
                for number, value in json_lines(file, lines):
                    yield from _document(value, f"{file}: line {number}")
            elif whole:
                text = lines.read()
                yield from [Document(text)] if text.strip() else []
            else:
                yield from map(Document, paragraphs(lines))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ProbeError(f"{file}: is no whole gzip file: {error}") from None
    except OSError as error:
        raise ProbeError(f"{file}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ProbeError(f"{file}: is not UTF-8 text (expected text, .jsonl or .parquet)") from None


def _parquet(file: Path) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = [name for name in _COLUMNS if name in table.schema_arrow.names]
            if not names:
                found = ", ".join(table.schema_arrow.names)
                raise ProbeError(
                    f"{file}: has no text: expected a column text, columns prompt and completion, or messages, found "
                    f"{found}"
                )
            for batch in table.iter_batches(batch_size=256, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    kept = {name: value for name, value in row.items() if value is not None}
                    yield from _document(kept, f"{file}: row {number}")
    except pyarrow.ArrowException as error:
        raise ProbeError(f"{file}: is no parquet file that can be read: {str(error).partition(chr(10))[0]}") from None


def _document(value: Any, where: str) -> list[Document]:
    """The document that one line or row holds; none where it is blank. where: file and line, for errors."""
    fields: dict[str, Any] = {"text": value} if isinstance(value, str) else value if isinstance(value, dict) else {}
    found: list[Document]
    if "messages" in fields:
        return [Document("", messages=_messages(fields["messages"], where))]
    if isinstance(fields.get("text"), str):
        found = [Document(fields["text"])]
    elif isinstance(fields.get("prompt"), str) and isinstance(fields.get("completion"), str):
        found = [Document(fields["completion"], fields["prompt"])]
    else:
        raise ProbeError(f"{where} has no text: expected {EXPECTED}, found {what_it_is(value)}")
    _check(found[0].prompt + found[0].text, where)
    return found if found[0].text.strip() else []


def what_it_is(value: Any) -> str:
    """What was found in the place of a text.

    >>> what_it_is({"answer": "a"}), what_it_is({"text": 5, "id": 1}), what_it_is([1])
    ('the key answer', 'the keys text (int), id (int)', 'list')
    """
    if not isinstance(value, dict) or not value:
        return type(value).__name__
    keys = [str(key) if isinstance(one, str) else f"{key} ({type(one).__name__})" for key, one in value.items()]
    return f"the key{'s' if len(keys) > 1 else ''} {', '.join(keys)}"


def _messages(messages: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ProbeError(f'{where}: its messages are not a list of {{"role": "…", "content": "…"}}')
    roles = [one["role"] for one in messages]
    if "assistant" not in roles:
        raise ProbeError(f"{where}: has no turn of the role assistant to take a loss on, found {', '.join(roles)}")
    for one in messages:
        _check(one["content"], where)
    # A table has every key in every row.
    return tuple({key: value for key, value in one.items() if value is not None} for one in messages)


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)


def _check(text: str, where: str) -> None:
    """JSON can write half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ProbeError(f"{where}: holds half of a surrogate pair, which is no text") from None
