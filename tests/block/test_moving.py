"""Disks from one kernel to another: what moves, what is refused, and what is left behind by what goes wrong."""

import contextlib
import errno
import os
import resource
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from whimbrel import (
    BlockedError,
    Kernel,
    LocalError,
    Machine,
    MigrationError,
    RunState,
    StateError,
    StreamError,
)
from whimbrel.channel import MemoryChannel
from whimbrel.savevm import Budget, LoadDriver, Mode, SaveDriver
from whimbrel.state import Outcome, RunParams
from whimbrel.stream import InStream, OutStream
from whimbrel.wire import items
from whimbrel.wire.format import Dialect
from whimbrel_block import CHUNK, BlockDevice, BlockHandler, RawImage
from whimbrel_block.codec import Chunk, read_record
from whimbrel_block.sending import Sender
from whimbrel_ram import RAMBlock, RamHandler

MIB = 1 << 20
SIZE = 6 * MIB + 512


class Faulty(RawImage):
    """A raw image that fails, or waits, where it is told to."""

    def __init__(self, path, **options):
        super().__init__(path, **options)
        self.fail_read = self.fail_write = self.fail_flush = None
        self.gate = threading.Event()
        self.gate.set()
        self.reads = []

    def read_into(self, view, offset, *, bulk=False):
        if bulk:
            self.gate.wait(30)
            self.reads.append(offset)
            if self.fail_read is not None and offset >= self.fail_read:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().read_into(view, offset, bulk=bulk)

    def write(self, view, offset, *, bulk=False):
        if bulk and self.fail_write is not None and offset >= self.fail_write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(view, offset, bulk=bulk)

    def flush(self):
        if self.fail_flush:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().flush()


class Side:
    """A machine with disks, and whether it runs."""

    def __init__(self, *devices, settings=None):
        self.runs = False
        self.seen = []
        self.machine = Machine(
            "disks-1", run_state=RunState.RUNNING, start=self.start, activate=self.activate
        )
        self.devices = devices
        for device in devices:
            self.machine.add(device)
        self.kernel = Kernel(self.machine)
        self.kernel.settings["max-bandwidth"] = 0
        self.kernel.settings.update(settings or {})

    def start(self):
        self.runs = True

    def activate(self):
        self.seen = [d.pread(1, 0) for d in self.devices]


@pytest.fixture
def filled(shm):
    """Makes a disk with data in some of its chunks."""

    def make(name="source.img", **options):
        path = shm / name
        with path.open("wb") as file:
            file.write(os.urandom(5000))
            file.seek(3 * MIB)
            file.write(os.urandom(MIB))
            file.seek(SIZE - 3)
            file.write(b"end")
        return BlockDevice("drv0", path, **options)

    return make


@pytest.fixture
def empty(shm):
    """Makes a disk that holds something else."""

    def make(name="destination.img", size=SIZE, **options):
        path = shm / name
        if not path.exists():
            path.write_bytes(b"\xaa" * size)
        return BlockDevice("drv0", path, **options)

    return make


def raw(device):
    return Path(device.image.name).read_bytes()


def move(source, destination, **params):
    """Migrate; (error there, error here), None each where it went well."""
    incoming = destination.kernel.incoming("tcp:127.0.0.1:0")
    outgoing = source.kernel.migrate(incoming.addresses[0], **params)
    errors = []
    for run in (incoming, outgoing):
        try:
            run.wait(30)
        except MigrationError as error:
            errors.append(error)
        else:
            errors.append(None)
    return tuple(errors)


def stays(source, destination):
    """The machine runs on at the source, and does not run at the destination."""
    assert source.machine.run_state is RunState.RUNNING
    assert not destination.runs


# ---- what moves


@pytest.mark.parametrize("zero_blocks", [True, False])
@pytest.mark.parametrize("size", [512, MIB, MIB + 512, SIZE, 3 * MIB])
def test_a_disk_of_any_size_arrives(shm, empty, zero_blocks, size):
    source = Side(BlockDevice("drv0", shm / "s", create=size))
    source.devices[0].pwrite(os.urandom(512), size - 512)
    destination = Side(empty(size=size))
    source.kernel.settings["zero-blocks"] = zero_blocks
    assert move(source, destination, blk=True) == (None, None)
    assert raw(destination.devices[0]) == raw(source.devices[0])
    assert destination.runs
    assert destination.seen == [source.devices[0].pread(1, 0)], "visible to activate()"
    assert not destination.devices[0].half_written
    assert destination.devices[0].pwrite(b"x", 0) == 1


