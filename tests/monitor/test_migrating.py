"""The commands that begin, follow and end a migration: what they do, what they return, what they refuse."""

import threading

import pytest

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


# ---- settings meanwhile


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


# ---- the outcome that is unknown


def test_resolve(wire):
    assert "no migration of unknown outcome" in wire.refused("x-whimbrel-resolve", run_here=True)
    text = "Invalid parameter type for 'run-here', expected: boolean"
    assert wire.refused("x-whimbrel-resolve", run_here="yes") == text
