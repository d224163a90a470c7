"""The pump between a machine and a channel, both played here: what the machine may see of an end."""

import contextlib
import socket
import threading

import pytest
from hypothesis import given, strategies as st

from whimbrel.descriptors import DescriptorChannel
from whimbrel.wire.format import PONG_RELAY
from whimbrel.wire.return_path import encode_pong, encode_shut
from whimbrel_cli.bridging.pump import Answers, DestinationPump, SourcePump
from whimbrel_cli.bridging.words import Result, Standing, State
from whimbrel_testing.peers import wait_until

RUNS = Standing("running", "active")
STOPPED = Standing("finish-migrate", "device")


def read(sock, n):
    """As much, or what comes before the end."""
    data = b""
    while len(data) < n and (some := sock.recv(n - len(data))):
        data += some
    return data


class Ends:
    """machine <-> pump <-> peer, and what the machine says of itself."""

    def __init__(self, *, gone=True):
        self.machine, ours = socket.socketpair()
        theirs, self.peer = socket.socketpair()
        self.says = RUNS
        self.unknown = []
        self.asked = 0
        channel = DescriptorChannel(sock=theirs, name="link", eof_means_peer_gone=gone)
        self.source = SourcePump(ours, channel, ask=self.ask, on_unknown=self.unknown.append)
        self.destination = DestinationPump(ours, channel)
        self.results = []
        self.channel = channel
        for sock in (self.machine, self.peer):
            sock.settimeout(30)

    def ask(self):
        self.asked += 1
        return self.says

    def run(self, pump):
        def run():
            self.results.append(pump.run())
            pump.close()

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def passes(self, data, *, back=False):
        here, there = (self.peer, self.machine) if back else (self.machine, self.peer)
        here.sendall(data)
        assert read(there, len(data)) == data

    def result(self):
        self.thread.join(30)
        return self.results[0]

    def held(self):
        """The machine sees nothing."""
        wait_until(lambda: self.unknown, "the word that nobody knows")
        self.machine.setblocking(False)
        with pytest.raises(BlockingIOError):
            self.machine.recv(1)
        self.machine.close()
        return self.result()

    def close(self):
        for sock in (self.machine, self.peer):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self.thread.join(30)


@pytest.fixture
def make():
    made = []

    def make(**kwargs):
        made.append(Ends(**kwargs))
        return made[-1]

    yield make
    for ends in made:
        ends.close()


# ---- a source


def test_bytes_pass_both_ways_and_the_end_is_orderly(make):
    ends = make()
    ends.run(ends.source)
    big = bytes(range(256)) * 20_000
    sender = threading.Thread(target=ends.machine.sendall, args=(big,))
    sender.start()
    assert read(ends.peer, len(big)) == big
    sender.join()
    ends.passes(encode_pong(1), back=True)
    ends.passes(encode_shut(0), back=True)
    ends.machine.close()
    assert ends.peer.recv(1) == b""
    ends.peer.close()
    assert ends.result() == Result(State.DONE)
    assert (ends.source.sent, ends.source.received) == (len(big), 16)


def test_a_refusal_is_passed_on(make):
    ends = make()
    ends.run(ends.source)
    ends.passes(encode_shut(1), back=True)
    ends.peer.close()
    ends.machine.close()
    assert ends.result().state is State.FAILED


@pytest.mark.parametrize("way_back", [True, False])
def test_a_link_that_is_lost_while_the_machine_runs_is_an_end(make, way_back):
    ends = make(gone=False)
    ends.run(ends.source)
    ends.passes(b"stream")
    if way_back:
        ends.passes(encode_pong(1), back=True)
    ends.peer.close()
    with contextlib.suppress(BrokenPipeError):  # the pump may have seen the end first
        ends.machine.sendall(b"more")
    assert ends.machine.recv(1) == b""
    assert ends.result().state is State.FAILED
    assert not ends.unknown


def test_behind_the_stop_an_end_that_proves_nothing_is_kept_from_the_machine(make):
    ends = make(gone=False)
    ends.run(ends.source)
    ends.passes(encode_pong(1), back=True)
    ends.says = STOPPED
    ends.passes(b"EOF")
    ends.peer.close()
    assert ends.held().state is State.UNKNOWN


def test_behind_the_stop_the_end_of_the_peers_process_is_passed_on(make):
    ends = make()
    ends.run(ends.source)
    ends.passes(encode_pong(1), back=True)
    ends.says = STOPPED
    ends.passes(b"EOF")
    ends.peer.close()
    assert ends.machine.recv(1) == b""
    assert ends.result().state is State.FAILED


def test_behind_a_relay_it_proves_nothing(make):
    ends = make()
    ends.run(ends.source)
    ends.passes(encode_pong(PONG_RELAY), back=True)
    ends.says = STOPPED
    ends.passes(b"EOF")
    ends.peer.close()
    assert ends.held().state is State.UNKNOWN


