"""A transport that QEMU has not got, on real QEMUs: by descriptor and pumped, and whatever ends in the middle."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import uuid
from pathlib import Path

import pytest

from whimbrel import LocalError
from whimbrel_cli import incoming
from whimbrel_cli.monitor import Monitor, Refused
from whimbrel_testing.peers import PATIENCE, wait_until
from whimbrel_testing.qemu_guest import check_count, counting_guest, last_number, wait_counting

pytestmark = pytest.mark.interop
ABSTRACT = Path(__file__).parents[2] / "examples/whimbrel-abstract/src/whimbrel_abstract"
SLOW = 1 << 20  # bytes/s


@pytest.fixture
def site(site):
    """With the third-party transport of the examples, as an installer leaves it."""
    shutil.copytree(ABSTRACT, site.path / "whimbrel_abstract")
    info = site.path / "whimbrel_abstract-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: whimbrel-abstract\nVersion: 0.1.0\nRequires-Dist: whimbrel-core>=0.1\n"
    )
    (info / "entry_points.txt").write_text(
        "[whimbrel.transports]\nabstract = whimbrel_abstract.plugin\n"
    )
    return site


class Pair:
    """A guest that counts, and a QEMU that waits for it; `uri` leads from one to the other."""

    def __init__(self, qemu, folder, versions):
        self.uri = f"abstract:whimbrel-{uuid.uuid4()}"
        guest = counting_guest(folder)
        self.logs = [folder / "src.log", folder / "dst.log"]
        self.source, self.destination = (
            qemu(
                *guest.args(log),
                *("-qmp", f"unix:{folder}/{log.stem}.qmp,server=on,wait=off"),
                *(("-incoming", "defer") if log.stem == "dst" else ()),
                version=version,
            )
            for version, log in zip(versions, self.logs, strict=True)
        )
        self.src, self.dst = (f"unix:{folder}/{n}.qmp" for n in ("src", "dst"))

    def goes_on_there(self):
        """The guest counts on at the destination, and no number is missing or comes twice."""
        before = last_number(self.logs[0])
        self.destination.wait_status("running")
        wait_counting(*self.logs, beyond=before)
        check_count(*self.logs)
        assert self.source.status() == "postmigrate"

    def goes_on_here(self):
        """It counts on at the source, and never ran at the destination."""
        self.source.wait_status("running")
        wait_counting(self.logs[0], beyond=last_number(self.logs[0]))
        check_count(self.logs[0])
        assert not self.logs[1].exists() or not self.logs[1].read_bytes()


@pytest.fixture(params=[("7.2", "10.0")])
def pair(request, qemu, tmp_path):
    pair = Pair(qemu, tmp_path, request.param)
    wait_counting(pair.logs[0])
    return pair


class Child:
    """migctl --json, not waited for, in a session of its own as a terminal gives it."""

    def __init__(self, process, folder):
        self.process, self.folder = process, folder

    def event(self, name):
        """The next line, which must be that event."""
        line = self.process.stdout.readline()
        assert line, self.process.communicate(timeout=PATIENCE)[1]
        event = json.loads(line)
        assert event.get("event") == name, event
        return event

    def ends(self, status=0):
        """Wait for its end: the last line of its output, and its errors."""
        status_there = self.process.wait(PATIENCE)
        out, errors = self.process.stdout.read(), self.process.stderr.read()
        if status_there != status:  # all of it, which an assert would cut
            pytest.fail(f"migctl ended with {status_there}: {out}{errors}")
        return json.loads(out.splitlines()[-1]) if out else {}, errors


@pytest.fixture
def start(site, tmp_path):
    running = []

    def run(*args, **changes):
        process = subprocess.Popen(
            site.command(*args, "--json"),
            env=site.environment(XDG_RUNTIME_DIR=str(tmp_path), **changes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return Child(process, tmp_path)

    yield run
    for process in running:
        process.kill()
        process.communicate()
    for record in (tmp_path / "migctl").glob("*.json"):
        process = Path("/proc", str(json.loads(record.read_text())["process"]))
        wait_until(lambda p=process: not p.exists(), "end of the bridge")


def bridge_of(start, monitor):
    """What status says of it."""
    return start("-m", monitor, "status").ends()[0]["bridge"]


ON, OFF = True, False


@pytest.mark.parametrize(
    ("pair", "here", "there", "way_back"),
    [
        (("7.2", "10.0"), "", "", ON),
        (("10.0", "7.2"), "", "", OFF),
        (("10.0", "7.2"), "meter::", "meter::", ON),
        (("7.2", "10.0"), "meter::", "meter::", OFF),
        (("7.2", "10.0"), "meter::", "", ON),
        (("10.0", "7.2"), "", "meter::", ON),
    ],
    indirect=["pair"],
)
def test_a_guest_goes_on(pair, start, here, there, way_back):
    pair.source.capabilities(return_path=way_back)
    incoming = start("-m", pair.dst, "incoming", f"{there}{pair.uri}")
    assert incoming.event("listening")["addresses"] == [f"{there}{pair.uri}"]
    done, _ = start("-m", pair.src, "migrate", f"{here}{pair.uri}").ends()
    assert done["event"] == "completed"
    assert done["acknowledged"] is way_back
    assert done["bridge"]["form"] == ("pump" if here else "descriptor")
    if here:
        assert done["bridge"]["sent"] >= done["ram"]["transferred"]
    arrived = incoming.event("connected")
    assert arrived["form"] == ("pump" if there else "descriptor")
    assert incoming.ends()[0]["run-state"] == "running"
    pair.goes_on_there()


def test_a_monitor_that_drops_the_first_who_comes_back_is_asked_again(qemu, tmp_path):
    """What a loading QEMU does now and then; the monitor behind is a real one's."""
    path = tmp_path / "monitor.qmp"
    real = tmp_path / "real.qmp"
    qemu("-M", "none", "-qmp", f"unix:{real},server=on,wait=off")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def drop_the_first():
            server.accept()[0].close()
            path.unlink()
            path.symlink_to(real)

        dropping = threading.Thread(target=drop_the_first)
        dropping.start()
        assert incoming._follow(f"unix:{path}", survive=False) == "running"
        dropping.join(PATIENCE)


