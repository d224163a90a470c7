"""The ram section as the savevm driver sees it: both sides, without a kernel around them."""

import itertools
import random
import struct
import threading
import time

import numpy as np
import pytest

from whimbrel import (
    Budget,
    EndOfStream,
    LoadContext,
    LocalError,
    Machine,
    MachineError,
    MigrationError,
    Mode,
    Outcome,
    OutStream,
    RunParams,
    SettingError,
    StreamError,
)
from whimbrel.channel import MemoryChannel
from whimbrel.wire.items import Configuration
from whimbrel_ram import PageTransport, Phase, RAMBlock, RamHandler, Sent, StreamPages
from whimbrel_ram.setup import BlockEntry, encode_setup, read_setup

PAGE = 4096
EOS = bytes.fromhex("0000000000000010")


class Pair:
    """A source handler that writes into memory, and what came of it."""

    def __init__(self, blocks, **options):
        self.channel = MemoryChannel()
        self.out = OutStream(self.channel)
        self.handler = RamHandler(blocks, **options)
        self.items = []  # payloads of START, PART..., END

    def _item(self, write):
        self.out.flush()
        start = len(self.channel.data)
        result = write()
        self.out.flush()
        self.items.append(bytes(self.channel.data[start:]))
        return result

    def setup(self):
        self._item(lambda: self.handler.setup(self.out, RunParams()))

    def iterate(self, **budget):
        return self._item(lambda: self.handler.iterate(self.out, Budget(**budget)))

    def complete(self):
        self._item(lambda: self.handler.complete(self.out, Mode.PRECOPY))

    def all(self, passes=1):
        self.setup()
        for _ in range(passes):
            self.iterate()
        self.complete()
        self.handler.cleanup(Outcome.COMPLETED)
        return b"".join(self.items)


def load(slow, data, blocks, *, items=None, configuration=None, **options):
    handler = RamHandler(blocks, **options)
    handler.load_setup(LoadContext(machine=Machine("m"), configuration=configuration))
    inp = slow.in_stream(data, buffer_size=1 << 18)
    try:
        if items is None:
            while not inp.at_end():
                slow.read_item(handler, inp)
        else:
            for _ in range(items):
                slow.read_item(handler, inp)
        handler.load_complete()
    finally:
        handler.load_cleanup(Outcome.COMPLETED)
    return handler


def content(block, seed, share=0.5):
    rng = np.random.default_rng(seed)
    pages = rng.permutation(block.pages)[: int(block.pages * share)]
    block.rows[pages] = rng.integers(0, 256, (len(pages), block.page_size), np.uint8)


@pytest.mark.parametrize("tracker", ["auto", "uffd-wp", "shadow", "explicit"])
@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_what_is_sent_is_what_arrives(slow, tracker, share):
    blocks = [RAMBlock("pc.ram", 3000 * PAGE), RAMBlock("vga.vram", 16 * PAGE)]
    for i, block in enumerate(blocks):
        content(block, i, share)
    data = Pair(blocks, tracker=tracker).all()
    copies = [RAMBlock("vga.vram", 16 * PAGE), RAMBlock("pc.ram", 3000 * PAGE)]
    for copy in copies:
        copy.view[::1000] = 0xEE
    load(slow, data, copies)
    assert (copies[1].view == blocks[0].view).all()
    assert (copies[0].view == blocks[1].view).all()


def test_the_section_byte_for_byte(slow):
    block = RAMBlock("pc.ram", 5 * PAGE)
    block.view[3 * PAGE : 4 * PAGE] = 0xAB
    pair = Pair([block, RAMBlock("pc.bios", PAGE)])
    pair.all()
    start, part, end = pair.items
    assert (
        start
        == bytes.fromhex(
            "00000000000060040670632e72616d00000000000050000770632e62696f730000000000001000"
        )
        + EOS
    )
    expected = bytes.fromhex("00000000000000020670632e72616d00")
    expected += bytes.fromhex("000000000000102200000000000000202200000000000000402200")
    expected += bytes.fromhex("0000000000003028") + b"\xab" * PAGE
    expected += bytes.fromhex("00000000000000020770632e62696f7300")
    assert part == expected + EOS
    assert end == EOS
    records, _, _ = slow.decode(part, {"pc.ram": 5 * PAGE, "pc.bios": PAGE}, PAGE)
    assert len(records) == 6


# ---- passes


