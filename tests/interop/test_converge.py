"""auto-converge with real QEMUs of both versions: theirs while they migrate to us, ours while we migrate to them."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from whimbrel import Kernel, Machine
from whimbrel_ram import RAMBlock, Throttle
from whimbrel_testing.peers import QemuFactory, wait_until
from whimbrel_testing.qemu_guest import (
    MIB,
    FilledGuest,
    check_count,
    counting_guest,
    last_number,
    wait_counting,
)

pytestmark = pytest.mark.interop
versions = pytest.mark.parametrize("version", ["7.2", "10.0"])
MACHINE = "pc-i440fx-7.2"


class Writer:
    """An app that writes all of its memory, again and again, as fast as it is let."""

    def __init__(self, memory: bytes) -> None:
        self.throttle = Throttle()
        self.asked: list[int] = []
        self.machine = Machine(MACHINE, stop=self.stop, start=self.start, throttle=self.slow_down)
        self.block = self.machine.add(RAMBlock("ram", memory=bytearray(memory)))
        self._running = False

    def slow_down(self, percent: int) -> None:
        self.asked.append(percent)
        self.throttle.set(percent)

    def start(self) -> None:
        self._running = True
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def stop(self) -> None:
        if self._running:
            self._running = False
            self.throttle.wake()
            self._thread.join()

    def _work(self) -> None:
        """128 pages at a time, and a short pause for everybody else."""
        pages, page, pause = self.block.rows, 0, threading.Event()
        while self._running:
            pages[page : page + 128, 0] += 1
            self.block.mark_dirty(page * 4096, 128 * 4096)
            page = (page + 128) % len(pages)
            pause.wait(0.005)
            self.throttle.checkpoint()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    guest = FilledGuest(size=16 * MIB)
    guest.fill(tmp_path / "ours", seed=11)
    writer = Writer((tmp_path / "ours").read_bytes())
    yield writer
    writer.stop()


@versions
def test_an_app_that_writes_too_fast_moves_into_a_qemu(
    qemu: QemuFactory, writer: Writer, tmp_path: Path, version: str
) -> None:
    theirs = tmp_path / "theirs"
    FilledGuest(size=16 * MIB).fill(theirs, seed=12)
    target = qemu(
        *FilledGuest(size=16 * MIB).args(theirs, MACHINE), "-incoming", "defer", version=version
    )
    target.capabilities(return_path=True)
    target.qmp("migrate-incoming", uri=f"unix:{tmp_path}/m")
    kernel = Kernel(writer.machine)
    kernel.settings.update(
        {
            "auto-converge": True,
            "cpu-throttle-initial": 40,
            "max-bandwidth": 20 * MIB,
            "downtime-limit": 0,
            "dirty-tracker": "explicit",
        }
    )
    writer.start()
    outgoing = kernel.migrate(f"unix:{tmp_path}/m")
    shown = wait_until(lambda: kernel.query().get("cpu-throttle-percentage"), "throttling")
    assert shown >= 40
    kernel.settings.update({"max-bandwidth": 0, "downtime-limit": 2000})
    assert outgoing.wait(60).acknowledged
    assert (writer.asked[0], writer.asked[-1]) == (40, 0)
    assert "cpu-throttle-percentage" not in kernel.query()
    target.wait_migration("completed")
    target.kill()
    assert theirs.read_bytes() == writer.block.view.tobytes()


@versions
def test_a_guest_of_a_qemu_that_is_slowed_down_arrives_here(
    qemu: QemuFactory, migctl: Callable[..., Any], tmp_path: Path, version: str
) -> None:
    guest, log, after = counting_guest(tmp_path), tmp_path / "before.log", tmp_path / "after.log"
    file = tmp_path / "guest.mig"
    source = qemu(*guest.args(log), version=version)
    wait_counting(log)
    source.capabilities(auto_converge=True, return_path=True)
    source.qmp("migrate-set-parameters", cpu_throttle_initial=40)
    receiver = migctl("receive", f"unix:{tmp_path}/in", file)
    source.migrate(receiver.address(), max_bandwidth=8 * MIB, downtime_limit=1)
    shown = wait_until(lambda: source.migration().get("cpu-throttle-percentage"), "throttling")
    assert shown >= 40
    source.qmp("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=2000)
    assert receiver.succeeded("received")["acknowledged"]
    source.wait_migration("completed")
    source.kill()
    stopped_at = last_number(log)
    target = qemu(*guest.args(after), "-incoming", f"unix:{tmp_path}/out", version=version)
    migctl("send", file, f"unix:{tmp_path}/out").succeeded("sent")
    wait_until(lambda: target.status() == "running", "the guest to run on")
    wait_counting(after)
    check_count(log, after)
    assert last_number(after) > stopped_at
