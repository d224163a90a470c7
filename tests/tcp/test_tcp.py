"""What is particular to tcp: many addresses, ports, names, and errors that help."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time

import pytest

from whimbrel import Cancelled, ChannelError, DeadlineExceeded, Role, TransportContext
from whimbrel_tcp.transport import TcpTransport
from whimbrel_testing.transport_suite import (
    Task,
    full_backlog,
    nothing_left_behind,
    read_exactly,
)

PATIENCE = 10.0
TCP = TcpTransport()


def soon():
    return time.monotonic() + PATIENCE


@pytest.fixture(autouse=True)
def _clean():
    with nothing_left_behind():
        yield


def listen(text, **kwargs):
    return TCP.listen(TCP.parse(text), TransportContext(role=Role.DESTINATION, **kwargs))


def connect(text, **kwargs):
    return TCP.connect(TCP.parse(text), TransportContext(role=Role.SOURCE, **kwargs))


def passes(listener, text):
    """Something sent to the address arrives at the listener."""
    with connect(text, deadline=soon()) as source, listener.accept(soon()) as destination:
        source.send([b"here"])
        return read_exactly(destination, 4) == b"here"


def port_of(listener):
    return int(listener.addresses[0].rpartition(":")[2])


@pytest.fixture
def resolved(monkeypatch):
    """Makes the name 'many' have the addresses given."""

    def to(*places):
        real = socket.getaddrinfo

        def getaddrinfo(host, port, *args, **kwargs):
            found = []
            for where in places if host == "many" else [(host, port)]:
                found += real(where[0], where[1] or port, *args, **kwargs)
            return found

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return to


@pytest.fixture
def closed_port():
    """A port that nobody listens on, and nobody else gets."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_port_zero_becomes_the_real_port():
    with listen("127.0.0.1:0") as listener:
        (address,) = listener.addresses
        assert address.startswith("tcp:127.0.0.1:")
        assert port_of(listener) > 0
        assert passes(listener, address.removeprefix("tcp:"))


def test_without_a_host_it_is_all_addresses_with_one_port():
    with listen(":0") as listener:
        port = port_of(listener)
        assert sorted(listener.addresses) == [f"tcp:0.0.0.0:{port}", f"tcp:[::]:{port}"]
        assert passes(listener, f"127.0.0.1:{port}")
        assert passes(listener, f"[::1]:{port}")
        assert passes(listener, f":{port}")


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ("", {4, 6}),
        (",ipv4", {4}),
        (",ipv4=on", {4}),
        (",ipv6=off", {4}),
        (",ipv6", {6}),
        (",ipv4=off", {6}),
        (",ipv4=on,ipv6=on", {4, 6}),
        (",ipv4=on,ipv6=off", {4}),
    ],
)
def test_kinds_of_addresses(options, kinds):
    with listen(f":0{options}") as listener:
        assert {6 if "[" in address else 4 for address in listener.addresses} == kinds


def test_a_host_without_ipv6_listens_on_the_rest(resolved):
    """An address of a kind that this host does not have is left out, unless it is the only one."""
    resolved(("2001:db8::1", 0), ("127.0.0.1", 0))
    with listen("many:0") as listener:
        assert [a.rpartition(":")[0] for a in listener.addresses] == ["tcp:127.0.0.1"]
        assert passes(listener, f"127.0.0.1:{port_of(listener)}")


def test_names_of_services():
    with open("/etc/services") as file:
        lines = file.readlines()
    for line in lines:
        name, _, rest = line.partition("\t")
        number, _, protocol = rest.split()[0].partition("/") if rest.split() else ("", "", "")
        if protocol == "tcp" and number.isdigit() and int(number) > 1023:
            with contextlib.suppress(ChannelError), listen(f"127.0.0.1:{name}") as listener:
                assert port_of(listener) == int(number)
                assert passes(listener, f"127.0.0.1:{name}")
                return
    pytest.skip("no service has a free port")


def test_a_range_of_ports():
    with listen("127.0.0.1:0") as first:
        port = port_of(first)
        if port > 65000:
            pytest.skip("too few ports are left above this one")
        with listen(f"127.0.0.1:{port},to={port + 500}") as second:
            assert port < port_of(second) <= port + 500
            assert passes(second, second.addresses[0].removeprefix("tcp:"))
        with pytest.raises(ChannelError, match=f"port {port}: Address already in use") as caught:
            listen(f"127.0.0.1:{port},to={port}")
        assert "Choose another port, a range by to=PORT, or port 0" in str(caught.value)


