"""The stream: position, small and large writes, reading ahead, and the first error, which stays."""

import errno
import os
import socket
import time

import pytest
from hypothesis import given, strategies as st

from whimbrel import ChannelError, DeadlineExceeded, EndOfStream, InStream, OutStream
from whimbrel.channel import MemoryChannel
from whimbrel.descriptors import DescriptorChannel


class Trickle(MemoryChannel):
    """Gives at most `most` bytes at a time."""

    def __init__(self, data, most):
        super().__init__(data)
        self.most = most

    def recv_into(self, view):
        return super().recv_into(view[: self.most])


class Broken(MemoryChannel):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def send(self, buffers):
        self.calls += 1
        raise OSError("cable pulled")

    def recv_into(self, view):
        self.calls += 1
        raise OSError("cable pulled")


@given(st.lists(st.binary(max_size=40_000), max_size=12))
def test_what_is_written_arrives_in_order(chunks):
    channel = MemoryChannel()
    out = OutStream(channel)
    for i, chunk in enumerate(chunks):
        (out.write if i % 2 else lambda c: out.write_all([c, memoryview(c)]))(chunk)
    out.flush()
    expected = b"".join(c * (1 if i % 2 else 2) for i, c in enumerate(chunks))
    assert bytes(channel.data) == expected
    assert out.position == len(expected)


@given(st.binary(max_size=3000), st.integers(1, 50), st.lists(st.integers(0, 400)))
def test_reading_in_any_pieces(data, most, sizes):
    inp = InStream(Trickle(data, most), buffer_size=128)
    at = 0
    for n in sizes:
        if at + n > len(data):
            with pytest.raises(EndOfStream) as caught:
                inp.read(n)
            assert caught.value.offset == len(data)
            return
        assert inp.read(n) == data[at : at + n]
        at += n
        assert inp.position == at


@given(st.binary(min_size=300, max_size=3000), st.integers(1, 200))
def test_looking_before_consuming(data, most):
    inp = InStream(Trickle(data, most), buffer_size=256)
    got = b""
    while len(got) + 100 <= len(data):
        view = inp.buffered(100)
        assert len(view) >= 100
        got += bytes(view[:70])
        inp.consume(70)
    assert got == data[: len(got)]


def test_more_than_was_buffered_cannot_be_consumed():
    inp = InStream(MemoryChannel(b"abc"))
    inp.buffered(1)
    with pytest.raises(ValueError, match="more than was buffered"):
        inp.consume(4)
    with pytest.raises(ValueError, match="do not fit"):
        inp.buffered(inp.capacity + 1)


def test_large_reads_go_straight_into_their_place():
    data = bytes(range(256)) * 64
    inp = InStream(MemoryChannel(b"x" + data + b"y"), buffer_size=64)
    assert inp.read(1) == b"x"
    target = bytearray(len(data))
    inp.read_into(memoryview(target))
    assert target == data
    assert inp.position == 1 + len(data)
    assert inp.read(1) == b"y"
    assert inp.at_end()


def test_the_first_error_stays():
    out = OutStream(broken := Broken())
    out.write(b"small")
    with pytest.raises(ChannelError, match="cable pulled") as first:
        out.flush()
    with pytest.raises(ChannelError) as second:
        out.write_all([b"more"])
    assert second.value is first.value
    assert broken.calls == 1
    inp = InStream(broken := Broken())
    for _ in range(2):
        with pytest.raises(ChannelError, match="cable pulled"):
            inp.u8()
    assert broken.calls == 1


def test_a_missed_deadline_is_not_the_end():
    class Slow(MemoryChannel):
        late = True

        def peek(self, n, deadline=None):
            if self.late:
                raise DeadlineExceeded("too late")
            return super().peek(n)

    channel = Slow(b"a")
    inp = InStream(channel)
    inp.deadline = 0.0
    with pytest.raises(DeadlineExceeded):
        inp.u8()
    channel.late = False
    assert inp.u8() == ord("a")


def test_a_lent_descriptor_counts():
    out = OutStream(MemoryChannel())
    out.write(b"head")
    with out.lend() as fd:
        assert fd is None
        assert out.channel.data == b"head"
        out.account(100)
    assert out.position == 104


def test_native_code_goes_on_with_what_was_buffered():
    one, other = socket.socketpair()
    with other, DescriptorChannel(sock=one) as channel:
        inp = InStream(channel)
        other.sendall(b"abcdef")
        assert inp.u8() == ord("a")
        seen = []

        def loop(fd, buffer, start, end):
            seen.append(bytes(buffer[start:end]))
            buffer[0:3] = os.read(fd, 3)
            return 1, 3, 7

        other.sendall(b"ghi")
        inp.run(loop)
        assert seen == [b"bcdef"]
        assert inp.position == 8
        assert inp.read(2) == b"hi"


def test_native_code_is_left_out_where_bytes_are_looked_at_or_awaited_in_time():
    def loop(*_):
        raise AssertionError

    InStream(MemoryChannel(b"a")).run(loop)
    one, other = socket.socketpair()
    with other, DescriptorChannel(sock=one) as channel:
        InStream(channel, tap=print).run(loop)
        inp = InStream(channel)
        inp.deadline = time.monotonic() + 1
        inp.run(loop)


def test_an_error_of_native_code_is_one_of_the_stream():
    one, other = socket.socketpair()
    with other, DescriptorChannel(sock=one, name="there") as channel:
        for stream in (InStream(channel), OutStream(channel)):

            def fail(*_):
                raise BrokenPipeError(errno.EPIPE, "broken")

            with pytest.raises(ChannelError, match="there: .* failed: broken"):
                if isinstance(stream, InStream):
                    stream.run(fail)
                else:
                    with stream.lend():
                        fail()
            with pytest.raises(ChannelError, match="there: .* failed: broken"):
                stream.check()


def test_integers_are_big_endian():
    channel = MemoryChannel()
    out = OutStream(channel)
    out.u8(1), out.u16(2), out.u32(3), out.u64(4)
    out.flush()
    assert channel.data.hex() == "010002000000030000000000000004"
    inp = InStream(channel)
    assert (inp.u8(), inp.u16(), inp.u32(), inp.u64()) == (1, 2, 3, 4)
