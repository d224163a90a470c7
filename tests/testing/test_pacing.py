"""The link passes what it is given, no faster than it may, and breaks where it is told to."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest

from whimbrel_testing import pacing
from whimbrel_testing.pacing import Direction, Link, Pacer, Trigger

FORWARD, BACK = Direction.FORWARD, Direction.BACK


class Clock:
    """Time that passes only by sleep(), which is late by what the test says."""

    def __init__(self, late=0.0):
        self.now, self.late = 100.0, late

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds + self.late


@pytest.mark.parametrize("late", [0.0, 0.0001, 0.0009])
def test_the_pace_does_not_drift_when_sleeps_are_late(monkeypatch, late):
    clock = Clock(late)
    monkeypatch.setattr(
        pacing, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)
    )
    pacer = Pacer(1000.0)
    start = clock.now
    for _ in range(1000):
        pacer.wait(1)
    pacer.wait(1)
    assert clock.now - start == pytest.approx(1.0, abs=2 * late + 1e-9)


def test_who_was_held_up_makes_good_for_little(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(
        pacing, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)
    )
    pacer = Pacer(1000.0)
    clock.now += 60
    start = clock.now
    for _ in range(1000):
        pacer.wait(1)
    assert clock.now - start == pytest.approx(1.0 - pacing._CREDIT - 0.001, abs=0.002)


class Ends:
    """A link with a socket at either end."""

    def __init__(self, kind, directory, **options):
        if kind == "unix":
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{directory}/t.sock")
            target = f"unix:{directory}/t.sock"
        else:
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            target = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        listener.listen()
        self.link = Link(target, **options)
        where = self.link.uri.partition(":")[2]
        if kind == "unix":
            self.source = socket.socket(socket.AF_UNIX)
            self.source.connect(where)
        else:
            host, port = where.removesuffix(",direct=off").split(":")
            self.source = socket.create_connection((host, int(port)))
        self.destination, _ = listener.accept()
        listener.close()
        for sock in (self.source, self.destination):
            sock.settimeout(20)

    def close(self):
        self.source.close()
        self.destination.close()
        self.link.close()


@pytest.fixture(params=["tcp", "unix"])
def ends(request, tmp_path):
    made = []

    def make(**options):
        made.append(Ends(request.param, tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def everything(sock):
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def exactly(sock, n):
    data = b""
    while len(data) < n:
        piece = sock.recv(n - len(data))
        assert piece, f"the end after {len(data)} of {n} bytes"
        data += piece
    return data


def silent(sock):
    """Nothing comes (this much patience is not a judgement of speed: a byte that comes later fails the next look)."""
    sock.settimeout(0.1)
    with pytest.raises(TimeoutError):
        sock.recv(1)
    sock.settimeout(20)


def test_bytes_pass_both_ways_and_the_end_passes_too(ends):
    e = ends()
    data = bytes(range(256)) * 4096
    threading.Thread(
        target=lambda: (e.source.sendall(data), e.source.shutdown(socket.SHUT_WR))
    ).start()
    assert everything(e.destination) == data
    e.destination.sendall(b"thanks")
    e.destination.close()
    assert everything(e.source) == b"thanks"
    assert e.link.passed == {FORWARD: len(data), BACK: 6}


def test_a_rate_is_kept_towards_the_target(ends):
    e = ends(rate=10e6)
    data = bytes(2 << 20)
    start = time.monotonic()
    threading.Thread(
        target=lambda: (e.source.sendall(data), e.source.shutdown(socket.SHUT_WR))
    ).start()
    assert len(everything(e.destination)) == len(data)
    # Too slow proves nothing on a busy machine; too fast would be a link that does not pace.
    assert time.monotonic() - start >= (len(data) - pacing._CHUNK) / 10e6 - 2 * pacing._CREDIT


def test_cut_ends_both_sides(ends):
    e = ends()
    e.source.sendall(b"x")
    assert e.destination.recv(1) == b"x"
    e.link.cut()
    assert e.destination.recv(1) == b""
    assert e.source.recv(1) == b""


def test_reset_is_a_reset_on_tcp(tmp_path):
    e = Ends("tcp", tmp_path)
    try:
        e.source.sendall(b"x")
        assert e.destination.recv(1) == b"x"
        e.link.reset()
        for sock in (e.source, e.destination):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    finally:
        e.close()


def test_hang_and_resume(ends):
    e = ends()
    e.link.hang()
    e.source.sendall(b"kept")
    silent(e.destination)
    e.link.resume()
    assert exactly(e.destination, 4) == b"kept"


@pytest.mark.parametrize(("before", "passed"), [(True, b"aaab"), (False, b"aaabXY")])
def test_a_trigger_acts_at_its_place(ends, before, passed):
    trigger = Trigger(FORWARD, b"XY", do=Link.cut, before=before)
    e = ends(triggers=[trigger])
    e.source.sendall(b"aaabXYccc")
    assert everything(e.destination) == passed
    assert trigger.fired.wait(20)


def test_a_trigger_waits_for_its_occurrence_and_direction(ends):
    trigger = Trigger(BACK, b"XY", do=Link.cut, occurrence=3)
    e = ends(triggers=[trigger])
    e.source.sendall(b"XYXYXYXY")
    assert exactly(e.destination, 8) == b"XYXYXYXY"
    e.destination.sendall(b"1XY2XY3XY4")
    assert everything(e.source) == b"1XY2XY3"


def test_a_pattern_in_pieces_is_found(ends):
    trigger = Trigger(FORWARD, b"PATTERN", do=Link.cut)
    e = ends(triggers=[trigger])
    for piece in (b"..PAT", b"TE", b"RN.."):
        e.source.sendall(piece)
    assert everything(e.destination) == b".."


def test_the_beginning_of_a_pattern_that_does_not_come_is_let_go(ends):
    e = ends(triggers=[Trigger(FORWARD, b"PATTERN", do=Link.cut)])
    e.source.sendall(b"..PAT")
    assert exactly(e.destination, 5) == b"..PAT"
    e.source.sendall(b"TERN")  # not the pattern any more: its beginning has passed
    assert exactly(e.destination, 4) == b"TERN"


def test_hang_at_a_trigger_lets_the_rest_through_later(ends):
    trigger = Trigger(FORWARD, b"XY", do=Link.hang)
    e = ends(triggers=[trigger])
    e.source.sendall(b"aXYb")
    assert exactly(e.destination, 1) == b"a"
    assert trigger.fired.wait(20)
    silent(e.destination)
    e.link.resume()
    assert exactly(e.destination, 3) == b"XYb"


def test_without_a_target_the_connection_just_ends(tmp_path):
    with Link(f"unix:{tmp_path}/nobody") as link:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(link.uri.partition(":")[2])
        sock.settimeout(20)
        assert sock.recv(1) == b""
        sock.close()
