"""The other commands: settings, the setters of 2013, the machine, and what the monitor says of itself."""

import threading

import pytest

from whimbrel import RunState, Status

# ---- settings


def test_capabilities_are_those_that_plugins_declare(app):
    one = app()
    wire = one.client()
    listed = wire.ask("query-migrate-capabilities")
    assert {"capability": "events", "state": False} in listed
    wire.set_capabilities(events=True)
    assert one.kernel.settings["events"] is True
    text = "Parameter 'capability' does not accept value 'nope'"
    changes = [
        {"capability": "events", "state": False},
        {"capability": "nope", "state": True},
    ]
    assert wire.refused("migrate-set-capabilities", capabilities=changes) == text
    assert one.kernel.settings["events"] is True


@pytest.mark.parametrize(
    ("capabilities", "text"),
    [
        ({}, "Invalid parameter type for 'capabilities', expected: array"),
        ([5], "Invalid parameter type for 'capabilities[0]', expected: object"),
        ([{"capability": "events"}], "Parameter 'capabilities[0].state' is missing"),
        (
            [{"capability": "events", "state": 1}],
            "Invalid parameter type for 'capabilities[0].state', expected: boolean",
        ),
        (
            [{"capability": 5, "state": True}],
            "Invalid parameter type for 'capabilities[0].capability', expected: string",
        ),
        (
            [{"capability": "events", "state": True, "z": 1}],
            "Parameter 'capabilities[0].z' is unexpected",
        ),
    ],
)
def test_what_capabilities_must_be(wire, capabilities, text):
    assert wire.refused("migrate-set-capabilities", capabilities=capabilities) == text


def test_parameters_are_all_or_nothing(app):
    one = app()
    wire = one.client()
    assert wire.ask("migrate-set-parameters", downtime_limit=77, max_bandwidth=5) == {}
    told = wire.ask("query-migrate-parameters")
    assert (told["downtime-limit"], told["max-bandwidth"]) == (77, 5)
    assert wire.refused("migrate-set-parameters", downtime_limit=88, nope=1) == (
        "Parameter 'nope' is unexpected"
    )
    assert "between 0 and 2000000" in wire.refused(
        "migrate-set-parameters", max_bandwidth=6, downtime_limit=2_000_001
    )
    assert wire.ask("query-migrate-parameters") == told
    assert told["downtime-limit"] == one.kernel.settings["downtime-limit"]
    assert wire.ask("migrate-set-parameters") == {}


@pytest.mark.parametrize("value", ["5", "5M", 1.5, True, None, 1 << 64])
def test_sizes_are_numbers_on_the_wire(wire, value):
    text = "Parameter 'max-bandwidth' expects uint64"
    assert wire.refused("migrate-set-parameters", max_bandwidth=value) == text


def test_a_negative_size_is_the_unsigned_one_of_the_same_bits(wire):
    wire.ask("migrate-set-parameters", max_bandwidth=-1)
    assert wire.ask("query-migrate-parameters")["max-bandwidth"] == (1 << 64) - 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("4", "Parameter 'cpu-throttle-initial' expects uint64"),
        (1.5, "Parameter 'cpu-throttle-initial' expects uint64"),
        (256, "Parameter 'cpu-throttle-initial' expects uint8_t"),
        (-1, "Parameter 'cpu-throttle-initial' expects uint8_t"),
        (1 << 64, "Parameter 'cpu-throttle-initial' expects uint64"),
        (0, "between 1 and 99"),
    ],
)
def test_small_numbers(wire, value, text):
    assert text in wire.refused("migrate-set-parameters", cpu_throttle_initial=value)


# ---- the setters of 2013


@pytest.mark.parametrize(
    ("value", "stored"),
    [(5, 5), (0, 0), (-3, 0), (1 << 64, (1 << 64) - 1), (1 << 80, (1 << 64) - 1)],
)
def test_speed_is_clamped(wire, value, stored):
    assert wire.ask("migrate_set_speed", value=value) == {}
    assert wire.ask("query-migrate-parameters")["max-bandwidth"] == stored


@pytest.mark.parametrize(
    ("value", "stored"),
    [(0.03, 30), (2, 2000), (0.0001, 1), (0, 0), (-1, 0), (1e30, 2_000_000), (10**40, 2_000_000)],
)
def test_downtime_is_in_seconds(wire, value, stored):
    assert wire.ask("migrate_set_downtime", value=value) == {}
    assert wire.ask("query-migrate-parameters")["downtime-limit"] == stored


def test_downtime_is_a_number(wire):
    text = wire.refused("migrate_set_downtime", value="0.3")
    assert text == "Invalid parameter type for 'value', expected: number"
    assert (
        "JSON parse error"
        in wire.say(b'{"execute":"migrate_set_downtime","arguments":{"value":NaN}}')["error"][
            "desc"
        ]
    )