def test_several_disks_arrive_and_a_read_only_one_stays(shm):
    BlockDevice("cd", shm / "cd", create=MIB).close()

    def disks(side):
        return [
            BlockDevice("a", shm / f"{side}a", create=2 * MIB),
            BlockDevice("b", shm / f"{side}b", create=SIZE),
            BlockDevice("cd", shm / "cd", read_only=True),
        ]

    here, there = disks("s"), disks("d")
    here[0].pwrite(b"first", MIB)
    here[1].pwrite(b"second", 5)
    source, destination = Side(*here), Side(*there)
    assert move(source, destination, blk=True) == (None, None)
    assert [raw(d) for d in there] == [raw(d) for d in here]


def test_without_blk_the_disks_stay_where_they_are(filled, empty):
    source, destination = Side(filled()), Side(empty())
    before = raw(destination.devices[0])
    assert move(source, destination) == (None, None)
    assert raw(destination.devices[0]) == before
    assert "disk" not in source.kernel.query()


def test_the_capability_copies_in_each_migration(filled, empty):
    source, destination = Side(filled(), settings={"block": True}), Side(empty())
    assert move(source, destination) == (None, None)
    assert raw(destination.devices[0]) == raw(source.devices[0])


def test_writes_and_discards_of_a_running_machine_arrive(filled, empty):
    device = filled()
    source, destination = Side(device), Side(empty())
    halt, wrote = threading.Event(), []

    def work():
        while not halt.wait(0.001):
            n = len(wrote)
            device.pwrite(struct.pack(">Q", n) * 64, n % 30 * 65536)
            if n % 50 == 49:
                device.discard(MIB, MIB)
            wrote.append(n)

    def stop():
        halt.set()
        thread.join()

    source.machine._callbacks["stop"] = stop
    source.kernel.settings["max-bandwidth"] = 20 * MIB
    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert move(source, destination, blk=True) == (None, None)
    finally:
        stop()
    assert len(wrote) > 10
    assert raw(destination.devices[0]) == raw(device)


def test_a_chunk_that_is_written_all_the_time_is_read_once_at_a_time(shm):
    """However slowly it goes out: or what waits for the stream would be the same chunk, over and over, and no end in sight."""
    device = BlockDevice("drv0", shm / "busy.img", create=6 * MIB)
    device.pwrite(b"x" * 6 * MIB, 0)
    sender = Sender([device], incremental=False, zero_blocks=False)
    out = OutStream(MemoryChannel())
    with contextlib.closing(sender):
        for i in range(30):
            device.pwrite(b"%8d" % i, MIB)
            sender.send(out, Budget(bytes=1), 10)
        assert sender.left() <= 2 * MIB
        before = out.position
        device.pwrite(b"the last", MIB)
        sender.send_rest(out)
        assert out.position - before < 1.1 * MIB, "what was read before the last write stays here"
    assert bytes(out.channel.data[-MIB:][:8]) == b"the last"
    device.close()


def test_query_tells_of_the_disks(filled, empty):
    source, destination = Side(filled()), Side(empty())
    assert move(source, destination, blk=True) == (None, None)
    info = source.kernel.query()
    assert info["disk"]["total"] == SIZE
    assert info["disk"]["remaining"] == 0
    # Three chunks hold data; the others go as a word.
    assert 3 * CHUNK < info["disk"]["transferred"] < 4 * CHUNK
    (disk,) = info["x-disks"]
    assert disk["device"] == "drv0"
    assert disk["transferred"] == info["disk"]["transferred"]


def test_disks_go_before_ram(filled):
    side = Side(filled())
    side.machine.add(RAMBlock("ram", 4096))
    names = [h.idstr for h in side.kernel.collect_handlers()]
    assert names.index("block") < names.index("ram")


def test_direct_reads_and_writes(tmp_path):
    """On a real file system; the last chunk is no multiple of a page."""

    def disk(name):
        try:
            return BlockDevice("drv0", tmp_path / name, create=SIZE, direct=True)
        except OSError as error:
            pytest.skip(f"no O_DIRECT at {tmp_path}: {error}")

    source, destination = Side(disk("s")), Side(disk("d"))
    source.devices[0].pwrite(os.urandom(3 * MIB), 123)
    source.devices[0].pwrite(b"end", SIZE - 3)
    assert move(source, destination, blk=True) == (None, None)
    assert raw(destination.devices[0]) == raw(source.devices[0])


