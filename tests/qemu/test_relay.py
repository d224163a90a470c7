"""relay() between apps of ours, and between scripted ends that do what no real peer can be made to do."""

import contextlib
import os
import queue
import random
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from whimbrel import EndOfStream, InStream, OutcomeUnknown, PeerError, RunState, StreamError
from whimbrel.channel import MemoryChannel
from whimbrel.descriptors import DescriptorChannel
from whimbrel.wire import items
from whimbrel.wire.format import PONG_RELAY, Answer, Command
from whimbrel.wire.return_path import encode_pong, encode_shut, read_answer
from whimbrel_qemu import Passage, Relayed, relay
from whimbrel_qemu.receiving import receive_from

from .test_keeping import MIB, App

PATIENCE = 30


class Relaying:
    """relay() in a thread; `address` is where it listens."""

    def __init__(self, out: str, uri: str = "tcp:127.0.0.1:0", **options: object) -> None:
        self._queue: queue.Queue[tuple[str, ...]] = queue.Queue()
        self.result: Relayed | None = None
        self.error: BaseException | None = None

        def work() -> None:
            try:
                self.result = relay(uri, out, on_listening=self._queue.put, **options)  # type: ignore[arg-type]
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=work)
        self.thread.start()
        self.address = self._queue.get(timeout=PATIENCE)[0]

    def wait(self) -> Relayed:
        self.thread.join(PATIENCE)
        assert self.error is None
        assert self.result is not None
        return self.result

    def wait_error(self) -> BaseException:
        self.thread.join(PATIENCE)
        assert self.error is not None
        return self.error


def expect(target: App, uri: str = "tcp:127.0.0.1:0") -> tuple[object, str]:
    target.running = False
    incoming = target.kernel.incoming(uri)
    return incoming, incoming.addresses[0]


@pytest.mark.parametrize("kinds", ["tcp unix", "unix tcp"])
@pytest.mark.parametrize("ticks", [41, None], ids=["device", "no-device"])
@pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "one-way"])
def test_app_passes(tmp_path: Path, kinds: str, ticks: int | None, return_path: bool) -> None:
    uris = {"tcp": "tcp:127.0.0.1:0", "unix": f"unix:{tmp_path}/m"}
    come, go = kinds.split()
    source, target = App(ticks), App(None if ticks is None else 0)
    source.fill()
    source.kernel.settings["return-path"] = return_path
    incoming, address = expect(target, uris[go])
    relaying = Relaying(address, uris[come])
    assert source.kernel.migrate(relaying.address).wait(PATIENCE).acknowledged is return_path
    incoming.wait(PATIENCE)
    done = relaying.wait()
    assert (source.running, target.running) == (False, True)
    assert target.content() == source.content()
    assert target.counter.ticks == source.counter.ticks
    assert done.acknowledged is return_path
    assert (done.machine_type, done.run_state) == ("app-1.0", "running")
    assert done.blocks == (("low", MIB), ("high", 4 * MIB))
    assert done.normal + done.zero >= 5 * MIB // 4096
    devices = [(s.idstr, s.bytes) for s in done.sections if s.kind == "device"]
    assert ("counter", 8) in devices if ticks else ("counter", 8) not in devices
    assert done.unverified_from is None


def test_relays_may_stand_in_a_row() -> None:
    source, target = App(7), App()
    source.fill()
    incoming, address = expect(target)
    second = Relaying(address)
    first = Relaying(second.address)
    assert source.kernel.migrate(first.address).wait(PATIENCE).acknowledged
    incoming.wait(PATIENCE)
    assert first.wait().stream_bytes == second.wait().stream_bytes
    assert target.content() == source.content()


def test_a_destination_that_cannot_be_reached_leaves_the_machine_at_the_source(
    tmp_path: Path,
) -> None:
    source = App()
    relaying = Relaying(f"unix:{tmp_path}/nobody")
    with pytest.raises(Exception, match="closed|reset|pipe"):
        source.kernel.migrate(relaying.address).wait(PATIENCE)
    assert "nobody" in str(relaying.wait_error())
    assert source.running


