"""The compliance suite of transports: subclass it in a test module and say what your transport needs.

    class TestMyScheme(TransportSuite):
        plugin = whimbrel_myscheme.plugin
        scheme = "myscheme"
        good_texts = ("host:1",)
        bad_texts = ("", "host")

        @pytest.fixture
        def ends(self):
            return Ends("127.0.0.1:0")

Every test starts with nothing left over, and fails when it leaves a descriptor, a thread or a child process.

No test judges by the clock. What has to happen "within a second" must happen within `patience`, which is longer, as
test machines are busy: a transport that hangs is found, one that is slow is not.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Generic, TypeVar

import attrs
import pytest

from whimbrel import (
    API,
    Cancelled,
    Channel,
    ChannelError,
    DeadlineExceeded,
    FilterSpec,
    Listener,
    Role,
    Transport,
    TransportContext,
    TransportSpec,
    UriError,
)
from whimbrel.route import Route
from whimbrel.uri import Uri, parse_uri

T = TypeVar("T")
MIB = 1 << 20


@attrs.frozen
class Ends:
    """Texts behind `scheme:` for one migration. Without `connect`, the source takes the listener's first address."""

    listen: str
    connect: str | None = None


@attrs.frozen
class Hang:
    """Where connect() gets no answer, and what undoes the means to it."""

    connect: str
    undo: Callable[[], object] = lambda: None


class Task(Generic[T]):
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._results: list[T] = []
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:
            self._error = error

    def result(self, patience: float) -> T:
        """What the call returned or raised."""
        self.thread.join(patience)
        if self.thread.is_alive():
            pytest.fail(f"{self._call} still hangs after {patience} seconds")
        if self._error is not None:
            raise self._error
        return self._results[0]

    def error(self, patience: float) -> BaseException | None:
        """What the call raised."""
        with contextlib.suppress(BaseException):
            self.result(patience)
        assert not self.thread.is_alive(), f"{self._call} still hangs after {patience} seconds"
        return self._error

    def until_blocked(self, patience: float) -> None:
        """Return once the thread stands still: several looks in a row that find that it had next to no processor time.

        Too early a return does no harm: whatever comes next then meets a thread that is about to block.
        """
        end = time.monotonic() + patience
        still = 0
        looked, used = time.monotonic_ns(), 0
        while still < 5 and self.thread.is_alive():
            self.thread.join(0.01)
            now, then_used = time.monotonic_ns(), used
            used = _processor_time(self.thread.native_id)
            still = still + 1 if (used - then_used) * 10 < now - looked else 0
            looked = now
            if looked > end * 1e9:
                pytest.fail(f"{self._call} does not block")


def _processor_time(native_id: int | None) -> int:
    """Of a thread, in nanoseconds."""
    try:
        with open(f"/proc/self/task/{native_id}/schedstat") as file:
            return int(file.read().split()[0])
    except OSError:  # it has not begun, or has ended
        return 0


@contextlib.contextmanager
def nothing_left_behind(patience: float = 5.0) -> Iterator[None]:
    """Fails when descriptors, threads or child processes are left of what is done inside."""
    gc.collect()
    threads, descriptors, children = set(threading.enumerate()), _descriptors(), _children()
    yield
    gc.collect()
    end = time.monotonic() + patience
    for thread in set(threading.enumerate()) - threads:
        thread.join(max(0.0, end - time.monotonic()))
        assert not thread.is_alive(), f"{thread} is left behind"
    left = {fd: path for fd, path in _descriptors().items() if descriptors.get(fd) != path}
    assert not left, f"descriptors are left behind: {left}"
    assert _children() <= children, f"child processes are left behind: {_children() - children}"


def _descriptors() -> dict[int, str]:
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
    return found


def _children() -> set[str]:
    found: set[str] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/children") as file:
            found.update(file.read().split())
    return found


@attrs.define
class Pair:
    """A source and a destination that are connected."""

    source: Channel
    destination: Channel
    listener: Listener
    ends: Ends


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes in which no part is like another."""
    return hashlib.shake_128(seed.to_bytes(4, "big")).digest(size)


def read_exactly(channel: Channel, size: int) -> bytes:
    """Size bytes, or as many as there are before the end."""
    data = bytearray(size)
    view, have = memoryview(data), 0
    while have < size:
        n = channel.recv_into(view[have:])
        if n == 0:
            break
        have += n
    return bytes(data[:have])


@contextlib.contextmanager
def full_backlog() -> Iterator[tuple[str, int]]:
    """Host and port of a TCP listener that answers nobody any more: connecting hangs."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        while True:  # until one gets no answer
            client = stack.enter_context(socket.socket())
            client.settimeout(0.1)
            try:
                client.connect(server.getsockname())
            except TimeoutError:
                break
        yield server.getsockname()


