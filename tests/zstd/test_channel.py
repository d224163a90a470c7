"""The filter on real sockets: what it sends when, what it says of itself, and what it makes of wrong input."""

import contextlib
import threading
import time

import pytest

from whimbrel import ChannelError, DeadlineExceeded, EndOfStream, Kernel, Role, StreamError
from whimbrel.channel import MemoryChannel
from whimbrel_testing.pacing import Link
from whimbrel_testing.peers import wait_until
from whimbrel_testing.transport_suite import Task, pattern, read_exactly
from whimbrel_zstd.channel import SHORT
from whimbrel_zstd.frames import MAX_BLOCK
from whimbrel_zstd.pace import START, STEPS

MIB = 1 << 20
PATIENCE = 20.0
#: Bytes of four bits of entropy each: half of it is left at every level from 1 on.
HALF = bytes(value & 15 for value in range(256))


class Sink(MemoryChannel):
    """Takes everything at once, and keeps nothing."""

    def send(self, buffers):
        pass


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def wrap(kernel):
    """A zstd channel around another, with the settings of `kernel`."""

    def wrapped(inner, role=Role.SOURCE):
        each = kernel.plugins.filter("zstd")
        each.begin(kernel.context(role))
        return each.wrap(inner, role)

    return wrapped


@pytest.fixture
def connect(kernel):
    """(source, destination, listener, route of the source) over URIs with zstd::, perhaps through a link."""
    with contextlib.ExitStack() as stack:

        def connected(uri="zstd::tcp:127.0.0.1:0", **link):
            listener = stack.enter_context(
                kernel.route(uri).listen(kernel.context(Role.DESTINATION))
            )
            address = listener.addresses[0]
            if link:
                between = stack.enter_context(Link(address.removeprefix("zstd::"), **link))
                address = f"zstd::{between.uri}"
            accepting = Task(listener.accept)
            route = kernel.route(address)
            source = stack.enter_context(route.connect(kernel.context(Role.SOURCE)))
            destination = stack.enter_context(accepting.result(PATIENCE))
            return source, destination, listener, route

        yield connected


# ---- the level


def test_the_level_rises_where_the_link_is_slow(connect):
    """The link takes 4 MB/s: seen by the level that is chosen, whatever the processor can do."""
    source, destination, _, route = connect(rate=4e6)
    stop, received = threading.Event(), bytearray(MIB)

    def drain():
        while destination.recv_into(memoryview(received)):
            pass

    def fill():
        number = 0
        while not stop.is_set():
            number += 1
            source.send([pattern(MIB, number).translate(HALF)])

    draining, filling = Task(drain), Task(fill)
    try:
        wait_until(lambda: source.statistics.level > START + 2, "a harder level", PATIENCE)
    finally:
        stop.set()
        source.abort()
        filling.error(PATIENCE)
        destination.abort()
        draining.error(PATIENCE)
    said = route.query()["x-zstd"]
    assert said["level"] == source.statistics.level
    assert said["ratio"] == round(said["plain"] / said["compressed"], 2)
    assert said["ratio"] > 1.3


def test_the_level_falls_where_nothing_holds_it_up(wrap):
    channel, data = wrap(Sink()), pattern(MIB).translate(HALF)
    assert channel.statistics.level == START
    for _ in range(4000):
        if channel.statistics.level == STEPS[0]:
            break
        channel.send([data])
    assert channel.statistics.level == STEPS[0]


def test_a_level_that_is_set_is_used_from_the_next_frame_on(kernel, wrap):
    channel, sizes = wrap(MemoryChannel()), {}
    data = pattern(MIB).translate(HALF)
    for level in ("-7", "9", 1):
        kernel.settings["zstd-level"] = level
        channel.send([b"x"])  # the end of the frame that is open, in its own level
        before = channel.statistics.sent.compressed
        channel.send([data])
        sizes[str(level)] = channel.statistics.sent.compressed - before
        assert channel.statistics.level == int(level)
    assert sizes["-7"] > sizes["1"] > 0.4 * MIB
    for wrong in ("fast", "0", 13, "-8"):
        with pytest.raises(Exception, match=r"zstd-level.*auto"):
            kernel.settings["zstd-level"] = wrong


# ---- what is sent when


def test_what_was_sent_is_there_without_a_flush(connect):
    source, destination, *_ = connect("zstd::tcp:127.0.0.1:0")
    for size in (1, 10, 100_000, 3 * MIB):
        sending = Task(lambda size=size: source.send([pattern(size)]))
        assert read_exactly(destination, size) == pattern(size)
        sending.result(PATIENCE)


def test_what_is_short_ends_its_frame_and_nothing_follows_it(wrap):
    """Who has read it may hang up: a byte behind it would meet a closed connection."""
    wire = MemoryChannel()
    channel = wrap(wire)
    for data in (pattern(MIB), b"PING", b"end"):
        channel.send([data])
    at = len(wire.data)
    channel.flush()
    channel.finish()
    assert len(wire.data) == at
    assert read_exactly(wrap(MemoryChannel(wire.data)), 2 * MIB) == pattern(MIB) + b"PINGend"


