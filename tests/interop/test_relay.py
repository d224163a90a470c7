"""QEMU -> migctl relay -> QEMU: the guest runs on, or stays where it is."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from whimbrel_testing.peers import PATIENCE, Qemu, QemuFactory, wait_until
from whimbrel_testing.qemu_guest import (
    MIB,
    FilledGuest,
    check_count,
    counting_guest,
    last_number,
    wait_counting,
)

from .matrix import Record
from .passage import TRANSPORTS, Passage

pytestmark = pytest.mark.interop

Ways = Callable[[str], Passage]
RETURN_PATH = pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "one-way"])


@pytest.fixture
def way(tmp_path: Path, qemu: QemuFactory, migctl: Callable[..., Any]) -> Iterator[Ways]:
    """Makes ways over a transport, each in a folder of its own."""
    with contextlib.ExitStack() as stack:

        def make(transport: str) -> Passage:
            folder = tmp_path / f"way{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            return stack.enter_context(contextlib.closing(Passage(transport, folder, qemu, migctl)))

        yield make


@RETURN_PATH
@pytest.mark.parametrize("out", TRANSPORTS)
@pytest.mark.parametrize("into", TRANSPORTS)
def test_guest_counts_on_over_any_two_transports(
    way: Ways, tmp_path: Path, record: Record, *, into: str, out: str, return_path: bool
) -> None:
    table = f"relay, {'with' if return_path else 'without'} a return path"
    record(table, f"in {into}", f"out {out}")
    first, second = way(into), way(out)
    if return_path and not (first.two_way and second.two_way):
        record(table, f"in {into}", f"out {out}", "none: a pipe to a command has no way back")
        return
    guest = counting_guest(tmp_path)
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    source = first.qemu(*guest.args(before), capabilities={"return_path": return_path})
    target = second.target(*guest.args(after), return_path=return_path)
    wait_counting(before)
    relay = first.leave(source, "relay", target.uri, inherited=target.sockets)
    passed = relay.succeeded("relayed")
    source.wait_migration("completed")
    target.qemu.wait_status("running")
    wait_counting(before, after, beyond=last_number(before))
    target.qemu.qmp("stop")
    check_count(before, after)
    assert passed["acknowledged"] is return_path
    assert passed["unverified_from"] is None
    assert passed["normal"] > 1000
    record(table, f"in {into}", f"out {out}", "counts on")


@RETURN_PATH
@pytest.mark.parametrize(("old", "new"), [("7.2", "10.0"), ("10.0", "7.2")])
def test_guest_counts_on_in_another_version(
    way: Ways, tmp_path: Path, old: str, new: str, return_path: bool
) -> None:
    guest = counting_guest(tmp_path)  # of type pc-i440fx-7.2
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    first, second = way("tcp"), way("unix")
    capabilities = {"return_path": return_path}
    source = first.qemu(*guest.args(before), version=old, capabilities=capabilities)
    target = second.target(*guest.args(after), version=new, return_path=return_path)
    wait_counting(before)
    first.leave(source, "relay", target.uri).succeeded("relayed")
    target.qemu.wait_status("running")
    wait_counting(before, after, beyond=last_number(before))
    target.qemu.qmp("stop")
    check_count(before, after)


MACHINES = {
    "pc": ("7.2", "x86_64", "pc"),
    "q35": ("10.0", "x86_64", "q35"),
    "microvm": ("10.0", "x86_64", "microvm"),
    "isapc": ("7.2", "x86_64", "isapc"),
    "none": ("10.0", "x86_64", "none"),
    "pc-i440fx-2.4": ("10.0", "x86_64", "pc-i440fx-2.4"),
    "pc-i440fx-2.3": ("7.2", "x86_64", "pc-i440fx-2.3"),
    "pc-i440fx-2.0": ("7.2", "x86_64", "pc-i440fx-2.0"),
    "pc-i440fx-1.7": ("7.2", "x86_64", "pc-i440fx-1.7"),
    "virt": (None, "aarch64", "virt"),
    "integratorcp": ("7.2", "aarch64", "integratorcp"),  # pages of 1 KiB
    "pseries": (None, "ppc64", "pseries"),
}
#: What of a stream cannot be checked: a live section that nobody here reads, devices that nothing describes.
UNVERIFIED = {"pseries": "spapr/htab", "pc-i440fx-2.0": "timer"}


@RETURN_PATH
@pytest.mark.parametrize("name", MACHINES)
def test_ram_of_any_machine_arrives_whole(
    way: Ways, tmp_path: Path, record: Record, name: str, return_path: bool
) -> None:
    row = "return path" if return_path else "one-way"
    record("relay by machine", row, name)
    version, arch, machine = MACHINES[name]
    guest = FilledGuest((256 if name == "pseries" else 32) * MIB)
    ram, copy = tmp_path / "ram", tmp_path / "copy"
    guest.fill(ram)
    first, second = way("unix"), way("tcp")
    peer = {"arch": arch} | ({"version": version} if version else {})
    capabilities = {"return_path": return_path}
    source = first.qemu(*guest.args(ram, machine), capabilities=capabilities, **peer)
    target = second.target(*guest.args(copy, machine), return_path=return_path, **peer)
    passed = first.leave(source, "relay", target.uri, "--report").succeeded("relayed")
    source.wait_migration("completed")
    target.qemu.wait_status("prelaunch", "paused")
    assert ram.read_bytes() == copy.read_bytes()
    assert passed["unverified_from"] == UNVERIFIED.get(name)
    if name not in UNVERIFIED:
        kinds = {section["idstr"]: section["kind"] for section in passed["sections"]}
        assert kinds["ram"] == "live"
        assert kinds["timer"] == "device"
        assert passed["ram"] >= guest.size
        assert passed["normal"] * 4096 > guest.size // 4
    unverified = "unverified from " + UNVERIFIED[name] if name in UNVERIFIED else "RAM equal"
    record("relay by machine", row, name, unverified)


# ---- what goes wrong


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "source.log"


def counts_on(source: Qemu, log: Path) -> None:
    """The source's machine runs, and has lost nothing."""
    source.wait_status("running")
    wait_counting(log, beyond=last_number(log))
    source.qmp("stop")
    check_count(log)