# ---- what differs from a base


@pytest.fixture
def base(shm):
    path = shm / "base.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def copy_of(base, name, **options):
    path = base.with_name(name)
    path.write_bytes(base.read_bytes())
    return BlockDevice("drv0", path, base=base, **options)


def test_inc_sends_what_differs(base):
    source, destination = Side(copy_of(base, "s")), Side(copy_of(base, "d"))
    source.devices[0].pwrite(b"changed", 2 * MIB)
    source.devices[0].discard(4 * MIB, MIB)
    assert move(source, destination, inc=True) == (None, None)
    assert raw(destination.devices[0]) == raw(source.devices[0])
    # The changed chunk and the last one; the discarded one goes as a word.
    assert source.kernel.query()["disk"]["transferred"] < 3 * CHUNK


def test_inc_sends_what_is_again_as_in_the_base(base):
    """A chunk that was sent in another state must go once more."""
    device = copy_of(base, "s")
    device.pwrite(b"changed", 0)
    source, destination = BlockHandler([device], patience=30), copy_of(base, "d")

    def back():
        device.pwrite(base.read_bytes()[:CHUNK], 0)

    data = stream([source], between=back, params=RunParams(inc=True))
    load(data, BlockHandler([destination]))
    assert raw(destination) == base.read_bytes()


def test_inc_needs_a_base(filled, empty):
    source, destination = Side(filled()), Side(empty())
    there, here = move(source, destination, inc=True)
    assert "has no base" in str(here)
    assert "base=PATH" in str(here)
    stays(source, destination)


def test_inc_does_not_mend_a_half_written_disk(base):
    source, target = Side(copy_of(base, "s")), copy_of(base, "d")
    target.begin_load()
    target.image.write(memoryview(b"garbage"), 3 * MIB)
    target.end_load(whole=False)
    destination = Side(target)
    there, here = move(source, destination, inc=True)
    assert "half-written before" in str(there)
    stays(source, destination)
    assert move(source, destination, blk=True) == (None, None)
    assert raw(target) == raw(source.devices[0])


# ---- what is refused before anything is written


def untouched(destination, before):
    assert raw(destination.devices[0]) == before
    assert not destination.devices[0].half_written
    assert destination.devices[0].pread(1, 0) == before[:1]


@pytest.mark.parametrize("missing", [512, MIB, 5 * MIB])
def test_a_disk_that_is_too_small(filled, empty, missing):
    source, destination = Side(filled()), Side(empty(size=SIZE - missing))
    before = raw(destination.devices[0])
    there, here = move(source, destination, blk=True)
    assert f"expected at least {SIZE} bytes, found {SIZE - missing}" in str(there)
    stays(source, destination)
    untouched(destination, before)


def test_a_disk_that_is_larger_takes_it(filled, empty):
    source, destination = Side(filled()), Side(empty(size=SIZE + 2 * MIB))
    assert move(source, destination, blk=True) == (None, None)
    assert raw(destination.devices[0])[:SIZE] == raw(source.devices[0])


def test_a_disk_that_is_missing(shm, filled):
    source = Side(filled())
    destination = Side(BlockDevice("other", shm / "other", create=SIZE))
    there, here = move(source, destination, blk=True)
    assert "the source has a disk 'drv0', and there is none of that name here" in str(there)
    assert there.section == "block"
    stays(source, destination)
    untouched(destination, bytes(SIZE))


def test_a_disk_that_the_source_does_not_have(shm, filled, empty):
    source = Side(filled())
    destination = Side(empty(), BlockDevice("drv1", shm / "other", create=SIZE))
    there, here = move(source, destination, blk=True)
    assert "only a part of disk 'drv1'" in str(there)
    stays(source, destination)


def test_a_disk_that_is_read_only_there(filled, empty):
    empty().close()
    source, destination = Side(filled()), Side(empty(read_only=True))
    there, here = move(source, destination, blk=True)
    assert "read-only here" in str(there)
    stays(source, destination)


def test_a_machine_without_disks_cannot_copy_them(shm):
    side = Side()
    for params in ({"blk": True}, {"inc": True}):
        with pytest.raises(BlockedError, match="no disk that could be copied"):
            side.kernel.migrate("tcp:127.0.0.1:1", **params)
    side.kernel.settings["block"] = True
    with pytest.raises(BlockedError, match="capability block is on"):
        side.kernel.migrate("tcp:127.0.0.1:1")
    assert side.kernel.query() == {}

    cd = Side(BlockDevice("cd", shm / "cd", create=MIB), settings={"block": True})
    cd.devices[0].image.read_only = True
    there, here = move(cd, Side())
    assert "no disk that could be copied" in str(here)


