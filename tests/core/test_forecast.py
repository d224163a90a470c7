"""The model of a precopy: what holds for any machine and link, and figures that can be worked out by hand."""

import pytest
from hypothesis import assume, given, strategies as st

from whimbrel.forecast import Writes, forecast

MIB = 1 << 20
MEMORY = st.floats(1e4, 1e12)
BANDWIDTH = st.floats(1e3, 1e11)
LIMIT = st.floats(0.001, 100)
SHARE = st.floats(0, 1)


@st.composite
def writes(draw):
    """Whatever somebody may have measured, consistent or not."""
    memory = draw(MEMORY)
    points = draw(st.lists(st.tuples(st.floats(0.01, 60), st.floats(0, 2)), max_size=4))
    return Writes.of([(t, share * memory) for t, share in points], memory)


def brute_force(written, to_send, bandwidth, limit):
    """The passes one after the other; None when a thousand were not enough."""
    now, left = 0.0, to_send
    for _ in range(1000):
        now += left / bandwidth
        left = written.within(left / bandwidth)
        if left <= bandwidth * limit:
            return now, left / bandwidth
    return None


@given(writes(), st.lists(st.floats(0, 200), min_size=3, max_size=3))
def test_more_time_writes_no_less_and_at_no_higher_rate(written, times):
    a, b, c = sorted(times)
    slack = 1e-9 * written.memory + 1e-6
    assert 0 <= written.within(a) <= written.within(b) + slack <= written.memory + 2 * slack
    if 0 < a < b < c:
        assert written.rate(b) <= written.rate(a) * (1 + 1e-9) + slack / a
        straight = written.within(a) + (written.within(c) - written.within(a)) * (b - a) / (c - a)
        assert written.within(b) >= straight - slack


@given(MEMORY, st.lists(st.tuples(st.floats(0.01, 60), SHARE), min_size=1, max_size=4))
def test_it_is_nowhere_below_what_was_measured(memory, points):
    measured = [(t, share * memory) for t, share in points]
    written = Writes.of(measured, memory)
    for t, size in measured:
        assert written.within(t) >= size * (1 - 1e-9) - 1e-6


@given(writes(), SHARE, BANDWIDTH, LIMIT)
def test_it_is_what_the_passes_one_after_the_other_come_to(written, share, bandwidth, limit):
    to_send = share * written.memory
    expected = brute_force(written, to_send, bandwidth, limit)
    found = forecast(written, to_send=to_send, bandwidth=bandwidth, downtime_limit=limit)
    if expected is not None:
        assert (found.switchover, found.downtime) == pytest.approx(expected)
        assert found.downtime <= limit * (1 + 1e-9)
        assert found.total == found.switchover + found.downtime
    elif found.excess > 1.001:
        assert found.switchover is None


@given(writes(), SHARE, BANDWIDTH, LIMIT)
def test_it_converges_where_the_limit_holds_no_more_than_the_link_takes(
    written, share, bandwidth, limit
):
    found = forecast(
        written, to_send=share * written.memory, bandwidth=bandwidth, downtime_limit=limit
    )
    if found.excess < 0.99:
        assert found.switchover is not None
    if found.switchover is None:
        assert found.excess >= 1
        assert found.downtime >= limit


@given(writes(), LIMIT, st.floats(1.1, 1000))
def test_what_it_asks_for_is_enough_and_no_more_than_needed(written, limit, excess):
    assume(written.rate(limit) > 1)
    bandwidth = written.rate(limit) / excess

    def find(factor=1.0, limit=limit):
        return forecast(
            written,
            to_send=written.memory,
            bandwidth=bandwidth * factor,
            downtime_limit=limit,
        )

    found = find()
    assert found.switchover is None
    assert found.excess == pytest.approx(excess)
    assert find(factor=found.excess * 1.02).switchover is not None
    assert find(factor=found.excess * 0.97).switchover is None
    assert find(limit=found.downtime * 1.02).switchover is not None
    assert find(limit=max(found.downtime * 0.97, limit)).switchover is None


@given(writes(), BANDWIDTH, LIMIT, st.floats(1, 10))
def test_a_faster_link_never_takes_longer(written, bandwidth, limit, faster):
    slow, fast = (
        forecast(written, to_send=written.memory, bandwidth=b, downtime_limit=limit)
        for b in (bandwidth, bandwidth * faster)
    )
    if slow.switchover is not None:
        assert fast.switchover is not None
        assert fast.switchover <= slow.switchover * (1 + 1e-9)


@given(MEMORY, st.floats(0.01, 0.9), BANDWIDTH)
def test_a_steady_rate_is_a_geometric_series(memory, ratio, bandwidth):
    """Of passes that are never saturated and never stop early: memory/bandwidth * (1 + r + r^2 + ...)."""
    written = Writes.steady(ratio * bandwidth, memory)
    limit = memory / bandwidth * ratio**5.5
    found = forecast(written, to_send=memory, bandwidth=bandwidth, downtime_limit=limit)
    assert found.switchover == pytest.approx(memory / bandwidth * sum(ratio**n for n in range(6)))
    assert found.passes == 7


def test_nothing_is_written():
    found = forecast(
        Writes.of([], 64 * MIB), to_send=64 * MIB, bandwidth=32 * MIB, downtime_limit=0.3
    )
    assert (found.passes, found.switchover, found.downtime, found.excess) == (2, 2.0, 0.0, 0.0)


def test_a_working_set_is_written_once_however_long_a_pass_is():
    """4 MiB again and again: 13 MiB/s over 0.3 s, and still 4 MiB after a minute."""
    written = Writes.of([(0.3, 4 * MIB), (2.7, 4 * MIB)], 1024 * MIB)
    assert written.within(60) == 4 * MIB
    slow = forecast(written, to_send=1024 * MIB, bandwidth=8 * MIB, downtime_limit=0.3)
    assert slow.switchover is None
    assert slow.excess == pytest.approx(4 / 0.3 / 8)
    assert slow.downtime == pytest.approx(0.5)  # 4 MiB at 8 MiB/s
    fast = forecast(written, to_send=1024 * MIB, bandwidth=16 * MIB, downtime_limit=0.3)
    assert fast.switchover == 64
    assert fast.downtime == pytest.approx(0.25)


def test_in_the_middle_of_a_pass():
    """10 MiB left, 2 s after the last look, at 1 MiB/s of writes and 5 of link: 4 MiB, 0.8, and 0.16 that fit."""
    found = forecast(
        Writes.steady(MIB, 100 * MIB),
        to_send=10 * MIB,
        bandwidth=5 * MIB,
        downtime_limit=0.1,
        since=2.0,
    )
    assert found.switchover == pytest.approx(2 + 0.8 + 0.16)
    assert found.downtime == pytest.approx(0.032)


@pytest.mark.parametrize(
    "wrong",
    [{"bandwidth": 0}, {"bandwidth": -1}, {"to_send": -1}, {"downtime_limit": -1}, {"since": -1}],
)
def test_figures_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="bandwidth"):
        forecast(Writes.of([], 1), **{"to_send": 1, "bandwidth": 1, "downtime_limit": 1, **wrong})
    with pytest.raises(ValueError, match="measurements"):
        Writes.of([(0, 1)], 10)
