"""Every byte waits for its time, by a clock that only passes when somebody sleeps."""

import pytest

from whimbrel import OutStream
from whimbrel.channel import MemoryChannel
from whimbrel.pace import CREDIT, SLICE, SMALLEST, Pace

LIMITS = [1_000, 10_000_000, 100_000_000, 1_000_000_000]


class World:
    """A stream with a pace, a limit to be changed, and a clock. Sleeps are `late` seconds too long."""

    def __init__(self, monkeypatch, limit, late=0.0):
        self.now, self.late, self.limit = 1000.0, late, limit
        self.naps, self.wake = [], None
        monkeypatch.setattr("whimbrel.pace.time.monotonic", lambda: self.now)
        self.pace = Pace(lambda: self.limit, self.sleep)
        self.out = OutStream(Channel(self))
        self.out.pace = self.pace
        self.start = self.now

    def sleep(self, seconds):
        assert 0 < seconds <= SLICE
        self.naps.append(seconds)
        self.now += seconds + self.late
        return self.wake is not None and self.wake()

    def sent_by(self, after):
        """Bytes that had gone so many seconds after the start."""
        return sum(n for at, n in self.out.channel.sends if at <= self.start + after)


class Channel(MemoryChannel):
    """Takes no time; notes when it was given how much."""

    def __init__(self, world):
        super().__init__()
        self.world, self.sends = world, []

    def send(self, buffers):
        self.sends.append((self.world.now, sum(memoryview(b).nbytes for b in buffers)))


@pytest.mark.parametrize("late", [0.0, 0.0001, 0.009, 0.05])
@pytest.mark.parametrize("limit", LIMITS[1:])
def test_the_rate_is_the_limit_however_late_the_sleeps_are(monkeypatch, limit, late):
    world = World(monkeypatch, limit, late)
    data = bytes(1 << 20)
    while world.now < world.start + 5:
        world.out.write(data)
    elapsed = world.now - world.start
    ahead = 2 * SLICE * limit + len(data)
    assert limit * (elapsed - late) <= world.out.position <= limit * elapsed + ahead


@pytest.mark.parametrize("limit", LIMITS[1:])
def test_it_goes_evenly(monkeypatch, limit):
    """In no tenth of a second more than the limit and what may run ahead."""
    world = World(monkeypatch, limit)
    for _ in range(10 + limit // 1_000_000):
        world.out.write(bytes(1 << 20))
    for tenth in range(int((world.now - world.start) * 10)):
        went = world.sent_by((tenth + 1) / 10) - world.sent_by(tenth / 10)
        assert went <= limit * (0.1 + 2 * SLICE) + world.pace.piece
        assert went >= limit * (0.1 - 2 * SLICE) - world.pace.piece


def test_a_large_write_goes_in_pieces_and_all_of_it_goes(monkeypatch):
    world = World(monkeypatch, 10_000_000)
    data = bytes(range(256)) * 4096
    sent = bytearray()
    monkeypatch.setattr(world.out.channel, "send", lambda bufs: [sent.extend(b) for b in bufs])
    world.out.write_all([b"head", memoryview(data), bytearray(b"tail")])
    assert sent == b"head" + data + b"tail"
    assert world.out.position == len(sent)


def test_pieces_do_not_get_tiny(monkeypatch):
    world = World(monkeypatch, 1_000)
    world.out.write(bytes(3 * SMALLEST))
    assert [n for _, n in world.out.channel.sends] == [SMALLEST] * 3
    assert world.now - world.start == pytest.approx(2 * SMALLEST / 1_000)


def test_who_was_held_up_makes_good_for_no_more_than_the_credit(monkeypatch):
    world = World(monkeypatch, 10_000_000)
    world.out.write(bytes(SMALLEST))
    world.now += 60
    world.start = world.now
    world.out.write(bytes(10_000_000))
    assert world.now - world.start == pytest.approx(1 - CREDIT, abs=2 * SLICE)


def test_small_writes_are_collected_and_charged_once(monkeypatch):
    world = World(monkeypatch, 1_000_000)
    for _ in range(1000):
        world.out.write(b"x")
    assert not world.out.channel.sends
    world.out.flush()
    assert world.pace.left(world.now + 0.01) == pytest.approx(9_000, abs=1)


def test_bytes_past_the_stream_count(monkeypatch):
    world = World(monkeypatch, 1_000_000)
    world.out.account(500_000)
    world.out.wait_for_turn()
    assert world.now - world.start == pytest.approx(0.5)
    world.out.account(300_000, paid=200_000)
    world.out.wait_for_turn()
    assert world.now - world.start == pytest.approx(0.6)
    assert world.out.position == 800_000


@pytest.mark.parametrize(("old", "new"), [(1_000, 100_000_000), (1_000_000_000, 10_000_000)])
def test_a_change_is_felt_within_a_slice(monkeypatch, old, new):
    """Also by somebody who has much to wait for, or to make good: that was of the old limit."""
    world = World(monkeypatch, old)
    world.out.account(10 * old)  # 10 seconds to wait
    changed = world.now + 0.1
    world.wake = lambda: world.now >= changed and setattr(world, "limit", new)
    world.out.write(bytes(new))
    first = world.out.channel.sends[0][0]
    assert first <= changed + SLICE
    assert world.now - first == pytest.approx(1, abs=3 * SLICE)


def test_without_a_limit_nothing_waits_or_is_cut(monkeypatch):
    world = World(monkeypatch, 0)
    world.out.write(bytes(100 << 20))
    assert world.out.channel.sends == [(world.start, 100 << 20)]
    assert world.pace.left(world.now) is None
    world.limit = 10_000_000  # and what went before is not owed
    assert world.pace.left(world.now + 0.1) == pytest.approx(1_000_000, abs=1)
    assert not world.naps


def test_a_limit_that_is_lifted_lets_the_rest_go_at_once(monkeypatch):
    world = World(monkeypatch, 1_000_000)
    world.wake = lambda: setattr(world, "limit", 0)
    world.out.write(bytes(50 << 20))
    assert world.now - world.start <= SLICE
    assert len(world.out.channel.sends) < 5


def test_who_is_cancelled_does_not_wait(monkeypatch):
    world = World(monkeypatch, 1_000)
    world.out.account(1_000_000)
    world.wake = lambda: True
    world.out.wait_for_turn()
    assert len(world.naps) == 1


def test_what_is_left_is_what_is_due_by_then(monkeypatch):
    world = World(monkeypatch, 1_000_000)
    assert world.pace.left(world.now + 0.1) == pytest.approx(100_000, abs=1)
    world.out.account(250_000)
    for left in (0, 0, 50_000, 150_000):
        assert world.pace.left(world.now + 0.1) == pytest.approx(left, abs=1)
        world.now += 0.1
