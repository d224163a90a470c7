"""The dirty trackers over real memory."""

import ctypes
import mmap
import os
import subprocess
import sys
import threading

import attrs
import numpy as np
import pytest

from whimbrel import LocalError, SettingError
from whimbrel_ram import DirtyTracker, RAMBlock, TrackerSpec
from whimbrel_ram.handler import page_map
from whimbrel_ram.memory import untouched
from whimbrel_ram.trackers import BUILT_IN, choose
from whimbrel_ram.trackers.shadow import ShadowTracker
from whimbrel_ram.trackers.uffd import UffdTracker, probe

PAGES = 1100
SIZE = PAGES * 4096
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MEMORY = {
    "memfd": lambda: None,
    "private": lambda: mmap.mmap(-1, SIZE, flags=PRIVATE),
    "shared": lambda: mmap.mmap(-1, SIZE),
}
needs_uffd = pytest.mark.skipif(
    probe([RAMBlock("probe", 4096)]) is not None, reason=str(probe([RAMBlock("probe", 4096)]))
)
TRACKERS = [pytest.param(UffdTracker, marks=needs_uffd, id="uffd-wp"), ShadowTracker]


def found(tracker, block):
    pages = page_map(tracker.sync(block), block)
    return [] if pages is None else np.flatnonzero(pages).tolist()


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("make", TRACKERS)
def test_each_write_is_found_once(make, kind):
    block = RAMBlock("ram", SIZE, memory=MEMORY[kind]())
    block.view[: 600 * 4096] = 1
    tracker = make()
    tracker.start([block])
    try:
        assert found(tracker, block) == []
        block.buffer[5] = 2
        block.buffer[4096 * 7 + 4095] = 2
        block.view[4096 * 99 : 4096 * 101] = 9
        block.buffer[4096 * 700] = 3  # had never been touched
        assert found(tracker, block) == [0, 7, 99, 100, 700]
        assert found(tracker, block) == []
        block.buffer[4096 * 700] = 4
        assert found(tracker, block) == [700]
        every_third = block.rows[::3, 17]
        every_third += 1
        assert found(tracker, block) == list(range(0, PAGES, 3))
    finally:
        tracker.stop()
    tracker.stop()


@pytest.mark.parametrize("make", TRACKERS)
def test_several_blocks_and_page_sizes(make):
    blocks = [
        RAMBlock("a", 64 << 10, page_size=1024),
        RAMBlock("b", 1 << 20, page_size=65536),
        RAMBlock("c", 64 << 10, page_size=4096),
    ]
    tracker = make()
    tracker.start(blocks)
    for block in blocks:
        assert found(tracker, block) == []
        block.buffer[9000] = 1
    try:
        pages = {b.idstr: found(tracker, b) for b in blocks}
    finally:
        tracker.stop()
    assert 8 in pages["a"]  # the kernel tells host pages: its neighbours may come with it
    assert set(pages["a"]) <= {8, 9, 10, 11}
    assert pages["b"] == [0]
    assert pages["c"] == [2]


@needs_uffd
def test_writes_of_the_kernel_are_seen():
    block = RAMBlock("ram", SIZE)
    block.view[:] = 1
    tracker = UffdTracker()
    tracker.start([block])
    read, write = os.pipe()
    os.write(write, b"x" * 4096)
    assert os.readv(read, [block.buffer[4096 * 9 : 4096 * 10]]) == 4096
    os.close(read)
    os.close(write)
    assert found(tracker, block) == [9]
    tracker.stop()


@needs_uffd
@pytest.mark.parametrize("kind", MEMORY)
def test_no_write_is_lost_beside_a_busy_writer(kind):
    """Counters that go up while syncs run: what a sync did not name has the value that was read after the one before."""
    block = RAMBlock("ram", SIZE, memory=MEMORY[kind]())
    cells = block.rows[:, 128:136].view(np.uint64)[:, 0]
    copy = np.zeros(PAGES, np.uint64)
    stop, started = threading.Event(), threading.Event()

    def write():
        order = np.random.default_rng(3).permutation(PAGES)
        while not stop.is_set():
            for i in range(0, PAGES, 50):
                cells[order[i : i + 50]] += np.uint64(1)
            started.set()

    thread = threading.Thread(target=write)
    tracker = UffdTracker()
    tracker.start([block])
    first = tracker.untouched(block)
    thread.start()
    try:
        started.wait(30)
        if first is None:
            first = np.zeros(PAGES, np.bool_)
        copy[~first] = cells[~first]
        for _ in range(50):
            dirty = page_map(tracker.sync(block), block)
            copy[dirty] = cells[dirty]
    finally:
        stop.set()
        thread.join()
    dirty = page_map(tracker.sync(block), block)
    copy[dirty] = cells[dirty]
    tracker.stop()
    assert (copy == cells).all()
    assert cells.any()


