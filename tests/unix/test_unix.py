"""What is particular to unix: the file, whose it is, who may connect."""

from __future__ import annotations

import os
import socket
import stat
import time

import pytest

from whimbrel import ChannelError, Role, TransportContext
from whimbrel_testing.transport_suite import nothing_left_behind, read_exactly
from whimbrel_unix.transport import SEND_BUFFER, UnixTransport

UNIX = UnixTransport()


def soon():
    return time.monotonic() + 10


@pytest.fixture(autouse=True)
def _clean():
    with nothing_left_behind():
        yield


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "m.sock")


def listen(path):
    return UNIX.listen(UNIX.parse(path), TransportContext(role=Role.DESTINATION))


def connect(path):
    return UNIX.connect(UNIX.parse(path), TransportContext(role=Role.SOURCE, deadline=soon()))


def works(listener, path):
    with connect(path) as source, listener.accept(soon()) as destination:
        source.send([b"here"])
        return read_exactly(destination, 4) == b"here"


@pytest.fixture
def umask():
    before = os.umask(0)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_the_file_is_never_open_to_others(path, umask, mask, monkeypatch):
    """Not even between bind and listen, and without the umask, which is the whole process's."""
    umask(mask)
    modes = []
    real = socket.socket.bind

    def bind(sock, where):
        real(sock, where)
        modes.append(stat.S_IMODE(os.lstat(where).st_mode))

    def refuse(mask):
        pytest.fail("the umask belongs to all threads")

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "bind", bind)
        patch.setattr(os, "umask", refuse)
        listener = listen(path)
    with listener:
        modes.append(stat.S_IMODE(os.lstat(path).st_mode))
        assert modes == [0o600, 0o600]
        assert works(listener, path)


def test_a_file_system_that_gives_another_mode_is_refused(path, umask, monkeypatch):
    monkeypatch.setattr(os, "fchmod", lambda fd, mode: None)
    with pytest.raises(ChannelError, match="gave unix:.* the mode 0777 instead of 0600"):
        listen(path)
    assert not os.path.lexists(path)


def test_a_socket_left_by_a_killed_process_is_replaced(path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    with listen(path) as listener:
        assert works(listener, path)


@pytest.mark.parametrize("state", ["listening", "bound", "datagrams"])
def test_a_live_socket_is_refused_and_left_in_peace(path, state):
    kind = socket.SOCK_DGRAM if state == "datagrams" else socket.SOCK_STREAM
    with socket.socket(socket.AF_UNIX, kind) as live:
        live.bind(path)
        if state == "listening":
            live.listen(0)
        live.setblocking(False)
        before = os.lstat(path).st_ino
        with pytest.raises(ChannelError) as caught:
            listen(path)
        assert str(caught.value) == (
            f"cannot listen on unix:{path}: another process does already."
            " Stop it or choose another path"
        )
        assert os.lstat(path).st_ino == before
        if state == "listening":  # a destination takes the first that connects for the source
            with pytest.raises(BlockingIOError):
                live.accept()


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling"])
def test_what_is_no_socket_is_never_removed(path, tmp_path, kind):
    if kind == "file":
        (tmp_path / "m.sock").write_text("precious")
    elif kind == "directory":
        os.mkdir(path)
    else:
        target = tmp_path / "target"
        if kind == "link":
            target.write_text("precious")
        os.symlink(target, path)
    before = os.lstat(path)
    with pytest.raises(ChannelError, match="there is something that is not a socket"):
        listen(path)
    assert os.lstat(path).st_ino == before.st_ino


def test_the_file_is_removed_in_the_end(path):
    listener = listen(path)
    assert os.path.exists(path)
    listener.close()
    assert not os.path.exists(path)


def test_the_file_of_another_is_left_alone(path):
    """Somebody removed ours and listens in its place."""
    first = listen(path)
    os.unlink(path)
    with listen(path) as second:
        first.close()
        assert works(second, path)


def test_a_channel_needs_the_file_no_more(path):
    with listen(path) as listener, connect(path) as source:
        with listener.accept(soon()) as destination:
            listener.close()
            source.send([b"x"])
            assert read_exactly(destination, 1) == b"x"


def test_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with listen("m.sock") as listener:
        assert listener.addresses == (f"unix:{tmp_path}/m.sock",)
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert works(listener, f"{tmp_path}/m.sock")
    assert not (tmp_path / "m.sock").exists()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_does_not_remove_the_file(path):
    with listen(path) as listener:
        pid = os.fork()
        if pid == 0:
            listener.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert works(listener, path)


def test_send_buffers_are_large(path):
    """At least what the system allows; it doubles what is asked, for its own book-keeping."""
    with open("/proc/sys/net/core/wmem_max") as file:
        allowed = min(SEND_BUFFER, int(file.read()))
    with listen(path) as listener, connect(path) as source:
        with listener.accept(soon()) as destination:
            for channel in (source, destination):
                with socket.socket(fileno=os.dup(channel.raw_fd("write"))) as sock:
                    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * allowed


def test_errors_say_what_to_do(path, tmp_path):
    with pytest.raises(ChannelError, match="No such file.*Start the destination first"):
        connect(path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        with pytest.raises(ChannelError, match="Connection refused. Nobody listens there any more"):
            connect(path)
    with pytest.raises(
        ChannelError, match="No such file.*Choose a path in a directory that exists"
    ):
        listen(str(tmp_path / "none" / "m.sock"))
