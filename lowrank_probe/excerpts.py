"""A sample of a long text that is cheap to tokenize: excerpts spread evenly over all of it. No torch.

The first sequences of a text are of its first documents, which may be two of a hundred, and a bootstrap takes them for
independent. So a sequence is taken from every part of the text: by characters first, since tokens are not known before
they are made, then by blocks.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lowrank_probe.documents import Document

# An excerpt is so many characters for each token that is wanted of it; a token is seldom more than a quarter of that.
CHARACTERS: Final = 16
_REST_OF_A_WORD: Final = re.compile(r"\A\S*\s+(?=\S)")


def evenly(n: int, most: int) -> NDArray[np.int64]:
    """At most `most` of 0, …, n − 1, ascending, as far apart as they can be: the middles of as many equal parts.

    >>> evenly(10, 3).tolist(), evenly(2, 3).tolist()
    ([1, 5, 8], [0, 1])
    """
    n_taken = min(n, most)
    return ((np.arange(n_taken) + 0.5) * n / n_taken).astype(np.int64) if n_taken else np.empty(0, np.int64)


def excerpts(documents: Sequence[Document], n: int, length: int) -> list[tuple[int, Document]]:
    """(number of the document, it or a part of its text) of `n` excerpts that each hold `length` tokens, in order.

    All of it where the text is no longer than that. A document that is cut says so; prompts and conversations are taken
    whole.
    """
    wanted = CHARACTERS * length
    ends = list(accumulate(len(one.text) + 1 if _plain(one) else wanted for one in documents))
    total = ends[-1] if ends else 0
    if total <= n * wanted:
        return list(enumerate(documents))
    found: dict[tuple[int, int], tuple[int, Document]] = {}
    for i in range(n):
        at, stop = i * total // n, i * total // n + wanted
        number = bisect_right(ends, at)
        while number < len(documents) and (begin := ends[number - 1] if number else 0) < stop:
            first = max(0, at - begin) if _plain(documents[number]) else 0
            found.setdefault((number, first), (number, _part(documents[number], first, stop - begin)))
            number += 1
    return list(found.values())


def _plain(document: Document) -> bool:
    return not document.prompt and not document.messages


def _part(document: Document, first: int, stop: int) -> Document:
    """The text from the word after character `first` up to `stop`."""
    if not _plain(document) or (first <= 0 and stop >= len(document.text)):
        return document
    text = document.text[max(0, first) : stop]
    if first > 0:
        text = _REST_OF_A_WORD.sub("", text)
    return replace(document, text=text, cut=stop < len(document.text))
