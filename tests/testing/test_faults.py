"""The fault channel breaks where it is told to, and nowhere else."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from whimbrel import Channel, ChannelError, DeadlineExceeded, Role
from whimbrel.channel import MemoryChannel
from whimbrel.descriptors import DescriptorChannel
from whimbrel_testing.faults import (
    RECV,
    SEND,
    FaultChannel,
    FaultFilter,
    Kind,
    corrupt,
    cut,
    delay,
    hang,
    parse_faults,
)
from whimbrel_testing.transport_suite import Task, nothing_left_behind, read_exactly

PATIENCE = 10.0


def soon():
    return time.monotonic() + PATIENCE


@pytest.fixture(autouse=True)
def _clean():
    with nothing_left_behind():
        yield


@pytest.fixture
def ends():
    """Makes a channel with faults, and gives the peer's end."""
    with contextlib.ExitStack() as stack:

        def make(*faults):
            a, b = socket.socketpair()
            peer = stack.enter_context(
                DescriptorChannel(sock=b, name="peer", eof_means_peer_gone=True)
            )
            inner = DescriptorChannel(sock=a, name="here", eof_means_peer_gone=True)
            return stack.enter_context(FaultChannel(inner, faults)), peer

        yield make


def test_without_faults_everything_passes(ends):
    channel, peer = ends()
    channel.send([b"ab", b"", b"cd"])
    assert read_exactly(peer, 4) == b"abcd"
    peer.send([b"answer"])
    assert channel.peek(3, soon()) == b"ans"
    assert read_exactly(channel, 6) == b"answer"
    assert channel.passed == {SEND: 4, RECV: 6}
    assert channel.return_path() is channel
    channel.finish(soon())
    assert peer.recv_into(memoryview(bytearray(1))) == 0


def test_what_would_pass_it_by_is_not_offered(ends):
    channel, _ = ends()
    assert channel.raw_fd("read") is None
    assert channel.raw_fd("write") is None
    assert channel.extension(DescriptorChannel) is None
    assert channel.extension(Channel) is channel
    assert not channel.eof_means_peer_gone, "after a cut the peer is alive"


@pytest.mark.parametrize("at", [0, 1, 5, 9, 10])
def test_a_cut_while_sending(ends, at):
    channel, peer = ends(cut(SEND, at=at))
    with pytest.raises(ChannelError, match=f"here: the link was cut at byte {at}"):
        channel.send([b"01234", b"56789"])
        channel.send([b"x"])
    assert read_exactly(peer, 20) == b"0123456789"[:at]
    for call in (
        lambda: channel.send([b"x"]),
        lambda: channel.peek(1, soon()),
        lambda: channel.recv_into(memoryview(bytearray(1))),
    ):
        with pytest.raises(ChannelError, match="the link was cut"):
            call()


@pytest.mark.parametrize("at", [0, 3, 10])
def test_a_cut_while_receiving(ends, at):
    channel, peer = ends(cut(RECV, at=at))
    peer.send([b"0123456789!"])
    got = b""
    view = memoryview(bytearray(100))
    with pytest.raises(ChannelError, match=f"cut at byte {at}"):
        while True:
            got += bytes(view[: channel.recv_into(view)])
    assert got == b"0123456789!"[:at]


def test_a_peek_does_not_see_behind_a_fault(ends):
    channel, peer = ends(cut(RECV, at=2))
    peer.send([b"0123"])
    assert channel.peek(4, soon()) == b"01"
    assert read_exactly(channel, 2) == b"01"
    with pytest.raises(ChannelError):
        channel.peek(4, soon())


@pytest.mark.parametrize("at", [0, 4, 5, 9])
def test_one_byte_is_corrupted(ends, at):
    sent, expected = b"0123456789", bytearray(b"0123456789")
    expected[at] ^= 0x81
    channel, peer = ends(corrupt(SEND, at=at, mask=0x81), corrupt(RECV, at=at))
    channel.send([sent[:5], sent[5:]])
    assert read_exactly(peer, 10) == expected
    peer.send([sent])
    expected[at] ^= 0x81 ^ 0xFF
    assert read_exactly(channel, at) == sent[:at]
    assert channel.peek(1, soon()) == expected[at : at + 1], "a peek sees what will be received"
    assert read_exactly(channel, 10 - at) == expected[at:]
    assert [fault.direction for fault in channel.happened] == [SEND, RECV]
    assert sent == b"0123456789", "the sender's own buffer is left alone"


