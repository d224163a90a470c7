"""Each command: what it does to the kernel, what it returns, what it refuses."""

import threading

import pytest

from whimbrel import RunState, Status
from whimbrel_testing.peers import wait_until

MIB = 1 << 20


@pytest.fixture
def pair(app):
    """A source that migrates slowly, and a destination that waits; each with a client."""

    def make(**kwargs):
        source, destination = app(ram=4 * MIB, **kwargs), app(ram=4 * MIB, waiting=True)
        source.wire, destination.wire = source.client(), destination.client()
        source.wire.ask("migrate-set-parameters", max_bandwidth=2 * MIB)
        destination.uri = f"unix:{destination.address.removeprefix('unix:')}.m"
        return source, destination

    return make


def wait_status(wire, status):
    wait_until(lambda: wire.ask("query-migrate").get("status") == status, status)


# ---- migrating


def test_a_whole_migration(pair):
    source, destination = pair()
    for side in (source, destination):
        side.wire.set_capabilities(events=True)
    assert source.wire.ask("query-migrate") == {}
    assert destination.wire.ask("migrate-incoming", uri=destination.uri) == {}
    assert destination.wire.ask("query-migrate")["status"] == "setup"
    assert source.wire.ask("migrate", uri=destination.uri, blk=False, inc=False, detach=True) == {}
    wait_status(source.wire, "active")
    active = source.wire.ask("query-migrate")
    assert {"total-time", "setup-time", "expected-downtime", "ram"} <= set(active)
    assert source.wire.refused("migrate", uri=destination.uri).startswith(
        "there is a migration process in progress"
    )
    source.wire.ask("migrate-set-parameters", max_bandwidth=0)
    info = source.wire.ends()
    assert (info["status"], info["ram"]["remaining"], info["x-acknowledged"]) == (
        *("completed", 0, True),
    )
    assert source.wire.ask("query-status") == {"status": "postmigrate", "running": False}
    assert destination.wire.ask("query-status") == {"status": "running", "running": True}
    assert bytes(source.ram.buffer) == bytes(destination.ram.buffer)
    names = [source.wire.event("MIGRATION")["status"] for _ in range(3)]
    assert names == ["setup", "active", "device"]


def events_until_end(wire):
    told = []
    while not told or told[-1] not in ("completed", "failed", "cancelled"):
        message = wire.events.pop(0) if wire.events else wire_message(wire)
        data = message.get("data", {})
        told.append(data.get("status") or data.get("pass") or message["event"])
    return told


def wire_message(wire):
    import json

    return json.loads(wire.raw_line())


def test_events_of_a_running_machine(pair):
    source, destination = pair()
    source.wire.ask("migrate-set-parameters", max_bandwidth=0)
    source.wire.set_capabilities(events=True)
    destination.wire.set_capabilities(events=True)
    destination.wire.ask("migrate-incoming", uri=destination.uri)
    source.wire.ask("migrate", uri=destination.uri)
    told = events_until_end(source.wire)
    assert told[:3] == ["setup", 1, "active"]
    assert told[-4:-2] == ["STOP", "device"]
    assert isinstance(told[-2], int)
    assert told[-1] == "completed"
    assert events_until_end(destination.wire) == ["setup", "active", "RESUME", "completed"]


def test_no_events_of_migrations_unless_they_are_wanted(pair):
    source, destination = pair()
    source.wire.ask("migrate-set-parameters", max_bandwidth=0)
    destination.wire.ask("migrate-incoming", uri=destination.uri)
    source.wire.ask("migrate", uri=destination.uri)
    source.wire.ends()
    assert [m["event"] for m in source.wire.events] == ["STOP"]


def test_cancel(pair):
    source, destination = pair()
    assert source.wire.ask("migrate_cancel") == {}  # nothing to cancel
    destination.wire.ask("migrate-incoming", uri=destination.uri)
    source.wire.ask("migrate", uri=destination.uri)
    wait_status(source.wire, "active")
    assert source.wire.ask("migrate_cancel") == {}
    assert source.wire.ends()["status"] == "cancelled"
    assert source.wire.ask("migrate_cancel") == {}
    assert source.wire.ask("query-status")["running"]