def test_passes_send_what_was_written_and_figures_say_so():
    block = RAMBlock("ram", 1000 * PAGE)
    content(block, 1, 1)
    pair = Pair([block], tracker="uffd-wp")
    pair.setup()
    assert pair.handler.pending(exact=False).precopy == block.size
    assert pair.iterate() is True
    assert pair.handler.pending(exact=False).precopy == 0
    block.view[7 * PAGE] ^= 1
    block.rows[500] = 0
    pending = pair.handler.pending(exact=True)
    assert pending.precopy == 2 * PAGE
    assert pending.dirty_bytes_per_s > 0
    assert pair.iterate() is True
    block.view[9 * PAGE] ^= 1
    pair.complete()
    ram = pair.handler.query()["ram"]
    assert ram["dirty-sync-count"] == 3
    assert (ram["normal"], ram["duplicate"]) == (1000 + 1 + 1, 1)
    assert ram["normal-bytes"] == 1002 * PAGE
    assert ram["remaining"] == 0
    assert ram["total"] == block.size
    assert ram["page-size"] == PAGE
    assert ram["dirty-pages-rate"] > 0
    eos = 8 * 3
    assert ram["downtime-bytes"] == 8 + PAGE == len(pair.items[3]) - 8
    assert ram["transferred"] == sum(map(len, pair.items[1:])) - eos
    assert ram["precopy-bytes"] == ram["transferred"] - ram["downtime-bytes"]
    pair.handler.cleanup(Outcome.COMPLETED)
    assert pair.handler.query()["ram"] == ram


def test_a_machine_that_stands_still_is_sent_in_one_pass():
    block = RAMBlock("ram", 100 * PAGE)
    pair = Pair([block], running=lambda: False)
    pair.all()
    ram = pair.handler.query()["ram"]
    assert ram["dirty-sync-count"] == 2
    assert ram["precopy-bytes"] == 0
    assert ram["downtime-bytes"] == ram["transferred"] > 0


@pytest.mark.parametrize("limit", [1, 5000, 300_000, 1 << 20, 2 << 20])
def test_the_budget_is_kept(limit):
    block = RAMBlock("ram", 2000 * PAGE)
    content(block, 2, 1)
    pair = Pair([block])
    pair.setup()
    done = False
    for _ in range(3):
        done = pair.iterate(bytes=limit)
        assert len(pair.items[-1]) <= max(limit, 1 << 20) + (1 << 20)
        if limit < 1 << 20:
            assert len(pair.items[-1]) <= limit + 2 * (8 + PAGE) + 8
        assert not done
    assert pair.iterate() is True
    assert sum(map(len, pair.items[1:])) == 2000 * (8 + PAGE) + 4 * 8 + len("\3ram")
    pair.handler.cleanup(Outcome.COMPLETED)


def test_a_past_deadline_and_a_cancel_stop_within_a_batch():
    block = RAMBlock("ram", 4000 * PAGE)
    content(block, 2, 1)
    pair = Pair([block])
    pair.setup()
    assert pair.iterate(deadline=time.monotonic() - 1) is False
    assert pair.items[-1] == EOS
    calls = iter([False, False, True])
    assert pair.iterate(cancelled=lambda: next(calls, True)) is False
    assert len(EOS) < len(pair.items[-1]) < 9 << 20
    pair.handler.cleanup(Outcome.CANCELLED)


def test_offsets_ascend_in_a_pass(slow):
    block = RAMBlock("ram", 3000 * PAGE)
    content(block, 5, 0.5)
    pair = Pair([block])
    pair.setup()
    starts = []
    while not pair.iterate(bytes=1 << 20):
        records, _, _ = slow.decode(pair.items[-1], {"ram": block.size}, PAGE, "ram")
        starts.append([r.page for r in records])
    for one, two in itertools.pairwise(starts):
        assert max(one) < min(two)
    for pages in starts:
        assert len(set(pages)) == len(pages)
    pair.handler.cleanup(Outcome.COMPLETED)


@pytest.mark.parametrize("tracker", ["uffd-wp", "shadow"])
def test_nothing_is_lost_beside_a_busy_writer(slow, tracker):
    block = RAMBlock("ram", 600 * PAGE)
    content(block, 1, 0.5)
    stop, started = threading.Event(), threading.Event()

    def write():
        rng = np.random.default_rng(9)
        while not stop.is_set():
            block.rows[rng.integers(0, 600, 20), rng.integers(0, PAGE)] += 1
            block.rows[rng.integers(0, 600)] = 0
            started.set()

    pair = Pair([block], tracker=tracker)
    thread = threading.Thread(target=write)
    thread.start()
    try:
        started.wait(30)
        pair.setup()
        for _ in range(10):
            pair.iterate(bytes=1 << 20)
            pair.handler.pending(exact=True)
    finally:
        stop.set()
        thread.join()
    pair.complete()
    pair.handler.cleanup(Outcome.COMPLETED)
    copy = RAMBlock("ram", 600 * PAGE)
    load(slow, b"".join(pair.items), [copy])
    assert (copy.view == block.view).all()