def test_a_hang_while_sending_tells_nobody(ends):
    channel, peer = ends(hang(SEND, at=3))
    sending = Task(lambda: channel.send([b"012345"]))
    assert read_exactly(peer, 3) == b"012"
    sending.until_blocked(PATIENCE)
    with pytest.raises(DeadlineExceeded):
        peer.peek(1, time.monotonic() + 0.02)
    peer.send([b"the other direction is well"])
    assert read_exactly(channel, 3) == b"the"
    channel.abort()
    with pytest.raises(ChannelError, match="here was aborted"):
        sending.result(PATIENCE)


def test_a_hang_while_receiving(ends):
    channel, peer = ends(hang(RECV, at=2))
    peer.send([b"0123"])
    assert read_exactly(channel, 2) == b"01"
    with pytest.raises(DeadlineExceeded):
        channel.peek(1, time.monotonic() + 0.02)
    receiving = Task(lambda: channel.recv_into(memoryview(bytearray(1))))
    receiving.until_blocked(PATIENCE)
    channel.close()
    with pytest.raises(ChannelError):
        receiving.result(PATIENCE)


def test_a_delay_happens_once(ends):
    channel, peer = ends(delay(SEND, at=1, seconds=0.05))
    sending = Task(lambda: channel.send([b"ab"]))
    assert read_exactly(peer, 2) == b"ab"
    sending.result(PATIENCE)
    assert [fault.kind for fault in channel.happened] == [Kind.DELAY]
    assert not channel.faults


def test_a_delay_can_be_aborted(ends):
    channel, _ = ends(delay(SEND, at=0, seconds=1000))
    sending = Task(lambda: channel.send([b"x"]))
    sending.until_blocked(PATIENCE)
    channel.abort()
    with pytest.raises(ChannelError, match="aborted"):
        sending.result(PATIENCE)


def test_a_condition_instead_of_a_byte(ends):
    phase = []
    channel, peer = ends(cut(SEND, when=lambda: bool(phase)))
    channel.send([b"before"])
    assert read_exactly(peer, 6) == b"before"
    phase.append("now")
    with pytest.raises(ChannelError, match="cut at byte 6"):
        channel.send([b"after"])
    assert read_exactly(peer, 6) == b""


def test_several_faults_come_in_their_order(ends):
    channel, peer = ends(cut(SEND, at=6), corrupt(SEND, at=4, mask=1), corrupt(SEND, at=0, mask=1))
    with pytest.raises(ChannelError):
        channel.send([b"00000000"])
    assert read_exactly(peer, 10) == b"100010"


def test_a_separate_return_path_has_no_faults():
    class TwoWays(MemoryChannel):
        def return_path(self):
            return MemoryChannel(b"answer")

    channel = FaultChannel(TwoWays(), [cut(RECV, at=0)])
    assert read_exactly(channel.return_path(), 6) == b"answer"


def test_faults_from_the_environment(monkeypatch):
    monkeypatch.setenv("WHIMBREL_FAULTS", "corrupt:send@2:0x01 cut:send@4")
    inner = MemoryChannel()
    channel = FaultFilter().wrap(inner, Role.SOURCE)
    with pytest.raises(ChannelError):
        channel.send([b"00000000"])
    assert inner.data == b"0010"
    monkeypatch.delenv("WHIMBREL_FAULTS")
    FaultFilter().wrap(inner, Role.SOURCE).send([b"!"])
    assert inner.data == b"0010!"


def test_faults_as_text():
    assert parse_faults("") == []
    assert parse_faults(" cut:send@4096  hang:recv@0 delay:send@1:0.5 corrupt:recv@9") == [
        cut(SEND, at=4096),
        hang(RECV, at=0),
        delay(SEND, at=1, seconds=0.5),
        corrupt(RECV, at=9, mask=0xFF),
    ]
    for text in ("cut", "cut:send", "cut:both@1", "burn:send@1", "cut:send@x", "cut:send@1:2"):
        with pytest.raises(ValueError, match=text):
            parse_faults(text)
    with pytest.raises(ValueError, match="changes no byte"):
        parse_faults("corrupt:send@1:0")
    with pytest.raises(ValueError, match="give one of them"):
        cut(SEND)
