"""When the source iterates, when it switches over, and the figures that decide it."""

import pytest

from whimbrel import OutStream, Plugins, RunState
from whimbrel.channel import MemoryChannel
from whimbrel.outgoing import Outgoing

from .conftest import Live, Number, ScriptedDestination, answer_pong, answer_shut


class Clock:
    """time.monotonic() as a test wants it."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("whimbrel.stream.time.monotonic", lambda: self.now)

    def __iadd__(self, seconds):
        self.now += seconds
        return self


@pytest.fixture
def run(world, monkeypatch):
    """An Outgoing that is not started, with a stream into memory and a clock that stands still."""
    clock = Clock(monkeypatch)
    side = world.side(Number("a"))
    side.kernel.settings["max-bandwidth"] = 0
    run = Outgoing(side.kernel, side.kernel.route("pair:"), [])
    run._out = OutStream(MemoryChannel())
    run.clock = clock
    run._out.start_window()
    return run


def test_threshold_is_bandwidth_times_what_is_left_of_the_limit(run):
    run._round_trip, run._scan_time = 0.02, 0.01
    run._out.write(bytes(1_000_000))
    run.clock += 0.1
    run._close_window()
    figures = run._figures
    assert figures.bandwidth == pytest.approx(10_000_000)
    assert figures.mbps == pytest.approx(80)
    assert figures.threshold == pytest.approx(10_000_000 * (0.3 - 0.01 - 2 * 0.02))


def test_an_overhead_above_the_limit_leaves_nothing(run):
    run._round_trip = 1.0
    run._out.write(bytes(1_000_000))
    run.clock += 0.1
    run._close_window()
    assert run._figures.threshold == 0


def test_a_stalled_window_divides_nothing_by_zero(run):
    run._dirty_rate = 1e6
    run._figures.expected_downtime = 0.3
    run.clock += 0.1
    run._close_window()
    assert run._figures.bandwidth == 0
    assert run._figures.threshold == 0
    assert run._figures.expected_downtime == 0.3


@pytest.mark.parametrize(
    ("moved", "rate", "expected"), [(10_000, 1e6, 0.3), (10_001, 1e6, None), (10_001, None, 0.3)]
)
def test_expected_downtime_needs_a_known_rate_and_a_significant_window(run, moved, rate, expected):
    run._figures.expected_downtime = 0.3
    run._dirty_rate = rate
    run._out.write(bytes(moved))
    run.clock += 0.1
    run._close_window()
    assert run._figures.expected_downtime == pytest.approx(expected or 1e6 / 100_010)


def test_mbps_is_minus_1_before_the_first_window(run):
    assert run._figures.mbps == -1


# ---- the whole loop


@pytest.mark.parametrize("left", [0, 99, 100])
def test_a_machine_that_stands_still_is_not_looked_at(run, left):
    run._figures.threshold = 100
    run._figures.mbps = 1.0
    assert run._must_look(left) is (left < 100)
    run._machine.run_state = RunState.PAUSED
    assert not run._must_look(left)


@pytest.mark.parametrize(
    ("whole", "passes", "limit", "looks"),
    [
        (2_990_000, 1, 300, False),  # 1 MB went in 0.1 s: everything once more takes 0.299 s
        (3_010_000, 1, 300, True),
        (1_000_000, 1, 99, True),
        (1_000_000, 2, 300, True),  # what was found by a look may be found again
    ],
)
def test_a_pass_that_may_be_repeated_within_the_limit_needs_no_look(
    run, whole, passes, limit, looks
):
    run.kernel.settings["downtime-limit"] = limit
    run._whole, run._figures.passes = whole, passes
    run._out.write(bytes(1_000_000))
    run.clock += 0.1
    assert run._must_look(0) is looks
    run._close_window()
    assert run._must_look(0)


def peer(world):
    return ScriptedDestination(world.transport.peer(), on_ping=answer_pong, on_eof=answer_shut(0))


def test_nothing_pending_switches_at_once(world):
    side = world.side(live := Live(0))
    peer(world)
    side.kernel.migrate("pair:").wait(5)
    assert live.looks == 1  # the last, with the machine stopped


def test_it_iterates_until_a_look_finds_nothing_while_the_threshold_is_0(world):
    """Without time to stand still everything is looked at again, until a look finds nothing."""
    side = world.side(live := Live(1000, dirtied=[500, 200, 0, 40]))
    side.kernel.settings["downtime-limit"] = 0
    side.kernel.settings["max-bandwidth"] = 0
    peer(world)
    result = side.kernel.migrate("pair:").wait(5)
    assert live.looks == 4  # the last one with the machine stopped
    assert live.left == 0
    assert result.figures.expected_downtime == 0


def test_bandwidth_is_of_its_window_alone(run):
    """What was beyond the limit in one window does not count again in the next."""
    for moved in (5_000_000, 1_000_000):
        run._out.write(bytes(moved))
        run.clock += 0.1
        run._close_window()
        assert run._figures.bandwidth == pytest.approx(moved * 10)


def test_the_limit_is_kept_while_it_iterates_and_not_behind_it(world):
    side = world.side(live := Live(400_000, dirtied=[0, 3_000_000]))
    side.kernel.settings.update({"max-bandwidth": 2_000_000, "downtime-limit": 0})
    peer(world)
    run = side.kernel.migrate("pair:")
    result = run.wait(20)
    assert live.left == 0
    assert run._out.pace is None
    # Too slow proves nothing on a busy machine.
    assert result.figures.total_time >= 400_000 / 2_000_000 - 0.02


def test_plugins_are_optional(world):
    assert Plugins.load(entry_points=[]).schemes == ()
