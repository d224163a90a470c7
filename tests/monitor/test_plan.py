"""migctl plan and an app, and whether it goes as planned: an app that writes at a known rate, over a link of a known one."""

import json
import re
import subprocess
import sys
import threading
import time

import pytest

from whimbrel_testing.peers import wait_until

from .test_migctl import RUN, migctl

MIB = 1 << 20
PAGE = 4096


class Writer:
    """Writes a ring of so many pages, again and again, at a rate in bytes/s."""

    def __init__(self, ram, pages, rate):
        self._ram, self._pages, self._rate = ram, pages, rate
        self._runs, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._runs.set()
        self._thread.start()

    def _run(self):
        done, began = 0, time.monotonic()
        while not self._over.wait(0.005):
            if not self._runs.is_set():
                done, began = 0, time.monotonic()
                continue
            due = int((time.monotonic() - began) * self._rate / PAGE)
            self._ram.rows[[n % self._pages for n in range(done, due)], 9] += 1
            done = due

    def start(self):
        self._runs.set()

    def stop(self):
        self._runs.clear()

    def close(self):
        self._over.set()
        self._thread.join()


@pytest.fixture
def writing(app):
    """An app of 16 MiB, half of them in use, that writes."""
    writers = []

    def make(*, pages, rate):
        def each(what):
            return lambda: [getattr(writer, what)() for writer in writers]

        one = app(ram=16 * MIB, start=each("start"), stop=each("stop"))
        one.ram.view[8 * MIB :] = 0
        writers.append(Writer(one.ram, pages, rate))
        return one

    yield make
    for writer in writers:
        writer.close()


def plan(source, *args, status=0):
    return json.loads(migctl(source, "plan", "--json", *args, status=status))


def test_one_that_is_planned_to_converge_does_and_about_so(app, writing):
    """2 MiB/s of writes, 6 MiB/s of link, 8 MiB in use."""
    source, destination = writing(pages=1024, rate=2 * MIB), app(ram=16 * MIB, waiting=True)
    migctl(source, "set", "bandwidth", "6MiB/s")
    migctl(source, "set", "downtime", "100ms")
    planned = plan(source)
    assert planned["converges"] is True
    assert (planned["bandwidth"], planned["bandwidth-by"]) == (6 * MIB, "max-bandwidth")
    assert planned["memory"] == 16 * MIB
    assert planned["used"] == pytest.approx(8 * MIB, rel=0.2)
    assert 0 < planned["downtime"] <= 0.1
    told = migctl(destination, "incoming", "tcp:127.0.0.1:0")
    said = migctl(source, "migrate", "--json", told.removeprefix("listening at ").strip())
    ended = json.loads(said.splitlines()[-1])
    assert ended["event"] == "completed"
    assert ended["total-time"] / 1000 == pytest.approx(planned["total-time"], rel=0.75)
    assert planned["passes"] / 2 <= ended["ram"]["dirty-sync-count"] <= planned["passes"] * 2
    forecasts = [json.loads(line) for line in said.splitlines()]
    downtimes = [f["downtime"] for f in forecasts if f["event"] == "progress" and f["switchover"]]
    assert all(0 <= downtime <= 0.1 for downtime in downtimes)


def test_one_that_is_planned_not_to_converge_does_not_and_does_with_what_it_asks_for(app, writing):
    """6 MiB/s of writes, 2 MiB/s of link: a working set of 4 MiB, which is never sent within 100 ms."""
    source, destination = writing(pages=1024, rate=6 * MIB), app(ram=16 * MIB, waiting=True)
    migctl(source, "set", "bandwidth", "2MiB/s")
    migctl(source, "set", "downtime", "100ms")
    planned = plan(source, status=4)
    assert planned["converges"] is False
    assert planned["total-time"] is None
    assert 1.5 < planned["excess"] < 6
    told = migctl(destination, "incoming", "tcp:127.0.0.1:0")
    uri = told.removeprefix("listening at ").strip()
    migctl(source, "migrate", "--detach", uri)
    info = source.client()

    def third_pass():
        found = info.ask("query-migrate")
        return found["ram"]["dirty-sync-count"] >= 4 if "ram" in found else False

    wait_until(third_pass, "third pass")
    assert "a migration is in progress" in migctl(source, "plan", status=1)
    status = json.loads(migctl(source, "status", "--json"))
    assert status["forecast"]["switchover"] is None
    assert status["forecast"]["excess"] >= 0.95
    assert "not converging: memory gets dirty" in migctl(source, "status")
    needed = planned["needs"]["bandwidth"] * 1.5  # samples, and a busy machine
    migctl(source, "set", "bandwidth", str(round(needed)))
    assert info.ends()["status"] == "completed"


def test_it_says_what_it_found_and_what_to_do(writing):
    source = writing(pages=512, rate=4 * MIB)
    fast = migctl(source, "plan", "--seconds", "1", "--bandwidth", "10Gbit/s")
    assert "1.2 GiB/s (--bandwidth)" in fast
    assert "3 passes" in fast
    assert "max-bandwidth is 128.0 MiB/s" in fast
    slow = migctl(source, "plan", "--seconds", "1", "--bandwidth", "1MiB/s", status=4)
    assert re.search(r"16\.0 MiB, [78]\.\d MiB of it in use", slow)
    assert "will not converge" in slow
    assert "a link that takes" in slow
    assert f"migctl -m {source.address} set bandwidth" not in slow
    assert "if the app can be slowed down: it would rest" in slow
    migctl(source, "set", "bandwidth", "1MiB/s")
    slow = migctl(source, "plan", "--seconds", "1", status=4)
    assert "1.0 MiB/s (max-bandwidth of the machine)" in slow
    assert f"migctl -m {source.address} set bandwidth" in slow
    assert f"migctl -m {source.address} caps auto-converge=on" in slow


def test_an_app_that_is_paused_writes_nothing(writing):
    source = writing(pages=512, rate=4 * MIB)
    migctl(source, "stop")
    source.kernel.blockers.add("the crane is lifting")
    found = plan(source, "--seconds", "1")
    assert (found["converges"], found["excess"], found["downtime"]) == (True, 0, 0)
    assert found["notes"] == [
        "the machine is paused: it writes nothing now",
        "stands against it now: the crane is lifting",
    ]
    assert "the crane is lifting" in migctl(source, "plan", "tcp:h:1", status=3)


def test_what_cannot_be_planned(app):
    waiting = app(waiting=True)
    assert "the machine is not here, it is inmigrate" in migctl(waiting, "plan", status=1)
    one = app()
    migctl(one, "set", "bandwidth", "unlimited")
    assert "how fast is the link?" in migctl(one, "plan", status=2)
    for wrong in ("10Gbot", "0", "-1"):
        assert "--bandwidth" in migctl(one, "plan", "--bandwidth", wrong, status=2)


def test_an_interrupt_leaves_nothing(app):
    one = app()
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, "-m", one.address, "plan", "--seconds", "20"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wire = one.client()
    wait_until(lambda: wire.ask("query-dirty-rate")["status"] == "measuring", "measuring")
    child.send_signal(2)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130, errors
    assert "interrupted" in errors
    wait_until(lambda: wire.ask("query-dirty-rate")["status"] == "measured", "its end")
