"""What is particular to fd: what a descriptor can be, and whose it is."""

from __future__ import annotations

import array
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from whimbrel import BlockedError, ChannelError, Kernel, Machine, Role, TransportContext
from whimbrel_fd.plugin import preflight
from whimbrel_fd.transport import FdTransport
from whimbrel_testing.transport_suite import Task, nothing_left_behind, read_exactly

FD = FdTransport()
PATIENCE = 10.0


def soon():
    return time.monotonic() + PATIENCE


@pytest.fixture(autouse=True)
def _clean():
    with nothing_left_behind():
        yield


def source(text, **named):
    return FD.connect(FD.parse(str(text)), TransportContext(role=Role.SOURCE, named_fds=named))


def listen(text, named=None):
    context = TransportContext(role=Role.DESTINATION, named_fds={} if named is None else named)
    return FD.listen(FD.parse(str(text)), context)


def destination(text, named=None):
    with listen(text, named) as listener:
        return listener.accept(soon())


@pytest.fixture
def pipe():
    fds = os.pipe()
    yield fds
    for fd in fds:  # what is still open: a descriptor that was refused
        if is_open(fd):
            os.close(fd)


def is_open(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_registered_name_is_used_up():
    r, w = os.pipe()
    names = {"mig": r, "other": 99}
    with destination("mig", names) as channel:
        assert names == {"other": 99}
        os.write(w, b"x")
        os.close(w)
        assert read_exactly(channel, 2) == b"x"
    assert not is_open(r)


def test_an_unknown_name():
    with pytest.raises(ChannelError) as caught:
        source("mig", b=1, a=2)
    assert str(caught.value) == (
        "File descriptor named 'mig' has not been found (registered: a, b). Register it first, by"
        " kernel.register_fd('mig', FD) or getfd, or give a number"
    )
    with pytest.raises(ChannelError, match=re.escape("(registered: none)")):
        source("mig")


def test_a_migration_to_an_unknown_name_is_refused_before_it_begins():
    kernel = Kernel(Machine("m"))
    with pytest.raises(
        BlockedError, match=re.escape("'mig' has not been found (registered: none)")
    ):
        kernel.migrate("fd:mig")
    assert kernel.state.status == "none"
    kernel.register_fd("mig", 2)
    for known in ("fd:mig", "fd:mig,direct=on", "fd:7", "tcp:mig", "nonsense"):
        assert preflight(kernel, known) == []


def test_a_number_that_is_not_open():
    with pytest.raises(ChannelError, match="descriptor 987 is not open in this process. Hand it"):
        source(987)


@pytest.mark.parametrize("call", [source, listen])
def test_the_wrong_end_of_a_pipe(pipe, call):
    r, w = pipe
    fd, message = {
        source: (r, f"descriptor {r} is open for reading only; the source needs to write"),
        listen: (w, f"descriptor {w} is open for writing only; the destination needs to read"),
    }[call]
    with pytest.raises(ChannelError, match=message):
        call(fd)
    assert is_open(fd), "what is refused stays the caller's"
    assert os.get_blocking(fd)


def opened(kind, path):
    """A descriptor that no stream can use."""
    if kind == "directory":
        return os.open(path, os.O_RDONLY)
    if kind == "path":
        return os.open("/dev/null", os.O_PATH)
    if kind == "event":
        return os.eventfd(0)
    if kind == "datagrams":
        return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()
    return socket.socket().detach()


@pytest.mark.parametrize("call", [source, listen])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("directory", "is a directory. A stream needs a file, a pipe or a connected socket"),
        ("path", "is open for no access"),
        ("event", "is not a file, pipe or socket"),
        ("datagrams", "is a socket of datagrams. Give one of streams"),
        ("unconnected", "is a socket that is not connected. Connect it first"),
    ],
)
def test_what_is_no_stream(call, kind, message, tmp_path):
    fd = opened(kind, tmp_path)
    try:
        with pytest.raises(ChannelError, match=f"descriptor {fd} {message}"):
            call(fd)
        assert is_open(fd)
    finally:
        os.close(fd)


def test_a_listening_socket_is_not_for_the_source():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(ChannelError, match="is a listening socket; the source needs a connec"):
            source(server.fileno())
        assert server.fileno() >= 0
        socket.create_connection(server.getsockname()).close()


def test_a_listening_unix_socket_leaves_its_file(tmp_path):
    """Who bound it removes it."""
    path = str(tmp_path / "s")
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    with listen(server.detach()) as listener:
        assert listener.addresses == (f"unix:{path}",)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            with listener.accept(soon()) as channel:
                client.sendall(b"x")
                assert read_exactly(channel, 1) == b"x"
    assert os.path.exists(path)