class TransportSuite:
    """What every transport has to do. Override what stands first."""

    #: The declaration module of the plugin.
    plugin: ModuleType
    scheme: str
    #: Texts behind `scheme:` that parse, and such that do not.
    good_texts: tuple[str, ...] = ()
    bad_texts: tuple[str, ...] = ()
    #: The destination can answer on the channel.
    has_return_path = True
    #: One listener gives several channels.
    many_channels = True
    #: accept() waits for somebody to connect; otherwise it has its channel from the start.
    accept_waits = True
    #: What both sides claim of their channels.
    eof_means_peer_gone = False
    #: For the suite of a filter: what all channels of the transport pass through.
    filters: tuple[FilterSpec, ...] = ()
    #: Seconds after which something hangs.
    patience = 10.0

    @pytest.fixture
    def ends(self) -> Ends:
        """Fresh addresses for one connection."""
        raise NotImplementedError

    @pytest.fixture
    def hang(self) -> Iterator[Hang | None]:
        """Where connect() hangs; None when it cannot."""
        yield None

    # ---- helpers

    @pytest.fixture(autouse=True)
    def _nothing_left_behind(self) -> Iterator[None]:
        with nothing_left_behind(self.patience):
            yield

    @property
    def transport(self) -> Transport:
        return self.spec.create()

    @property
    def spec(self) -> TransportSpec:
        specs: list[TransportSpec] = self.plugin.transports()
        return next(spec for spec in specs if self.scheme in spec.schemes)

    def context(self, role: Role, **kwargs: Any) -> TransportContext:
        return TransportContext(role=role, **kwargs)

    def soon(self) -> float:
        """A deadline that only what hangs will miss."""
        return time.monotonic() + self.patience

    def _route(self, text: str) -> Route:
        """To what stands behind `scheme:`."""
        transport = self.transport
        return Route(
            Uri(self.scheme, text, tuple(spec.name for spec in self.filters)),
            transport,
            transport.parse(text),
            tuple(spec.create() for spec in self.filters),
        )

    def listen(self, ends: Ends, **kwargs: Any) -> Listener:
        return self._route(ends.listen).listen(self.context(Role.DESTINATION, **kwargs))

    def connect(self, ends: Ends, listener: Listener | None, **kwargs: Any) -> Channel:
        text = ends.connect
        if text is None:
            assert listener is not None
            names = [spec.name for spec in self.filters]
            text = parse_uri(listener.addresses[0], names).rest
        return self._route(text).connect(self.context(Role.SOURCE, **kwargs))

    @pytest.fixture
    def pair(self, ends: Ends) -> Iterator[Pair]:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(self.listen(ends))
            accepting = Task(lambda: listener.accept(self.soon()))
            source = stack.enter_context(self.connect(ends, listener, deadline=self.soon()))
            destination = stack.enter_context(accepting.result(self.patience))
            stack.enter_context(self._watched(source, destination))
            yield Pair(source, destination, listener, ends)

    @contextlib.contextmanager
    def _watched(self, *channels: Channel) -> Iterator[None]:
        """What still hangs after a while gets an error instead."""

        def end() -> None:
            for channel in channels:
                channel.abort()
            for channel in channels:
                channel.close()

        timer = threading.Timer(2 * self.patience, end)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    # ---- declaration and addresses

    def test_is_declared(self) -> None:
        assert self.plugin.whimbrel_api[0] == API[0]
        assert self.spec.schemes[0]
        assert f"{self.scheme}:" in self.spec.syntax
        assert self.spec.needs() is None, "the suite needs a transport that is ready"
        assert isinstance(self.transport, Transport)

    def test_there_are_texts_to_parse(self) -> None:
        assert self.good_texts
        assert self.bad_texts

    def test_parsing_is_pure(self) -> None:
        """The same text is the same address, made without a descriptor, and str() of it says the same again."""
        before = _descriptors()
        for text in self.good_texts:
            address = self.transport.parse(text)
            assert self.transport.parse(text) == address
            assert self.transport.parse(str(address)) == address
        assert _descriptors() == before

    def test_what_cannot_be_parsed_is_said(self) -> None:
        for text in self.bad_texts:
            with pytest.raises(UriError) as caught:
                self.transport.parse(text)
            assert str(caught.value).strip()
            assert caught.value.hint, f"the error about {text!r} does not say what to do"

    # ---- sending and receiving

    def test_bytes_arrive_in_order(self, pair: Pair) -> None:
        pair.source.send([b"one ", bytearray(b"two "), memoryview(b"three")])
        assert read_exactly(pair.destination, 13) == b"one two three"

    def test_empty_buffers_are_nothing(self, pair: Pair) -> None:
        pair.source.send([])
        pair.source.send([b""])
        pair.source.send([b"", b"a", memoryview(b""), b"b", b""])
        assert read_exactly(pair.destination, 2) == b"ab"

    def test_many_small_buffers_in_one_send(self, pair: Pair) -> None:
        """More than the system takes in one call."""
        data = pattern(5000)
        pieces = [data[i : i + 1 + i % 3] for i in range(len(data))]
        sending = Task(lambda: pair.source.send(pieces))
        expected = b"".join(pieces)
        assert read_exactly(pair.destination, len(expected)) == expected
        sending.result(self.patience)

    def test_large_buffers(self, pair: Pair) -> None:
        """More than anything in between can hold, so that both sides have to wait."""
        data = pattern(8 * MIB)
        sending = Task(lambda: pair.source.send([data[:10], data[10:], data[: 3 * MIB]]))
        received = read_exactly(pair.destination, 11 * MIB)
        sending.result(self.patience)
        assert received == data + data[: 3 * MIB]

    def test_a_buffer_of_larger_items_is_sent_whole(self, pair: Pair) -> None:
        words = memoryview(pattern(64)).cast("I")
        pair.source.send([words])
        assert read_exactly(pair.destination, 64) == words.tobytes()

    def test_receive_gives_what_is_there(self, pair: Pair) -> None:
        """It does not wait until the view is full, and never gives more than fits."""
        pair.source.send([b"0123456789"])
        view = memoryview(bytearray(4))
        got = b""
        while len(got) < 10:
            n = pair.destination.recv_into(view)
            assert 1 <= n <= 4
            got += bytes(view[:n])
        assert got == b"0123456789"
        pair.source.send([b"more"])
        large = memoryview(bytearray(MIB))
        n = pair.destination.recv_into(large)
        assert 1 <= n <= 4
        assert b"more".startswith(bytes(large[:n]))
        if n < 4:
            assert read_exactly(pair.destination, 4 - n) == b"more"[n:]

    def test_the_end_is_zero_and_stays(self, pair: Pair) -> None:
        pair.source.send([b"last"])
        pair.source.finish(self.soon())
        assert read_exactly(pair.destination, 10) == b"last"
        for _ in range(2):
            assert pair.destination.recv_into(memoryview(bytearray(8))) == 0
            assert pair.destination.peek(1, self.soon()) == b""

    def test_receive_all_fills_every_view(self, pair: Pair) -> None:
        """Across what arrives in pieces, from behind what was peeked, and never more than was asked for."""
        data = pattern(3 * MIB)
        pair.source.send([b"peeked"])
        assert pair.destination.peek(1, self.soon()) == b"p"
        first, rest = bytearray(4), bytearray(len(data) + 2)
        views = [memoryview(first), memoryview(b""), memoryview(rest)]
        receiving = Task(lambda: pair.destination.recv_all(views))
        for i in range(0, len(data), 100_000):
            pair.source.send([data[i : i + 100_000]])
        assert receiving.result(self.patience) == len(data) + 6
        assert first + rest == b"peeked" + data
        pair.source.send([b"more"])
        assert read_exactly(pair.destination, 4) == b"more"

    def test_receive_all_is_short_only_at_the_end(self, pair: Pair) -> None:
        pair.source.send([b"the last"])
        pair.source.finish(self.soon())
        first, rest = bytearray(3), bytearray(10)
        views = [memoryview(first), memoryview(rest)]
        assert pair.destination.recv_all(views) == 8
        assert first + rest[:5] == b"the last"
        assert pair.destination.recv_all(views) == 0

    def test_flush(self, pair: Pair) -> None:
        pair.source.send([b"flushed"])
        pair.source.flush()
        assert read_exactly(pair.destination, 7) == b"flushed"

    # ---- peeking

    def test_peek_consumes_nothing(self, pair: Pair) -> None:
        pair.source.send([b"0123456789"])
        first = pair.destination.peek(4, self.soon())
        assert first
        assert b"0123".startswith(first)
        while len(pair.destination.peek(4, self.soon())) < 4:
            pass  # the rest is on its way
        assert pair.destination.peek(4, self.soon()) == b"0123"
        assert read_exactly(pair.destination, 3) == b"012"
        assert pair.destination.peek(1, self.soon()) == b"3"
        assert read_exactly(pair.destination, 7) == b"3456789"

    def test_peek_obeys_its_deadline(self, pair: Pair) -> None:
        with pytest.raises(DeadlineExceeded):
            pair.destination.peek(1, time.monotonic() + 0.05)
        with pytest.raises(DeadlineExceeded):
            pair.destination.peek(1, time.monotonic() - 1)
        pair.source.send([b"late"])
        assert read_exactly(pair.destination, 4) == b"late", "a deadline must not harm the channel"

    def test_peek_waits_for_input(self, pair: Pair) -> None:
        peeking = Task(lambda: pair.destination.peek(1, self.soon()))
        peeking.until_blocked(self.patience)
        pair.source.send([b"x"])
        assert peeking.result(self.patience) == b"x"

    # ---- the way back

    def test_return_path(self, pair: Pair) -> None:
        if not self.has_return_path:
            assert pair.source.return_path() is None
            assert pair.destination.return_path() is None
            return
        answers, back = pair.source.return_path(), pair.destination.return_path()
        assert answers is not None
        assert back is not None
        back.send([b"pong"])
        assert read_exactly(answers, 4) == b"pong"

    def test_both_directions_at_once(self, pair: Pair) -> None:
        """One reader and one writer thread on each channel."""
        answers, back = pair.source.return_path(), pair.destination.return_path()
        if answers is None or back is None:
            pytest.skip("one way only")
        there, here = pattern(4 * MIB, 1), pattern(4 * MIB, 2)
        sending = Task(lambda: pair.source.send([there]))
        answering = Task(lambda: back.send([here]))
        receiving = Task(lambda: read_exactly(pair.destination, len(there)))
        assert read_exactly(answers, len(here)) == here
        assert receiving.result(self.patience) == there
        sending.result(self.patience)
        answering.result(self.patience)

    # ---- finishing

    def test_finish_closes_one_direction(self, pair: Pair) -> None:
        answers, back = pair.source.return_path(), pair.destination.return_path()
        pair.source.send([b"done"])
        pair.source.finish(self.soon())
        assert read_exactly(pair.destination, 5) == b"done"
        if answers is not None and back is not None:
            back.send([b"seen"])
            assert read_exactly(answers, 4) == b"seen"
        with pytest.raises(ChannelError):
            pair.source.send([b"more"])

    def test_the_destination_can_finish_as_well(self, pair: Pair) -> None:
        pair.source.send([b"all"])
        pair.source.finish(self.soon())
        assert read_exactly(pair.destination, 4) == b"all"
        pair.destination.finish(self.soon())

    def test_a_peer_that_vanished_is_an_error(self, pair: Pair) -> None:
        pair.source.send([b"x"])
        assert read_exactly(pair.destination, 1) == b"x"
        pair.destination.close()

        def go_on() -> None:
            data = [pattern(MIB)]
            for _ in range(64):
                pair.source.send(data)
            pair.source.finish(self.soon())

        error = Task(go_on).error(self.patience)
        assert isinstance(error, ChannelError)
        assert not isinstance(error, DeadlineExceeded)
        assert str(error)

    # ---- abort and close

    def _aborted(self, channel: Channel, *calls: Callable[[], object]) -> None:
        tasks = [Task(call) for call in calls]
        for task in tasks:
            task.until_blocked(self.patience)
        Task(channel.abort).result(self.patience)
        for task in tasks:
            error = task.error(self.patience)
            assert isinstance(error, ChannelError), f"abort() ended a call with {error!r}"
            assert not isinstance(error, DeadlineExceeded)
        for call in calls:
            with pytest.raises(ChannelError):
                call()
        channel.abort()
        channel.close()
        channel.abort()

    def test_abort_ends_send(self, pair: Pair) -> None:
        self._aborted(pair.source, lambda: _send_for_ever(pair.source))

    def test_abort_ends_receive(self, pair: Pair) -> None:
        view = memoryview(bytearray(8))
        self._aborted(pair.destination, lambda: pair.destination.recv_into(view))

    def test_abort_ends_receive_all(self, pair: Pair) -> None:
        pair.source.send([b"too few"])
        views = [memoryview(bytearray(8)), memoryview(bytearray(8))]
        self._aborted(pair.destination, lambda: pair.destination.recv_all(views))

    def _closed(self, channel: Channel, call: Callable[[], object]) -> None:
        """It ends before close() returns: by then the number of a descriptor may be another file's."""
        blocked = Task(call)
        blocked.until_blocked(self.patience)
        Task(channel.close).result(self.patience)
        assert isinstance(blocked.error(self.patience), ChannelError)

    def test_close_ends_send(self, pair: Pair) -> None:
        self._closed(pair.source, lambda: _send_for_ever(pair.source))

    def test_close_ends_receive_all(self, pair: Pair) -> None:
        views = [memoryview(bytearray(8))]
        self._closed(pair.destination, lambda: pair.destination.recv_all(views))

    def test_abort_ends_peek(self, pair: Pair) -> None:
        self._aborted(pair.destination, lambda: pair.destination.peek(1))
        with pytest.raises(ChannelError):
            pair.destination.peek(1, self.soon())

    def test_abort_ends_both_directions(self, pair: Pair) -> None:
        answers = pair.source.return_path()
        if answers is None:
            pytest.skip("one way only")
        view = memoryview(bytearray(8))
        self._aborted(
            pair.source, lambda: _send_for_ever(pair.source), lambda: answers.recv_into(view)
        )

    def test_after_an_abort_even_what_had_arrived_is_refused(self, pair: Pair) -> None:
        pair.source.send([b"arrived"])
        assert pair.destination.peek(1, self.soon())
        pair.destination.abort()
        with pytest.raises(ChannelError):
            pair.destination.recv_into(memoryview(bytearray(8)))
        with pytest.raises(ChannelError):
            pair.destination.peek(1, self.soon())

    def test_close_is_idempotent_and_final(self, pair: Pair) -> None:
        for channel in (pair.source, pair.destination):
            channel.close()
            channel.close()
            channel.abort()
            assert channel.raw_fd("read") is None
            assert channel.raw_fd("write") is None
            with pytest.raises(ChannelError):
                channel.send([b"x"])
            with pytest.raises(ChannelError):
                channel.recv_into(memoryview(bytearray(1)))
            with pytest.raises(ChannelError):
                channel.peek(1, self.soon())
            with pytest.raises(ChannelError):
                channel.finish(self.soon())
        pair.listener.close()
        pair.listener.close()

    def test_a_channel_outlives_its_listener(self, pair: Pair) -> None:
        pair.listener.close()
        pair.source.send([b"still here"])
        assert read_exactly(pair.destination, 10) == b"still here"

    # ---- what it says of itself

    def test_claims(self, pair: Pair) -> None:
        for channel in (pair.source, pair.destination):
            assert channel.name.startswith(f"{self.scheme}:")
            assert channel.eof_means_peer_gone is self.eof_means_peer_gone
            assert channel.extension(type(channel)) is channel
            assert channel.extension(_Nothing) is None
        begin = "".join(f"{spec.name}::" for spec in self.filters) + f"{self.scheme}:"
        assert all(address.startswith(begin) for address in pair.listener.addresses)

    def test_errors_name_the_channel(self, pair: Pair) -> None:
        pair.source.abort()
        with pytest.raises(ChannelError) as caught:
            pair.source.send([b"x"])
        assert pair.source.name in str(caught.value)

    def test_the_raw_descriptor_writes_what_send_would(self, pair: Pair) -> None:
        fd = pair.source.raw_fd("write")
        if fd is None:
            pytest.skip("there is none")
        pair.source.send([b"sent "])
        assert os.write(fd, b"written ") == 8
        pair.source.send([b"sent"])
        assert read_exactly(pair.destination, 17) == b"sent written sent"

    def test_the_raw_descriptor_reads_what_receive_would(self, pair: Pair) -> None:
        pair.source.send([b"0123456789"])
        assert pair.destination.peek(1, self.soon()) == b"0"
        fd = pair.destination.raw_fd("read")
        if fd is None:  # it holds what was peeked
            assert read_exactly(pair.destination, 1) == b"0"
            fd = pair.destination.raw_fd("read")
            if fd is None:
                pytest.skip("there is none")
            expected = b"123456789"
        else:
            expected = b"0123456789"
        got = b""
        while len(got) < len(expected):
            select.select([fd], [], [], self.patience)
            got += os.read(fd, len(expected) - len(got))
        assert got == expected

    def test_what_is_lent_is_a_socket_that_writes_and_reads_the_same(self, pair: Pair) -> None:
        with pair.source.lend("write") as to, pair.destination.lend("read") as fro:
            if to is None or fro is None:
                pytest.skip("there is none")
            with (
                socket.socket(fileno=os.dup(to)) as one,
                socket.socket(fileno=os.dup(fro)) as other,
            ):
                one.sendall(b"lent ")
                assert other.recv(5, socket.MSG_WAITALL) == b"lent "
        pair.source.send([b"sent"])
        assert read_exactly(pair.destination, 4) == b"sent"

    def test_abort_ends_a_call_on_what_is_lent(self, pair: Pair) -> None:
        def read_for_ever() -> None:
            with pair.destination.lend("read") as fd:
                assert fd is not None
                with socket.socket(fileno=os.dup(fd)) as sock:
                    sock.recv(1)

        with pair.destination.lend("read") as fd:
            if fd is None:
                pytest.skip("there is none")
        self._aborted(pair.destination, read_for_ever)

    # ---- listening and connecting

    def test_several_channels(self, pair: Pair) -> None:
        if not self.many_channels:
            with pytest.raises(ChannelError):
                pair.listener.accept(self.soon())
            with pytest.raises(ChannelError):
                pair.source.open_extra("multifd", 0)
            return
        with contextlib.ExitStack() as stack:
            for i in range(3):
                accepting = Task(lambda: pair.listener.accept(self.soon()))
                extra = stack.enter_context(pair.source.open_extra("multifd", i))
                accepted = stack.enter_context(accepting.result(self.patience))
                extra.send([b"extra %d" % i])
                assert read_exactly(accepted, 7) == b"extra %d" % i
            pair.source.send([b"main"])
            assert read_exactly(pair.destination, 4) == b"main"

    def test_a_listener_can_be_closed_unused(self, ends: Ends) -> None:
        listener = self.listen(ends)
        listener.close()
        listener.close()
        with pytest.raises(ChannelError):
            listener.accept(self.soon())

    def test_accept_obeys_its_deadline(self, ends: Ends) -> None:
        if not self.accept_waits:
            pytest.skip("accept does not wait")
        with self.listen(ends) as listener:
            waiting = Task(lambda: listener.accept(time.monotonic() + 0.05))
            assert isinstance(waiting.error(self.patience), DeadlineExceeded)
            with contextlib.ExitStack() as stack:
                accepting = Task(lambda: listener.accept(self.soon()))
                stack.enter_context(self.connect(ends, listener, deadline=self.soon()))
                stack.enter_context(accepting.result(self.patience))

    def test_accept_can_be_cancelled(self, ends: Ends) -> None:
        if not self.accept_waits:
            pytest.skip("accept does not wait")
        with _event() as cancel, self.listen(ends, cancel_fd=cancel) as listener:
            accepting = Task(listener.accept)
            accepting.until_blocked(self.patience)
            os.eventfd_write(cancel, 1)
            assert isinstance(accepting.error(self.patience), Cancelled)

    def test_closing_the_listener_ends_accept(self, ends: Ends) -> None:
        if not self.accept_waits:
            pytest.skip("accept does not wait")
        with self.listen(ends) as listener:
            accepting = Task(listener.accept)
            accepting.until_blocked(self.patience)
            Task(listener.close).result(self.patience)
            assert isinstance(accepting.error(self.patience), ChannelError)

    def test_connect_obeys_its_deadline(self, hang: Hang | None) -> None:
        if hang is None:
            pytest.skip("connect does not wait")
        ends = Ends("", hang.connect)
        connecting = Task(lambda: self.connect(ends, None, deadline=time.monotonic() + 0.1))
        assert isinstance(connecting.error(self.patience), DeadlineExceeded)
        hang.undo()

    def test_connect_can_be_cancelled(self, hang: Hang | None) -> None:
        if hang is None:
            pytest.skip("connect does not wait")
        with _event() as cancel:
            ends = Ends("", hang.connect)
            connecting = Task(lambda: self.connect(ends, None, cancel_fd=cancel))
            connecting.until_blocked(self.patience)
            os.eventfd_write(cancel, 1)
            assert isinstance(connecting.error(self.patience), Cancelled)
        hang.undo()


def _send_for_ever(channel: Channel) -> None:
    """Bytes that no filter makes less of."""
    while True:
        channel.send([os.urandom(MIB)])


class _Nothing:
    """A protocol that no channel has."""


@contextlib.contextmanager
def _event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)