@needs_uffd
def test_a_lost_tracker_sends_everything():
    block = RAMBlock("ram", SIZE)
    tracker = UffdTracker()
    tracker.start([block])
    os.close(tracker._uffd)
    assert found(tracker, block) == list(range(PAGES))
    tracker._uffd = -1
    tracker.stop()


@needs_uffd
def test_a_second_userfaultfd_is_named():
    block = RAMBlock("ram", SIZE)
    tracker = UffdTracker()
    tracker.start([block])
    assert "another userfaultfd" in probe([block])
    tracker.stop()
    assert probe([block]) is None


def test_memory_that_the_kernel_cannot_track_is_named(tmp_path):
    space = mmap.mmap(-1, 16384)
    unaligned = RAMBlock("low", memory=memoryview(space)[16:8208])
    assert "'low' does not begin and end on a page boundary" in probe([unaligned])


@needs_uffd
def test_a_mapped_file_is_tracked_too(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as file:
        block = RAMBlock("disk", memory=mmap.mmap(file.fileno(), 8192))
    if (reason := probe([block])) is not None:
        pytest.skip(reason)
    tracker = UffdTracker()
    tracker.start([block])
    assert tracker.untouched(block) is None
    block.buffer[4096] = 1
    assert found(tracker, block) == [1]
    tracker.stop()


# ---- what was never touched


@pytest.mark.parametrize("kind", ["memfd", "private"])
def test_untouched_pages_are_known_and_stay_so(kind):
    block = RAMBlock("ram", SIZE, memory=MEMORY[kind]())
    assert untouched(block).all()
    block.buffer[4096 * 3] = 1
    block.buffer[4096 * 900] = 1
    expected = np.ones(PAGES, np.bool_)
    expected[[3, 900]] = False
    assert (untouched(block) == expected).all()
    assert (untouched(block) == expected).all()
    block.view[:] = 1
    assert untouched(block) is None or not untouched(block).any()


def test_what_cannot_be_known_is_not_claimed(tmp_path):
    space = mmap.mmap(-1, 16384, flags=PRIVATE)
    assert untouched(RAMBlock("ram", memory=memoryview(space)[16:8208])) is None
    path = tmp_path / "ram"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as file:
        assert untouched(RAMBlock("disk", memory=mmap.mmap(file.fileno(), 8192))) is None
        private = mmap.mmap(file.fileno(), 8192, flags=mmap.MAP_PRIVATE)
        assert untouched(RAMBlock("disk", memory=private)) is None


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("make", TRACKERS)
def test_untouched_as_of_the_start(make, kind):
    block = RAMBlock("ram", SIZE, memory=MEMORY[kind]())
    block.rows[10:20] = 1
    tracker = make()
    tracker.start([block])
    before = tracker.untouched(block)
    if before is None:
        assert kind == "shared"
    else:
        assert not before[10:20].any()
        assert before[:10].all()
        assert before[20:].all()
    tracker.stop()


@needs_uffd
@pytest.mark.parametrize("kind", ["private", "memfd"])
def test_tracking_takes_no_memory_for_untouched_pages(kind):
    block = RAMBlock(
        "ram", 64 << 20, memory=None if kind == "memfd" else mmap.mmap(-1, 64 << 20, flags=PRIVATE)
    )
    tracker = UffdTracker()
    tracker.start([block])
    for _ in range(3):
        assert found(tracker, block) == []
    block.buffer[0] = 1
    assert found(tracker, block) == [0]
    tracker.stop()
    assert np.count_nonzero(untouched(block)) == block.pages - 1


# ---- the copy


def test_the_shadow_is_what_is_sent():
    """A page that goes A, B, A around a sync must not be sent as B and then look unchanged."""
    block = RAMBlock("ram", 8192)
    block.view[:] = 1
    tracker = ShadowTracker()
    tracker.start([block])
    source = tracker.source(block)
    block.view[:4096] = 2
    assert (source == 1).all()
    assert found(tracker, block) == [0]
    block.view[:4096] = 3
    assert (source[0] == 2).all()
    block.view[:4096] = 2
    assert found(tracker, block) == []
    assert (source[0] == 2).all()
    tracker.stop()


def test_the_shadow_sees_pages_that_were_given_back():
    memory = mmap.mmap(-1, SIZE, flags=PRIVATE)
    block = RAMBlock("ram", memory=memory)
    block.rows[4:8] = 5
    tracker = ShadowTracker()
    tracker.start([block])
    memory.madvise(mmap.MADV_DONTNEED, 5 * 4096, 4096)
    assert found(tracker, block) == [5]
    assert not tracker.source(block)[5].any()
    tracker.stop()


# ---- choosing


BLOCKS = [RAMBlock("ram", SIZE)]
UNALIGNED = [RAMBlock("ram", memory=memoryview(mmap.mmap(-1, 16384))[16:8208])]


def fake(name, priority, reason=None, **more):
    return TrackerSpec(
        name=name, priority=priority, factory=ShadowTracker, probe=lambda blocks: reason, **more
    )


@needs_uffd
def test_auto_takes_the_kernel_where_it_can():
    assert choose("auto", BUILT_IN, BLOCKS).name == "uffd-wp"


def test_auto_takes_the_copy_where_the_kernel_cannot():
    assert choose("auto", BUILT_IN, UNALIGNED).name == "shadow"


def test_auto_takes_a_third_party_one_of_higher_priority():
    assert choose("auto", [*BUILT_IN, fake("kvm", 200)], BLOCKS).name == "kvm"
    assert choose("auto", [*BUILT_IN, fake("kvm", 200, "no /dev/kvm")], UNALIGNED).name == "shadow"


def test_auto_never_relies_on_the_app():
    with pytest.raises(SettingError) as caught:
        choose("auto", [fake("a", 5, "no a here"), *BUILT_IN[2:]], BLOCKS)
    assert "a: no a here" in str(caught.value)
    assert "explicit: never chosen by itself" in str(caught.value)


def test_a_tracker_that_cannot_be_used_says_what_is_missing_and_what_else_there_is():
    with pytest.raises(SettingError) as caught:
        choose("uffd-wp", BUILT_IN, UNALIGNED)
    text = str(caught.value)
    assert "'uffd-wp' cannot be used: RAM block 'ram' does not begin" in text
    assert "shadow: ready" in text
    assert "explicit: ready" in text


def test_an_unknown_tracker_names_the_known():
    with pytest.raises(SettingError, match="does not accept value 'kvm'") as caught:
        choose("kvm", BUILT_IN, BLOCKS)
    assert caught.value.expected == "one of auto, uffd-wp, shadow, explicit"


def test_a_failing_probe_is_a_reason():
    def broken(blocks):
        raise RuntimeError("boom")

    spec = attrs.evolve(fake("x", 1), probe=broken)
    with pytest.raises(SettingError, match="its probe failed: boom"):
        choose("x", [spec], BLOCKS)


def test_two_trackers_of_one_name_are_refused():
    with pytest.raises(SettingError, match="'shadow' is provided twice"):
        choose("auto", [*BUILT_IN, fake("shadow", 1)], BLOCKS)


def test_the_copy_must_fit():
    giant = attrs.make_class("Giant", ["size"])(1 << 60)
    with pytest.raises(SettingError, match="the copy needs"):
        choose("shadow", BUILT_IN[1:2], [giant])


# ---- what a tracker may return


@pytest.mark.parametrize(
    "given",
    [
        np.array([1, 8, 9]),
        np.array([9, 1, 8, 1], np.uint32),
        np.array([i in (1, 8, 9) for i in range(11)]),
        np.array([0b10, 0b11], np.uint8),
    ],
    ids=["numbers", "uint32", "bool", "bitmap"],
)
def test_forms_of_an_answer(given):
    block = RAMBlock("ram", 11 * 4096)
    assert np.flatnonzero(page_map(given, block)).tolist() == [1, 8, 9]
    assert page_map(None, block) is None


@pytest.mark.parametrize(
    "given",
    [
        np.array([11]),
        np.array([-1]),
        np.zeros(10, np.bool_),
        np.zeros(3, np.uint8),
        np.zeros(11),
        "x",
    ],
)
def test_answers_that_are_refused(given):
    with pytest.raises(LocalError):
        page_map(given, RAMBlock("ram", 11 * 4096))


def test_the_contract_has_no_more_than_three_duties():
    assert DirtyTracker.__abstractmethods__ == {"start", "sync", "stop"}


# ---- without privilege


AS_NOBODY = """
import ctypes, os, mmap
import numpy as np
from whimbrel_ram import RAMBlock
from whimbrel_ram.trackers.uffd import UffdTracker, probe
os.setgroups([]); os.setgid(65534); os.setuid(65534)  # after the imports: nobody may not read this interpreter
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self belongs to us again
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
for memory in (None, mmap.mmap(-1, 1 << 20), mmap.mmap(-1, 1 << 20, flags=flags)):
    block = RAMBlock("ram", 1 << 20, memory=memory)
    reason = probe([block])
    assert reason is None, reason
    tracker = UffdTracker()
    tracker.start([block])
    block.buffer[4096 * 5] = 1
    assert np.flatnonzero(tracker.sync(block)).tolist() == [5]
    tracker.stop()
print("tracked as uid", os.getuid())
"""


@needs_uffd
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become nobody")
def test_the_kernel_tracks_for_nobody_too():
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "tracked as uid 65534", done.stderr


def test_ctypes_memory_can_be_compared():
    memory = (ctypes.c_uint8 * 8192)()
    block = RAMBlock("ram", memory=memory)
    tracker = ShadowTracker()
    tracker.start([block])
    memory[4096] = 7
    assert found(tracker, block) == [1]
    tracker.stop()