def test_files(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"head")
    fd = os.open(path, os.O_WRONLY)
    os.lseek(fd, 0, os.SEEK_END)
    with source(fd) as channel:
        channel.send([b"stream"])
        channel.finish(soon())
    assert path.read_bytes() == b"headstream"
    fd = os.open(path, os.O_RDWR)
    os.lseek(fd, 4, os.SEEK_SET)
    with destination(fd) as channel:
        assert read_exactly(channel, 20) == b"stream"
        assert channel.return_path() is None
        channel.finish(soon())
    assert not is_open(fd)


def test_a_failing_sync_fails_finish(tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with source(os.open(tmp_path / "f", os.O_CREAT | os.O_WRONLY)) as channel:
        channel.send([b"x"])
        with pytest.raises(ChannelError, match="finishing failed: No space left on device"):
            channel.finish(soon())


def test_a_terminal_like_device():
    master, slave = os.openpty()
    with source(slave) as channel:
        channel.send([b"x"])
        assert os.read(master, 1) == b"x"
    os.close(master)


def test_no_child_inherits_what_was_taken_over(pipe):
    r, w = pipe
    for fd in pipe:
        os.set_inheritable(fd, True)
    with source(w), destination(r):
        assert not os.get_inheritable(w)
        assert not os.get_inheritable(r)


@pytest.mark.parametrize("blocking", [True, False])
def test_the_blocking_mode_of_others_is_given_back(pipe, blocking):
    r, w = pipe
    shared = os.dup(w)
    os.set_blocking(shared, blocking)
    source(w).close()
    assert os.get_blocking(shared) is blocking
    os.close(shared)


def test_standard_output_can_be_the_stream():
    """What is printed afterwards does not get into it, and no other file gets the number 1."""
    program = (
        "import os, sys, time\n"
        "from whimbrel import Role, TransportContext\n"
        "from whimbrel_fd.transport import FdTransport\n"
        "fd = FdTransport()\n"
        "channel = fd.connect(fd.parse('1'), TransportContext(role=Role.SOURCE))\n"
        "channel.send([b'stream'])\n"
        "print('not in the stream', flush=True)\n"
        "channel.finish()\n"
        "channel.close()\n"
        "print('nor this', flush=True)\n"
        "sys.stderr.write(os.readlink('/proc/self/fd/1'))\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.read() == b"stream", "the end comes with finish, not with the process"
        assert process.stderr.read(9) == b"/dev/null"
        process.stdin.close()
        assert process.wait(PATIENCE) == 0


def test_a_name_goes_before_a_number(pipe):
    r, w = pipe
    with FD.connect(
        FD.parse("7"), TransportContext(role=Role.SOURCE, named_fds={"7": w})
    ) as channel:
        channel.send([b"x"])
        assert os.read(r, 1) == b"x"


def test_a_descriptor_of_another_process_over_a_socket():
    """As getfd hands them over."""
    a, b = socket.socketpair()
    r, w = os.pipe()
    with a, b:
        socket.send_fds(a, [b"x"], [w])
        os.close(w)
        _, fds, _, _ = socket.recv_fds(b, 1, 1)
    with source("mig", mig=fds[0]) as channel:
        channel.send([b"x"])
        channel.finish(soon())
        assert os.read(r, 2) == b"x"
    os.close(r)
    assert array.array("i", fds)


def test_direct_is_the_callers_word(pipe):
    """Nothing shows whether the other end of a socket is the peer's own or a relay's, so the end of it proves nothing
    unless the caller vouches for it.
    """
    for text, claim in (
        ("", False),
        (",direct=on", True),
        (",direct", True),
        (",direct=off", False),
    ):
        a, b = socket.socketpair()
        with b, source(f"{a.detach()}{text}") as channel:
            assert channel.eof_means_peer_gone is claim


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_the_end_comes_when_the_last_copy_of_the_other_end_is_closed():
    """So a copy that leaked into some process makes the proof come late, and never makes it false."""
    a, b = socket.socketpair()
    until_told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:  # holds a copy of b
        os.close(tell)
        os.read(until_told, 1)
        os._exit(0)
    b.close()
    with source(f"{a.detach()},direct=on") as channel:
        receiving = Task(lambda: channel.recv_into(memoryview(bytearray(1))))
        receiving.until_blocked(PATIENCE)
        assert receiving.thread.is_alive()
        os.close(tell)
        # The child holds a copy of our end as well, which does not count.
        assert receiving.result(PATIENCE) == 0
    os.waitpid(pid, 0)
    os.close(until_told)