def test_a_destination_can_insist(filled, empty):
    source, destination = Side(filled()), Side(empty(), settings={"block": True})
    there, here = move(source, destination)
    assert "without block" in str(there)
    stays(source, destination)


def test_a_disk_that_cannot_be_marked(filled, empty, shm):
    source, destination = Side(filled()), Side(empty(marker=shm / "gone" / "mark"))
    before = raw(destination.devices[0])
    there, here = move(source, destination, blk=True)
    assert "cannot be marked" in str(there)
    stays(source, destination)
    untouched(destination, before)


# ---- what goes wrong on the way


def half(destination):
    device = destination.devices[0]
    assert device.half_written
    for use in (lambda: device.pread(1, 0), lambda: device.pwrite(b"x", 0), device.flush):
        with pytest.raises(StateError, match="half-written"):
            use()
    # A later start of the app sees it too.
    again = BlockDevice("drv0", device.image.name)
    with pytest.raises(StateError, match="remove .*incoming"):
        again.pread(1, 0)
    again.close()


def test_a_read_error_names_device_and_offset(filled, empty):
    source = Side(BlockDevice("drv0", Faulty(filled().image.path)))
    destination = Side(empty())
    source.devices[0].image.fail_read = 3 * MIB
    there, here = move(source, destination, blk=True)
    assert isinstance(here, LocalError)
    assert "disk 'drv0'" in str(here)
    assert "Input/output error" in str(here)
    stays(source, destination)
    source.devices[0].pwrite(b"x", 0)


@pytest.mark.parametrize("left", [3 * MIB + 4096, 2 * MIB, SIZE - 512, 0])
def test_an_image_that_was_cut_short_under_it(filled, empty, left):
    """Its end is not taken for a hole."""
    source, destination = Side(filled()), Side(empty())
    os.truncate(source.devices[0].image.path, left)
    there, here = move(source, destination, blk=True)
    assert "the image ends at byte" in str(here)
    stays(source, destination)


