"""calc-dirty-rate and query-dirty-rate: how much an app writes, and that it is not disturbed."""

import threading

import pytest

from whimbrel_testing.peers import wait_until

MIB = 1 << 20
PAGE = 4096


def measure(wire, milliseconds=200, **arguments):
    wire.ask("calc-dirty-rate", calc_time=milliseconds, calc_time_unit="millisecond", **arguments)
    wait_until(lambda: wire.ask("query-dirty-rate")["status"] == "measured", "measurement")
    return wire.ask("query-dirty-rate", calc_time_unit="millisecond")


def test_an_app_that_stands_still(app):
    wire = app(ram=4 * MIB).client()
    assert wire.ask("query-dirty-rate") == {
        "status": "unstarted",
        "sample-pages": 0,
        "mode": "page-sampling",
        "calc-time-unit": "second",
        "start-time": 0,
        "calc-time": 0,
    }
    found = measure(wire, sample_pages=128)
    assert (found["dirty-rate"], found["x-written"]) == (0, 0)
    assert (found["x-memory"], found["x-used"]) == (4 * MIB, 4 * MIB)
    assert found["calc-time"] >= 200  # as long as it took
    assert found["sample-pages"] == 128


def test_what_an_app_writes_and_that_its_memory_is_not_touched(app):
    """One MiB of four again and again, while all pages are samples."""
    one = app(ram=4 * MIB)
    wire, stop = one.client(), threading.Event()

    def write():
        count = 0
        while not stop.wait(0.001):
            count += 1
            one.ram.rows[:256, 0] = count % 251

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = measure(wire)
    finally:
        stop.set()
        writer.join()
    assert found["x-written"] == MIB
    assert 0 <= 1000 / found["calc-time"] - found["dirty-rate"] < 1.1  # rounded down
    assert measure(wire)["x-written"] == 0


def test_one_measurement_at_a_time_which_no_client_waits_for(app):
    one = app()
    first, second = one.client(), one.client()
    first.ask("calc-dirty-rate", calc_time=400, calc_time_unit="millisecond")
    assert second.ask("query-dirty-rate")["status"] == "measuring"
    assert "dirty-rate" not in second.ask("query-dirty-rate")
    refused = second.refused("calc-dirty-rate", calc_time=1)
    assert refused == "the dirty rate is already being measured."
    wait_until(lambda: second.ask("query-dirty-rate")["status"] == "measured", "measurement")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"calc_time": 49}, "Calculation time is out of range [50ms, 60000ms]."),
        ({"calc_time": 1, "sample_pages": 5}, "sample-pages is out of range[128, 16384]."),
        # What would have to be switched on in the machine is not offered.
        (
            {"calc_time": 100, "mode": "dirty-bitmap"},
            "Parameter 'mode' does not accept value 'dirty-bitmap'",
        ),
    ],
)
def test_what_is_refused(wire, arguments, text):
    unit = "second" if "sample_pages" in arguments else "millisecond"
    assert wire.refused("calc-dirty-rate", calc_time_unit=unit, **arguments) == text
    assert wire.ask("query-dirty-rate")["status"] == "unstarted"


def test_a_migration_goes_on_beside_a_measurement(app, tmp_path):
    """Nothing is tracked for it, so neither takes anything from the other."""
    source, destination = app(ram=4 * MIB), app(ram=4 * MIB, waiting=True)
    wire = source.client()
    uri = f"unix:{tmp_path}/m.sock"
    destination.client().ask("migrate-incoming", uri=uri)
    wire.ask("calc-dirty-rate", calc_time=300, calc_time_unit="millisecond")
    wire.ask("migrate", uri=uri)
    assert wire.ends()["status"] == "completed"
    wait_until(lambda: destination.machine.is_running, "the destination runs")
    assert destination.ram.buffer == source.ram.buffer
    wait_until(lambda: wire.ask("query-dirty-rate")["status"] == "measured", "measurement")