def test_without_answers_the_end_of_a_destination_is_none(make):
    """It has all, and hangs up."""
    ends = make()
    ends.run(ends.source)
    ends.says = STOPPED
    ends.passes(b"EOF")
    ends.peer.close()
    ends.says = Standing("postmigrate", "completed")
    ends.machine.close()
    assert ends.result() == Result(State.DONE)


def test_while_nobody_can_be_asked_the_machine_sees_nothing(make):
    ends = make(gone=False)
    ends.run(ends.source)
    ends.passes(encode_pong(1), back=True)
    ends.says = None
    ends.peer.close()
    wait_until(lambda: ends.asked > 1, "a second question")
    ends.says = STOPPED
    assert ends.held().state is State.UNKNOWN


def test_in_postcopy_an_end_is_one(make):
    """The source waits for a new connection then."""
    ends = make(gone=False)
    ends.run(ends.source)
    ends.passes(encode_pong(1), back=True)
    ends.says = Standing("finish-migrate", "postcopy-active")
    ends.peer.close()
    assert ends.machine.recv(1) == b""


def test_told_to_end_too_late_it_waits_for_the_answer(make):
    ends = make()
    ends.run(ends.source)
    ends.says = STOPPED
    ends.passes(encode_pong(1), back=True)
    ends.source.terminate()
    wait_until(lambda: ends.asked, "the question")
    ends.passes(encode_shut(0), back=True)
    ends.machine.close()
    assert ends.result() == Result(State.DONE)


def test_a_migration_that_was_cancelled_ends_the_channel_as_broken(make):
    ends = make()
    ends.run(ends.source)
    ends.passes(b"stream")
    ends.says = Standing("running", "cancelled")
    ends.machine.close()
    assert ends.result() == Result(State.FAILED, "the migration was cancelled at the source")


# ---- a destination


def test_a_destination_says_first_that_there_is_a_pump(make):
    ends = make()
    ends.run(ends.destination)
    ends.peer.sendall(b"stream")
    assert read(ends.machine, 6) == b"stream"
    ends.machine.sendall(encode_pong(1))
    assert read(ends.peer, 16) == encode_pong(PONG_RELAY) + encode_pong(1)
    ends.machine.sendall(encode_shut(0))
    ends.machine.close()
    assert read(ends.peer, 9) == encode_shut(0)
    ends.peer.close()
    assert ends.result() == Result(State.DONE)


def test_a_source_that_asks_nothing_is_told_nothing(make):
    ends = make()
    ends.run(ends.destination)
    ends.peer.sendall(b"stream")
    ends.peer.shutdown(socket.SHUT_WR)
    assert read(ends.machine, 7) == b"stream"
    ends.machine.close()
    assert ends.peer.recv(1) == b""
    assert ends.result() == Result(State.DONE)


def test_a_destination_that_hangs_up_is_passed_on(make):
    ends = make()
    ends.run(ends.destination)
    ends.machine.sendall(encode_pong(1))
    ends.machine.close()
    assert read(ends.peer, 16)
    assert ends.peer.recv(1) == b""
    ends.peer.close()
    assert ends.result().state is State.FAILED


def test_a_source_that_is_lost_ends_the_stream(make):
    ends = make()
    ends.run(ends.destination)
    ends.peer.sendall(b"stre")
    ends.peer.close()
    assert read(ends.machine, 5) == b"stre"
    ends.machine.close()
    ends.result()


def test_that_the_source_could_not_be_told_is_told(make):
    ends = make()
    ends.run(ends.destination)
    ends.peer.close()
    assert ends.machine.recv(1) == b""
    ends.machine.sendall(encode_shut(0))
    ends.machine.close()
    result = ends.result()
    assert result.state is State.UNKNOWN
    assert "could not be told" in result.error


def test_told_to_end_a_destination_is_cut_off(make):
    ends = make()
    ends.run(ends.destination)
    ends.destination.terminate()
    assert ends.machine.recv(1) == b""
    ends.machine.close()
    ends.result()


# ---- answers


@given(st.lists(st.integers(1, 40)))
def test_answers_come_in_pieces_of_any_size(cuts):
    data = encode_pong(PONG_RELAY) + encode_pong(2) + encode_shut(3)
    answers = Answers()
    for cut in cuts:
        answers.feed(data[:cut])
        data = data[cut:]
    answers.feed(data)
    assert (answers.relayed, answers.shut) == (True, 3)


@given(st.binary(max_size=2000))
def test_answers_of_any_kind_do_no_harm(data):
    answers = Answers()
    answers.feed(data)
    assert len(answers._rest) < 516 + 4
