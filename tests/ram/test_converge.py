"""Auto-converge: when a machine is slowed down, by how much, and that it is let go again whatever happens."""

import threading
import time

import numpy as np
import pytest

from whimbrel import BlockedError, Cancelled, Kernel, Machine, MachineError, MigrationError
from whimbrel_ram import RAMBlock, Throttle
from whimbrel_ram.converge import AutoConverge, Rules
from whimbrel_testing.peers import wait_until

MIB = 1 << 20


class Bench:
    """An AutoConverge with a clock of its own: each period() is a look one second after the last."""

    def __init__(self, **rules):
        self.now, self.sent = 100.0, 0
        self.asked = []
        self.refuse = False
        self.converge = AutoConverge(lambda: Rules(**rules), self._throttle, lambda: self.now)
        self.converge.synced(999 * MIB, 0)  # the first look: nothing to compare with

    def _throttle(self, percent):
        if self.refuse:
            raise MachineError("no")
        self.asked.append(percent)

    def period(self, written, sent, seconds=1.0):
        self.now += seconds
        self.sent += sent
        self.converge.synced(written, self.sent)


def test_two_periods_in_a_row_slow_it_down():
    bench = Bench()
    for written in (51, 50, 51, 51):
        bench.period(written, 100)
    assert bench.asked == [20]
    bench.period(80, 100)
    bench.period(80, 100)
    bench.period(80, 100)
    assert bench.asked == [20, 30]
    assert bench.converge.query() == {"cpu-throttle-percentage": 30}
    bench.converge.lift()
    assert bench.asked == [20, 30, 0]
    assert bench.converge.query() == {}
    bench.converge.lift()
    assert bench.asked == [20, 30, 0]


def test_it_stops_at_the_most_and_tells_the_machine_once():
    bench = Bench(trigger=10, initial=60, increment=30, most=75)
    for _ in range(10):
        bench.period(100, 100)
    assert bench.asked == [60, 75]


def test_looks_within_a_period_are_added_up():
    bench = Bench()
    for _ in range(8):
        bench.period(30, 50, seconds=0.25)
    assert bench.asked == [20]
    bench = Bench()
    for _ in range(7):
        bench.period(30, 50, seconds=0.25)
    assert bench.asked == []


def test_slower_at_the_tail():
    """At 80 % it writes 60 in a fifth of the time; 50 are allowed, so it shall work a sixth: 83 %, not 90."""
    bench = Bench(initial=80, tailslow=True)
    for written in (60, 60, 60, 60):
        bench.period(written, 100)
    assert bench.asked == [80, 83]


def test_a_machine_that_cannot_be_slowed_down_migrates_at_its_own_pace():
    bench = Bench()
    bench.refuse = True
    bench.period(99, 100)
    bench.period(99, 100)
    assert bench.converge.percent == 0
    bench.converge.lift()


class Writer:
    """A machine whose thread writes all of its RAM again and again, and rests when it is told."""

    def __init__(self):
        self.throttle = Throttle()
        self.asked = []
        self.machine = Machine("m-1", stop=self.stop, start=self.start, throttle=self.slow_down)
        self.block = self.machine.add(RAMBlock("ram", 8 * MIB))
        self.block.view[:] = 1  # what was never written is passed over in no time
        self.running = False
        self.start()

    def slow_down(self, percent):
        self.asked.append(percent)
        self.throttle.set(percent)

    def start(self):
        self.running = True
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def stop(self):
        if self.running:
            self.running = False
            self.throttle.wake()
            self.thread.join()

    def work(self):
        """60 MiB/s, as long as nobody throttles it, also where it seldom gets a turn."""
        pages, page = self.block.view.reshape(-1, 4096), 0
        since = time.monotonic()
        while self.running:
            time.sleep(0.008)
            now = time.monotonic()
            due = np.arange(page, page + int((now - since) * 60 * MIB / 4096))
            pages[due % len(pages), 0] += 1
            page, since = int(due[-1]) + 1, now
            began = time.monotonic()
            self.throttle.checkpoint()
            since += time.monotonic() - began