def test_not_a_number_is_refused():
    import math
    from types import SimpleNamespace

    from whimbrel import Kernel, LocalError, Machine
    from whimbrel_monitor.commands import settings_2013

    ctx = SimpleNamespace(kernel=Kernel(Machine("none")))
    with pytest.raises(LocalError):
        settings_2013.migrate_set_downtime(ctx, {"value": math.nan})


def test_the_cache_size_is_rounded_down(wire):
    assert wire.ask("migrate-set-cache-size", value=99_999) == {}
    assert wire.ask("query-migrate-cache-size") == 65536
    assert wire.ask("query-migrate-parameters")["xbzrle-cache-size"] == 65536
    text = "Parameter 'cache size' expects exceeding address space"
    assert wire.refused("migrate-set-cache-size", value=1 << 64) == text
    assert wire.refused("migrate-set-cache-size", value=-1) == text
    assert "cache size" in wire.refused("migrate-set-cache-size", value=4095)
    assert wire.ask("query-migrate-cache-size") == 65536


# ---- the machine


def test_stop_and_cont(app):
    said = []
    one = app(stop=lambda: said.append("stop"), start=lambda: said.append("start"))
    wire = one.client()
    assert wire.ask("query-status") == {"status": "running", "running": True}
    for command in ("stop", "stop"):
        assert wire.ask(command) == {}
    assert wire.ask("query-status") == {"status": "paused", "running": False}
    for command in ("cont", "cont"):
        assert wire.ask(command) == {}
    assert said == ["stop", "start"]
    assert one.machine.run_state is RunState.RUNNING


def test_a_failing_callback_is_told(app):
    def stop():
        raise RuntimeError("the valve is stuck")

    wire = app(stop=stop).client()
    assert "the valve is stuck" in wire.refused("stop")
    assert wire.ask("query-status")["running"]


def test_announce_self(app):
    said = []
    wire = app(announce=lambda: said.append("here")).client()
    ask = {"initial": 50, "max": 550, "rounds": 5, "step": 50}
    assert wire.ask("announce-self", **ask) == {}
    assert said == ["here"]
    del ask["step"]
    assert wire.refused("announce-self", **ask) == "Parameter 'step' is missing"
    waiting = app(waiting=True).client()
    assert "not here" in waiting.refused("announce-self", **ask, step=1)


def test_quit(app):
    ended = threading.Event()
    wire = app(quit=ended.set).client()
    wire.send('{"execute":"quit","id":7}')
    assert wire.event("SHUTDOWN") == {"guest": False, "reason": "host-qmp-quit"}
    assert wire.line() == {"return": {}, "id": 7}
    assert ended.wait(20)


def test_an_app_that_gave_no_callback_goes_on(wire):
    assert "cannot be ended" in wire.refused("quit")
    assert wire.ask("query-status")["running"]
    assert wire.events == []


def test_quit_may_close_the_monitor(app):
    one = app(quit=lambda: one.monitor.close())  # noqa: PLW0108 - it is not there yet
    wire = one.client()
    assert wire.ask("quit") == {}
    assert wire.raw_line() == b""


# ---- about itself


def test_versions_agree(app):
    wire = app().stranger()
    greeting = wire.line()["QMP"]["version"]
    wire.say('{"execute":"qmp_capabilities"}')
    assert wire.ask("query-version") == greeting


def test_plugins(wire):
    told = {info["name"]: info for info in wire.ask("x-whimbrel-plugins")}
    assert told["monitor"]["settings"] == ["events"]
    assert told["unix"]["provides"] == ["unix"]
    states = {name: info["state"] for name, info in told.items()}
    assert states.pop("rdma") in ("ready", "needs")  # as this machine has a device or not
    assert set(states.values()) == {"ready"}


def test_the_schema_is_closed(wire):
    """Every type that something names is there, once, as clients follow them."""
    entries = wire.ask("query-qmp-schema")
    names = [e["name"] for e in entries]
    assert len(names) == len(set(names))
    by_name = {e["name"]: e for e in entries}
    for entry in entries:
        used = [entry.get(k) for k in ("arg-type", "ret-type", "element-type")]
        used += [m["type"] for m in entry.get("members", ()) if "type" in m]
        used += [v["type"] for v in entry.get("variants", ())]
        assert all(u is None or u in by_name for u in used), entry
    commands = {e["name"] for e in entries if e["meta-type"] == "command"}
    assert commands == {c["name"] for c in wire.ask("query-commands")}
    migrate = by_name[by_name["migrate"]["arg-type"]]["members"]
    assert {"name": "uri", "type": "str", "default": None} in migrate
    parameters = by_name[by_name["migrate-set-parameters"]["arg-type"]]["members"]
    assert {"name": "max-bandwidth", "type": "int", "default": None} in parameters
    status = by_name[by_name["MIGRATION"]["arg-type"]]["members"][0]["type"]
    assert set(by_name[status]["values"]) == set(map(str, Status))
