"""ReceivingPages: RAM that the source writes by RDMA, on the destination."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from whimbrel.state import Outcome
from whimbrel_ram import PageFlag, PageTransport, RAMBlock, untouched
from whimbrel_rdma.protocol import (
    CHUNK,
    BlockInfo,
    Kind,
    Message,
    RamSpace,
    Registered,
    decode_register,
    decode_zeros,
    encode_blocks,
    encode_result,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from whimbrel.stream import InStream
    from whimbrel_rdma.channel import RdmaChannel


@attrs.define(eq=False)
class _Block:
    block: RAMBlock
    #: Pages that the host has given no memory for: they are zero, and writing zero would populate them.
    untouched: NDArray[np.bool_] | None
    regions: dict[int, tuple[Any, int]] = attrs.field(factory=dict)  # chunk → registration, length
    old: list[Any] = attrs.field(factory=list)  # registrations that a longer one has replaced
    whole: Any = None


class ReceivingPages(PageTransport):
    """Answers the source's control messages, from HOOK to REGISTER_FINISHED. What it writes meanwhile is never seen."""

    def __init__(self, channel: RdmaChannel) -> None:
        self._channel, self._link = channel, channel.link
        self._connection = channel.connection
        self._blocks: list[_Block] = []
        self._space = RamSpace(())

    def on_blocks(self, blocks: Sequence[RAMBlock]) -> None:
        self._release()
        self._blocks = [_Block(b, untouched(b)) for b in blocks]
        self._space = RamSpace(b.size for b in blocks)

    def on_record(self, flag: PageFlag, inp: InStream) -> None:
        if flag is not PageFlag.HOOK:
            super().on_record(flag, inp)
            return
        while True:
            message = self._link.hear(
                Kind.RAM_BLOCKS_REQUEST,
                Kind.COMPRESS,
                Kind.REGISTER_REQUEST,
                Kind.UNREGISTER_REQUEST,
                Kind.REGISTER_FINISHED,
            )
            if message.kind is Kind.REGISTER_FINISHED:
                return
            self._serve(message)

    def _serve(self, message: Message) -> None:
        if message.kind is Kind.RAM_BLOCKS_REQUEST:
            self._link.reply(encode_blocks(self._describe()))
        elif message.kind is Kind.COMPRESS:
            for zero in decode_zeros(message):
                where = self._space.locate(zero.index, zero.offset, zero.length)
                self._zero(self._blocks[zero.index], where, zero.length)
        elif message.kind is Kind.REGISTER_REQUEST:
            results = []
            for request in decode_register(message):
                where = self._space.locate(request.index, request.at, 1)
                results.append(self._register(request.index, where, request.extra))
            self._link.reply(encode_result(results))
        else:
            for request in decode_register(message):
                self._space.chunk_range(request.index, request.at, 0)
                region, _ = self._blocks[request.index].regions.pop(request.at, (None, 0))
                if region is not None:
                    region.close()
            self._link.reply(Message(Kind.UNREGISTER_FINISHED))

    def _describe(self) -> list[BlockInfo]:
        """The blocks in the source's order; with pin-all they are registered here."""
        found = []
        for block, offset in zip(self._blocks, self._space.offsets, strict=True):
            memory, rkey = block.block, 0
            if self._channel.pin_all:
                if block.whole is None:
                    block.whole = self._connection.register(
                        memory.address, memory.size, remote=True
                    )
                    block.untouched = None
                rkey = block.whole.rkey
            found.append(BlockInfo(memory.address, offset, memory.size, rkey))
        return found

    def _register(self, index: int, where: int, extra: int) -> Registered:
        """The chunk that `where` is in, and `extra` behind it."""
        block = self._blocks[index]
        chunk = where // CHUNK
        start, length = self._space.chunk_range(index, chunk, extra)
        region, have = block.regions.get(chunk, (None, 0))
        if have < length:
            if region is not None:  # the source may still write by its key
                block.old.append(region)
            region = self._connection.register(block.block.address + start, length, remote=True)
            block.regions[chunk] = region, length
            if block.untouched is not None:
                size = block.block.page_size
                block.untouched[start // size : (start + length) // size] = False
        assert region is not None
        return Registered(region.rkey, block.block.address)

    @staticmethod
    def _zero(block: _Block, where: int, length: int) -> None:
        size, end = block.block.page_size, where + length
        fresh = block.untouched
        if fresh is not None and not where % size and not end % size:
            pages = fresh[where // size : end // size]
            if pages.any():
                block.block.rows[where // size : end // size][~pages] = 0
                return
        elif fresh is not None:
            fresh[where // size : -(-end // size)] = False
        ctypes.memset(block.block.address + where, 0, length)

    def close(self, outcome: Outcome) -> None:
        if outcome is not Outcome.COMPLETED:
            self._channel.fail()
        self._release()

    def _release(self) -> None:
        for block in self._blocks:
            regions = [region for region, _ in block.regions.values()] + block.old
            for region in [*regions, *([block.whole] if block.whole is not None else [])]:
                region.close()
        self._blocks = []