def test_answers_that_cannot_pass_are_refused_at_the_start(tmp_path: Path) -> None:
    """A pipe to a command leads one way only."""
    source, file = App(), tmp_path / "file"
    relaying = Relaying(f"exec:cat > {file}")
    with pytest.raises(PeerError):
        source.kernel.migrate(relaying.address).wait(PATIENCE)
    assert "return-path off" in str(relaying.wait_error())
    assert source.running


# ---- scripted ends


def stream_of(app: App, folder: Path) -> bytes:
    """What it sends one way."""
    app.kernel.settings["return-path"] = False
    file = folder / "stream"
    app.kernel.migrate(f"exec:cat > {file}").wait(PATIENCE)
    return file.read_bytes()


@pytest.fixture
def stream(tmp_path: Path) -> bytes:
    app = App(41)
    app.fill()
    return stream_of(app, tmp_path)


def eof_of(stream: bytes) -> int:
    return stream.rindex(b"\x00\x06", 0, stream.rindex(b'{"page_size"'))


def with_return_path(stream: bytes) -> bytes:
    """The same, of a source that wants answers."""
    inp = InStream(MemoryChannel(stream))
    items.read_header(inp)
    items.read_configuration(inp, inp.u8())
    at = inp.position - 1  # the type of the next item was read with it
    ask = items.encode_command(Command.OPEN_RETURN_PATH)
    assert stream[at] in (1, 4)
    return stream[:at] + ask + stream[at:]


