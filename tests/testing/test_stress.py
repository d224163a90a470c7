"""The stress machine's proof holds for a whole machine, and fails, saying where, for each kind of damage."""

import os
import threading
import time

import pytest

from whimbrel_testing.lease import Lease, LeaseViolation
from whimbrel_testing.sequence import BATCH
from whimbrel_testing.stress import StressConfig, StressMachine

CONFIG = StressConfig(ram=8 << 20, small=1 << 20, filled=0.5, hot=0.75, rate=40e6)


def until(condition, seconds=20.0):
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        pause.wait(0.002)


def worked(stress, batches=40, lines=3):
    """Let it run until it has written that many more batches and said so many lines; it then stands still."""
    batches += stress.work.batches
    lines += stress.serial.lines
    stress.start()
    until(lambda: stress.work.batches >= batches and stress.serial.lines >= lines)
    stress.stop()
    return stress


@pytest.fixture
def stress(tmp_path):
    stress = StressMachine(CONFIG, log=tmp_path / "serial.log")
    stress.boot()
    yield worked(stress)
    stress.stop()


def faults(stress):
    proof = stress.verify()
    assert not proof.holds
    return str(proof)


def written_page(stress):
    """A page of the boot fill that nothing has covered since."""
    view = stress.views[0]
    for page in range(CONFIG.ram // 4096 // 2):
        if int(stress.sequence.writers(view[page])[0]) == page:
            return page
    raise AssertionError("every page was covered")


def test_a_whole_machine_is_proved(stress):
    proof = stress.verify()
    assert proof.holds, str(proof)
    assert proof.writes == stress.work.batches * BATCH >= 40 * BATCH
    assert proof.pages == 9 * 256
    assert proof.lines == stress.serial.lines >= 3


def test_the_proof_of_a_running_machine_leaves_it_running(stress):
    stress.start()
    assert stress.verify().holds
    before = stress.work.batches
    until(lambda: stress.work.batches > before)
    stress.stop()
    assert stress.verify().holds


def test_stop_leaves_it_truly_still(stress):
    worked(stress)
    seen = (
        stress.clock.last_ns,
        stress.work.batches,
        stress.log.read_bytes(),
        stress.views[0].copy(),
    )
    assert not any(t.name == "stress machine" for t in threading.enumerate())
    assert not stress.is_running
    assert (stress.views[0] == seen[3]).all()
    assert (stress.clock.last_ns, stress.work.batches, stress.log.read_bytes()) == seen[:3]


def test_start_and_stop_may_come_twice(stress):
    stress.start()
    stress.start()
    stress.stop()
    stress.stop()
    assert stress.verify().holds


def test_the_felt_downtime_is_the_gap_between_two_ticks(stress):
    last = stress.clock.last_ns
    stress.start()
    assert stress.wait_for_tick(10)
    stress.stop()
    assert stress.clock.felt_ns > 0
    assert last + stress.clock.felt_ns <= stress.clock.last_ns


# ---- damage


def test_a_lost_write_is_found(stress):
    page = written_page(stress)
    stress.views[0][page] = 0
    assert (
        f"page {page} of block stress.ram: holds zeros, but its last write is #{page:,}"
        in faults(stress)
    )


def test_a_stale_page_is_found(stress):
    """What a dirty tracker that forgets a page would leave: the write before the last one."""
    old = stress.views[0].copy()
    worked(stress, batches=200)
    page = next(p for p in range(len(old)) if (old[p] != stress.views[0][p]).any() and old[p].any())
    stress.views[0][page] = old[page]
    number = int(stress.sequence.writers(old[page])[0])
    text = faults(stress)
    assert (
        f"page {page} of block stress.ram: holds write #{number:,}, but its last write is #" in text
    )
    assert "the write is lost" in text


def test_a_torn_page_is_found_with_the_place_of_the_tear(stress):
    page = written_page(stress)
    stress.views[0][page, 300:] = stress.views[0][page + 1, 300:]
    assert (
        f"page {page} of block stress.ram: torn: words 0-299 of write #{page:,}; words 300-511 of"
        in (faults(stress))
    )


def test_one_flipped_bit_is_found(stress):
    page = written_page(stress)
    stress.views[0][page, 17] ^= 1
    assert f"words 17-17 of no write; words 18-511 of write #{page:,}" in faults(stress)


def test_a_page_in_the_wrong_place_is_found(stress):
    page = written_page(stress)
    other = stress.views[1][stress.views[1].any(axis=1)][0]
    stress.views[0][page] = other
    assert f"page {page} of block stress.ram" in faults(stress)
    assert "belongs to another page" in faults(stress)


def test_a_write_to_memory_that_was_never_used_is_found(stress):
    page = len(stress.views[0]) - 1  # behind the hot part
    stress.views[0][page, 0] = 5
    assert f"page {page} of block stress.ram: torn" in faults(stress)
    assert "it was never written" in faults(stress)


def test_a_write_after_the_state_was_saved_is_found(stress):
    """What a source that did not stand still would leave: RAM newer than the devices."""
    batches, chain = stress.work.batches, stress.work.chain
    for _ in range(2):
        stress._write_batch()
    stress.work.batches, stress.work.chain = batches, chain
    assert "written after the machine's state was saved" in faults(stress)


def test_a_repeated_batch_is_found(stress):
    stress.work.batches -= 1
    stress._write_batch()
    assert "hash chain" in faults(stress)


def test_a_skipped_batch_is_found(stress):
    stress.work.batches += 1
    stress._write_batch()
    text = faults(stress)
    assert "hash chain" in text
    assert "the write is lost" in text


def test_damage_that_a_later_write_covers_is_found_by_the_chain(stress):
    """A stale page that the machine overwrites before anybody looks: RAM is right again, the chain is not."""
    sequence = stress.sequence
    batch = stress.work.batches
    place = int(sequence.pages_of(batch)[0])
    view = stress.views[sequence.region_of(batch)]
    view[place] = view[place] ^ view.dtype.type(1)
    worked(stress, batches=10)
    text = faults(stress)
    assert "the hash chain after write" in text
    assert "the hash chain broke between write #" in text
    assert "page" not in text.replace("a page held what it must not", "")


def test_another_seed_is_found(tmp_path, stress):
    other = StressMachine(StressConfig(ram=8 << 20, seed=2))
    other.work.seed = 1
    assert "the machine has seed 1, not 2" in faults(other)


def test_a_clock_and_a_counter_that_disagree_are_found(stress):
    stress.counter.value += 1
    assert "the counter counted" in faults(stress)


def test_a_failure_of_the_machines_own_thread_is_told(stress):
    stress.work.chain = None
    stress.start()
    until(lambda: stress.fault is not None)
    stress.work.chain = bytes(32)
    assert "the machine's own thread failed: AttributeError" in faults(stress)


# ---- damage to the serial log


def edit(stress, change):
    lines = stress.log.read_bytes().splitlines(keepends=True)
    change(lines)
    stress.log.write_bytes(b"".join(lines))


def test_a_lost_line_is_found(stress):
    edit(stress, lambda lines: lines.pop(1))
    text = faults(stress)
    assert "line 1 of the serial log has number 2, due was 1: lines are lost" in text
    assert "the machine remembers" in text


def test_a_repeated_line_is_found(stress):
    edit(stress, lambda lines: lines.insert(1, lines[0]))
    assert "line 1 of the serial log has number 0, due was 1: lines are repeated" in faults(stress)


def test_lines_of_a_second_copy_are_found(stress):
    """Two running copies write the same numbers, each from its own process."""

    def second(lines):
        number, *rest, _ = lines[-1].split()
        lines.append(b" ".join([number, *rest, b"99999"]) + b"\n")

    edit(stress, second)
    text = faults(stress)
    assert f"(written by process 99999, before it {os.getpid()})" in text


def test_a_changed_line_is_found(stress):
    def change(lines):
        number, when, *rest = lines[1].split()
        lines[1] = b" ".join([number, str(int(when) + 1).encode(), *rest]) + b"\n"

    edit(stress, change)
    assert "its digest differs" in faults(stress)


def test_a_damaged_line_is_found(stress):
    edit(stress, lambda lines: lines.__setitem__(2, b"garbage\n"))
    assert "line 2 of the serial log is damaged" in faults(stress)


def test_many_faults_are_counted_not_listed(stress):
    stress.views[0][: written_page(stress) + 200] ^= stress.views[0].dtype.type(1)
    text = faults(stress)
    assert len(text.splitlines()) == 21
    assert "more faults" in text.splitlines()[-1]


# ---- the machine's own rules


@pytest.mark.parametrize("field", ["ram", "small"])
def test_sizes_are_whole_batches(field):
    with pytest.raises(ValueError, match=f"{field} of 4096 bytes"):
        StressConfig(**{field: 4096})


def test_a_second_copy_is_not_started(tmp_path):
    one, two = (
        StressMachine(CONFIG, lease=Lease(tmp_path, name)) for name in ("source", "destination")
    )
    one.start()
    try:
        with pytest.raises(
            LeaseViolation, match=r"destination-.* starts .* while source-.* runs it"
        ):
            two.start()
        assert not two.is_running
    finally:
        one.stop()
    two.start()
    two.stop()


def test_the_throttle_slows_the_writes_not_the_clock(tmp_path):
    stress = StressMachine(CONFIG)
    stress.throttle(100)
    ticks = 20
    stress.start()
    until(lambda: stress.clock.ticks >= ticks)
    stress.stop()
    assert stress.work.batches == 0
    stress.throttle(0)
    worked(stress, batches=1, lines=0)