def test_a_monitor_that_is_gone_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(incoming, "_SETTLED", 0.3)
    with pytest.raises(LocalError, match="the migration failed: nobody answers at the monitor"):
        incoming._follow(f"unix:{tmp_path}/none.qmp", survive=False)


def test_what_qemu_speaks_itself_is_bridged_on_demand(pair, start):
    incoming = start("-m", pair.dst, "incoming", "--bridge", "tcp:127.0.0.1:0")
    (address,) = incoming.event("listening")["addresses"]
    done, _ = start("-m", pair.src, "migrate", "--pump", address).ends()
    assert done["bridge"]["form"] == "pump"
    assert incoming.event("connected")["form"] == "descriptor"
    pair.goes_on_there()


def test_detached_on_both_sides_it_goes_on_and_status_tells(pair, start):
    uri = f"meter::{pair.uri}"
    done, _ = start("-m", pair.dst, "incoming", "--detach", uri).ends()
    assert done["addresses"] == [uri]
    there = bridge_of(start, pair.dst)
    assert (there["state"], there["alive"]) == ("listening", True)
    begin(pair, start, uri, "--detach").ends()
    assert bridge_of(start, pair.src)["state"] == "pumping"
    pair.source.qmp("migrate-set-parameters", max_bandwidth=0)
    pair.goes_on_there()
    for monitor in (pair.src, pair.dst):
        wait_until(lambda m=monitor: bridge_of(start, m)["state"] == "done", "end of the pump")
    with Monitor(pair.src) as monitor, pytest.raises(Refused, match="not found"):
        monitor.execute("closefd", {"fdname": "migctl-kept"})


def listen(pair, start, uri=None):
    incoming = start("-m", pair.dst, "incoming", uri or f"meter::{pair.uri}")
    incoming.event("listening")
    return incoming


def begin(pair, start, uri, *args, way_back=True, **changes):
    """A migration that lasts until somebody does something."""
    pair.source.capabilities(return_path=way_back)
    pair.source.qmp("migrate-set-parameters", max_bandwidth=SLOW)
    return start("-m", pair.src, "migrate", *args, uri, **changes)


def in_the_middle(pair):
    wait_until(
        lambda: pair.source.migration().get("ram", {}).get("transferred", 0) > 200_000, "some RAM"
    )


