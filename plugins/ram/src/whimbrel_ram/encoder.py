"""Encoder: pages into records, a batch at a time. Sans-I/O; nothing in Python per page.

A batch of equal records is an array with one row a record: pages are gathered into a staging buffer laid out like that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from whimbrel_ram import native, xbzrle
from whimbrel_ram.records import CONTINUE, PAGE, U64, XBZRLE, ZERO

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Pages gathered at once: 256 KiB of 4 KiB pages stay in the L2 cache between gathering and sending.
_GATHER_BYTES = 256 << 10
#: Bytes of page records in one send.
SEND_BYTES = 1 << 20


class Encoder:
    """Turns pages of one block into buffers for the stream. What it returns is valid until the next call."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        #: Bytes of one page record with CONTINUE.
        self.record = 8 + page_size
        #: Most pages that pages() takes at once.
        self.batch = max(1, SEND_BYTES // page_size)
        self._gather = max(1, _GATHER_BYTES // page_size)
        words = page_size // 8
        self._staging = np.empty((self.batch, 1 + words), np.uint64)
        self._bytes = self._staging.reshape(-1).view(np.uint8).data
        self._block: bytes | None = None

    def restart(self) -> None:
        """The next record names its block."""
        self._block = None

    def continues(self, idstr: bytes) -> bool:
        """The next record of that block needs no name."""
        return self._block == idstr

    def _head(self, idstr: bytes, kind: int, page: int) -> bytes:
        """First word and idstr of a record that starts a block."""
        self._block = idstr
        return U64.pack(page * self.page_size | kind) + bytes((len(idstr),)) + idstr

    def zeros(self, idstr: bytes, pages: NDArray[np.intp]) -> list[bytes | memoryview]:
        """Records for pages that are zero."""
        buffers: list[bytes | memoryview] = []
        if not self.continues(idstr):
            buffers.append(self._head(idstr, ZERO, int(pages[0])) + b"\0")
            pages = pages[1:]
        records = np.zeros((len(pages), 9), np.uint8)
        words = self._first_words(pages, ZERO | CONTINUE)
        records[:, :8] = words.view(np.uint8).reshape(-1, 8)
        buffers.append(records.reshape(-1).data)
        return buffers

    def pages(
        self, idstr: bytes, source: NDArray[np.uint64], pages: NDArray[np.intp]
    ) -> list[bytes | memoryview]:
        """Records with the bytes of these pages (ascending, at most `batch`); source is the block as rows of words."""
        buffers: list[bytes | memoryview] = []
        if not self.continues(idstr):
            first = int(pages[0])
            buffers += [self._head(idstr, PAGE, first), source[first].tobytes()]
            pages = pages[1:]
        n = len(pages)
        if native.records is not None:
            used = native.records.gather(self._bytes, source, pages, self.page_size)
            return [*buffers, self._bytes[:used]]
        out = self._staging
        out[:n, 0] = self._first_words(pages, PAGE | CONTINUE)
        for i in range(0, n, self._gather):
            j = min(i + self._gather, n)
            low, high = int(pages[i]), int(pages[j - 1])
            if high - low == j - 1 - i:  # they ascend, so this is one piece of memory
                out[i:j, 1:] = source[low : high + 1]
            else:
                out[i:j, 1:] = source[pages[i:j]]
        buffers.append(self._bytes[: n * self.record])
        return buffers

    def copies(
        self, idstr: bytes, rows: NDArray[np.uint64], pages: NDArray[np.intp]
    ) -> list[bytes | memoryview]:
        """Records like those of pages(), with bytes that were copied: row i is page pages[i]."""
        buffers: list[bytes | memoryview] = []
        if not self.continues(idstr):
            buffers += [self._head(idstr, PAGE, int(pages[0])), rows[0].tobytes()]
            pages, rows = pages[1:], rows[1:]
        n = len(pages)
        self._staging[:n, 0] = self._first_words(pages, PAGE | CONTINUE)
        self._staging[:n, 1:] = rows
        buffers.append(self._bytes[: n * self.record])
        return buffers

    def deltas(
        self,
        idstr: bytes,
        pages: NDArray[np.intp],
        data: NDArray[np.uint8],
        length: NDArray[np.intp],
    ) -> list[bytes | memoryview]:
        """Records with deltas: data holds them one behind the other, length[i] bytes for page pages[i]."""
        head = 8 + xbzrle.HEAD
        size = length + head
        start = np.cumsum(size) - size
        out = np.empty(int(start[-1] + size[-1]), np.uint8)
        heads = np.empty((len(pages), head), np.uint8)
        heads[:, :8] = self._first_words(pages, XBZRLE | CONTINUE).view(np.uint8).reshape(-1, 8)
        heads[:, 8] = xbzrle.ENCODING
        heads[:, 9:] = length.astype(">u2").view(np.uint8).reshape(-1, 2)
        within = start[:, None] + np.arange(head)
        body = np.ones(len(out), np.bool_)
        body[within] = False
        out[within] = heads
        out[body] = data
        if self.continues(idstr):
            return [out.data]
        return [self._head(idstr, XBZRLE, int(pages[0])), out[8:].data]

    def _first_words(self, pages: NDArray[np.intp], flags: int) -> NDArray[np.uint64]:
        """As they lie in the stream."""
        words = pages.astype(np.uint64) * np.uint64(self.page_size) | np.uint64(flags)
        return words.astype(">u8").view(np.uint64)