def in_the_middle(source: Qemu) -> None:
    """Wait until part of RAM has gone."""

    def some() -> bool:
        answer = source.migration()
        return answer["status"] == "active" and answer["ram"]["transferred"] > MIB

    wait_until(some, "a migration in the middle of RAM")


@pytest.fixture
def counting(way: Ways, tmp_path: Path, log: Path) -> Callable[[bool], Qemu]:
    """A guest that counts, and whose migration does not end by itself."""

    def start(return_path: bool) -> Qemu:
        guest = counting_guest(tmp_path, pages=2048, pages_per_tick=2048, hz=100)
        source = way("unix").qemu(*guest.args(log), capabilities={"return_path": return_path})
        wait_counting(log)
        return source

    return start


SLOW = {"max_bandwidth": 4 * MIB, "downtime_limit": 1}


@RETURN_PATH
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_relay_that_is_stopped_in_the_middle(
    counting: Callable[[bool], Qemu],
    way: Ways,
    migctl: Callable[..., Any],
    tmp_path: Path,
    *,
    log: Path,
    return_path: bool,
    kill: signal.Signals,
) -> None:
    source = counting(return_path)
    guest = counting_guest(tmp_path)
    target = way("unix").target(*guest.args(tmp_path / "after.log"))
    relay = migctl("relay", f"unix:{tmp_path}/in", target.uri)
    source.migrate(relay.address(), **SLOW)
    in_the_middle(source)
    relay.process.send_signal(kill)
    if kill is not signal.SIGKILL:
        assert "interrupted" in relay.failed(130)
    source.wait_migration("failed")
    counts_on(source, log)
    assert target.qemu.wait_exit() != 0
    assert not (tmp_path / "after.log").read_bytes()


