"""Channels and listeners over descriptors: what the compliance suite of transports does not ask for."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import threading
import time

import pytest

from whimbrel import ChannelError, DeadlineExceeded
from whimbrel.descriptors import (
    DescriptorChannel,
    ReadyListener,
    SocketListener,
    connect_socket,
    socket_uri,
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
def pipe():
    r, w = os.pipe()
    with DescriptorChannel(read_fd=r, name="in") as reader:
        with DescriptorChannel(write_fd=w, name="out") as writer:
            yield reader, writer


@pytest.fixture
def sockets():
    a, b = socket.socketpair()
    with DescriptorChannel(sock=a, name="a") as one, DescriptorChannel(sock=b, name="b") as two:
        yield one, two


@pytest.fixture
def tcp():
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    with DescriptorChannel(sock=client, name="client") as one:
        with DescriptorChannel(sock=accepted, name="server") as two:
            yield one, two


def test_one_way_descriptors_say_so(pipe):
    reader, writer = pipe
    with pytest.raises(ChannelError, match="in is not open for writing"):
        reader.send([b"x"])
    with pytest.raises(ChannelError, match="out is open for writing only"):
        writer.recv_into(memoryview(bytearray(1)))
    with pytest.raises(ChannelError, match="out is open for writing only"):
        writer.peek(1, soon())
    assert reader.return_path() is None
    assert writer.return_path() is None


def test_peek_on_a_pipe_shows_more_as_more_comes(pipe):
    reader, writer = pipe
    writer.send([b"ab"])
    assert reader.peek(4, soon()) == b"ab"
    assert reader.raw_fd("read") is None, "a raw read would miss what was peeked"
    writer.send([b"cdef"])
    assert reader.peek(4, soon()) == b"abcd"
    assert reader.peek(2, soon()) == b"ab"
    assert read_exactly(reader, 6) == b"abcdef"
    assert reader.raw_fd("read") is not None


@pytest.mark.parametrize("blocking", [True, False])
def test_the_blocking_mode_is_given_back(blocking):
    """The mode belongs to the open file, which other processes may share."""
    a, b = socket.socketpair()
    r, w = os.pipe()
    kept = [os.dup(fd) for fd in (a.fileno(), r, w)]
    for fd in kept:
        os.set_blocking(fd, blocking)
    for channel in (
        DescriptorChannel(sock=a),
        DescriptorChannel(read_fd=r),
        DescriptorChannel(write_fd=w),
    ):
        channel.close()
    assert [os.get_blocking(fd) for fd in kept] == [blocking] * 3
    b.close()
    for fd in kept:
        os.close(fd)


def test_the_blocking_mode_is_given_back_by_finish():
    r, w = os.pipe()
    kept = os.dup(w)
    with DescriptorChannel(write_fd=w) as channel:
        assert not os.get_blocking(kept)
        channel.finish(soon())
        assert os.get_blocking(kept)
    os.close(kept)
    os.close(r)


def test_a_default_timeout_of_the_application_changes_nothing():
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.01)
    try:
        a, b = socket.socketpair()
        with DescriptorChannel(sock=a) as one, DescriptorChannel(sock=b) as two:
            receiving = Task(lambda: read_exactly(two, 1))
            receiving.until_blocked(PATIENCE)
            one.send([b"x"])
            assert receiving.result(PATIENCE) == b"x"
    finally:
        socket.setdefaulttimeout(before)


def test_finish_of_a_pipe_ends_it(pipe):
    reader, writer = pipe
    writer.send([b"x"])
    writer.finish(soon())
    assert read_exactly(reader, 2) == b"x"
    assert writer.raw_fd("write") is None
    writer.finish(soon())


def test_a_file_is_written_and_synced(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))
    fd = os.open(tmp_path / "f", os.O_CREAT | os.O_WRONLY)
    with DescriptorChannel(write_fd=fd) as channel:
        channel.send([b"kept"])
        channel.finish(soon())
    assert synced == [fd]
    assert (tmp_path / "f").read_bytes() == b"kept"
    with DescriptorChannel(read_fd=os.open(tmp_path / "f", os.O_RDONLY)) as channel:
        assert channel.peek(2, soon()) == b"ke"
        assert read_exactly(channel, 10) == b"kept"
        assert channel.recv_into(memoryview(bytearray(1))) == 0


def test_a_failed_sync_fails_finish(tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    fd = os.open(tmp_path / "f", os.O_CREAT | os.O_RDWR)
    with DescriptorChannel(read_fd=fd, write_fd=fd, name="file") as channel:
        with pytest.raises(ChannelError, match="file: finishing failed: Input/output error"):
            channel.finish(soon())


def test_a_full_device_is_an_error():
    with DescriptorChannel(write_fd=os.open("/dev/full", os.O_WRONLY), name="full") as channel:
        with pytest.raises(ChannelError, match="full: writing failed: No space left on device"):
            channel.send([b"x"])


def test_finish_waits_until_the_other_host_has_all(tcp):
    """As long as the peer takes nothing, what was sent lies here and may still be lost."""
    client, server = tcp
    sent = bytearray()
    filling = memoryview(bytes(1 << 16))
    client._sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += filling[: client._sock.send(filling)]
    with pytest.raises(DeadlineExceeded):
        client.finish(time.monotonic() + 0.05)
    finishing = Task(lambda: client.finish(soon()))
    assert read_exactly(server, len(sent) + 1) == sent
    finishing.result(PATIENCE)


def test_finish_can_be_aborted(tcp):
    client, _ = tcp
    client._sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client._sock.send(bytes(1 << 16))
    finishing = Task(client.finish)
    finishing.until_blocked(PATIENCE)
    client.abort()
    with pytest.raises(ChannelError, match="client was aborted"):
        finishing.result(PATIENCE)


@pytest.mark.parametrize("kind", ["tcp", "sockets"])
def test_finish_fails_when_the_peer_closed_with_bytes_unread(kind, request):
    one, two = request.getfixturevalue(kind)
    one.send([b"never read"])
    two.close()
    with pytest.raises(ChannelError):
        one.finish(soon())


def test_a_reset_is_an_error_and_not_the_end(tcp):
    client, server = tcp
    linger = struct.pack("ii", 1, 0)
    server._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    server.close()
    with pytest.raises(ChannelError, match="client: reading failed: Connection reset by peer"):
        client.recv_into(memoryview(bytearray(1)))


@pytest.mark.parametrize("kind", ["pipe", "sockets"])
def test_close_turns_out_other_threads(kind, request):
    reader, _ = request.getfixturevalue(kind)
    receiving = Task(lambda: reader.recv_into(memoryview(bytearray(1))))
    receiving.until_blocked(PATIENCE)
    reader.close()
    with pytest.raises(ChannelError, match="is closed"):
        receiving.result(PATIENCE)


def test_many_threads_may_close_and_abort(sockets):
    one, two = sockets
    receiving = [Task(lambda: one.recv_into(memoryview(bytearray(1)))) for _ in range(3)]
    for task in receiving:
        task.until_blocked(PATIENCE)
    barrier = threading.Barrier(6)

    def end(call):
        barrier.wait(PATIENCE)
        call()

    ending = [Task(lambda c=c: end(c)) for c in [one.close, one.abort] * 3]
    for task in ending:
        task.result(PATIENCE)
    for task in receiving:
        assert isinstance(task.error(PATIENCE), ChannelError)
    two.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["pipe", "sockets"])
def test_abort_by_another_process(kind, request):
    channel, _ = request.getfixturevalue(kind)
    receiving = Task(lambda: channel.recv_into(memoryview(bytearray(1))))
    receiving.until_blocked(PATIENCE)
    pid = os.fork()
    if pid == 0:
        channel.abort()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    with pytest.raises(ChannelError, match="was aborted"):
        receiving.result(PATIENCE)
    with pytest.raises(ChannelError, match="was aborted"):
        channel.peek(1, soon())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["pipe", "sockets"])
def test_a_forked_child_that_closes_does_no_harm(kind, request):
    """As happens by itself when it ends: its copies of the objects are collected."""
    reader, writer = request.getfixturevalue(kind)
    receiving = Task(lambda: read_exactly(reader, 4))
    receiving.until_blocked(PATIENCE)
    pid = os.fork()
    if pid == 0:
        reader.close()
        writer.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    writer.send([b"more"])
    assert receiving.result(PATIENCE) == b"more"
    if kind == "pipe":
        assert not os.get_blocking(reader.raw_fd("read"))


def test_arrays_are_sent_as_bytes(sockets):
    one, two = sockets
    one.send([memoryview(array.array("I", [1, 2]))])
    assert read_exactly(two, 8) == array.array("I", [1, 2]).tobytes()


def test_further_channels_come_from_the_transport(sockets):
    one, _ = sockets
    with pytest.raises(ChannelError, match="a has room for one channel only"):
        one.open_extra("multifd", 0)
    a, b = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(b)
        extra = DescriptorChannel(sock=a)
        main = DescriptorChannel(sock=socket.socket(), open_extra=lambda: extra)
        stack.enter_context(main)
        assert stack.enter_context(main.open_extra("multifd", 0)) is extra


def test_connect_says_what_the_system_said(tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        with pytest.raises(FileNotFoundError):
            connect_socket(sock, str(tmp_path / "none"), deadline=soon())


def test_a_listener_forgets_clients_that_left():
    """A client that is gone before accept() is none, and the next one is found."""
    server = socket.create_server(("127.0.0.1", 0))
    where = server.getsockname()
    with SocketListener(
        [server], addresses=["tcp:x"], channel=lambda sock: DescriptorChannel(sock=sock)
    ) as listener:
        client = socket.create_connection(where)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        with socket.create_connection(where) as second:
            second.sendall(b"second")
            found = b""
            while not found:
                with listener.accept(soon()) as channel, contextlib.suppress(ChannelError):
                    found = read_exactly(channel, 6)
            assert found == b"second"


def test_a_ready_listener_gives_its_channel_once():
    a, b = socket.socketpair()
    channel = DescriptorChannel(sock=a)
    listener = ReadyListener(channel, "fd:1")
    assert listener.accept() is channel
    with pytest.raises(ChannelError, match="one channel only"):
        listener.accept()
    listener.close()
    b.sendall(b"x")
    assert read_exactly(channel, 1) == b"x", "what was given is not the listener's any more"
    channel.close()
    b.close()


def test_uris_of_sockets(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert socket_uri(server) == f"tcp:127.0.0.1:{server.getsockname()[1]}"
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        assert socket_uri(server) == f"tcp:[::1]:{server.getsockname()[1]}"
    with socket.socket(socket.AF_UNIX) as server:
        assert socket_uri(server) == ""
        server.bind(str(tmp_path / "s"))
        assert socket_uri(server) == f"unix:{tmp_path}/s"
