"""A transport that QEMU has not got, on real QEMUs: by descriptor and pumped, and whatever ends in the middle."""

import json
import os
import shutil
import signal
import uuid
from pathlib import Path

import pytest

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

    def __init__(self, process):
        self.process = process

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
        assert status_there == status, (out, errors)
        return json.loads(out.splitlines()[-1]) if out else {}, errors


@pytest.fixture
def start(site, tmp_path):
    running = []

    def run(*args, **changes):
        import subprocess

        process = subprocess.Popen(
            site.command(*args, "--json"),
            env=site.environment(XDG_RUNTIME_DIR=str(tmp_path), **changes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return Child(process)

    yield run
    for process in running:
        process.kill()
        process.communicate()
    for record in (tmp_path / "migctl").glob("*.json"):
        with_pid = json.loads(record.read_text())
        wait_until(lambda: not Path(f"/proc/{with_pid['process']}").exists(), "end of the bridge")


def bridge_of(start, monitor):
    """What status says of it."""
    return start("-m", monitor, "status").ends()[0]["bridge"]


@pytest.mark.parametrize("way_back", [True, False])
@pytest.mark.parametrize(
    ("pair", "here", "there"),
    [
        (("7.2", "10.0"), "", ""),
        (("10.0", "7.2"), "meter::", "meter::"),
        (("7.2", "10.0"), "meter::", ""),
        (("10.0", "7.2"), "", "meter::"),
    ],
    indirect=["pair"],
)
def test_a_guest_goes_on(pair, start, way_back, here, there):
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