def test_a_short_one_is_compared_with_its_checksum(wrap):
    wire = MemoryChannel()
    channel = wrap(wire)
    channel.send([b"section"])
    wire.data[-1] ^= 1  # of the checksum
    reader = wrap(MemoryChannel(wire.data), Role.DESTINATION)
    with pytest.raises(StreamError, match="memory: .*checksum"):
        read_exactly(reader, 7)


def test_a_frame_goes_on_over_long_ones(wrap):
    """What repeats is found again."""
    channel = wrap(MemoryChannel())
    data = pattern(SHORT)
    channel.send([data])
    before = channel.statistics.sent.compressed
    channel.send([data])
    assert channel.statistics.sent.compressed - before < 1000


def test_an_answer_is_a_frame_of_its_own(wrap):
    """The end of the channel behind it is an end in order: what a source takes for the end of a process."""
    wire = MemoryChannel()
    wrap(wire, Role.DESTINATION).send([b"pong"])
    reader = wrap(MemoryChannel(wire.data))
    assert read_exactly(reader, 10) == b"pong"
    assert reader.peek(1) == b""


def test_several_channels_are_counted_together(connect):
    source, destination, listener, route = connect("zstd::tcp:127.0.0.1:0")
    with contextlib.ExitStack() as stack:
        for number in range(3):
            accepting = Task(listener.accept)
            extra = stack.enter_context(source.open_extra("multifd", number))
            other = stack.enter_context(accepting.result(PATIENCE))
            extra.send([b"%d" % number * 1000])
            extra.finish()
            assert read_exactly(other, 2000) == b"%d" % number * 1000
            assert extra.raw_fd("write") is None
    source.send([b"main" * 1000])
    assert read_exactly(destination, 4000) == b"main" * 1000
    said = route.query()["x-zstd"]
    assert said["plain"] == 7000
    assert said["compressed"] < 500


# ---- wrong input


def test_the_end_within_a_frame_is_no_end_in_order(wrap):
    wire = MemoryChannel()
    channel, data = wrap(wire), pattern(SHORT)
    channel.send([data])
    within = len(wire.data)  # all has come, and the frame has not ended
    channel.finish()
    whole = bytes(wire.data)
    for size in (1, 5, 8, 100, within - 1, within, within + 1, len(whole) - 1):
        reader = wrap(MemoryChannel(whole[:size]), Role.DESTINATION)
        with pytest.raises(EndOfStream, match="within a zstd frame") as caught:
            read_exactly(reader, 2 * SHORT)
        assert caught.value.offset == size
        with pytest.raises(EndOfStream):
            reader.peek(1)
    assert wrap(MemoryChannel()).recv_into(memoryview(bytearray(20))) == 0
    assert read_exactly(wrap(MemoryChannel(whole)), 2 * SHORT) == data


def test_what_came_before_an_error_is_received_before_it(wrap):
    wire = MemoryChannel()
    channel = wrap(wire)
    channel.send([b"good"])
    channel.finish()
    reader = wrap(MemoryChannel(bytes(wire.data) + b"bad"), Role.DESTINATION)
    view = memoryview(bytearray(20))
    assert reader.recv_into(view) == 4
    for _ in range(2):
        with pytest.raises(StreamError, match="no zstd frame follows"):
            reader.recv_into(view)


def test_a_bomb_is_received_in_bounded_pieces(wrap):
    """A megabyte of frames that would be 32 GiB."""
    frame = b"\x28\xb5\x2f\xfd\x00\x38" + (MAX_BLOCK << 3 | 2).to_bytes(3, "little") + b"x"
    bomb = frame[:6] + frame[6:] * 250_000
    reader = wrap(MemoryChannel(bomb), Role.DESTINATION)
    view = memoryview(bytearray(64 * 1024))
    for _ in range(100):
        assert reader.recv_into(view) == len(view)
    assert reader.statistics.received.plain <= 100 * len(view) + MAX_BLOCK


def test_empty_frames_without_end_do_not_outlast_a_deadline(wrap, connect):
    source, destination, *_ = connect("zstd::tcp:127.0.0.1:0")
    empty, stop = b"\x28\xb5\x2f\xfd\x00\x38\x01\x00\x00" * 10_000, threading.Event()

    def flood():
        with contextlib.suppress(ChannelError):
            while not stop.is_set():
                source.inner.send([empty])

    flooding = Task(flood)
    with pytest.raises(DeadlineExceeded):
        Task(lambda: destination.peek(1, time.monotonic() + 0.2)).result(PATIENCE)
    stop.set()
    destination.abort()
    source.abort()
    flooding.result(PATIENCE)