def test_a_full_disk(filled, empty):
    """Not even a fault: the system refuses writes beyond a limit."""
    device = filled()
    before = raw(device)
    source, destination = Side(device), Side(empty())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, hard))
    try:
        there, here = move(source, destination, blk=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written at byte" in str(there)
    assert "File too large" in str(there)
    assert "Make room" in str(there)
    stays(source, destination)
    assert raw(device) == before
    half(destination)
    assert move(source, destination, blk=True) == (None, None)
    assert raw(destination.devices[0]) == before
    assert not destination.devices[0].half_written


@pytest.mark.parametrize("fault", ["fail_write", "fail_flush"])
def test_a_failing_destination_disk(filled, empty, fault):
    source = Side(filled())
    destination = Side(BlockDevice("drv0", Faulty(empty().image.path)))
    setattr(destination.devices[0].image, fault, 1)
    there, here = move(source, destination, blk=True)
    assert "disk 'drv0'" in str(there)
    stays(source, destination)
    half(destination)


def test_a_write_error_of_the_source_is_the_apps(filled, empty):
    device = BlockDevice("drv0", Faulty(filled().image.path))
    source, destination = Side(device), Side(empty())
    os.close(device.image._fd)
    device.image._fd = os.open(device.image.path, os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        device.pwrite(b"x", 0)
    assert move(source, destination, blk=True) == (None, None)


def test_an_activate_that_fails_leaves_a_marked_disk(filled, empty):
    source, destination = Side(filled()), Side(empty())
    destination.machine._callbacks["activate"] = lambda: 1 / 0
    there, here = move(source, destination, blk=True)
    assert "activate()" in str(there)
    stays(source, destination)
    half(destination)


def test_a_mark_can_be_cleared(empty):
    device = empty()
    device.begin_load()
    device.end_load(whole=False)
    with pytest.raises(StateError):
        device.pread(1, 0)
    device.forget_half_written()
    assert device.pread(1, 0) == b"\xaa"
    assert BlockDevice("drv0", device.image.name).pread(1, 0) == b"\xaa"


def test_a_half_written_disk_does_not_migrate(empty, shm):
    device = empty()
    device.begin_load()
    device.end_load(whole=False)
    there, here = move(Side(device), Side(empty("third.img")), blk=True)
    assert "half-written" in str(here)


# ---- streams by hand


def stream(handlers, *, between=lambda: None, params=None):
    """The bytes of a whole stream."""
    machine = Machine("disks-1")
    channel = MemoryChannel()
    driver = SaveDriver(OutStream(channel), machine, handlers, Dialect())
    driver.header(items.Configuration(machine_type="disks-1"))
    driver.setup(params or RunParams(blk=True))
    while not driver.iterate(Budget()):
        pass
    between()
    driver.complete(Mode.PRECOPY)
    driver.out.write(driver.tail())
    driver.out.flush()
    driver.cleanup(Outcome.COMPLETED)
    return bytes(channel.data)


def load(data, handler):
    driver = LoadDriver(Machine("disks-1"), [handler], Dialect())
    outcome = Outcome.FAILED
    try:
        driver.load(InStream(MemoryChannel(data)))
        outcome = Outcome.COMPLETED
    finally:
        driver.cleanup(outcome)


def test_cut_at_every_record(filled, empty):
    """Wherever it is cut: refused, and the disk is marked from the first write on."""
    data = stream([BlockHandler([filled()], patience=30)])
    ends = record_ends(data)
    assert len(ends) > 10
    for end in ends:
        for cut in (end - 1, end):
            target = empty()
            with pytest.raises(MigrationError):
                load(data[:cut], BlockHandler([target]))
            written = raw(target) != b"\xaa" * SIZE
            assert target.half_written >= written, f"cut at {cut}"
            if target.half_written:
                half(Side(target))
                target.forget_half_written()
            Path(target.image.name).write_bytes(b"\xaa" * SIZE)
            target.close()


def record_ends(data):
    """Where each record of the block section ends."""
    ends = []

    class Watching(BlockHandler):
        def load(self, inp, header):
            while (record := read_record(inp)) is not None:
                if isinstance(record, Chunk) and not record.zero:
                    inp.read(CHUNK)
                ends.append(inp.position)
            ends.append(inp.position)

        def load_cleanup(self, outcome):
            pass

    with contextlib.suppress(MigrationError):
        load(data, Watching([]))
    return ends


def word(sector, flags):
    return struct.pack(">Q", sector << 9 | flags)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (word(0, 0x10), "unknown combination of flags"),
        (word(0, 0x03), "unknown combination of flags"),
        (word(7, 0x02), "unknown combination of flags"),
        (word(0, 0x08), "unknown combination of flags"),
        (word(0, 0x01) + b"\x00", "without a printable name"),
        (word(0, 0x01) + b"\x04dr\xffv", "without a printable name"),
        (word(0, 0x01) + b"\x04none", "none of that name"),
        (word((1 << 55) - 1, 0x09) + b"\x04drv0", "too small"),
        (word(SIZE // 512, 0x09) + b"\x04drv0", "too small"),
        (word(SIZE // 512 - 2, 0x01) + b"\x04drv0", "too small"),
    ],
)
def test_wrong_records_are_refused_before_they_do_harm(empty, record, message):
    target = empty()
    head = items.encode_header() + items.encode_configuration(
        items.Configuration(machine_type="disks-1")
    )
    start = items.SectionHeader(1, 1, "block", 0, 1)
    part = items.SectionHeader(2, 1)
    data = head + items.encode_section_header(start) + word(0, 2) + items.encode_footer(1)
    at = len(data) + 5
    data += items.encode_section_header(part) + record + bytes(CHUNK)
    with pytest.raises(StreamError, match=message) as error:
        load(data, BlockHandler([target]))
    assert error.value.section == "block"
    assert at <= error.value.offset <= at + 9
    assert raw(target) == b"\xaa" * SIZE
    assert not target.half_written


def test_a_copy_that_ends_too_early_is_refused(empty):
    """As QEMU 7.2 sends it on a fast link: the first chunks, and then the end."""
    target = empty()
    head = items.encode_header() + items.encode_configuration(
        items.Configuration(machine_type="disks-1")
    )
    start = items.SectionHeader(1, 1, "block", 0, 1)
    end = items.SectionHeader(3, 1)
    data = head + items.encode_section_header(start) + word(0, 2) + items.encode_footer(1)
    data += items.encode_section_header(end)
    data += word(0, 9) + b"\x04drv0" + word(2048, 9) + b"\x04drv0" + word(100, 4) + word(0, 2)
    data += items.encode_footer(1) + b"\0"
    with pytest.raises(StreamError, match="nothing for byte 2097152.*downtime-limit"):
        load(data, BlockHandler([target]))
    half(Side(target))


# ---- reading


def test_holes_are_not_read(shm):
    """4 GiB, of which three chunks hold something."""
    image = Faulty(shm / "sparse", create=4 << 30)
    device = BlockDevice("drv0", image)
    for offset in (0, 1 << 30, (4 << 30) - 1):
        device.pwrite(b"x", offset)
    target = BlockDevice("drv0", shm / "target", create=4 << 30)
    load(stream([BlockHandler([device], patience=30)]), BlockHandler([target]))
    assert sorted(image.reads) == [0, 1 << 30, (4 << 30) - CHUNK]
    assert [target.pread(1, o) for o in (0, 1 << 30, (4 << 30) - 1)] == [b"x"] * 3
    assert Path(target.image.name).stat().st_blocks * 512 <= 4 * CHUNK


def test_a_slow_disk_does_not_hold_ram_up(shm):
    image = Faulty(shm / "slow", create=4 * MIB)
    device = BlockDevice("drv0", image)
    device.pwrite(os.urandom(4 * MIB), 0)
    image.gate.clear()
    ram = RAMBlock("ram", 2 * MIB)
    ram.view[:] = 7
    handlers = [BlockHandler([device]), RamHandler([ram], tracker="explicit")]
    driver = SaveDriver(OutStream(MemoryChannel()), Machine("disks-1"), handlers, Dialect())
    driver.header(items.Configuration(machine_type="disks-1"))
    driver.setup(RunParams(blk=True))
    try:
        while handlers[1].pending(exact=False).precopy:
            assert not driver.iterate(Budget())
        assert handlers[0].pending(exact=False).precopy == 4 * CHUNK
    finally:
        image.gate.set()
    while not driver.iterate(Budget()):
        pass
    assert handlers[0].pending(exact=True).precopy == 0
    driver.cleanup(Outcome.COMPLETED)


def test_pending_counts_what_was_written_since(shm):
    device = BlockDevice("drv0", shm / "disk", create=8 * MIB)
    device.pwrite(b"x", 0)
    handler = BlockHandler([device], patience=30)
    out = OutStream(MemoryChannel())
    handler.setup(out, RunParams(blk=True))
    # One chunk of data, the last one, and holes of a few bytes each.
    assert 2 * CHUNK < handler.pending(exact=True).precopy < 2 * CHUNK + 200
    assert handler.iterate(out, Budget())
    assert handler.pending(exact=True).precopy == 0
    device.pwrite(bytes(2), CHUNK - 1)
    device.discard(5 * MIB, 1)
    assert handler.pending(exact=True).precopy == 3 * CHUNK
    assert handler.pending(exact=False).dirty_bytes_per_s > 0
    handler.cleanup(Outcome.CANCELLED)
    assert handler.pending(exact=True).precopy == 0


# ---- the device


def test_access_outside_the_disk(empty):
    device = empty()
    for use in (
        lambda: device.pread(2, SIZE - 1),
        lambda: device.pwrite(b"xy", SIZE - 1),
        lambda: device.discard(-1, 1),
        lambda: device.mark_dirty(SIZE, 1),
    ):
        with pytest.raises(ValueError, match="not inside disk 'drv0'"):
            use()


@pytest.mark.parametrize("name", ["", "a" * 256, "naïve", "a\n"])
def test_names_that_no_stream_can_carry(shm, name):
    with pytest.raises(ValueError, match="name of a disk|counted string"):
        BlockDevice(name, shm / "disk", create=512)


@pytest.mark.parametrize("size", [0, 511, 513])
def test_sizes_that_are_no_sectors(shm, size):
    with pytest.raises(ValueError, match="sectors"):
        BlockDevice("drv0", shm / "disk", create=size)


def test_two_disks_of_one_name(shm, filled, empty):
    with pytest.raises(MigrationError, match="two disks named 'drv0'"):
        BlockHandler([filled(), empty()])


def test_an_app_that_only_has_disks_does_not_import_numpy(tmp_path):
    code = (
        "import sys; from whimbrel import Machine; from whimbrel_block import BlockDevice;"
        f"Machine('m').add(BlockDevice('d', {str(tmp_path / 'd')!r}, create=512)).pwrite(b'x', 0);"
        "sys.exit('numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