class Ends:
    """A passage between two socket pairs; the far ends are the test's."""

    def __init__(self, *, proof: bool = False) -> None:
        self.source, near_source = socket.socketpair()
        self.destination, near_destination = socket.socketpair()
        for sock in (self.source, self.destination):
            sock.settimeout(PATIENCE)
        self._channels = (
            DescriptorChannel(sock=near_source, name="source"),
            DescriptorChannel(sock=near_destination, name="destination", eof_means_peer_gone=proof),
        )
        self.received = bytearray()
        self.error: BaseException | None = None
        self.result: Relayed | None = None
        self.asked: list[OutcomeUnknown] = []
        self.verdict: bool | None = None
        self._passage = Passage(*self._channels)
        self._threads = [threading.Thread(target=self._pass), threading.Thread(target=self._take)]
        for thread in self._threads:
            thread.start()

    def _pass(self) -> None:
        def ask(error: OutcomeUnknown) -> bool | None:
            self.asked.append(error)
            return self.verdict

        try:
            self.result = self._passage.run(ask)
        except Exception as error:
            self.error = error
        for channel in self._channels:
            channel.close()

    def _take(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.destination.recv(1 << 16):
                self.received += data

    def send(self, stream: bytes, *, more: bool = False) -> None:
        """As the source. more: it does not hang up behind it."""
        with contextlib.suppress(OSError):  # it was refused before its end
            self.source.sendall(stream)
            if not more:
                self.source.shutdown(socket.SHUT_WR)

    def answers(self) -> list[tuple[Answer, bytes]]:
        """What the source was told, to the end."""
        told = []
        with DescriptorChannel(sock=self.source.dup()) as channel:
            inp = InStream(channel)
            with contextlib.suppress(EndOfStream):
                while True:
                    told.append(read_answer(inp))
        return told

    def wait(self) -> None:
        self._threads[0].join(PATIENCE)
        assert not self._threads[0].is_alive()

    def close(self) -> None:
        self.source.close()
        with contextlib.suppress(OSError):
            self.destination.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        self.destination.close()


@pytest.fixture
def ends() -> Iterator[Callable[..., Ends]]:
    with contextlib.ExitStack() as stack:

        def make(**options: bool) -> Ends:
            return stack.enter_context(contextlib.closing(Ends(**options)))

        yield make


@pytest.mark.parametrize("foreign", [False, True], ids=["devices", "foreign"])
def test_a_pipe_is_not_read_byte_by_byte(
    stream: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, foreign: bool
) -> None:
    whole = foreign_in(stream) if foreign else stream
    reads: list[int] = []
    recv_into = DescriptorChannel.recv_into

    def counting(self: DescriptorChannel, view: memoryview) -> int:
        reads.append(n := recv_into(self, view))
        return n

    monkeypatch.setattr(DescriptorChannel, "recv_into", counting)
    (tmp_path / "whole").write_bytes(whole)
    for keep in (False, True):
        reads.clear()
        with subprocess.Popen(["cat", tmp_path / "whole"], stdout=subprocess.PIPE) as cat:
            assert cat.stdout is not None
            with DescriptorChannel(read_fd=os.dup(cat.stdout.fileno()), name="pipe") as pipe:
                if keep:
                    receive_from(pipe, tmp_path / "kept")
                else:
                    Passage(pipe, MemoryChannel()).run()
        assert sum(reads) == len(whole)
        assert len(reads) < 50 + len(whole) // 1024


SHUT_1 = (Answer.SHUT, struct.pack(">I", 1))


def test_all_passes_as_it_came(ends: Callable[..., Ends], stream: bytes) -> None:
    passing = ends()
    passing.send(stream)
    passing.wait()
    assert passing.error is None
    passing.close()
    assert bytes(passing.received) == stream


@pytest.mark.parametrize("seed", range(12))
def test_what_ends_early_never_reaches_the_byte_that_starts_the_machine(
    ends: Callable[..., Ends], stream: bytes, seed: int
) -> None:
    eof = eof_of(stream)
    cuts = [0, 3, 20, eof - 1, eof, eof + 2, len(stream) - 1]
    cut = cuts[seed] if seed < len(cuts) else random.Random(seed).randrange(eof)
    passing = ends()
    passing.send(stream[:cut])
    passing.wait()
    passing.close()
    assert isinstance(passing.error, EndOfStream | StreamError)
    assert stream[:eof].startswith(passing.received)


def at(stream: bytes, pattern: bytes, offset: int) -> int:
    return stream.index(pattern) + offset


WRONG = {
    "magic": lambda s: (0, None),
    "item type": lambda s: (at(s, b"\x03ram", -5), None),
    "section version": lambda s: (at(s, b"\x03ram", 11), "ram"),
    "ram flags": lambda s: (at(s, b"\x04high", 5 + 8 + 6), "ram"),
    "device footer": lambda s: (at(s, b"\x07counter", 8 + 8 + 8), "counter"),
    "vmdescription": lambda s: (s.rindex(b'"size": 8') + 8, None),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_stream_ends_here(ends: Callable[..., Ends], stream: bytes, what: str) -> None:
    place, section = WRONG[what](stream)
    wrong = bytearray(stream)
    wrong[place] ^= 0x01
    passing = ends()
    passing.send(bytes(wrong))
    passing.wait()
    passing.close()
    error = passing.error
    assert isinstance(error, StreamError | EndOfStream)
    assert error.offset is not None
    # Nobody could tell the source; what is no stream at all comes from none.
    assert ("'cont' there lets it run on" in str(error)) is (what != "magic")
    if section == "ram":
        assert error.section == section
    elif section is not None:
        assert section in str(error)
    assert bytes(wrong[: eof_of(stream)]).startswith(passing.received)


def test_the_source_of_a_wrong_stream_is_told(ends: Callable[..., Ends], stream: bytes) -> None:
    wrong = bytearray(with_return_path(stream))
    wrong[at(wrong, b"\x03ram", 11)] ^= 1
    passing = ends()
    passing.send(bytes(wrong), more=True)
    passing.wait()
    assert passing.answers() == [(Answer.PONG, struct.pack(">I", PONG_RELAY)), SHUT_1]


def wait_received(passing: Ends, size: int) -> None:
    event = threading.Event()
    for _ in range(PATIENCE * 100):
        if len(passing.received) >= size:
            return
        event.wait(0.01)
    raise AssertionError(f"{len(passing.received)} of {size} bytes came")


@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_refusal_of_the_destination_is_passed_on(
    ends: Callable[..., Ends], stream: bytes, when: str
) -> None:
    stream = with_return_path(stream)
    passing = ends()
    passing.send(stream[:5000] if when == "before" else stream, more=True)
    wait_received(passing, 100 if when == "before" else len(stream))
    passing.destination.sendall(encode_pong(1) + encode_shut(7))
    assert passing.answers()[1:] == [
        (Answer.PONG, struct.pack(">I", 1)),
        (Answer.SHUT, struct.pack(">I", 7)),
    ]
    passing.wait()
    assert isinstance(passing.error, PeerError)
    assert "status 7" in str(passing.error)


def test_a_destination_that_is_gone_behind_eof_is_answered_for(
    ends: Callable[..., Ends], stream: bytes
) -> None:
    stream = with_return_path(stream)
    passing = ends(proof=True)
    passing.send(stream, more=True)
    wait_received(passing, len(stream))
    passing.destination.shutdown(socket.SHUT_RDWR)
    assert passing.answers()[-1] == SHUT_1
    passing.wait()
    assert isinstance(passing.error, PeerError)
    assert passing.asked == []


@pytest.mark.parametrize("verdict", [True, False, None])
@pytest.mark.parametrize("relayed", [True, False])
def test_without_proof_a_person_decides_while_the_source_waits(
    ends: Callable[..., Ends], stream: bytes, verdict: bool | None, relayed: bool
) -> None:
    """A further relay behind this one takes away what its connection would prove."""
    stream = with_return_path(stream)
    passing = ends(proof=relayed)
    passing.verdict = verdict
    passing.send(stream, more=True)
    wait_received(passing, len(stream))
    if relayed:
        passing.destination.sendall(encode_pong(PONG_RELAY))
    passing.destination.shutdown(socket.SHUT_RDWR)
    told = [data for answer, data in passing.answers() if answer is Answer.SHUT]
    assert told == ([] if verdict is None else [struct.pack(">I", 0 if verdict else 1)])
    passing.wait()
    assert len(passing.asked) == 1
    if verdict:
        assert passing.result is not None
        assert not passing.result.acknowledged
    else:
        assert isinstance(passing.error, OutcomeUnknown if verdict is None else PeerError)


def test_a_foreign_live_section_passes_and_is_named(
    ends: Callable[..., Ends], stream: bytes
) -> None:
    """Here a section of our own stands in for a plugin's, in a stream that is right otherwise."""
    place = at(stream, b"\x03ram", -5)
    header = b"\x01" + struct.pack(">I", 99) + b"\x07foreign" + struct.pack(">II", 0, 1)
    foreign = header + b"whatever this is" + b"\x7e" + struct.pack(">I", 99)
    whole = stream[:place] + foreign + stream[place:]
    passing = ends()
    passing.send(whole)
    passing.wait()
    passing.close()
    assert passing.error is None
    assert bytes(passing.received) == whole
    assert passing.result is not None
    assert passing.result.unverified_from == "foreign"
    assert [s.kind for s in passing.result.sections][-1] == "unverified"


def test_a_foreign_live_section_that_breaks_off_is_an_error(
    ends: Callable[..., Ends], stream: bytes
) -> None:
    place = at(stream, b"\x03ram", -5)
    header = b"\x01" + struct.pack(">I", 99) + b"\x07foreign" + struct.pack(">II", 0, 1)
    passing = ends()
    passing.send(stream[:place] + header + b"what" + stream[place : eof_of(stream)])
    passing.wait()
    assert isinstance(passing.error, EndOfStream)
    assert "its own log" in str(passing.error)


def foreign_in(stream: bytes) -> bytes:
    """The stream with a live section in it that nobody here can read."""
    place = at(stream, b"\x03ram", -5)
    header = b"\x01" + struct.pack(">I", 99) + b"\x07foreign" + struct.pack(">II", 0, 1)
    return stream[:place] + header + b"what" + b"\x7e" + struct.pack(">I", 99) + stream[place:]


@pytest.mark.parametrize("further", [1, 2, 6])
def test_behind_a_foreign_section_the_end_waits_for_what_follows(
    ends: Callable[..., Ends], stream: bytes, further: int
) -> None:
    """The source breaks off behind its EOF byte: a destination that has that one may run the machine."""
    whole = foreign_in(stream)
    eof = eof_of(whole)
    passing = ends()
    passing.send(whole[: eof + further], more=True)
    wait_received(passing, eof)
    passing.source.shutdown(socket.SHUT_WR)
    passing.wait()
    passing.close()
    assert isinstance(passing.error, EndOfStream)
    assert bytes(passing.received) == whole[:eof]


def test_behind_a_foreign_section_an_end_that_nothing_describes_passes(
    ends: Callable[..., Ends], stream: bytes
) -> None:
    whole = foreign_in(with_return_path(stream))
    whole = whole[: eof_of(whole) + 1]
    passing = ends()
    passing.send(whole, more=True)
    wait_received(passing, len(whole))
    passing.destination.sendall(encode_shut(0))
    passing.wait()
    assert passing.result is not None
    assert passing.result.acknowledged


def test_a_question_behind_a_foreign_section_passes_whatever_it_ends_with(
    ends: Callable[..., Ends], stream: bytes
) -> None:
    whole = foreign_in(with_return_path(stream))
    first = whole[: eof_of(whole)] + items.encode_command(Command.PING, struct.pack(">I", 0x100))
    passing = ends()
    passing.send(first, more=True)
    wait_received(passing, len(first))
    assert passing.error is None


def test_behind_a_package_nothing_is_certain(ends: Callable[..., Ends], stream: bytes) -> None:
    """Of bitmaps that go on after the machine, say: it is started by a command in the package."""
    whole = foreign_in(stream)
    package = items.encode_command(Command.PACKAGED, struct.pack(">I", 4)) + b"what"
    passing = ends()
    passing.send(whole[: eof_of(whole)] + package)
    passing.wait()
    assert isinstance(passing.error, OutcomeUnknown)


def test_a_source_that_asked_and_then_ends_wrongly_starts_nothing(
    ends: Callable[..., Ends], stream: bytes
) -> None:
    """EOF stands behind a question here, not behind a footer; what follows it is no vmdescription."""
    stream = with_return_path(stream)
    eof = eof_of(stream)
    asked = stream[:eof] + items.encode_command(Command.PING, struct.pack(">I", 7))
    passing = ends()
    passing.send(asked, more=True)
    wait_received(passing, len(asked))
    passing.send(b"\0" + b"\x09" * 100)
    passing.wait()
    assert passing.answers()[-1] == SHUT_1
    passing.close()
    assert bytes(passing.received) == asked


def test_a_destination_cannot_have_taken_over_what_it_was_not_sent(
    ends: Callable[..., Ends], stream: bytes
) -> None:
    passing = ends()
    stream = with_return_path(stream)
    passing.send(stream[:-1], more=True)
    wait_received(passing, eof_of(stream))
    passing.destination.sendall(encode_shut(0))
    assert passing.answers()[1:] == [SHUT_1]
    passing.wait()
    assert isinstance(passing.error, PeerError)
    assert "before it was sent the end" in str(passing.error)


def test_a_destination_that_is_gone_before_the_end_is_answered_for(
    ends: Callable[..., Ends], stream: bytes
) -> None:
    """The source has sent everything, and is told that its machine is where it was."""
    stream = with_return_path(stream)
    passing = ends()
    passing.send(stream[:-1], more=True)
    wait_received(passing, eof_of(stream))
    passing.destination.shutdown(socket.SHUT_WR)  # it still reads
    assert passing.answers()[1:] == [SHUT_1]
    passing.wait()
    assert isinstance(passing.error, PeerError)
    passing.close()
    assert bytes(passing.received) == stream[: eof_of(stream)]


def test_a_source_that_reads_no_answers_holds_up_nobody(
    ends: Callable[..., Ends], stream: bytes
) -> None:
    passing = ends()
    stream = with_return_path(stream)
    passing.send(stream[:5000], more=True)
    wait_received(passing, 100)
    passing.destination.settimeout(0.5)
    with pytest.raises(TimeoutError):
        while True:
            passing.destination.sendall(encode_pong(1) * 1000)
    passing.source.shutdown(socket.SHUT_WR)
    passing.wait()
    assert isinstance(passing.error, EndOfStream)


def test_a_source_that_is_paused_passes_as_paused() -> None:
    source, target = App(run_state=RunState.PAUSED), App()
    incoming, address = expect(target)
    relaying = Relaying(address)
    source.kernel.migrate(relaying.address).wait(PATIENCE)
    incoming.wait(PATIENCE)
    assert relaying.wait().run_state == "paused"
    assert not target.running
