"""What a peer sends that it must not: it is refused in both roles, nothing stays registered, nobody hangs."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from whimbrel import Budget, MigrationError, Outcome, OutStream, PeerError, Role, StreamError
from whimbrel.channel import TransportContext
from whimbrel_ram import PageFlag, PageTransport, Phase, RAMBlock, SaveBlock
from whimbrel_rdma import protocol as p
from whimbrel_rdma.channel import RdmaChannel
from whimbrel_rdma.protocol import Kind
from whimbrel_rdma.transport import RdmaTransport
from whimbrel_testing.transport_suite import Task

MIB = 1 << 20
SIZES = (3 * MIB, 4096)


class Ends:
    """Two connected channels, and the blocks on each side."""

    def __init__(self, uri: str, pin_all: bool = False) -> None:
        transport, address = RdmaTransport(), RdmaTransport().parse(uri.removeprefix("rdma:"))
        deadline = time.monotonic() + 30
        self.listener = transport.listen(address, TransportContext(role=Role.DESTINATION))
        accepting = Task(lambda: self.listener.accept(deadline))
        context = TransportContext(
            role=Role.SOURCE,
            deadline=deadline,
            settings={"rdma-pin-all": pin_all},  # type: ignore[arg-type]
        )
        self.source: RdmaChannel = transport.connect(address, context)  # type: ignore[assignment]
        self.destination: RdmaChannel = accepting.result(30)  # type: ignore[assignment]
        self.blocks = [RAMBlock(f"block{i}", size) for i, size in enumerate(SIZES)]

    def receiving(self) -> PageTransport:
        pages = self.destination.extension(PageTransport)
        assert pages is not None
        pages.on_blocks(self.blocks)
        return pages

    def close(self) -> None:
        for channel in (self.source, self.destination):
            channel.close()
        self.listener.close()


@pytest.fixture
def ends(uri: str) -> Iterator[Ends]:
    made = Ends(uri)
    yield made
    made.close()


def test_no_descriptor_blocks(ends: Ends) -> None:
    """A call of pyverbs that waits holds the GIL: none may wait."""
    for channel in (ends.source, ends.destination):
        for fd in (channel.connection._comp_fd, channel.connection._events.fd):
            assert not os.get_blocking(fd)


def message(kind: int, data: bytes = b"", repeat: int = 1, length: int | None = None) -> bytes:
    return struct.pack(">IIII", len(data) if length is None else length, kind, repeat, 0) + data


REGISTER, UNREGISTER, COMPRESS = Kind.REGISTER_REQUEST, Kind.UNREGISTER_REQUEST, Kind.COMPRESS


def some(cases: list[Any]) -> list[Any]:
    """Every third of them is in the short form as well."""
    return [
        c if n % 3 == 0 else pytest.param(c, marks=pytest.mark.slow) for n, c in enumerate(cases)
    ]


@pytest.mark.parametrize(
    "said",
    some(
        [
            message(0),
            message(99),
            message(Kind.QEMU_FILE, b"x", 0),
            message(Kind.REGISTER_RESULT, bytes(16)),
            message(Kind.READY) * 2,
            message(REGISTER, bytes(24), 2**32 - 1),
            message(REGISTER, bytes(24), 1, 2**32 - 1),
            p.encode_register(REGISTER, [p.Register(4 * MIB, 0)]).encode(),
            p.encode_register(REGISTER, [p.Register(0, 7)]).encode(),
            p.encode_register(REGISTER, [p.Register(0, 0, 2**64 - 1)]).encode(),
            p.encode_register(REGISTER, [p.Register(2**64 - 1, 1)]).encode(),
            p.encode_register(UNREGISTER, [p.Register(3, 0)]).encode(),
            p.encode_zero(p.ZeroRange(0, MIB, 3 * MIB)).encode(),
            p.encode_zero(p.ZeroRange(1, 0, 4096)).encode(),
            p.encode_zero(p.ZeroRange(0, 0, 2**64 - 1)).encode(),
            p.encode_zero(p.ZeroRange(0, 0, 4096, value=1)).encode(),
            b"",
            b"short",
        ]
    ),
    ids=lambda said: said[:48].hex() or "nothing",
)
def test_a_source_that_says_what_it_must_not(ends: Ends, said: bytes) -> None:
    pages = ends.receiving()
    listening = Task(lambda: pages.on_record(PageFlag.HOOK, None))  # type: ignore[arg-type]
    ends.source.connection.wait(
        lambda: ends.source.link._may_send > 0, time.monotonic() + 10, "READY"
    )
    ends.source.connection.send(said)
    assert isinstance(listening.error(20), StreamError)
    pages.close(Outcome.FAILED)
    with pytest.raises(MigrationError):  # ERROR, or the end
        ends.source.link.hear(Kind.READY, deadline=time.monotonic() + 10)


def saved(blocks: list[RAMBlock]) -> list[SaveBlock]:
    return [SaveBlock(b, i, b.rows.view(np.uint64)) for i, b in enumerate(blocks)]


INFO = [p.BlockInfo(1 << 40, 0, SIZES[0], 1), p.BlockInfo(1 << 41, SIZES[0], SIZES[1], 2)]


def answer(ends: Ends, *replies: bytes) -> threading.Thread:
    """A destination that is ready for everything and gives these replies to whatever asks for one."""

    def serve() -> None:
        left = list(replies)
        try:
            while True:
                kind = ends.destination.link.hear(*Kind, deadline=time.monotonic() + 10).kind
                if kind in (Kind.RAM_BLOCKS_REQUEST, REGISTER, UNREGISTER):
                    ends.destination.connection.send(left.pop(0))
        except (MigrationError, IndexError):
            return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def send_all(ends: Ends) -> None:
    pages = ends.source.extension(PageTransport)
    assert pages is not None
    out = OutStream(ends.source)
    blocks = saved(ends.blocks)
    try:
        pages.begin(blocks, out)
        pages.round_begin(out, Phase.ITERATE)
        ends.blocks[0].view[:] = 1
        pages.send(blocks[0], np.arange(ends.blocks[0].pages), out, Budget())
        pages.round_end(out, Phase.ITERATE)
    finally:
        pages.close(Outcome.FAILED)


@pytest.mark.parametrize(
    "replies",
    some(
        [
            [message(Kind.RAM_BLOCKS_RESULT, bytes(33))],
            [p.encode_blocks(INFO[:1]).encode()],
            [p.encode_blocks([INFO[0], INFO[0]]).encode()],
            [message(Kind.REGISTER_RESULT, bytes(16))],
            [message(Kind.RAM_BLOCKS_RESULT, bytes(64), 2**32 - 1)],
            [message(Kind.ERROR)],
            [p.encode_blocks(INFO).encode(), *[p.encode_result([p.Registered(1, 1)]).encode()] * 3],
            [p.encode_blocks(INFO).encode(), message(Kind.UNREGISTER_FINISHED)],
            [
                p.encode_blocks(INFO).encode(),
                p.encode_result([p.Registered(1, 1 << 40)] * 3).encode(),
            ],
        ]
    ),
)
def test_a_destination_that_says_what_it_must_not(ends: Ends, replies: list[bytes]) -> None:
    thread = answer(ends, *replies)
    sending = Task(lambda: send_all(ends))
    assert isinstance(sending.error(30), MigrationError)
    thread.join(20)
    assert not thread.is_alive()


def test_a_key_that_is_wrong_with_pin_all(uri: str) -> None:
    ends = Ends(uri, pin_all=True)
    try:
        assert ends.source.pin_all
        assert ends.destination.pin_all
        thread = answer(ends, p.encode_blocks(INFO).encode())
        error = Task(lambda: send_all(ends)).error(30)
        assert isinstance(error, MigrationError)
        assert "memory" in str(error)
        thread.join(20)
    finally:
        ends.close()


def test_what_a_destination_says_when_it_fails(ends: Ends) -> None:
    pages = ends.receiving()
    ends.destination.ready()
    pages.close(Outcome.FAILED)
    with pytest.raises(PeerError, match="given up"):
        ends.source.link.hear(Kind.READY, deadline=time.monotonic() + 10)
