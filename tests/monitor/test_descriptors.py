"""Descriptors that come by SCM_RIGHTS: used, kept under names, and closed when nobody wants them."""

import contextlib
import os
import socket

import pytest

from whimbrel_monitor.client import MAX_FDS
from whimbrel_monitor.commands.descriptors import MAX_NAMED
from whimbrel_testing.peers import wait_until

NONE = "No file descriptor supplied via SCM_RIGHTS"

MIB = 1 << 20


@pytest.fixture
def pipe():
    """The write end is sent away; once all copies of it are closed, the read end says so."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


def give(pipe):
    """For `fds=`, and closed here after it was sent."""
    return [pipe[1]]


def is_closed_everywhere(reader):
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 1) == b""
    except BlockingIOError:
        return False


def test_migrate_to_a_descriptor_that_was_sent(app):
    source, destination = app(ram=2 * MIB), app(ram=2 * MIB, waiting=True)
    here, there = source.client(), destination.client()
    a, b = socket.socketpair()
    with a, b:
        there.ask("getfd", fdname="in", fds=[b.fileno()])
        # As qemu.qmp does it: the descriptor comes with a blank, before its command.
        here.send(" ", fds=[a.fileno()])
        here.ask("getfd", fdname="out")
    there.ask("migrate-incoming", uri="fd:in")
    here.ask("migrate", uri="fd:out")
    assert here.ends()["status"] == "completed"
    assert bytes(destination.ram.buffer) == bytes(source.ram.buffer)
    assert source.kernel.named_fds == destination.kernel.named_fds == {}


def test_getfd_needs_one_and_takes_the_first_of_several(wire, pipe):
    assert wire.refused("getfd", fdname="a") == NONE
    other = os.pipe()
    wire.ask("getfd", fdname="a", fds=[pipe[1], other[1]])
    os.close(other[1])
    assert is_closed_everywhere(other[0])
    os.close(other[0])
    assert wire.refused("getfd", fdname="b") == NONE


def test_a_descriptor_that_nobody_took_is_closed(app, pipe):
    wire = app().client()
    wire.send(" ", fds=give(pipe))
    os.close(pipe[1])
    wire.ask("query-status")
    assert not is_closed_everywhere(pipe[0])
    other = os.pipe()
    wire.send(" ", fds=[other[1]])  # takes its place
    os.close(other[1])
    wire.ask("query-status")
    assert is_closed_everywhere(pipe[0])
    wire.close()
    wait_until(lambda: is_closed_everywhere(other[0]), "close")
    os.close(other[0])


@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("getfd", {"fdname": "1a"}, "a name not starting with a digit"),
        ("getfd", {"fdname": "/dev/fdset/3"}, "is for add-fd"),
        ("add-fd", {"fdset_id": -1}, "a non-negative value"),
    ],
)
def test_a_descriptor_of_a_wrong_command_is_closed(wire, pipe, command, arguments, text):
    assert text in wire.refused(command, **arguments, fds=give(pipe))
    os.close(pipe[1])
    assert is_closed_everywhere(pipe[0])


def test_a_name_that_is_given_again_and_closefd(app, pipe):
    one = app()
    wire = one.client()
    wire.ask("getfd", fdname="a", fds=give(pipe))
    os.close(pipe[1])
    other = os.pipe()
    wire.ask("getfd", fdname="a", fds=[other[1]])
    os.close(other[1])
    assert is_closed_everywhere(pipe[0])
    assert not is_closed_everywhere(other[0])
    assert list(one.kernel.named_fds) == ["a"]
    assert wire.ask("closefd", fdname="a") == {}
    assert is_closed_everywhere(other[0])
    os.close(other[0])
    assert wire.refused("closefd", fdname="a") == "File descriptor named 'a' not found"


def test_names_outlive_the_client(app, pipe):
    one = app()
    first = one.client()
    first.ask("getfd", fdname="a", fds=give(pipe))
    first.close()
    assert one.client().ask("closefd", fdname="a") == {}


def test_there_are_not_too_many(app, pipe):
    one = app()
    wire = one.client()
    for n in range(MAX_NAMED):
        wire.ask("getfd", fdname=f"fd{n}", fds=give(pipe))
    before = len(os.listdir("/proc/self/fd"))
    assert "named descriptors already" in wire.refused("getfd", fdname="more", fds=give(pipe))
    wire.send(" ", fds=[pipe[1]] * 200)
    wire.ask("query-status")
    assert len(os.listdir("/proc/self/fd")) <= before + MAX_FDS
    for n in range(MAX_NAMED):
        wire.ask("closefd", fdname=f"fd{n}")


def test_sets(app, pipe):
    one = app()
    wire = one.client()
    assert wire.ask("query-fdsets") == []
    first = wire.ask("add-fd", opaque="x", fds=give(pipe))
    assert first["fdset-id"] == 0
    assert wire.ask("add-fd", fdset_id=7, fds=give(pipe))["fdset-id"] == 7
    assert "has its descriptor" in wire.refused("add-fd", fdset_id=7, fds=give(pipe))
    assert wire.ask("add-fd", fds=give(pipe))["fdset-id"] == 1
    told = wire.ask("query-fdsets")
    assert {"fdset-id": 0, "fds": [{"fd": first["fd"]}]} in told
    assert one.kernel.named_fds["/dev/fdset/0"] == first["fd"]
    assert wire.refused("remove-fd", fdset_id=9) == "File descriptor named 'fdset-id:9' not found"
    for n in (0, 1, 7):
        assert wire.ask("remove-fd", fdset_id=n) == {}
    assert wire.ask("query-fdsets") == []


def test_none_come_over_tcp(app):
    wire = app("tcp:127.0.0.1:0").client()
    assert wire.refused("getfd", fdname="a") == NONE