@pytest.fixture
def writer():
    writer = Writer()
    yield writer
    writer.stop()


def kernel_of(writer):
    """It does not end by itself: no downtime is allowed."""
    kernel = Kernel(writer.machine)
    kernel.settings.update({"auto-converge": True, "max-bandwidth": 40 * MIB, "downtime-limit": 0})
    kernel.settings.update({"cpu-throttle-initial": 70, "throttle-trigger-threshold": 60})
    return kernel


def test_what_would_not_converge_does(writer, tmp_path):
    there = Machine("m-1")
    block = there.add(RAMBlock("ram", 8 * MIB))
    incoming = Kernel(there).incoming(f"unix:{tmp_path}/m")
    kernel = kernel_of(writer)
    outgoing = kernel.migrate(f"unix:{tmp_path}/m")
    shown = wait_until(lambda: kernel.query().get("cpu-throttle-percentage"), "throttling")
    assert shown >= 70
    kernel.settings.update({"downtime-limit": 300, "max-bandwidth": 100 * MIB})
    outgoing.wait(60)
    incoming.wait(60)
    assert block.view.tobytes() == writer.block.view.tobytes()
    assert writer.asked[0] == 70
    assert writer.asked[-1] == 0
    assert "cpu-throttle-percentage" not in kernel.query()


def test_a_throttle_that_failed_is_lifted_too():
    asked = []

    def throttle(percent):
        asked.append(percent)
        if percent:
            raise MigrationError("half of the processors")

    now = iter(range(0, 100, 2))
    converge = AutoConverge(Rules, throttle, lambda: next(now))
    for _ in range(3):
        converge.synced(100, 0)
    assert (asked, converge.percent) == ([20], 0)
    converge.lift()
    converge.lift()
    assert asked == [20, 0]


def test_a_cancel_lets_it_run_freely_again(writer, tmp_path):
    there = Machine("m-1")
    there.add(RAMBlock("ram", 8 * MIB))
    incoming = Kernel(there).incoming(f"unix:{tmp_path}/m")
    kernel = kernel_of(writer)
    outgoing = kernel.migrate(f"unix:{tmp_path}/m")
    wait_until(lambda: kernel.query().get("cpu-throttle-percentage"), "throttling")
    outgoing.cancel()
    with pytest.raises(Cancelled):
        outgoing.wait(60)
    with pytest.raises(MigrationError):
        incoming.wait(60)
    assert writer.asked[-1] == 0
    assert writer.throttle.percent == 0
    assert writer.running


def test_a_machine_without_a_throttle_is_refused_at_once(tmp_path):
    machine = Machine("m-1")
    machine.add(RAMBlock("ram", MIB))
    kernel = Kernel(machine)
    kernel.settings["auto-converge"] = True
    with pytest.raises(BlockedError, match=r"no throttle\(\)"):
        kernel.migrate(f"unix:{tmp_path}/m")


# ---- the ready-made throttle


def test_a_rest_is_the_share_of_the_time_that_was_asked_for(monkeypatch):
    now, rests = [10.0], []
    monkeypatch.setattr("whimbrel_ram.converge.time.monotonic", lambda: now[0])
    throttle = Throttle()
    monkeypatch.setattr(throttle._wake, "wait", rests.append)
    now[0] += 0.03
    throttle.checkpoint()
    assert rests == []
    for percent, expected in ((50, 0.03), (75, 0.09), (99, 1.0)):
        throttle.set(percent)
        now[0] += 0.03
        throttle.checkpoint()
        assert rests.pop() == pytest.approx(expected)
    for wrong in (-1, 100):
        with pytest.raises(ValueError, match="not within"):
            throttle.set(wrong)


def test_a_rest_ends_when_it_is_lifted():
    throttle = Throttle()
    throttle.set(99)
    throttle._worked_since -= 60  # long enough for the longest rest
    lifter = threading.Timer(0.01, throttle.set, [0])
    lifter.start()
    throttle.checkpoint()
    lifter.join()
    assert throttle._wake.is_set(), "it rested on"