@pytest.mark.parametrize("tracker", ["uffd-wp", "explicit", "shadow"])
def test_marks_are_added_to_any_tracker(slow, tracker):
    """Written past the tracked mapping, and told: through the descriptor, and as a hole."""
    block = RAMBlock("ram", 50 * PAGE)
    block.view[:] = 1
    pair = Pair([block], tracker=tracker)
    pair.setup()
    pair.iterate()
    with open(f"/proc/self/fd/{block.fd}", "r+b", buffering=0) as file:
        file.seek(3 * PAGE)
        file.write(b"z" * 10)
    block.mark_dirty(3 * PAGE, 10)
    block.discard(20 * PAGE, 2 * PAGE)
    pair.complete()
    pair.handler.cleanup(Outcome.COMPLETED)
    copy = RAMBlock("ram", 50 * PAGE)
    load(slow, b"".join(pair.items), [copy])
    assert (copy.view == block.view).all()
    assert len(pair.items[-1]) == 8 + PAGE + 2 * 9 + 8


def test_untouched_memory_stays_untouched_on_both_sides(slow):
    block, copy = RAMBlock("ram", 256 << 20), RAMBlock("ram", 256 << 20)
    block.buffer[77 * PAGE] = 1
    copy.buffer[99 * PAGE] = 1
    data = Pair([block]).all()
    load(slow, data, [copy])
    assert copy.buffer[77 * PAGE] == 1
    assert copy.buffer[99 * PAGE] == 0
    from whimbrel_ram.memory import untouched

    assert block.pages - np.count_nonzero(untouched(block)) == 1
    assert copy.pages - np.count_nonzero(untouched(copy)) == 2


def test_the_tracker_is_stopped_whatever_happens():
    block = RAMBlock("ram", 16 * PAGE)
    for _ in range(3):  # a registration that was left behind would refuse the second
        pair = Pair([block], tracker="uffd-wp")
        pair.setup()
        pair.handler.cleanup(Outcome.FAILED)
        pair.handler.cleanup(Outcome.FAILED)
    assert block.take_marks() is None


def test_a_tracker_that_cannot_be_used_fails_the_setup():
    pair = Pair(
        [RAMBlock("ram", 8192, memory=memoryview(bytearray(9000))[5:8197])], tracker="uffd-wp"
    )
    with pytest.raises(SettingError, match="page boundary"):
        pair.setup()
    pair.handler.cleanup(Outcome.FAILED)


def test_blocks_must_fit_the_machine():
    with pytest.raises(MachineError, match="two RAM blocks named 'a'"):
        RamHandler([RAMBlock("a", PAGE), RAMBlock("a", PAGE)])
    with pytest.raises(MachineError, match="pages of 65536 bytes, the machine of 4096"):
        RamHandler([RAMBlock("a", 65536, page_size=65536)])


# ---- the setup record


def test_the_setup_record_of_a_real_guest(slow):
    """That of QEMU 7.2, `-M pc -m 32 -nodefaults`."""
    entries = [
        BlockEntry("pc.ram", 0x2000000),
        BlockEntry("/rom@etc/acpi/tables", 0x20000),
        BlockEntry("pc.bios", 0x40000),
        BlockEntry("pc.rom", 0x20000),
        BlockEntry("/rom@etc/table-loader", 0x1000),
        BlockEntry("/rom@etc/acpi/rsdp", 0x1000),
    ]
    data = encode_setup(entries)
    assert data.startswith(bytes.fromhex("00000000020820040670632e72616d000000000200000014"))
    assert len(data) == 0xB7 - 0x2B
    inp = slow.in_stream(data)
    assert read_setup(inp, inp.u64() & ~0xFFF, PAGE) == entries


