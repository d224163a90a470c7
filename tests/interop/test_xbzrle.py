"""Deltas from and to real QEMUs: a guest that writes a little in each of its pages, round after round."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from whimbrel import Budget, Machine, Mode, Outcome, OutStream, RunParams
from whimbrel.channel import MemoryChannel
from whimbrel.savevm import SaveDriver
from whimbrel.wire import items
from whimbrel.wire.format import Dialect
from whimbrel_ram import RAMBlock, RamHandler
from whimbrel_ram.xbzrle_pages import XbzrlePages
from whimbrel_testing.peers import Qemu, QemuFactory
from whimbrel_testing.qemu_guest import (
    MACHINE,
    MIB,
    FilledGuest,
    check_count,
    counting_guest,
    last_number,
    wait_counting,
)

from .passage import Passage

pytestmark = pytest.mark.interop
versions = pytest.mark.parametrize("version", ["7.2", "10.0"])
PAGE = 4096


def has_sent_deltas(source: Qemu) -> None:
    """It came to its end, and some pages came as deltas."""
    figures = source.wait_migration("completed")["xbzrle-cache"]
    assert figures["pages"] > 100, figures


@versions
@pytest.mark.parametrize("command", ["receive", "relay"])
def test_deltas_of_a_qemu_arrive(
    passage: Passage, tmp_path: Path, version: str, command: str
) -> None:
    guest = counting_guest(tmp_path)
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    source = passage.qemu(
        *guest.args(before), version=version, capabilities={"xbzrle": True, "return_path": True}
    )
    wait_counting(before)
    source.qmp("migrate-set-parameters", downtime_limit=1, max_bandwidth=16 * MIB)
    if command == "receive":
        process = passage.run("receive", f"unix:{tmp_path}/out", passage.file)
        source.migrate(process.address())
        has_sent_deltas(source)
        process.succeeded("received")
        target, _ = passage.send(*guest.args(after), version=version, return_path=True)
    else:
        to = passage.target(*guest.args(after), version=version, return_path=True)
        process = passage.run("relay", f"unix:{tmp_path}/out", to.uri)
        source.migrate(process.address())
        has_sent_deltas(source)
        process.succeeded("relayed")
        target = to.qemu
    target.wait_status("running")
    wait_counting(before, after, beyond=last_number(before))
    target.qmp("stop")
    check_count(before, after)


Change = Callable[[np.ndarray, np.random.Generator], None]


def some_bytes(pages: np.ndarray, rng: np.random.Generator) -> None:
    for _ in range(20):
        pages[np.arange(len(pages)), rng.integers(PAGE, size=len(pages))] ^= 0x5A


def stretches(pages: np.ndarray, rng: np.random.Generator) -> None:
    at = int(rng.integers(PAGE - 600))
    pages[:, at : at + 600] = rng.integers(256, size=(len(pages), 600), dtype=np.uint8)
    pages[:, -1] ^= 1


def everything(pages: np.ndarray, rng: np.random.Generator) -> None:
    pages[:] = rng.integers(256, size=pages.shape, dtype=np.uint8)


def nothing(pages: np.ndarray, rng: np.random.Generator) -> None:
    pages[:] = pages.copy()


def zero(pages: np.ndarray, rng: np.random.Generator) -> None:
    pages[:] = 0


@versions
@pytest.mark.parametrize("cache_size", [64 * MIB, MIB // 4], ids=["roomy", "tight"])
def test_a_qemu_takes_our_deltas(
    qemu: QemuFactory, tmp_path: Path, version: str, cache_size: int
) -> None:
    """Its RAM is then ours, byte for byte, after rounds of every kind of change, the cache resized in the middle."""
    guest = FilledGuest(size=8 * MIB)
    ours, theirs, stream = tmp_path / "ours", tmp_path / "theirs", tmp_path / "stream"
    guest.fill(ours, seed=3)
    guest.fill(theirs, seed=4)
    block = RAMBlock("ram", memory=bytearray(ours.read_bytes()))
    pages = block.view.reshape(-1, PAGE)
    size = [cache_size]
    transport = XbzrlePages(PAGE, lambda: size[0])
    handler = RamHandler([block], tracker="explicit", find_pages=lambda _: transport)
    machine = Machine(MACHINE)
    channel = MemoryChannel()
    driver = SaveDriver(OutStream(channel), machine, [handler], Dialect())
    driver.header(items.Configuration(machine_type=machine.machine_type))
    driver.setup(RunParams())
    rng = np.random.default_rng(5)
    changes: list[Change] = [nothing, some_bytes, some_bytes, zero, some_bytes]
    changes += [stretches, everything, some_bytes, nothing, stretches]
    for number, change in enumerate(changes):
        while not driver.iterate(Budget(bytes=3 * MIB)):
            pass
        hot = pages[100:600]
        change(hot, rng)
        block.mark_dirty(100 * PAGE, 500 * PAGE)
        driver.pending(exact=True)
        if number == 7:
            size[0] //= 2
    driver.complete(Mode.PRECOPY)
    driver.out.write(driver.tail())
    driver.out.flush()
    figures = handler.query()["xbzrle-cache"]
    driver.cleanup(Outcome.COMPLETED)
    assert figures["pages"] > 500 if cache_size == 64 * MIB else figures["pages"] > 50
    assert figures["cache-size"] == cache_size // 2
    assert figures["overflow"] > 0
    assert (figures["cache-miss"] > 0) is (cache_size < 64 * MIB)
    stream.write_bytes(channel.data)

    destination = qemu(*guest.args(theirs), version=version, incoming=f"exec:cat {stream}")
    destination.wait_migration("completed")
    destination.kill()
    assert theirs.read_bytes() == bytes(block.buffer)
