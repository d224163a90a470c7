"""Sampling: how much was written, what was in use, and that looking leaves no trace."""

import mmap
import os

import numpy as np
import pytest

from whimbrel import Kernel, LocalError, Machine
from whimbrel_ram import RAMBlock, dirty_rate
from whimbrel_ram.memory import untouched
from whimbrel_testing.peers import wait_until

PAGE = 4096
MIB = 1 << 20


def measured(*blocks, write=lambda: None):
    """A measurement in the middle of which something is written."""
    return dirty_rate.measure(blocks, 0.01, wait=lambda _: write())


def filled(size=4 * MIB, **kwargs):
    block = RAMBlock("ram", size, **kwargs)
    block.view[:] = 1
    return block


def test_a_machine_that_writes_nothing():
    found = measured(filled())
    assert (found.size, found.memory, found.used) == (0, 4 * MIB, 4 * MIB)


@pytest.mark.parametrize("share", [0.1, 0.5, 1])
def test_the_share_of_pages_that_were_written(share):
    """256 samples: the standard deviation is 3 % of the memory at most, and five of it are allowed."""
    block = filled(64 * MIB)
    pages = np.random.default_rng(1).permutation(block.pages)[: int(block.pages * share)]

    def write():
        block.rows[pages, 7] = 2

    found = measured(block, write=write)
    assert found.size / found.memory == pytest.approx(share, abs=0.16)
    assert found.rate == found.size / found.seconds


@pytest.mark.parametrize("at", [0, 1, 2047, 4095])
def test_a_single_byte_of_a_page_counts_wherever_it_is(at):
    block = filled(256 * PAGE)  # all pages are samples

    def write():
        block.rows[5, at] ^= 0x80
        block.rows[77, at] ^= 1

    assert measured(block, write=write).size == 2 * PAGE


def test_memory_that_is_first_written_meanwhile_counts_and_the_rest_stays_untouched():
    block = RAMBlock("ram", 16 * MIB)
    block.view[: 2 * MIB] = 1

    def write():
        block.view[8 * MIB : 9 * MIB] = 1

    found = measured(block, write=write)
    assert (found.size, found.used) == (MIB, 2 * MIB)
    assert np.count_nonzero(untouched(block)) * PAGE == 13 * MIB


def test_what_was_touched_and_is_zero_is_not_in_use():
    block = filled(MIB)
    block.view[MIB // 2 :] = 0
    assert measured(block).used == MIB // 2


def test_memory_of_an_app_that_no_tracker_could_watch():
    memory = bytearray(65 * PAGE)
    block = RAMBlock("odd", memory=memoryview(memory)[8 : 8 + 64 * PAGE])

    def write():
        block.view[:PAGE] = 1

    found = measured(block, RAMBlock("big", 32 * 4096, page_size=32768), write=write)
    assert found.size == PAGE
    assert found.memory == 64 * PAGE + 32 * 4096


def test_private_memory_stays_untouched_too():
    memory = mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block = RAMBlock("ram", memory=memory)
    block.view[:PAGE] = 1
    before = untouched(block)
    assert measured(block).used == PAGE
    assert (untouched(block) == before).all()


def test_a_machine_without_memory():
    found = measured()
    assert (found.size, found.memory, found.used) == (0, 0, 0)


def test_one_at_a_time_on_a_thread_that_ends():
    machine = Machine("m-1.0")
    machine.add(filled(MIB))
    kernel = Kernel(machine)
    rate = dirty_rate.of(kernel)
    assert dirty_rate.of(kernel) is rate
    assert not rate.is_measuring
    before = set(os.listdir("/proc/self/fd"))
    rate.begin(0.3)
    assert rate.is_measuring
    assert rate.written is None
    with pytest.raises(LocalError, match="already being measured"):
        rate.begin(0.3)
    wait_until(lambda: not rate.is_measuring, "end of the measurement")
    assert rate.written.seconds >= 0.3
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_failure_is_logged_and_the_next_may_begin(caplog):
    def gone():
        raise OSError("no memory")

    rate = dirty_rate.DirtyRate(gone)
    rate.begin(0.05)
    wait_until(lambda: not rate.is_measuring, "end of the measurement")
    assert rate.written is None
    assert "no memory" in caplog.text
    rate.begin(0.05)
    wait_until(lambda: not rate.is_measuring, "end of the second one")
