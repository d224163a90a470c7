"""The metering filter proves the contract of filters: it is found by its name, and a whole migration runs through it."""

from __future__ import annotations

import logging
import re
import socket

import pytest

from whimbrel import Channel, Kernel, Machine, Role
from whimbrel.channel import MemoryChannel
from whimbrel.descriptors import DescriptorChannel
from whimbrel_testing.meter import MeterFilter
from whimbrel_testing.transport_suite import nothing_left_behind, read_exactly


@pytest.fixture(autouse=True)
def _clean():
    with nothing_left_behind():
        yield


@pytest.fixture
def wrapped():
    a, b = socket.socketpair()
    meter = MeterFilter()
    inner = DescriptorChannel(sock=a, name="here", eof_means_peer_gone=True)
    with meter.wrap(inner, Role.SOURCE) as channel, DescriptorChannel(sock=b) as peer:
        yield meter, channel, peer


def test_it_counts_each_way(wrapped):
    meter, channel, peer = wrapped
    channel.send([b"12", b"", memoryview(bytes(64)).cast("I")])
    assert len(read_exactly(peer, 66)) == 66
    peer.send([b"answer"])
    assert channel.peek(6)
    assert meter.count.received == 0, "what was peeked was not received"
    assert read_exactly(channel, 6) == b"answer"
    assert (meter.count.sent, meter.count.received) == (66, 6)


def test_it_forwards_the_rest(wrapped):
    _, channel, peer = wrapped
    assert channel.name == "here"
    assert channel.eof_means_peer_gone
    assert channel.return_path() is channel
    channel.finish()
    assert peer.recv_into(memoryview(bytearray(1))) == 0
    channel.abort()
    assert peer.recv_into(memoryview(bytearray(1))) == 0


def test_nothing_passes_it_by(wrapped):
    _, channel, _ = wrapped
    assert channel.raw_fd("read") is None
    assert channel.raw_fd("write") is None
    assert channel.extension(DescriptorChannel) is None
    assert channel.extension(Channel) is channel


def test_a_separate_return_path_and_further_channels_count_as_well():
    class Many(MemoryChannel):
        def return_path(self):
            return MemoryChannel(b"answer")

        def open_extra(self, purpose, index):
            return MemoryChannel()

    meter = MeterFilter()
    channel = meter.wrap(Many(), Role.SOURCE)
    assert read_exactly(channel.return_path(), 6) == b"answer"
    channel.open_extra("multifd", 0).send([b"123"])
    assert (meter.count.sent, meter.count.received) == (3, 6)


def test_one_way_stays_one_way():
    assert MeterFilter().wrap(MemoryChannel(), Role.SOURCE).return_path() is None


@pytest.mark.parametrize("uri", ["meter::tcp:127.0.0.1:0", "meter::meter::tcp::0"])
def test_a_migration_through_it(uri, caplog):
    caplog.set_level(logging.INFO, "whimbrel.meter")
    source, destination = Kernel(Machine("m-1.0")), Kernel(Machine("m-1.0"))
    incoming = destination.incoming(uri)
    assert incoming.addresses[0].startswith(uri.partition("tcp:")[0] + "tcp:")
    sent = source.migrate(incoming.addresses[0]).wait(20)
    received = incoming.wait(20)
    stream, answers = sent.figures.transferred, set()
    assert stream == received.figures.transferred > 0
    metered = [tuple(map(int, re.findall(r"(\d+) (?:bytes|rec)", m))) for m in caplog.messages]
    assert len(metered) == 2 * uri.count("meter")
    for there, here in metered:
        assert stream in (there, here)
        answers.add(here if there == stream else there)
    assert len(answers) == 1, "what one side answered the other received"
    assert answers.pop() > 0
