"""migctl drives an app by its monitor, in the words that it has for a QEMU."""

import json
import os
import subprocess
import sys

import pytest

from whimbrel_testing.peers import wait_until

MIB = 1 << 20
RUN = "from whimbrel_cli.main import main; main()"


def migctl(app, *args, status=0, **kwargs):
    """Its end; `app` None: no monitor is named."""
    named = () if app is None else ("-m", app.address)
    done = subprocess.run(
        [sys.executable, "-c", RUN, *named, *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONWARNINGS": "error", "COLUMNS": "80", "NO_COLOR": "1"},
        **kwargs,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(params=[None, "tcp:127.0.0.1:0"], ids=["unix", "tcp"])
def source(app, request):
    return app(request.param, ram=4 * MIB)


@pytest.fixture
def destination(app):
    return app(ram=4 * MIB, waiting=True)


def test_a_migration(source, destination):
    assert "machine            running" in migctl(source, "status")
    assert "inmigrate" in migctl(destination, "status")
    migctl(source, "caps", "events=on")
    assert source.kernel.settings["events"]
    assert "500.0 MiB/s" in migctl(source, "set", "bandwidth", "500MiB/s")
    migctl(source, "set", "downtime", "0.2s")
    assert source.kernel.settings["downtime-limit"] == 200
    assert "commit-timeout" in migctl(source, "params")
    told = migctl(destination, "incoming", "tcp:127.0.0.1:0")
    uri = told.removeprefix("listening at ").strip()
    assert not uri.endswith(":0")
    assert "nothing is known against it" in migctl(
        source, "migrate", "--dry-run", "-d", destination.address, uri
    )
    assert "the destination has taken over" in migctl(source, "migrate", uri)
    assert destination.machine.is_running
    assert "postmigrate" in migctl(source, "status")
    info = json.loads(migctl(source, "status", "--json"))
    assert info["migration"]["x-outcome"] == "completed"
    assert "x-whimbrel" not in migctl(source, "cont", status=1)


def test_all_that_an_app_knows_against_it_comes_first(source):
    source.kernel.blockers.add("the crane is lifting")
    source.kernel.settings["auto-converge"] = True
    said = migctl(source, "migrate", "--dry-run", "unix:/tmp/m", status=3)
    assert "2 reasons" in said
    assert said.count("the crane is lifting") == 1
    assert "no throttle()" in said
    assert "unknown migration protocol 'foo'" in migctl(
        source, "migrate", "--dry-run", "foo:bar", status=3
    )


def test_cancel_stop_cont(source, destination):
    told = migctl(destination, "incoming", "tcp:127.0.0.1:0")
    migctl(source, "set", "bandwidth", "1MiB/s")
    uri = told.removeprefix("listening at ").strip()
    migctl(source, "migrate", "--detach", uri)
    wait_until(lambda: source.kernel.state.status == "active", "active")
    assert "pass" in migctl(source, "status")
    migctl(source, "cancel")
    assert source.machine.is_running
    assert "nothing to cancel" in migctl(source, "cancel", status=1)
    assert "paused" in migctl(source, "stop")
    assert "running" in migctl(source, "cont")


def test_reasons_against_it(source):
    source.kernel.blockers.add("a disk is attached")
    assert "a disk is attached" in migctl(source, "blockers", status=3)
    assert "a disk is attached" in migctl(source, "migrate", "tcp:h:1", status=3)
    assert source.machine.is_running
    assert source.client().ask("query-migrate") == {"blocked-reasons": ["a disk is attached"]}


def test_resolve(app, tmp_path, monkeypatch):
    """The last answer of the destination does not come: migctl says what that means, and settles it."""
    source, destination = app(ram=MIB), app(ram=MIB, waiting=True)
    assert "no migration of unknown outcome" in migctl(source, "resolve", "--gone", status=1)
    uri = f"unix:{tmp_path}/m.sock"
    destination.client().ask("migrate-incoming", uri=uri)
    migctl(source, "set", "commit-timeout", "500ms")
    # Behind the two PONGs of 8 bytes each, nothing comes through any more.
    monkeypatch.setenv("WHIMBREL_FAULTS", "hang:recv@16")
    assert "it is unknown" in migctl(source, "migrate", f"fault::{uri}", status=6)
    assert "unknown" in migctl(source, "status")
    assert not source.machine.is_running
    assert "running" in migctl(source, "resolve", "--run-here", "--yes")
    assert source.machine.is_running