@RETURN_PATH
def test_a_destination_that_dies_in_the_middle(
    counting: Callable[[bool], Qemu],
    way: Ways,
    migctl: Callable[..., Any],
    tmp_path: Path,
    *,
    log: Path,
    return_path: bool,
) -> None:
    source = counting(return_path)
    guest = counting_guest(tmp_path)
    target = way("tcp").target(*guest.args(tmp_path / "after.log"))
    relay = migctl("relay", f"unix:{tmp_path}/in", target.uri)
    source.migrate(relay.address(), **SLOW)
    in_the_middle(source)
    target.qemu.kill()
    assert (
        "the source runs on" if return_path else "'cont' there lets it run on"
    ) in relay.failed()
    source.wait_migration("failed")
    counts_on(source, log)


def test_a_source_that_is_cancelled(
    counting: Callable[[bool], Qemu],
    way: Ways,
    migctl: Callable[..., Any],
    tmp_path: Path,
    log: Path,
) -> None:
    source = counting(True)
    guest = counting_guest(tmp_path)
    target = way("unix").target(*guest.args(tmp_path / "after.log"))
    relay = migctl("relay", f"unix:{tmp_path}/in", target.uri)
    source.migrate(relay.address(), **SLOW)
    in_the_middle(source)
    source.qmp("migrate_cancel")
    source.wait_migration("cancelled")
    assert "broke off" in relay.failed()
    assert target.qemu.wait_exit() != 0
    counts_on(source, log)


def test_a_destination_that_refuses_leaves_the_guest_at_the_source(
    way: Ways, migctl: Callable[..., Any], tmp_path: Path, log: Path
) -> None:
    """It lacks a device, and says so when it has loaded half of the machine, the source being stopped."""
    guest = counting_guest(tmp_path)
    first, second = way("tcp"), way("unix")
    source = first.qemu(*guest.args(log), "-device", "e1000", capabilities={"return_path": True})
    target = second.target(*guest.args(tmp_path / "after.log"), return_path=True)
    wait_counting(log)
    relay = first.leave(source, "relay", target.uri)
    assert "the source runs on" in relay.failed()
    source.wait_migration("failed")
    counts_on(source, log)
    assert "e1000" in target.qemu.stderr


def test_multifd_is_refused_at_the_start(
    way: Ways, migctl: Callable[..., Any], tmp_path: Path, log: Path
) -> None:
    guest = counting_guest(tmp_path)
    first, second = way("tcp"), way("unix")
    source = first.qemu(*guest.args(log), capabilities={"multifd": True})
    target = second.target(*guest.args(tmp_path / "after.log"))
    wait_counting(log)
    relay = first.leave(source, "relay", target.uri)
    said = relay.failed()
    assert "multifd" in said
    if source.wait_migration("failed", "completed")["status"] == "completed":
        # Nobody told it: all that it had to send was on its way.
        assert "'cont' there lets it run on" in said
        source.qmp("cont")
    counts_on(source, log)


def test_it_keeps_no_ram(way: Ways, tmp_path: Path) -> None:
    """Its memory stays below 64 MiB while four times as much passes."""
    guest = FilledGuest(256 * MIB)
    ram = tmp_path / "ram"
    guest.fill(ram)
    first, second = way("unix"), way("unix")
    source = first.qemu(*guest.args(ram))
    target = second.target(*guest.args(tmp_path / "copy"))
    relay = first.leave(source, "relay", target.uri)
    peak = 0
    while relay.process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = Path(f"/proc/{relay.process.pid}/status").read_text()
            peak = max(peak, *(int(x.split()[1]) for x in status.splitlines() if "VmHWM" in x), 0)
    relay.succeeded("relayed")
    assert 0 < peak << 10 < 64 * MIB
    target.qemu.wait_status("prelaunch", timeout=PATIENCE)
