"""Memory behind all of a destination's RAM while it waits; what is in it stays right."""

import logging
import mmap
import threading

import numpy as np
import pytest

from whimbrel import Kernel, Machine
from whimbrel.errors import Cancelled
from whimbrel_ram import RAMBlock, prefault
from whimbrel_ram.memory import untouched
from whimbrel_ram.prefault import MADV_POPULATE_WRITE, Prefault
from whimbrel_testing.peers import wait_until

MIB = 1 << 20
PAGE = 4096


def has_populate():
    with mmap.mmap(-1, PAGE) as memory:
        try:
            memory.madvise(MADV_POPULATE_WRITE)
        except OSError:
            return False
    return True


pytestmark = pytest.mark.skipif(not has_populate(), reason="needs Linux 5.14")

MEMORY = {
    "memfd": lambda size: None,
    "private": lambda size: mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    "numpy": lambda size: np.frombuffer(mmap.mmap(-1, size), np.uint8),
}


def block_of(kind="memfd", size=24 * MIB):
    return RAMBlock("ram", size, memory=MEMORY[kind](size))


def resident(block):
    """Bytes of its memory that the process has, by the kernel's own count of the mapping."""
    low = block.address
    count = counting = 0
    with open("/proc/self/smaps", encoding="utf-8") as file:
        for line in file:
            head = line.split()[0]
            if "-" in head:
                start, end = (int(x, 16) for x in head.split("-"))
                counting = start <= low < end
            elif counting and head == "Rss:":
                count = int(line.split()[1]) << 10
    return count


@pytest.mark.parametrize("kind", MEMORY)
def test_all_of_it_and_its_content_stays(kind):
    block = block_of(kind)
    block.view[5 * PAGE : 6 * PAGE] = 7
    before = resident(block)
    made = Prefault([block])
    made.start()
    wait_until(lambda: not made._thread.is_alive(), "the end of it")
    assert before < MIB * 2
    assert resident(block) >= block.size
    assert block.view[5 * PAGE : 6 * PAGE].min() == 7
    assert int(block.view.sum(dtype=np.uint64)) == 7 * PAGE


def test_a_block_that_does_not_begin_on_a_page_is_taken_inside():
    memory = mmap.mmap(-1, 4 * MIB)
    block = RAMBlock("ram", memory=memoryview(memory)[100 : 100 + 2 * MIB])
    made = Prefault([block])
    made.start()
    made._thread.join(20)
    assert 2 * MIB - PAGE <= resident(block) < 4 * MIB
    del block, made


def test_it_stops_between_two_steps(monkeypatch):
    block = block_of(size=64 * MIB)
    made = Prefault([block])
    steps = iter([False, False, True])
    monkeypatch.setattr(made._stopping, "is_set", lambda: next(steps))
    made.start()
    made._thread.join(20)
    assert resident(block) == 2 * prefault.STEP


def test_closed_before_it_began():
    made = Prefault([block_of()])
    made.close()


def test_a_kernel_that_cannot_is_said_and_nothing_fails(monkeypatch, caplog):
    monkeypatch.setattr(prefault, "MADV_POPULATE_WRITE", 9999)
    made = Prefault([block_of()])
    with caplog.at_level(logging.WARNING, "whimbrel.ram"):
        made.start()
        made.close()
    assert "RAM block 'ram' is not prefaulted: Invalid argument" in caplog.text


def machine_with(block):
    machine = Machine("m-1")
    machine.add(block)
    return machine


def test_off_by_default_nothing_is_taken(tmp_path):
    kernel = Kernel(machine_with(block := block_of()))
    incoming = kernel.incoming(f"unix:{tmp_path}/m")
    incoming.cancel()
    with pytest.raises(Cancelled):
        incoming.wait(20)
    assert resident(block) == 0


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("wait", [True, False], ids=["ready", "meanwhile"])
def test_what_arrives_is_what_was_sent(kind, wait, tmp_path):
    """Also zero pages over what was there, and where the source comes while it is being done."""
    there, here = block_of(kind, 48 * MIB), block_of(size=48 * MIB)
    rng = np.random.default_rng(3)
    used = rng.permutation(here.pages)[: here.pages // 3]
    here.rows[used] = rng.integers(0, 256, (len(used), PAGE), np.uint8)
    there.rows[::7] = 9  # zero pages arrive here, too
    kernel = Kernel(machine_with(there))
    kernel.settings["prefault"] = True
    incoming = kernel.incoming(f"unix:{tmp_path}/m")
    if wait:
        wait_until(lambda: resident(there) >= there.size, "all of it")
        assert untouched(there) is None or not untouched(there).any()
    Kernel(machine_with(here)).migrate(f"unix:{tmp_path}/m").wait(60)
    incoming.wait(60)
    assert np.array_equal(there.view, here.view)


def test_a_cancel_ends_it(tmp_path, monkeypatch):
    """Also where it would go on for ever."""
    monkeypatch.setattr(prefault, "STEP", PAGE)
    block = block_of(size=256 * MIB)
    kernel = Kernel(machine_with(block))
    kernel.settings["prefault"] = True
    incoming = kernel.incoming(f"unix:{tmp_path}/m")
    wait_until(lambda: resident(block), "the first step")
    incoming.cancel()
    with pytest.raises(Cancelled):
        incoming.wait(20)
    assert "whimbrel-prefault" not in [thread.name for thread in threading.enumerate()]