def test_pause_and_continue(pair):
    source, destination = pair()
    source.wire.set_capabilities(pause_before_switchover=True)
    source.wire.ask("migrate-set-parameters", max_bandwidth=0)
    destination.wire.ask("migrate-incoming", uri=destination.uri)
    source.wire.ask("migrate", uri=destination.uri)
    wait_status(source.wire, "pre-switchover")
    text = source.wire.refused("migrate-continue", state="active")
    assert text == "Migration not in expected state: pre-switchover"
    assert source.wire.ask("query-status")["status"] == "finish-migrate"
    assert source.wire.ask("migrate-continue", state="pre-switchover") == {}
    assert source.wire.ends()["status"] == "completed"


def test_a_failure_after_the_start_is_told_by_the_status(app, tmp_path):
    wire = app().client()
    assert wire.ask("migrate", uri=f"unix:{tmp_path}/nobody") == {}
    info = wire.ends()
    assert info["status"] == "failed"
    assert "nobody" in info["error-desc"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "need either 'uri' or 'channels'"),
        ({"uri": "tcp:h:1", "channels": []}, "need either 'uri' or 'channels'"),
        ({"uri": 5}, "Invalid parameter type for 'uri', expected: string"),
        ({"uri": None}, "Invalid parameter type for 'uri', expected: string"),
        ({"uri": "tcp:h:1", "detach": 1}, "Invalid parameter type for 'detach', expected: boolean"),
        ({"uri": "tcp:h:1", "x": 1}, "Parameter 'x' is unexpected"),
        ({"uri": "zz:1"}, "unknown migration protocol 'zz'"),
        ({"uri": "tcp:h:1", "resume": True}, "Cannot resume if there is no paused migration"),
    ],
)
def test_what_migrate_refuses(wire, arguments, text):
    assert text in wire.refused("migrate", **arguments)


def test_blockers(app):
    one = app()
    wire = one.client()
    assert wire.ask("x-whimbrel-blockers") == []
    one.kernel.blockers.add("a disk is attached")
    one.kernel.blockers.add("a device is passed through")
    both = ["a device is passed through", "a disk is attached"]
    assert wire.ask("query-migrate") == {"blocked-reasons": both}
    assert wire.ask("x-whimbrel-blockers") == both
    reasons = wire.ask("x-whimbrel-blockers", uri="zz:1")
    assert reasons[:2] == both
    assert "unknown migration protocol 'zz'" in reasons[2]
    assert wire.refused("migrate", uri="tcp:h:1") == "; ".join(both)


CHANNELS = {
    "tcp:h:1": {"transport": "socket", "type": "inet", "host": "h", "port": "1"},
    "tcp:[::1]:1,to=9,ipv6=on": {
        "transport": "socket",
        "type": "inet",
        "host": "::1",
        "port": "1",
        "to": 9,
        "ipv6": True,
    },
    "unix:/a,b": {"transport": "socket", "type": "unix", "path": "/a,b"},
    "vsock:3:4": {"transport": "socket", "type": "vsock", "cid": "3", "port": "4"},
    "fd:x": {"transport": "socket", "type": "fd", "str": "x"},
    "exec:cat >x": {"transport": "exec", "args": ["/bin/sh", "-c", "cat >x"]},
    "exec:nc 'a b' 1": {"transport": "exec", "args": ["nc", "a b", "1"]},
    "rdma:h:1": {"transport": "rdma", "host": "h", "port": "1"},
    "file:/x,offset=5": {"transport": "file", "filename": "/x", "offset": 5},
}


@pytest.mark.parametrize("uri", CHANNELS)
def test_channels_say_the_same_as_a_uri(uri):
    from whimbrel_monitor import kinds
    from whimbrel_monitor.channels import MigrationChannel, to_uri

    given = [{"channel-type": "main", "addr": CHANNELS[uri]}]
    assert to_uri(kinds.of(list[MigrationChannel]).check(given, "channels")) == uri


