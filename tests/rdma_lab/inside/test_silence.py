"""The other side is killed, goes silent, or vanishes with its host, in each phase of a migration."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest
from pyverbs.qp import QPAttr

from whimbrel import Cancelled, ChannelError, MigrationError, OutcomeUnknown, Status
from whimbrel.errors import DeadlineExceeded
from whimbrel_rdma.verbs import Connection, e
from whimbrel_testing.peers import QemuFactory, wait_until

from . import mortal
from .test_hostile import Ends
from .test_qemu import GUEST, MACHINE, MIB, prepared

pytestmark = pytest.mark.slow

Start = Callable[..., "Other"]


class Other:
    """The other side: a process of mortal.py."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @property
    def state(self) -> str:
        """That of ps(1); X once it is gone."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii")
        except (FileNotFoundError, ProcessLookupError):
            return "X"
        return stat.rpartition(")")[2].split()[0]

    def stop(self) -> None:
        os.kill(self.pid, SIGSTOP)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        wait_until(lambda: self.state == "T", "stop")

    def wait_gone(self) -> None:
        wait_until(lambda: self.state in "XZ", "end of the other side")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, SIGKILL)
        self.wait_gone()


@pytest.fixture(scope="module")
def mortals() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, mortal.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


@pytest.fixture
def other(mortals: subprocess.Popen[str]) -> Iterator[Start]:
    with contextlib.ExitStack() as running:

        def start(role: str, uri: str, point: str = "-", signal: str = "SIGKILL") -> Other:
            assert mortals.stdin is not None
            assert mortals.stdout is not None
            mortals.stdin.write(f"{role}\t{uri}\t{point}\t{signal}\n")
            mortals.stdin.flush()
            made = Other(int(mortals.stdout.readline()))
            running.callback(made.kill)
            return made

        yield start


# ---- killed


@pytest.mark.parametrize("point", ["handshake", "setup", "first pass", "completion"])
def test_the_destination_is_killed(other: Start, uri: str, point: str) -> None:
    there = other("destination", uri, point)
    kernel = mortal.prepared("source")
    with pytest.raises(MigrationError):
        kernel.migrate(uri).wait(90)
    there.wait_gone()
    assert kernel.state.status is Status.FAILED
    assert kernel.machine.is_running


def test_the_destination_is_killed_in_a_later_pass(other: Start, uri: str) -> None:
    there = other("destination", uri)
    kernel = mortal.prepared("source")
    mortal.write_without_end(kernel)
    migration = kernel.migrate(uri)
    wait_until(lambda: kernel.query().get("ram", {}).get("dirty-sync-count", 0) >= 3, "passes")
    there.kill()
    with pytest.raises(MigrationError):
        migration.wait(90)
    assert kernel.machine.is_running


def test_the_destination_is_killed_when_it_was_handed_over(other: Start, uri: str) -> None:
    there = other("destination", uri, "handed over")
    kernel = mortal.prepared("source")
    with pytest.raises(OutcomeUnknown):
        kernel.migrate(uri).wait(90)
    there.wait_gone()
    assert not kernel.machine.is_running
    kernel.resolve(run_here=True)
    assert kernel.machine.is_running


@pytest.mark.parametrize("point", ["handshake", "setup", "first pass", "later pass", "completion"])
def test_the_source_is_killed(other: Start, uri: str, point: str) -> None:
    kernel = mortal.prepared("destination")
    incoming = kernel.incoming(uri)
    here = other("source", uri, point)
    with pytest.raises(MigrationError):
        incoming.wait(90)
    here.wait_gone()
    assert not kernel.machine.is_running


def test_the_source_is_killed_when_it_has_handed_over(other: Start, uri: str) -> None:
    kernel = mortal.prepared("destination")
    incoming = kernel.incoming(uri)
    other("source", uri, "handed over")
    incoming.wait(90)
    assert kernel.machine.is_running


# ---- silent: the process is there, and does nothing


@pytest.mark.parametrize("point", ["handshake", "setup", "first pass", "completion"])
def test_a_silent_destination_is_left_by_a_cancel(other: Start, uri: str, point: str) -> None:
    there = other("destination", uri, point, "SIGSTOP")
    kernel = mortal.prepared("source")
    migration = kernel.migrate(uri)
    there.wait_stopped()
    migration.cancel()
    with pytest.raises(Cancelled):
        migration.wait(30)
    assert kernel.machine.is_running


@pytest.mark.parametrize("point", ["handshake", "setup", "first pass", "completion"])
def test_a_silent_source_is_left_by_a_cancel(other: Start, uri: str, point: str) -> None:
    kernel = mortal.prepared("destination")
    incoming = kernel.incoming(uri)
    here = other("source", uri, point, "SIGSTOP")
    here.wait_stopped()
    incoming.cancel()
    with pytest.raises(Cancelled):
        incoming.wait(30)
    assert not kernel.machine.is_running


def test_a_machine_that_stands_still_is_not_kept_waiting(other: Start, uri: str) -> None:
    """Before its last pages go: nobody has cancelled."""
    there = other("destination", uri)
    kernel = mortal.prepared("source")
    kernel.settings.update({"pause-before-switchover": True, "commit-timeout": 1000})
    migration = kernel.migrate(uri)
    wait_until(lambda: kernel.state.status is Status.PRE_SWITCHOVER, "switchover")
    there.stop()
    kernel.migrate_continue(Status.PRE_SWITCHOVER)
    with pytest.raises(MigrationError, match="timed out waiting for the other side to be ready"):
        migration.wait(60)
    assert kernel.machine.is_running


@pytest.mark.parametrize("point", ["completion", "handed over"])
def test_a_silent_destination_at_the_commit(other: Start, uri: str, point: str) -> None:
    other("destination", uri, point, "SIGSTOP")
    kernel = mortal.prepared("source")
    kernel.settings["commit-timeout"] = 1000
    with pytest.raises(OutcomeUnknown if point == "handed over" else MigrationError):
        kernel.migrate(uri).wait(60)
    assert kernel.machine.is_running is (point == "completion")


# ---- vanished: nothing answers, not even its device


def test_a_destination_that_vanishes_is_noticed(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a source that only waits for it, without a deadline."""
    monkeypatch.setattr("whimbrel_rdma.verbs._QUIET", 0.5)
    ends = Ends(uri)
    try:
        for each in (ends.source, ends.destination):  # who is there and says nothing is waited for
            with pytest.raises(DeadlineExceeded):
                each.connection.wait(lambda: False, time.monotonic() + 3, "anything")
        # A queue pair in error answers nothing, as a device that lost its power.
        there = ends.destination.connection._qp
        there.modify(QPAttr(qp_state=e.IBV_QPS_ERR), e.IBV_QP_STATE)
        with pytest.raises(ChannelError, match="a sign of life failed: the other side does not"):
            ends.source.connection.wait(lambda: False, time.monotonic() + 90, "anything")
    finally:
        ends.close()


def test_a_qemu_that_stands_still_for_a_while_goes_on(
    qemu: QemuFactory, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never hears of the writes that look whether it is there."""
    monkeypatch.setattr("whimbrel_rdma.verbs._QUIET", 0.2)
    probes: list[bool] = []
    probe = Connection._probe
    monkeypatch.setattr(
        Connection, "_probe", lambda self: (probe(self), probes.append(self._probing))
    )
    here, there = tmp_path / "ours", tmp_path / "theirs"
    GUEST.fill(here, seed=3)
    target = qemu(*GUEST.args(there, MACHINE), version="7.2", incoming=uri)
    kernel = prepared(here, False)
    kernel.settings.update({"max-bandwidth": MIB, "return-path": False})
    migration = kernel.migrate(uri)
    wait_until(lambda: kernel.query().get("x-rdma", {}).get("writes"), "writes")
    target.process.send_signal(SIGSTOP)
    probes.clear()
    wait_until(lambda: probes.count(True) > 3, "probes")
    target.process.send_signal(SIGCONT)
    kernel.settings["max-bandwidth"] = 0
    migration.wait(60)
    target.wait_migration("completed")
    target.kill()
    assert there.read_bytes() == here.read_bytes()