def test_migctl_is_killed_in_the_middle(pair, start):
    incoming = listen(pair, start)
    child = begin(pair, start, f"meter::{pair.uri}")
    in_the_middle(pair)
    incoming.event("connected")
    for each in (child, incoming):
        each.process.kill()
        each.process.wait()
    pair.source.qmp("migrate-set-parameters", max_bandwidth=0)
    pair.goes_on_there()


def test_cancelled_in_the_middle(pair, start):
    incoming = listen(pair, start)
    child = begin(pair, start, f"meter::{pair.uri}")
    in_the_middle(pair)
    child.process.send_signal(signal.SIGINT)
    assert "was cancelled" in child.ends(5)[1]
    assert "the migration failed" in incoming_failure(incoming)
    pair.goes_on_here()


def incoming_failure(incoming):
    incoming.event("connected")
    return incoming.ends(1)[1]


@pytest.mark.parametrize(("form", "way_back"), [("", ON), ("meter::", ON), ("meter::", OFF)])
def test_the_destination_is_killed_in_the_middle(pair, start, form, way_back):
    incoming = listen(pair, start, form + pair.uri)
    child = begin(pair, start, form + pair.uri, way_back=way_back)
    in_the_middle(pair)
    pair.destination.kill()
    assert "the migration failed" in child.ends(1)[1]
    assert "the migration failed" in incoming_failure(incoming)
    pair.goes_on_here()


def test_the_source_is_killed_in_the_middle(pair, start):
    incoming = listen(pair, start)
    child = begin(pair, start, f"meter::{pair.uri}")
    in_the_middle(pair)
    pair.source.kill()
    child.ends(6)
    assert "the migration failed" in incoming_failure(incoming)
    assert pair.destination.wait_exit() != 0


def test_the_pump_is_killed_in_the_middle(pair, start):
    listen(pair, start)
    child = begin(pair, start, f"meter::{pair.uri}")
    in_the_middle(pair)
    os.kill(bridge_record(child, pair.src)["process"], signal.SIGKILL)
    assert "the pump was killed; the migration is cancelled" in child.ends(1)[1]
    pair.goes_on_here()


def bridge_record(child, monitor):
    """Read beside a migctl that holds the monitor."""
    folder = Path(child.folder, "migctl")
    records = [json.loads(p.read_text()) for p in folder.glob("*.json")]
    (record,) = [r for r in records if r["monitor"] == monitor]
    return record


def test_the_pump_of_a_detached_migration_is_killed(pair, start):
    listen(pair, start)
    child = begin(pair, start, f"meter::{pair.uri}", "--detach")
    child.ends()
    in_the_middle(pair)
    os.kill(bridge_record(child, pair.src)["process"], signal.SIGKILL)
    wait_until(lambda: not bridge_of(start, pair.src)["alive"], "end of the pump")
    assert start("-m", pair.src, "cancel").ends()[0]["run-state"] == "running"
    pair.goes_on_here()


def test_the_pump_is_told_to_end_in_the_middle(pair, start):
    listen(pair, start)
    child = begin(pair, start, f"meter::{pair.uri}")
    in_the_middle(pair)
    os.kill(bridge_record(child, pair.src)["process"], signal.SIGTERM)
    assert "the pump was told to end" in child.ends(1)[1]
    pair.goes_on_here()


# What the destination answers: PONG is 8 bytes, and so is SHUT behind EOF.


@pytest.mark.parametrize("pair", [("7.2", "10.0"), ("10.0", "7.2")], indirect=True)
def test_a_link_that_is_lost_behind_eof_makes_no_second_machine(pair, start):
    listen(pair, start, pair.uri)
    child = start_fast(pair, start, "cut:recv@12")
    message = child.ends(6)[1]
    assert "the link was lost while the machine stood still" in message
    assert "resolve --run-here" in message
    pair.destination.wait_status("running")
    assert pair.source.status() == "finish-migrate"
    assert bridge_of(start, pair.src)["state"] == "unknown"
    pair.destination.kill()
    start("-m", pair.src, "resolve", "--run-here", "--yes").ends()
    pair.source.wait_status("running")
    wait_counting(pair.logs[0], beyond=last_number(pair.logs[0]))
    check_count(pair.logs[0])


def start_fast(pair, start, faults):
    pair.source.capabilities(return_path=True)
    return start("-m", pair.src, "migrate", f"fault::{pair.uri}", WHIMBREL_FAULTS=faults)