@pytest.mark.parametrize(
    ("addr", "text"),
    [
        ({}, "Parameter 'channels[0].addr.transport' is missing"),
        ({"transport": "tcp"}, "Parameter 'transport' does not accept value 'tcp'"),
        ({"transport": "socket"}, "Parameter 'channels[0].addr.type' is missing"),
        ({**CHANNELS["tcp:h:1"], "port": 1}, "'channels[0].addr.port', expected: string"),
        ({**CHANNELS["tcp:h:1"], "path": "x"}, "'channels[0].addr.path' is unexpected"),
        ({**CHANNELS["tcp:h:1"], "host": "h,to=9"}, "is not a host"),
        ({**CHANNELS["tcp:h:1"], "port": "1,to=9"}, "is not part of an address"),
        (5, "Invalid parameter type for 'channels[0].addr', expected: object"),
    ],
)
def test_what_channels_must_have(wire, addr, text):
    channels = [{"channel-type": "main", "addr": addr}]
    assert text in wire.refused("migrate", channels=channels)
    assert "must have one entry" in wire.refused("migrate", channels=[])


def test_a_migration_by_channels(pair):
    source, destination = pair()
    source.wire.ask("migrate-set-parameters", max_bandwidth=0)
    path = destination.uri.removeprefix("unix:")
    addr = {"transport": "socket", "type": "unix", "path": path}
    channels = [{"channel-type": "main", "addr": addr}]
    destination.wire.ask("migrate-incoming", channels=channels)
    source.wire.ask("migrate", channels=channels)
    assert source.wire.ends()["status"] == "completed"


# ---- waiting for a migration


def test_only_a_machine_that_waits_can_be_told_where(pair):
    source, destination = pair()
    text = source.wire.refused("migrate-incoming", uri=destination.uri)
    assert "'-incoming' was not specified" in text
    assert source.machine.is_running
    destination.wire.ask("migrate-incoming", uri=destination.uri)
    text = destination.wire.refused("migrate-incoming", uri=destination.uri)
    assert text.startswith("The incoming migration has already been started")


def test_after_a_failure_it_may_be_told_again(pair):
    source, destination = pair()
    destination.wire.ask("migrate-incoming", uri=destination.uri)
    source.wire.ask("migrate", uri=destination.uri)
    wait_status(source.wire, "active")
    source.wire.ask("migrate_cancel")
    assert destination.wire.ends()["status"] == "failed"
    assert destination.wire.ask("query-status")["status"] == "inmigrate"
    source.wire.ask("migrate-set-parameters", max_bandwidth=0)
    source.wire.ends()
    destination.wire.ask("migrate-incoming", uri=destination.uri)
    source.wire.ask("migrate", uri=destination.uri)
    assert source.wire.ends()["status"] == "completed"


def test_exit_on_error_ends_the_app_if_that_can_be_ended(app, tmp_path):
    import socket

    ended = threading.Event()
    uri = f"unix:{tmp_path}/m"
    wire = app(waiting=True).client()
    text = wire.refused("migrate-incoming", uri=uri, exit_on_error=True)
    assert "needs an app that its monitor can end" in text
    wire = app(waiting=True, quit=ended.set).client()
    wire.ask("migrate-incoming", uri=uri, exit_on_error=True)
    with socket.socket(socket.AF_UNIX) as garbage:
        garbage.connect(uri.removeprefix("unix:"))
        garbage.sendall(b"x" * 100)
    assert ended.wait(20)
    assert wire.ends()["status"] == "failed"


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


def test_capabilities_stay_while_a_migration_runs(pair):
    source, destination = pair()
    destination.wire.ask("migrate-incoming", uri=destination.uri)
    source.wire.ask("migrate", uri=destination.uri)
    wait_status(source.wire, "active")
    changes = [{"capability": "events", "state": True}]
    text = source.wire.refused("migrate-set-capabilities", capabilities=changes)
    assert "migration process in progress" in text
    assert source.kernel.settings["events"] is False
    source.wire.ask("migrate-set-parameters", max_bandwidth=123)
    assert source.kernel.settings["max-bandwidth"] == 123


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


# ---- the outcome that is unknown


def test_resolve(wire):
    assert "no migration of unknown outcome" in wire.refused("x-whimbrel-resolve", run_here=True)
    text = "Invalid parameter type for 'run-here', expected: boolean"
    assert wire.refused("x-whimbrel-resolve", run_here="yes") == text


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
    assert {info["state"] for info in told.values()} == {"ready"}


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