@pytest.mark.parametrize(
    ("total", "entries", "words"),
    [
        (2 * PAGE, [("a", PAGE), ("a", PAGE)], "listed twice"),
        (PAGE, [("a", 2 * PAGE)], "bad length"),
        (PAGE, [("a", 0)], "bad length"),
        (2 * PAGE, [("a", PAGE + 1)], "bad length"),
        (2 * PAGE, [("a", 1 << 63)], "bad length"),
        (PAGE, [("", PAGE)], "printable name"),
        (1 << 60, [("a", PAGE)], "larger than this side accepts"),
        (PAGE, [("b", PAGE)], "unknown RAM block 'b'"),
        (PAGE, [("a\n", PAGE)], "printable name"),
        (2 * PAGE, [("a", 2 * PAGE)], "another length"),
    ],
)
def test_setup_records_that_are_refused(slow, total, entries, words):
    data = struct.pack(">Q", total | 4)
    data += b"".join(bytes([len(n)]) + n.encode() + struct.pack(">Q", s) for n, s in entries)
    block = RAMBlock("a", PAGE)
    with pytest.raises(StreamError, match=words) as caught:
        load(slow, data + EOS, [block])
    assert caught.value.section == "ram"
    assert caught.value.offset is not None


def test_another_order_of_blocks_and_a_second_record_are_accepted(slow):
    one, two = RAMBlock("a", PAGE), RAMBlock("b", 2 * PAGE)
    setup = encode_setup([BlockEntry("b", 2 * PAGE), BlockEntry("a", PAGE)])
    page = slow.encode([slow.Record("a", 0, 3, False)], PAGE)
    load(slow, setup + page + EOS + setup + EOS, [one, two])
    assert (one.view == 3).all()


def test_a_block_that_was_left_out_is_named(slow):
    data = Pair([RAMBlock("a", PAGE)]).all()
    with pytest.raises(StreamError, match="left out RAM block 'b'") as caught:
        load(slow, data, [RAMBlock("a", PAGE), RAMBlock("b", PAGE)])
    assert caught.value.found == "a"


@pytest.mark.parametrize("capability", ["x-ignore-shared", "mapped-ram"])
def test_capabilities_that_change_the_record_are_named(slow, capability):
    configuration = Configuration(machine_type="m", capabilities=("other", capability))
    with pytest.raises(StreamError, match=capability):
        load(slow, b"", [RAMBlock("a", PAGE)], configuration=configuration)


# ---- adopting


def test_adopting_makes_the_blocks_of_the_stream(slow):
    blocks = [RAMBlock("pc.ram", 300 * PAGE), RAMBlock("pc.bios", 2 * PAGE)]
    for i, block in enumerate(blocks):
        content(block, i)
    handler = load(slow, Pair(blocks).all(), [], adopt=1 << 30)
    assert [(b.idstr, b.size) for b in handler.blocks] == [(b.idstr, b.size) for b in blocks]
    for mine, theirs in zip(handler.blocks, blocks, strict=True):
        assert (mine.view == theirs.view).all()


def test_adopting_is_bounded(slow):
    data = Pair([RAMBlock("a", 10 * PAGE), RAMBlock("b", 10 * PAGE)]).all()
    with pytest.raises(StreamError, match="larger than this side accepts"):
        load(slow, data, [], adopt=19 * PAGE)
    assert len(load(slow, data, [], adopt=20 * PAGE).blocks) == 2
    more = encode_setup([BlockEntry("c", 5 * PAGE)]) + EOS
    with pytest.raises(StreamError, match="larger than this side accepts"):
        load(slow, data + more, [], adopt=24 * PAGE)


# ---- hostile and broken streams


def test_a_section_cut_at_any_byte_ended_early(slow):
    blocks = [RAMBlock("a", 24 * 1024, page_size=1024), RAMBlock("b", 1024, page_size=1024)]
    blocks[0].rows[:3] = 5
    blocks[0].rows[0, 0] = 6
    data = Pair(blocks, page_size=1024).all()
    copies = [RAMBlock(b.idstr, b.size, page_size=1024) for b in blocks]
    load(slow, data, copies, items=3, page_size=1024)
    for end in range(len(data)):
        with pytest.raises(EndOfStream):
            load(slow, data[:end], copies, items=3, page_size=1024)


def test_flipped_bytes_end_in_a_named_error_or_load(slow):
    blocks = [RAMBlock("a", 24 * 1024, page_size=1024), RAMBlock("b", 1024, page_size=1024)]
    blocks[0].rows[:3] = 5
    data = Pair(blocks, page_size=1024).all()
    fenced = [slow.Fenced(b.size) for b in blocks]
    rng = random.Random(4)
    loaded = 0
    for _ in range(700):
        broken = bytearray(data)
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        copies = [
            RAMBlock(b.idstr, memory=f.memory, page_size=1024)
            for b, f in zip(blocks, fenced, strict=True)
        ]
        try:
            load(slow, bytes(broken), copies, items=3, page_size=1024)
            loaded += 1
        except (StreamError, EndOfStream) as error:
            assert error.offset is not None
        for f in fenced:
            f.check()
    assert 0 < loaded < 700