def test_all_addresses_of_a_name_are_tried(resolved):
    with listen("127.0.0.1:0") as listener:
        resolved(("::1", port_of(listener)), ("127.0.0.2", port_of(listener)), ("127.0.0.1", 0))
        assert passes(listener, f"many:{port_of(listener)}")


def test_an_address_that_does_not_answer_leaves_time_for_the_next(resolved):
    with full_backlog() as silent, listen("127.0.0.1:0") as listener:
        resolved(silent, ("127.0.0.1", port_of(listener)))
        with connect("many:1", deadline=time.monotonic() + 1) as source:
            with listener.accept(soon()) as destination:
                source.send([b"x"])
                assert read_exactly(destination, 1) == b"x"


def test_each_address_says_why(resolved, closed_port):
    resolved(("127.0.0.1", closed_port), ("::1", closed_port))
    with pytest.raises(ChannelError) as caught:
        connect(f"many:{closed_port}")
    assert str(caught.value) == (
        f"cannot connect to many port {closed_port}: 127.0.0.1: Connection refused;"
        " ::1: Connection refused. Start the destination first, and check host and port"
    )


def test_refused(closed_port):
    with pytest.raises(ChannelError) as caught:
        connect(f"127.0.0.1:{closed_port}")
    assert str(caught.value) == (
        f"cannot connect to 127.0.0.1 port {closed_port}: Connection refused."
        " Start the destination first, and check host and port"
    )
    assert isinstance(caught.value.__cause__, OSError)


def test_an_address_of_another_host():
    with pytest.raises(ChannelError, match="192.0.2.1 port 0: Cannot assign") as caught:
        listen("192.0.2.1:0")
    assert "Choose an address of this host" in str(caught.value)


@pytest.mark.parametrize("text", ["127.0.0.1:no-such-service", "a..b:1", f"{'a' * 64}.b:1"])
def test_unknown_names(text):
    for call in (connect, listen):
        with pytest.raises(ChannelError, match="is not known: .+Check the names") as caught:
            call(text, deadline=soon())
        assert text.rpartition(":")[0] in str(caught.value)


@pytest.mark.parametrize("call", [connect, listen])
def test_a_look_up_that_hangs(monkeypatch, call):
    release = threading.Event()

    def getaddrinfo(*args, **kwargs):
        release.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(DeadlineExceeded, match="the addresses of host port 1"):
        call("host:1", deadline=time.monotonic() + 0.02)
    cancel = os.eventfd(0)
    calling = Task(lambda: call("host:1", cancel_fd=cancel))
    calling.until_blocked(PATIENCE)
    os.eventfd_write(cancel, 1)
    assert isinstance(calling.error(PATIENCE), Cancelled)
    os.close(cancel)
    release.set()


def test_small_messages_are_not_held_back():
    with listen("127.0.0.1:0") as listener:
        address = listener.addresses[0].removeprefix("tcp:")
        with connect(address) as source, listener.accept(soon()) as destination:
            for channel in (source, destination):
                with socket.socket(fileno=os.dup(channel.raw_fd("write"))) as sock:
                    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_end_proves_nothing_behind_a_relay():
    with listen("127.0.0.1:0,direct=off") as listener:
        address = listener.addresses[0].removeprefix("tcp:")
        with connect(f"{address},direct=off") as source, listener.accept(soon()) as destination:
            assert not source.eof_means_peer_gone
            assert not destination.eof_means_peer_gone


def test_a_further_connection_that_is_refused_is_said():
    with listen("127.0.0.1:0") as listener:
        address = listener.addresses[0].removeprefix("tcp:")
        with connect(address) as source:
            listener.close()
            with pytest.raises(ChannelError, match="cannot open a further connection to 127.0.0.1"):
                source.open_extra("multifd", 0)


def test_a_port_that_is_taken_on_the_second_address_is_chosen_anew(resolved, monkeypatch):
    """Port 0 takes one that is free for the first address; the second may have it in use."""
    resolved(("127.0.0.1", 0), ("127.0.0.2", 0))
    real = socket.socket.bind
    refused = []

    def bind(sock, where):
        if where[0] == "127.0.0.2" and not refused:
            refused.append(where[1])
            raise OSError(errno.EADDRINUSE, "Address already in use")
        real(sock, where)

    monkeypatch.setattr(socket.socket, "bind", bind)
    with listen("many:0") as listener:
        assert refused
        ports = {address.rpartition(":")[2] for address in listener.addresses}
        assert len(listener.addresses) == 2
        assert len(ports) == 1