def test_nor_does_a_pump_that_is_killed_behind_eof(pair, start):
    listen(pair, start, pair.uri)
    child = start_fast(pair, start, "hang:recv@12")
    pair.destination.wait_status("running")
    os.kill(bridge_record(child, pair.src)["process"], signal.SIGKILL)
    assert "the pump was killed while the machine stood still" in child.ends(6)[1]
    assert pair.source.status() == "finish-migrate"


def test_a_link_that_is_lost_in_the_middle_leaves_the_machine_here(pair, start):
    listen(pair, start, pair.uri)
    child = begin(pair, start, f"fault::{pair.uri}", WHIMBREL_FAULTS="cut:send@300000")
    assert "cut" in child.ends(1)[1]
    pair.goes_on_here()


# ---- before it begins


def test_a_connection_that_is_refused_begins_nothing(pair, start):
    assert "Connection refused" in start("-m", pair.src, "migrate", pair.uri).ends(1)[1]
    assert "status" not in pair.source.migration()


@pytest.mark.parametrize("how", ["Ctrl-C", "time-out", "cancel"])
def test_when_nobody_connects_the_destination_stays_as_it_was(pair, start, how):
    if how == "time-out":
        child = start("-m", pair.dst, "incoming", "--timeout", "1s", pair.uri)
        assert "timed out" in child.ends(1)[1]
    elif how == "Ctrl-C":
        child = listen(pair, start, pair.uri)
        child.process.send_signal(signal.SIGINT)
        child.ends(130)
    else:
        start("-m", pair.dst, "incoming", "--detach", pair.uri).ends()
        start("-m", pair.dst, "cancel").ends()
    assert pair.destination.migration() == {}
    if how == "Ctrl-C":
        listen(pair, start, pair.uri)  # the name is free again
        start("-m", pair.src, "migrate", pair.uri).ends()
        pair.goes_on_there()


def test_a_connection_that_brings_no_migration_does_not_use_it_up(pair, start):
    listen(pair, start, pair.uri)
    for said in (b"", b"GET / HTTP/1.0\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as stray:
            stray.connect(f"\0{pair.uri.partition(':')[2]}")
            stray.sendall(said)
    start("-m", pair.src, "migrate", pair.uri).ends()
    pair.goes_on_there()


def test_one_bridge_for_each_machine(pair, start):
    listen(pair, start, pair.uri)
    assert "another migctl bridges" in start("-m", pair.dst, "incoming", "meter::unix:x").ends(1)[1]


def test_a_channel_without_a_way_back(pair, start, tmp_path):
    uri = f"exec:cat > {tmp_path}/kept"
    pair.source.capabilities(return_path=True)
    assert "has no way back" in start("-m", pair.src, "migrate", "--bridge", uri).ends(3)[1]
    assert "status" not in pair.source.migration()
    pair.source.capabilities(return_path=False)
    done, _ = start("-m", pair.src, "migrate", "--bridge", uri).ends()
    assert done["acknowledged"] is False
    assert (tmp_path / "kept").stat().st_size == done["bridge"]["sent"]


def test_a_channel_that_does_not_end_well_leaves_it_unknown(pair, start):
    child = start("-m", pair.src, "migrate", "--bridge", "exec:cat > /dev/null; exit 3")
    message = child.ends(6)[1]
    assert "the source says completed, but not all may have arrived" in message
    start("-m", pair.src, "resolve", "--run-here", "--yes").ends()
    pair.goes_on_here()


def test_all_reasons_against_a_bridge_at_once(pair, start, qemu, tmp_path):
    guest = counting_guest(tmp_path)
    other = qemu(
        *guest.args(tmp_path / "other.log"),
        *("-qmp", "tcp:127.0.0.1:0,server=on,wait=off"),
        *("-incoming", "defer"),
        capabilities={"multifd": True},
    )
    where = next(
        c for c in other.qmp("query-chardev") if c["filename"].startswith("disconnected:tcp")
    )
    address = where["filename"].removeprefix("disconnected:").partition(",")[0]
    done, _ = start("-m", address, "incoming", "abstract:x").ends(3)
    assert len(done["reasons"]) == 2
    assert "only a monitor at a UNIX socket" in done["reasons"][0]
    assert "multifd" in done["reasons"][1]