@pytest.mark.parametrize(
    ("flag", "words"), [(0x80, "transport of the rdma plugin"), (0x200, "transport of multifd")]
)
def test_markers_of_other_transports_are_refused_by_name(slow, flag, words):
    setup = encode_setup([BlockEntry("a", PAGE)])
    with pytest.raises(StreamError, match=words) as caught:
        load(slow, setup + struct.pack(">Q", flag), [RAMBlock("a", PAGE)])
    assert caught.value.offset == len(setup)


# ---- page transports


class Aside(PageTransport):
    """Keeps pages beside the stream, and a diary."""

    def __init__(self, shared):
        self.shared = shared
        self.diary = []

    def begin(self, blocks, out):
        self.diary.append(("begin", [b.idstr for b in blocks]))

    def round_begin(self, out, phase):
        self.diary.append(("round_begin", phase))

    def round_end(self, out, phase):
        self.diary.append(("round_end", phase))
        out.u64(0x80)

    def send(self, block, pages, out, budget):
        for page in pages[:50].tolist():
            self.shared[block.idstr, page] = block.words[page].tobytes()
        self.diary.append(("send", block.idstr, min(50, len(pages))))
        return Sent(min(50, len(pages)), 0)

    def sync(self, out):
        self.diary.append(("sync",))

    def on_blocks(self, blocks):
        self.blocks = {b.idstr: b for b in blocks}
        self.diary.append(("on_blocks", sorted(self.blocks)))

    def on_record(self, flag, inp):
        self.diary.append(("on_record", flag.name))
        if flag.name == "HOOK":
            for (idstr, page), data in self.shared.items():
                self.blocks[idstr].rows[page] = np.frombuffer(data, np.uint8)

    def close(self, outcome):
        self.diary.append(("close", outcome))


def test_pages_may_leave_another_way(slow):
    shared = {}
    source, destination = Aside(shared), Aside(shared)
    blocks = [RAMBlock("a", 60 * PAGE), RAMBlock("b", PAGE)]
    for i, block in enumerate(blocks):
        content(block, i, 1)
    data = Pair(blocks, find_pages=lambda channel: source).all()
    assert len(data) < 200
    copies = [RAMBlock("a", 60 * PAGE), RAMBlock("b", PAGE)]
    load(slow, data, copies, find_pages=lambda channel: destination)
    for copy, block in zip(copies, blocks, strict=True):
        assert (copy.view == block.view).all()
    assert source.diary == [
        ("begin", ["a", "b"]),
        ("round_begin", Phase.ITERATE),
        ("send", "a", 50),
        ("send", "a", 10),
        ("send", "b", 1),
        ("sync",),
        ("round_end", Phase.ITERATE),
        ("round_begin", Phase.COMPLETE),
        ("round_end", Phase.COMPLETE),
        ("close", Outcome.COMPLETED),
    ]
    assert destination.diary == [
        ("on_blocks", ["a", "b"]),
        ("on_record", "EOS"),
        ("on_record", "HOOK"),
        ("on_record", "EOS"),
        ("on_record", "HOOK"),
        ("on_record", "EOS"),
        ("close", Outcome.COMPLETED),
    ]


def test_the_channel_may_bring_the_transport():
    class Special(MemoryChannel):
        def __init__(self):
            super().__init__()
            self.pages = Aside({})

        def extension(self, kind):
            return self.pages if kind is PageTransport else super().extension(kind)

    pair = Pair([RAMBlock("a", PAGE)], find_pages=lambda channel: pytest.fail("not asked"))
    pair.channel = Special()
    pair.out = OutStream(pair.channel)
    pair.all()
    assert pair.channel.pages.diary[-1] == ("close", Outcome.COMPLETED)


def test_a_transport_that_sends_nothing_is_an_error_not_a_hang():
    class Lazy(StreamPages):
        def send(self, block, pages, out, budget):
            return Sent(0)

    pair = Pair([RAMBlock("a", PAGE)], find_pages=lambda channel: Lazy(PAGE))
    pair.setup()
    with pytest.raises(LocalError, match="sent nothing"):
        pair.iterate()
    pair.handler.cleanup(Outcome.FAILED)


def test_errors_are_migration_errors_with_their_place(slow):
    with pytest.raises(MigrationError) as caught:
        load(slow, struct.pack(">Q", PAGE | 0x28), [RAMBlock("a", PAGE)])
    assert (caught.value.section, caught.value.offset) == ("ram", 0)
