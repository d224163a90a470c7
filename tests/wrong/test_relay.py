"""A relay lets nothing wrong through: what went on before it refused does not start a destination."""

import socket
import threading

import pytest

from whimbrel.channel import MemoryChannel
from whimbrel.descriptors import DescriptorChannel
from whimbrel.errors import MigrationError, OutcomeUnknown
from whimbrel.wire.format import PING_COMMIT
from whimbrel.wire.return_path import encode_shut
from whimbrel_qemu.relaying import Passage
from whimbrel_testing.peers import PATIENCE
from whimbrel_testing.wrong import all_cases
from whimbrel_testing.wrong.loaders import App, ClosedSource
from whimbrel_testing.wrong.pieces import (
    EOF,
    OPEN_RETURN_PATH,
    PING,
    TIMER_ID,
    command,
    footer,
    full,
    stream,
    u32,
    u64,
)

pytestmark = pytest.mark.timeout(20)

BY_NAME = {case.name: case for case in all_cases()}


def relayed(data, source=ClosedSource):
    """What went on, and the error or None."""
    destination = MemoryChannel()
    try:
        Passage(source(data), destination).run()
    except MigrationError as error:
        return bytes(destination.data), error
    return bytes(destination.data), None


def app_takes(data):
    try:
        App().load(ClosedSource(data, answers=MemoryChannel()), dialect=None)
    except MigrationError:
        return False
    return True


@pytest.mark.parametrize("name", BY_NAME)
def test_each(name):
    case = BY_NAME[name]
    data = case.data()
    passed, error = relayed(data)
    assert data.startswith(passed)
    if error is None:
        assert app_takes(passed) == app_takes(data)
        return
    assert str(error).isprintable()
    assert not app_takes(passed)
    assert not isinstance(error, OutcomeUnknown)
    assert error.offset is not None
    assert error.expected is not None or error.found is not None or error.hint


#: Where a relay takes what a keeper refuses: it keeps nothing, and passes on as it comes what it cannot read.
PASSES = {"section-live-unknown-behind-pages", "setup-total-of-1-tib"}
#: The destination of these tests gives no answers.
NO_WAY_BACK = {"legal-open-twice"}


@pytest.mark.parametrize("name", BY_NAME)
def test_what_a_keeper_refuses_a_relay_refuses(name):
    case = BY_NAME[name]
    _, error = relayed(case.data())
    takes = case.keep is None
    assert (error is None) == ((takes or name in PASSES) and name not in NO_WAY_BACK), error


class Slowly(ClosedSource):
    """A byte at a time."""

    def recv_into(self, view):
        return super().recv_into(view[:1])


@pytest.mark.parametrize("name", [name for name in BY_NAME if name.startswith(("end-", "footer-"))])
def test_however_the_bytes_arrive_the_end_waits_for_the_check(name):
    data = BY_NAME[name].data()
    passed, error = relayed(data, Slowly)
    assert data.startswith(passed)
    assert error is None or not app_takes(passed)


def test_what_looks_like_the_end_and_is_none_holds_up_nobody():
    """A footer and a 00 within the bytes of a device, and behind it a source that asks whether all has arrived."""
    fake = u64(0) + footer(TIMER_ID) + bytes(3) + u64(0)
    asks = command(PING, u32(PING_COMMIT | 5))
    opens = command(OPEN_RETURN_PATH)
    data = b"".join(stream(commands=opens, timer=full(TIMER_ID, "timer", fake, version=2)))
    eof = data.rindex(EOF + b"\6")
    first, last = data[:eof] + asks, data[eof:]

    source, from_source = socket.socketpair()
    destination, to_destination = socket.socketpair()
    with source, destination:
        channels = [
            DescriptorChannel(sock=s, name="pair", eof_means_peer_gone=True)
            for s in (from_source, to_destination)
        ]
        passage = threading.Thread(target=lambda: Passage(*channels).run())
        passage.start()
        source.sendall(first)
        with destination.makefile("rb") as come:
            assert come.read(len(first)) == first
            source.sendall(last)
            assert come.read(len(last)) == last
        destination.sendall(encode_shut(0))
        passage.join(PATIENCE)
        assert not passage.is_alive()
        for channel in channels:
            channel.close()
