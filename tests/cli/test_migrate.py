"""migctl migrate between real QEMUs of two versions: what it shows, what stops it, how it ends."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from whimbrel_testing.peers import PATIENCE, wait_until
from whimbrel_testing.qemu_guest import check_count, counting_guest, wait_counting

pytestmark = pytest.mark.interop
SLOW = 1 << 20  # bytes/s


def disk_args(image):
    return (
        "-drive",
        f"if=none,id=drv0,format=raw,file={image}",
        "-device",
        "virtio-blk,drive=drv0",
    )


class Pair:
    def __init__(self, qemu, folder, versions, args=(), disks=None):
        self.folder = folder
        self.uri = f"unix:{folder}/m.sock"
        guest = counting_guest(folder)
        self.logs = [folder / "src.log", folder / "dst.log"]
        self.source, self.destination = (
            qemu(
                *guest.args(log),
                *("-qmp", f"unix:{folder}/{log.stem}.qmp,server=on,wait=off"),
                *(args if log.stem == "dst" else ()),
                *(disk_args(disks[log.stem]) if disks else ()),
                version=version,
                incoming=self.uri if log.stem == "dst" else None,
            )
            for version, log in zip(versions, self.logs, strict=True)
        )
        self.src, self.dst = (f"unix:{folder}/{n}.qmp" for n in ("src", "dst"))


@pytest.fixture
def pair(qemu, tmp_path):
    pair = Pair(qemu, tmp_path, ("7.2", "10.0"))
    wait_counting(pair.logs[0])
    return pair


@pytest.fixture
def start(site):
    """Run migctl, not waited for."""
    running = []

    def run(*args, **kwargs):
        child = subprocess.Popen(
            site.command(*args),
            env=site.environment(),
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                **kwargs,
            },
        )
        running.append(child)
        return child

    yield run
    for child in running:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("versions", [("7.2", "10.0"), ("10.0", "7.2")])
def test_a_guest_goes_on_in_the_other_version(qemu, site, tmp_path, versions):
    pair = Pair(qemu, tmp_path, versions)
    before = wait_counting(pair.logs[0])
    pair.source.capabilities(return_path=True)
    done = site.migctl("-m", pair.src, "migrate", "-d", pair.dst, pair.uri)
    assert done.returncode == 0, done.stderr
    assert "completed in" in done.stdout
    assert "the destination has taken over" in done.stdout
    wait_counting(*pair.logs, beyond=before)
    check_count(*pair.logs)


def test_json_tells_each_state_and_the_figures_at_the_end(pair, site):
    done = site.migctl("-m", pair.src, "migrate", "--json", pair.uri)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    fractions = [e["fraction"] for e in events if e["event"] == "progress"]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    there = pair.source.migration()
    assert events[-1]["event"] == "completed"
    assert events[-1]["acknowledged"] is False  # return-path was off
    assert events[-1]["ram"]["transferred"] == there["ram"]["transferred"]


def test_disks_are_copied_on_request(qemu, site, tmp_path):
    images = {name: tmp_path / f"{name}.img" for name in ("src", "dst")}
    for image in images.values():
        image.write_bytes(os.urandom(4 << 20))
    pair = Pair(qemu, tmp_path, ("7.2", "7.2"), disks=images)
    site.migctl("-m", pair.src, "set", "bandwidth", "16MiB/s")  # 7.2 loses the end of a fast copy
    done = site.migctl("-m", pair.src, "migrate", "--blk", pair.uri)
    assert done.returncode == 0, done.stderr
    pair.destination.wait_status("running")
    pair.source.kill()
    pair.destination.kill()
    assert images["dst"].read_bytes() == images["src"].read_bytes()


def test_a_qemu_that_copies_no_disks_is_not_asked_to(qemu, site, tmp_path):
    pair = Pair(qemu, tmp_path, ("10.0", "7.2"))
    done = site.migctl("-m", pair.src, "migrate", "--inc", pair.uri)
    assert done.returncode == 3
    assert "QEMU 10.0 does not copy disks" in done.stderr


def test_a_dry_run_begins_nothing(pair, site):
    done = site.migctl("-m", pair.src, "migrate", "--dry-run", "-d", pair.dst, pair.uri)
    assert (done.returncode, done.stdout) == (0, "nothing is known against it\n")
    assert "status" not in pair.source.migration()


def test_all_reasons_are_listed_before_anything_is_begun(qemu, site, tmp_path):
    pair = Pair(qemu, tmp_path, ("7.2", "10.0"), args=("-smp", "2", "-m", "24"))
    pair.source.capabilities(multifd=True)
    done = site.migctl("-m", pair.src, "migrate", "--json", "-d", pair.dst, "carrier:x")
    assert done.returncode == 3
    reasons = "\n".join(json.loads(done.stdout)["reasons"])
    assert "unknown migration protocol 'carrier'" in reasons
    assert "capability multifd is on at the source, and off at the destination" in reasons
    assert "memory size is 16.0 MiB at the source, and 24.0 MiB" in reasons
    assert "number of CPUs is 1 at the source, and 2 at the destination" in reasons
    assert "status" not in pair.source.migration()
    assert "4 reasons against it" in done.stderr


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("{src}", "is the monitor of"),
        ("nonsense", "no scheme"),
    ],
)
def test_a_uri_that_leads_nowhere_is_a_reason(pair, site, uri, reason):
    done = site.migctl("-m", pair.src, "migrate", uri.format(src=pair.src))
    assert done.returncode == 3
    assert reason in done.stderr


def test_the_source_is_no_destination(pair, site):
    done = site.migctl("-m", pair.src, "migrate", "-d", pair.src, pair.uri)
    assert done.returncode == 3
    assert "the same machine" in done.stderr


def test_a_migration_that_fails_is_1_with_the_reason(pair, site):
    done = site.migctl("-m", pair.src, "migrate", f"unix:{pair.folder}/none.sock")
    assert done.returncode == 1
    assert "failed" in done.stderr
    assert pair.source.status() == "running"


def begun(pair, start, *args, **kwargs):
    pair.source.qmp("migrate-set-parameters", max_bandwidth=SLOW)
    child = start("-m", pair.src, "migrate", *args, pair.uri, **kwargs)
    pair.source.wait_migration("active")
    return child


def test_time_is_up(pair, start):
    child = begun(pair, start, "--timeout", "1s")
    _, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode == 4
    assert "not done after 1.0 s: cancelled" in errors
    assert pair.source.migration()["status"] == "cancelled"
    assert pair.source.status() == "running"


def test_time_is_up_and_the_machine_is_paused_so_that_it_ends(pair, start):
    child = begun(pair, start, "--timeout", "1s", "--on-timeout", "pause")
    wait_until(lambda: pair.source.status() == "paused", "pause")
    pair.source.qmp("migrate-set-parameters", max_bandwidth=0)
    _, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, errors
    assert "the machine is paused" in errors
    assert pair.destination.wait_status("paused") == "paused"


def test_one_that_makes_no_progress_is_stopped(qemu, start, tmp_path):
    pair = Pair(qemu, tmp_path, ("10.0", "7.2"))
    wait_counting(pair.logs[0])
    child = begun(pair, start, "--stall", "4s")
    _, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode == 4, errors
    assert "no progress for 4.0 s: cancelled" in errors
    assert pair.source.status() == "running"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_without_a_terminal_an_interrupt_cancels(pair, start, number):
    child = begun(pair, start)
    child.send_signal(number)
    _, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode == 5, errors
    assert pair.source.migration()["status"] == "cancelled"


def test_cancelled_by_somebody_else(pair, start):
    child = begun(pair, start)
    pair.source.qmp("migrate_cancel")
    _, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode == 5
    assert "was cancelled" in errors


def test_a_source_that_is_gone_leaves_it_unknown(pair, start):
    child = begun(pair, start)
    pair.source.kill()
    _, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode == 6
    assert re.search("the source is gone in the state '(setup|active)'", errors)


def test_detached_it_goes_on(pair, site):
    done = site.migctl("-m", pair.src, "migrate", "--detach", pair.uri)
    assert done.returncode == 0
    pair.source.wait_migration("completed")


class Terminal:
    """The other end of a terminal."""

    def __init__(self, fd):
        self.fd, self.text = fd, ""

    def wait_for(self, text):
        deadline = time.monotonic() + PATIENCE
        while text not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self.fd], [], [], 0.1)[0]:
                self.text += os.read(self.fd, 65536).decode("utf-8", "replace")

    def type(self, text):
        self.text = ""
        os.write(self.fd, text.encode())


@pytest.fixture
def terminal():
    ours, theirs = pty.openpty()
    yield Terminal(ours), {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    os.close(ours)
    os.close(theirs)


def test_on_a_terminal_an_interrupt_asks(pair, start, terminal):
    screen, ends = terminal
    child = begun(pair, start, **ends, start_new_session=True)
    screen.wait_for("left of")
    child.send_signal(signal.SIGINT)
    screen.wait_for("or (w)atch on?")
    screen.type("w\n")
    screen.wait_for("left of")
    child.send_signal(signal.SIGINT)
    screen.wait_for("or (w)atch on?")
    assert pair.source.migration()["status"] == "active"
    screen.type("d\n")
    assert child.wait(PATIENCE) == 0
    screen.wait_for("detached; the migration goes on")
    assert pair.source.migration()["status"] == "active"


def test_on_a_terminal_the_answer_may_be_to_cancel(pair, start, terminal):
    screen, ends = terminal
    child = begun(pair, start, **ends, start_new_session=True)
    screen.wait_for("left of")
    child.send_signal(signal.SIGINT)
    screen.wait_for("or (w)atch on?")
    screen.type("c\n")
    assert child.wait(PATIENCE) == 5
    assert pair.source.migration()["status"] == "cancelled"


def test_an_interrupt_never_finds_the_wait_for_it_locked():
    """Signals come at any instant of the wait; each is noted, and none stops the program."""
    code = """
import os, signal, threading
from whimbrel_cli.watching import _Interrupts
interrupts = _Interrupts()
over = threading.Event()
def send():
    for _ in range(3000):
        os.kill(os.getpid(), signal.SIGINT)
    over.set()
threading.Thread(target=send).start()
seen = 0
while not over.is_set():
    seen += interrupts.wait(0.0001)
os.kill(os.getpid(), signal.SIGTERM)
assert interrupts.wait(10)
interrupts.close()
print(True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
