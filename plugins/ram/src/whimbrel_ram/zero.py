"""Which pages are zero: looked at word by word, and no further than it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from whimbrel_ram import native

if TYPE_CHECKING:
    from numpy.typing import NDArray


def zero_map(words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which rows are all zero. Looks at one word of each, at two more where that is zero, and only then at the rest."""
    zero: NDArray[np.bool_] = words[:, 0] == 0
    candidates = np.flatnonzero(zero)
    if len(candidates) == len(words):
        zero[:] = np.bitwise_or.reduce(words, axis=1) == 0
    elif len(candidates):
        zero[candidates] = _zero_behind_the_first(words, candidates)
    return zero


def zero_map_at(words: NDArray[np.uint64], pages: NDArray[np.intp]) -> NDArray[np.bool_]:
    """zero_map() of scattered rows, without copying those that the first look settles."""
    if native.records is not None:
        found = np.empty(len(pages), np.bool_)
        native.records.zero(words, pages, words.shape[1] * 8, found)
        return found
    zero: NDArray[np.bool_] = words[pages, 0] == 0
    candidates = np.flatnonzero(zero)
    if len(candidates):
        zero[candidates] = _zero_behind_the_first(words, pages[candidates])
    return zero


def _zero_behind_the_first(words: NDArray[np.uint64], pages: NDArray[np.intp]) -> NDArray[np.bool_]:
    last = words.shape[1] - 1
    zero: NDArray[np.bool_] = (words[pages, last] | words[pages, last * 2 // 5]) == 0
    candidates = np.flatnonzero(zero)
    for i in range(0, len(candidates), 64):  # gathered in pieces that stay in the cache
        some = candidates[i : i + 64]
        zero[some] = np.bitwise_or.reduce(words[pages[some]], axis=1) == 0
    return zero


def as_words(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The same pages as rows of 8-byte words (whatever their alignment)."""
    return rows.view(np.uint64)
