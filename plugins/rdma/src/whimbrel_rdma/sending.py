"""SendingPages: RAM by RDMA WRITE into the destination's memory, on the source."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from whimbrel.errors import LocalError, StreamError
from whimbrel.state import Outcome
from whimbrel_ram import PageFlag, PageTransport, Phase, SaveBlock, Sent, zero_pages
from whimbrel_rdma.limits import pin_limit
from whimbrel_rdma.protocol import (
    CHUNK,
    BlockInfo,
    Kind,
    Message,
    Register,
    ZeroRange,
    decode_blocks,
    decode_result,
    encode_register,
    encode_zero,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from whimbrel.savevm import Budget
    from whimbrel.stream import OutStream
    from whimbrel_rdma.channel import RdmaChannel

_HOOK = int(PageFlag.HOOK).to_bytes(8, "big")
#: Bytes looked at together: their chunks are registered by one message.
_STEP = 16 << 20
#: Clean pages between two others that are sent along, rather than by a write for each side of the gap.
_GAP = 4


@attrs.define(eq=False)
class _Block:
    """A block and what is known of it on the other side."""

    saved: SaveBlock
    there: BlockInfo
    start: int  # address of its first byte here
    keys: dict[
        int, tuple[Any, int, int]
    ]  # chunk → registration here, key there, address of the block there
    whole: tuple[Any, int, int] | None = None  # the same for all of it


class SendingPages(PageTransport):
    """Zero chunks are said to be zero, others are registered on both sides and then written; with pin-all, everything is
    registered at the start and written. A round ends when every write has arrived.
    """

    def __init__(self, channel: RdmaChannel) -> None:
        self._connection, self._link = channel.connection, channel.link
        self._channel = channel
        self._pin_all = channel.pin_all
        self._blocks: list[_Block] = []
        self._pinned: collections.OrderedDict[tuple[int, int], None] = collections.OrderedDict()
        self._limit = pin_limit()
        self._zero_chunks = 0

    def begin(self, blocks: Sequence[SaveBlock], out: OutStream) -> None:
        self._hook(out)
        answer = self._link.ask(Message(Kind.RAM_BLOCKS_REQUEST), Kind.RAM_BLOCKS_RESULT)
        there = decode_blocks(answer)
        ours = [b.block.size for b in blocks]
        if [b.length for b in there] != ours:
            raise StreamError(
                "the destination's RAM blocks are not ours",
                section="ram",
                expected=f"lengths {ours}"[:300],
                found=str([b.length for b in there])[:300],
                hint="Start the destination with the same RAM",
            )
        for saved, info in zip(blocks, there, strict=True):
            if saved.block.page_size > CHUNK:
                raise LocalError(
                    f"RDMA knows chunks of {CHUNK} bytes, and the pages have {saved.block.page_size}",
                    section="ram",
                )
            self._blocks.append(_Block(saved, info, saved.words.ctypes.data, {}))
        if self._pin_all:
            for block in self._blocks:
                region = self._connection.register(
                    block.start, block.saved.block.size, remote=False
                )
                block.whole = (region, block.there.rkey, block.there.address)
        self._link.say(Message(Kind.REGISTER_FINISHED))

    def _hook(self, out: OutStream) -> None:
        """From here on the destination listens to control messages."""
        out.write(_HOOK)
        out.flush()

    def round_begin(self, out: OutStream, phase: Phase) -> None:
        if (
            phase is Phase.COMPLETE
        ):  # the machine stands still, for a destination that may have gone silent
            self._link.patience = self._channel.patience
        self._hook(out)

    def round_end(self, out: OutStream, phase: Phase) -> None:
        self._connection.drain()
        self._link.say(Message(Kind.REGISTER_FINISHED))

    def send(
        self, block: SaveBlock, pages: NDArray[np.intp], out: OutStream, budget: Budget
    ) -> Sent:
        page_size = block.block.page_size
        start, done, zero = out.position, 0, 0
        while done < len(pages):
            used = out.position - start
            if done and budget.spent(used):
                break
            step = _STEP // page_size
            if budget.bytes is not None:
                step = min(step, max(1, (budget.bytes - used) // page_size + 1))
            some = pages[done : done + step]
            if self._limit is not None and not self._pin_all:
                some = _within(some, CHUNK // page_size, max(1, self._limit // CHUNK))
            zero += self._send(self._blocks[block.index], some, out)
            done += len(some)
        return Sent(done, zero)

    def _send(self, block: _Block, pages: NDArray[np.intp], out: OutStream) -> int:
        """Send the pages; how many of them were said to be zero."""
        a_chunk = CHUNK // block.saved.block.page_size
        if block.whole is not None:
            self._write(block, pages, out)
            return 0
        chunk = pages // a_chunk
        first = np.flatnonzero(np.diff(chunk, prepend=-1))  # where each chunk begins in pages
        chunks = chunk[first]
        known = np.fromiter((int(c) in block.keys for c in chunks), np.bool_, len(chunks))
        empty = ~known
        if empty.any():
            empty &= np.logical_and.reduceat(zero_pages(block.saved, pages), first)
        sizes = np.diff(first, append=len(pages))
        zero = np.repeat(empty, sizes)
        if empty.any():
            self._say_zero(block, pages[zero])
            self._zero_chunks += int(np.count_nonzero(empty))
        new = chunks[~known & ~empty]
        if len(new):
            self._register(block, new, set(chunks[~empty].tolist()))
        if not empty.all():
            self._write(block, pages[~zero], out)
        return int(np.count_nonzero(zero))

    def _say_zero(self, block: _Block, pages: NDArray[np.intp]) -> None:
        size = block.saved.block.page_size
        for low, high in _runs(pages, 0):
            offset = block.there.offset + low * size
            self._link.say(encode_zero(ZeroRange(block.saved.index, offset, (high - low) * size)))

    def _register(self, block: _Block, chunks: NDArray[np.intp], in_use: set[int]) -> None:
        """Register chunks on both sides, and give up the oldest ones where no more may be pinned here.

        One by one: QEMU 7.2 answers a request of several with one key.
        """
        index, size = block.saved.index, block.saved.block.size
        for chunk in chunks.tolist():
            if self._limit is not None:
                self._make_room(CHUNK, index, in_use)
            start = chunk * CHUNK
            length = min(CHUNK, size - start)
            region = self._connection.register(block.start + start, length, remote=False)
            block.keys[chunk] = (region, 0, 0)
            asked = [Register(block.there.offset + start, index)]
            answer = self._link.ask(
                encode_register(Kind.REGISTER_REQUEST, asked), Kind.REGISTER_RESULT
            )
            (result,) = decode_result(answer, 1)
            block.keys[chunk] = (region, result.rkey, result.address)
            self._pinned[index, chunk] = None

    def _make_room(self, need: int, index: int, in_use: set[int]) -> None:
        assert self._limit is not None
        drained = False
        for key in list(self._pinned):
            if len(self._pinned) * CHUNK + need <= self._limit:
                return
            owner, chunk = key
            if owner == index and chunk in in_use:
                continue
            if not drained:
                self._connection.drain()
                drained = True
            del self._pinned[key]
            region, _, _ = self._blocks[owner].keys.pop(chunk)
            region.close()
            request = encode_register(Kind.UNREGISTER_REQUEST, [Register(chunk, owner)])
            self._link.ask(request, Kind.UNREGISTER_FINISHED)

    def _write(self, block: _Block, pages: NDArray[np.intp], out: OutStream) -> None:
        size = block.saved.block.page_size
        write = self._connection.write
        for low, high in _runs(pages, _GAP):
            start, end = low * size, high * size
            while start < end:
                stop = min(end, (start // CHUNK + 1) * CHUNK)
                region, rkey, there = block.whole or block.keys[start // CHUNK]
                write(block.start + start, region.lkey, stop - start, there + start, rkey)
                out.account(stop - start)
                start = stop

    def query(self) -> dict[str, Any]:
        counters = self._connection.counters
        return {
            "x-rdma": {
                "pin-all": self._pin_all,
                "registrations": counters.registrations,
                "writes": counters.writes,
                "bytes": counters.bytes,
                "outstanding": self._connection.outstanding,
                "zero-chunks": self._zero_chunks,
            }
        }

    def close(self, outcome: Outcome) -> None:
        if outcome is not Outcome.COMPLETED:
            self._channel.fail()
        for block in self._blocks:
            for region, _, _ in [*block.keys.values(), *([block.whole] if block.whole else [])]:
                region.close()
            block.keys.clear()
            block.whole = None


def _within(pages: NDArray[np.intp], a_chunk: int, chunks: int) -> NDArray[np.intp]:
    """The first of the pages, as many as lie in that number of chunks: these are registered at the same time."""
    first = np.flatnonzero(np.diff(pages // a_chunk, prepend=-1))
    return pages if len(first) <= chunks else pages[: first[chunks]]


def _runs(pages: NDArray[np.intp], gap: int) -> list[tuple[int, int]]:
    """Ascending pages as ranges (first, one behind the last); up to `gap` pages in between are taken in."""
    cut = np.flatnonzero(np.diff(pages) > gap + 1)
    low = pages[np.concatenate(([0], cut + 1))]
    high = pages[np.concatenate((cut, [len(pages) - 1]))] + 1
    return list(zip(low.tolist(), high.tolist(), strict=True))
