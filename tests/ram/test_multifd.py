"""multifd: its packets, machines that move over several channels, and channels that are lost, late or lying."""

import contextlib
import fcntl
import itertools
import socket
import struct
import termios
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from whimbrel import Cancelled, Kernel, Machine, MigrationError, StreamError
from whimbrel.channel import MemoryChannel
from whimbrel.savevm import Budget
from whimbrel.state import Outcome
from whimbrel.stream import OutStream
from whimbrel.wire.format import MAGIC
from whimbrel_ram import RAMBlock
from whimbrel_ram.multifd import packing, wire
from whimbrel_ram.multifd.pages import MultifdPages, Options
from whimbrel_ram.multifd.sending import Job, Senders
from whimbrel_ram.transport import Phase, SaveBlock
from whimbrel_ram.zero import as_words
from whimbrel_testing.peers import wait_until

MIB = 1 << 20
PAGE = 4096
METHODS = ("none", "zlib", "zstd")


# ---- packets


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_packets_come_back(data):
    page = data.draw(st.sampled_from([1024, 4096, 65536]))
    most = wire.pages_of(page)
    normal = data.draw(st.integers(0, most))
    zero = data.draw(st.integers(0, most - normal))
    method = data.draw(st.sampled_from(METHODS))
    offsets = np.arange(normal + zero, dtype=np.uint64) * np.uint64(page)
    packet = wire.Packet(
        flags=wire.METHODS[method] | data.draw(st.sampled_from([0, wire.SYNC])),
        number=data.draw(st.integers(0, (1 << 64) - 1)),
        idstr=data.draw(st.sampled_from([b"ram", b"x" * 255, b"/rom@etc/acpi/tables"])),
        normal=offsets[:normal],
        zero=offsets[normal:],
        size=normal * page,
    )
    head = wire.encode(packet, page)
    assert len(head) == wire.header_size(page)
    back = wire.decode(head, page, wire.METHODS[method])
    assert (back.flags, back.number, back.idstr, back.size) == (
        *(packet.flags, packet.number, packet.idstr, packet.size),
    )
    assert back.normal.tolist() == packet.normal.tolist()
    assert back.zero.tolist() == packet.zero.tolist()


def test_the_header_has_its_size_and_layout():
    """As written in the description of the format: 1344 bytes for pages of 4 KiB, each field at its offset."""
    head = wire.encode(
        wire.Packet(
            flags=1,
            number=7,
            idstr=b"pc.ram",
            normal=np.array([0x6000], np.uint64),
            zero=np.array([0x7000], np.uint64),
            size=PAGE,
        ),
        PAGE,
    )
    assert len(head) == 1344
    assert struct.unpack_from(">6I", head) == (0x11223344, 1, 1, 128, 1, PAGE)
    assert struct.unpack_from(">QI", head, 24) == (7, 1)
    assert head[64:71] == b"pc.ram\0"
    assert struct.unpack_from(">QQ", head, 320) == (0x6000, 0x7000)
    assert len(wire.encode_init(None, 3)) == 64


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.sampled_from([0, 1 << 63, (1 << 64) - 2 * PAGE]),
    st.booleans(),
)
def test_a_run_is_what_lies_in_one_piece(pages, base, skew):
    """The same answer as page by page, however far outside of the block; a place in memory only for what is inside."""
    offsets = [(base + page * PAGE + skew) % (1 << 64) for page in pages]
    run = wire.Packet(normal=np.array(offsets, np.uint64)).run(PAGE)
    in_order = all(b == (a + PAGE) % (1 << 64) for a, b in itertools.pairwise(offsets))
    assert run == (offsets[0] if in_order else None)
    if run is None:
        return
    block_size = 8 * PAGE
    if max(offsets) < block_size and not skew:
        where = wire.memory_of(run, len(pages), block_size, PAGE, b"ram")
        assert (where.start, where.stop) == (offsets[0], offsets[-1] + PAGE)
    else:
        with pytest.raises(StreamError, match="not in RAM block 'ram'"):
            wire.memory_of(run, len(pages), block_size, PAGE, b"ram")


@given(data=st.binary(min_size=1344, max_size=1344), flags=st.sampled_from([0, 2, 4]))
@settings(max_examples=200, deadline=None)
def test_no_header_does_more_than_be_refused(data, flags):
    head = bytearray(data)
    head[:12] = struct.pack(">3I", 0x11223344, 1, flags)
    with contextlib.suppress(StreamError):
        packet = wire.decode(head, PAGE, flags)
        assert len(packet.normal) + len(packet.zero) <= 128
        assert packet.size <= MIB


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("level", [0, 1, 9])
def test_what_was_packed_comes_out(method, level):
    packer, unpacker = packing.packer(method, level), packing.unpacker(method)
    rng = np.random.default_rng(1)
    for n in (1, 128, 3, 128):
        pages = rng.integers(4, size=n * PAGE, dtype=np.uint8).tobytes()
        packed = packer.pack(memoryview(pages))
        assert len(packed) < len(pages) or (method, level) == ("zlib", 0)
        into = bytearray(len(pages))
        unpacker.unpack(memoryview(packed), memoryview(into))
        assert into == pages


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_what_does_not_unpack_to_its_pages_is_refused(method):
    for pages, wanted, damage in (
        *((PAGE, 2 * PAGE, None), (2 * PAGE, PAGE, None), (8 * PAGE, 8 * PAGE, 0)),
        *((1 << 26, PAGE, None), (8 * PAGE, 8 * PAGE, -1)),
    ):
        packed = bytearray(packing.packer(method, 1).pack(memoryview(bytes(pages))))
        if damage is not None:
            packed[damage] ^= 0xFF
        with pytest.raises(StreamError, match="cannot be unpacked"):
            unpacker = packing.unpacker(method)
            for _ in range(2):  # a flaw at the end may only be seen in the next packet
                unpacker.unpack(memoryview(packed), memoryview(bytearray(wanted)))


# ---- machines


class Writer:
    """A machine with two blocks whose thread goes on writing until it is stopped."""

    def __init__(self, size=24 * MIB, *, writes=True):
        self.running = threading.Event()
        self.machine = Machine("m-1", stop=self.stop)
        self.ram = self.machine.add(RAMBlock("ram", size))
        self.vram = self.machine.add(RAMBlock("vga.vram", 2 * MIB))
        rng = np.random.default_rng(1)
        self.ram.view[: size // 2] = rng.integers(256, size=size // 2, dtype=np.uint8)
        self.vram.view[::100] = 7
        self.thread = threading.Thread(target=self.write)
        if writes:
            self.running.set()
            self.thread.start()

    def write(self):
        rng = np.random.default_rng(2)
        pages = self.ram.view.reshape(-1, PAGE)
        while self.running.is_set():
            some = rng.integers(len(pages), size=8)
            pages[some, rng.integers(PAGE, size=8)] += 1
            pages[rng.integers(len(pages), size=1)] = 0
            time.sleep(0.002)

    def stop(self):
        if self.running.is_set():
            self.running.clear()
            self.thread.join()


@pytest.fixture
def writer():
    with contextlib.ExitStack() as stack:

        def make(**options):
            made = Writer(**options)
            stack.callback(made.stop)
            return made

        yield make


def destination(size=24 * MIB, machine_type="m-1"):
    machine = Machine(machine_type)
    machine.add(RAMBlock("ram", size))
    machine.add(RAMBlock("vga.vram", 2 * MIB))
    return machine


def kernel(machine, **values):
    made = Kernel(machine)
    made.settings.update({"multifd": True, **{k.replace("_", "-"): v for k, v in values.items()}})
    return made


def memory(machine):
    return [b.view.tobytes() for b in machine.parts(RAMBlock)]


@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize("method", METHODS)
def test_a_machine_that_goes_on_writing_moves(writer, tmp_path, channels, method):
    source, there = writer(), destination()
    options = {"multifd_channels": channels, "multifd_compression": method}
    incoming = kernel(there, **options).incoming(f"unix:{tmp_path}/m")
    here = kernel(source.machine, **options, max_bandwidth=60 * MIB, downtime_limit=100)
    result = here.migrate(f"unix:{tmp_path}/m").wait(60)
    incoming.wait(60)
    assert result.acknowledged
    assert memory(there) == memory(source.machine)
    ram = here.query()["ram"]
    assert ram["remaining"] == 0
    assert ram["duplicate"] > 1000
    assert 0 < ram["multifd-bytes"] < ram["transferred"]
    if method == "none":
        assert ram["normal-bytes"] < ram["multifd-bytes"] < ram["normal-bytes"] * 1.02 + MIB


@pytest.mark.parametrize("zero", ["none", "legacy", "multifd"])
@pytest.mark.parametrize("machine_type", ["pc-i440fx-7.2", "pc-i440fx-9.2"])
def test_every_form_of_it_moves(writer, machine_type, zero):
    """Markers are ends of sections, or records of their own; zero pages go in the main channel, or in packets."""
    source, there = writer(), destination(machine_type=machine_type)
    source.machine.machine_type = machine_type
    there.parts(RAMBlock)[0].view[:] = 9  # zero must be written over it
    incoming = kernel(there).incoming("tcp:127.0.0.1:0")
    here = kernel(source.machine, zero_page_detection=zero, downtime_limit=1000)
    here.migrate(incoming.addresses[0]).wait(60)
    incoming.wait(60)
    assert memory(there) == memory(source.machine)
    ram = here.query()["ram"]
    assert (ram["duplicate"] > 1000) is (zero != "none")


def test_a_cancel_ends_it_at_once(writer, tmp_path):
    source, there = writer(), destination()
    incoming = kernel(there).incoming(f"unix:{tmp_path}/m")
    here = kernel(source.machine, max_bandwidth=MIB)
    outgoing = here.migrate(f"unix:{tmp_path}/m")
    wait_until(lambda: here.query().get("ram", {}).get("multifd-bytes"), "pages sent")
    outgoing.cancel()
    with pytest.raises(Cancelled):
        outgoing.wait(20)
    with pytest.raises(MigrationError):
        incoming.wait(20)
    assert source.machine.is_running
    assert not there.is_running
    names = {t.name for t in threading.enumerate()}
    assert not any(n.startswith("whimbrel-multifd") for n in names), names


def test_a_cancelled_destination_lets_the_source_go(writer, tmp_path):
    source, there = writer(), destination()
    incoming = kernel(there).incoming(f"unix:{tmp_path}/m")
    here = kernel(source.machine, max_bandwidth=MIB)
    outgoing = here.migrate(f"unix:{tmp_path}/m")
    wait_until(lambda: here.query().get("ram", {}).get("multifd-bytes"), "pages sent")
    incoming.cancel()
    with pytest.raises(MigrationError):
        outgoing.wait(20)
    with pytest.raises(Cancelled):
        incoming.wait(20)
    assert source.machine.is_running


def test_a_destination_without_it_says_so(writer, tmp_path):
    source, there = writer(writes=False), destination()
    incoming = Kernel(there).incoming(f"unix:{tmp_path}/m")
    with pytest.raises(MigrationError, match="multifd"):
        kernel(source.machine, zero_page_detection="multifd").migrate(f"unix:{tmp_path}/m").wait(20)
    with pytest.raises(MigrationError):
        incoming.wait(20)
    assert not there.is_running


@pytest.mark.parametrize("machine_type", ["m-1", "pc-i440fx-9.2"])
@pytest.mark.parametrize(
    "size", [2 * MIB, 24 * MIB]
)  # all of a channel's pages fit a buffer, or not
@pytest.mark.parametrize(
    ("here", "why"),
    [
        ({"multifd_channels": 3}, "more than 2 multifd channels|a multifd channel too many"),
        ({"multifd_compression": "zlib"}, "packed by another method"),
    ],
)
def test_sides_that_differ(writer, here, why, machine_type, size):
    source, machine = writer(writes=False, size=size), destination(size, machine_type)
    source.machine.machine_type = machine_type
    incoming = kernel(machine).incoming("tcp:127.0.0.1:0")
    with pytest.raises(MigrationError):
        kernel(source.machine, **here).migrate(incoming.addresses[0]).wait(20)
    with pytest.raises(MigrationError, match=why):
        incoming.wait(20)
    assert source.machine.is_running
    assert not machine.is_running


def test_a_source_without_it(writer, monkeypatch):
    monkeypatch.setattr("whimbrel_ram.multifd.receiving.PATIENCE", 1.0)
    for machine_type in ("m-1", "pc-i440fx-9.2"):
        source, machine = writer(writes=False), destination(machine_type=machine_type)
        source.machine.machine_type = machine_type
        incoming = kernel(machine).incoming("tcp:127.0.0.1:0")
        with pytest.raises(MigrationError):
            Kernel(source.machine).migrate(incoming.addresses[0]).wait(20)
        with pytest.raises(MigrationError, match=r"0 of 2 multifd channels.*Switch multifd on"):
            incoming.wait(20)
        assert source.machine.is_running
        assert not machine.is_running


def test_a_budget_counts_what_is_in_flight():
    """A channel's pages are sent by its own thread: what waits for it is not beyond the limit of the bandwidth."""

    class Main(MemoryChannel):
        def open_extra(self, purpose, index):
            return MemoryChannel()

    block = RAMBlock("ram", 16 * MIB)
    block.view[::100] = 7
    saved = SaveBlock(block, 0, as_words(block.rows))
    pages = MultifdPages(Options(page_size=PAGE, channels=8, method="zlib", level=1), lambda: False)
    out = OutStream(Main())
    pages.begin([saved], out)
    try:
        pages.round_begin(out, Phase.ITERATE)
        for budget in (100_000, 1_000_000):
            start = out.position
            pages.send(saved, np.arange(4096), out, Budget(bytes=budget))
            now = out.position
            pages.round_end(out, Phase.ITERATE)
            assert now == out.position - 8 * 1344  # nothing was in flight, but for the syncs
            assert now - start <= budget
    finally:
        pages.close(Outcome.COMPLETED)


def test_a_limit_is_owed_nothing_by_what_was_put_in_before_it():
    """Whether that was sent before the limit was noticed, or behind later ones of another channel."""
    words = as_words(RAMBlock("ram", MIB).rows)

    class Slow(MemoryChannel):
        def send(self, buffers):
            go_on.wait(10)
            super().send(buffers)

    go_on = threading.Event()
    go_on.set()
    channels = [Slow(), MemoryChannel()]
    senders = Senders(
        channels, page_size=PAGE, uuid=None, method="none", level=0, is_cancelled=lambda: False
    )
    job = Job(idstr=b"ram", words=words, normal=np.arange(8))
    size = 1344 + 8 * PAGE
    try:
        senders.put(job)
        senders.drain()
        assert senders.take_sent(30) == (size, 0), "sent before the limit was noticed"
        senders.put(job)
        senders.drain()
        assert senders.take_sent(30) == (size, size)
        assert senders.take_sent(30) == (0, 0)
        go_on.clear()
        senders.put(job)  # to either of them, in turn
        senders.put(job)
        wait_until(lambda: len(channels[1].data) >= 2 * size, "the quick channel")
        assert senders.take_sent(10) == (size, 0)
        go_on.set()
        senders.drain()
        assert senders.take_sent(10) == (size, 0)
    finally:
        go_on.set()
        senders.close(orderly=True)


def test_a_transport_with_room_for_one_channel_is_refused(writer):
    source = writer(writes=False)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outgoing = kernel(source.machine).migrate(f"fd:{ours.detach()}")
        with pytest.raises(MigrationError, match="one channel only, none for multifd 0"):
            outgoing.wait(20)
    assert source.machine.is_running


# ---- a source that is played: whatever it does on its channels, the machine does not start


class Liar:
    """Connects like a source, and says what a test wants."""

    def __init__(self, path, channels):
        self.path = path
        self.main = self.connect()
        self.extra = [self.connect() for _ in range(channels)]

    def connect(self):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        sock.settimeout(20)
        return sock

    def begin(self, machine_type="m-1", marker=b""):
        """The stream up to the end of START, and the init packets."""
        blocks = b"".join(
            bytes((len(n),)) + n + struct.pack(">Q", size)
            for n, size in ((b"ram", 24 * MIB), (b"vga.vram", 2 * MIB))
        )
        name = machine_type.encode()
        stream = struct.pack(">II", MAGIC, 3) + b"\7" + struct.pack(">I", len(name)) + name
        stream += b"\1\0\0\0\1\3ram" + struct.pack(">II", 0, 4)
        stream += struct.pack(">Q", 26 * MIB | 4) + blocks + marker + struct.pack(">Q", 0x10)
        self.main.sendall(stream + b"\x7e\0\0\0\1")
        for i, sock in enumerate(self.extra):
            sock.sendall(wire.encode_init(None, i))

    def packet(self, index, data=b"", **members):
        head = wire.encode(wire.Packet(**{"idstr": b"ram", **members}), PAGE)
        self.extra[index].sendall(head + data)

    def sync(self):
        for i in range(len(self.extra)):
            self.packet(i, flags=wire.SYNC)

    def settle(self):
        """Wait until all that was sent on the channels has been read."""
        for sock in self.extra:
            size = bytearray(4)
            wait_until(
                lambda sock=sock, size=size: (
                    fcntl.ioctl(sock, termios.TIOCOUTQ, size) == 0 and not any(size)
                ),
                "everything to be read",
            )

    def end(self):
        """END without pages, and EOF."""
        self.main.sendall(b"\3\0\0\0\1" + struct.pack(">Q", 0x10) + b"\x7e\0\0\0\1\0\6\0\0\0\0")

    def close(self):
        for sock in (self.main, *self.extra):
            sock.close()


@pytest.fixture
def lie(tmp_path, monkeypatch):
    """Plays a source against a destination with two channels; the error that it ends with."""
    monkeypatch.setattr("whimbrel_ram.multifd.receiving.PATIENCE", 1.0)

    def play(story, channels=2, machine_type="m-1", marker=b"", **values):
        there = destination(machine_type=machine_type)
        incoming = kernel(there, **values).incoming(f"unix:{tmp_path}/m")
        liar = Liar(f"{tmp_path}/m", channels)
        with contextlib.closing(liar):
            liar.begin(machine_type, marker)
            with contextlib.suppress(OSError):
                story(liar)
            with pytest.raises(MigrationError) as caught:
                incoming.wait(30)
        assert not there.is_running
        return str(caught.value)

    return play


def one(offset=0):
    return np.array([offset], np.uint64)


def test_channels_that_do_not_come(lie):
    assert "1 of 2 multifd channels came" in lie(lambda s: s.sync(), channels=1)


def test_a_channel_that_is_silent(lie):
    assert "nothing has come on multifd channel 1" in lie(lambda s: s.packet(0, flags=wire.SYNC))


def test_a_channel_that_is_slow_is_waited_for(tmp_path, monkeypatch):
    """As long as packets come: all up to its sync may take longer than a silent channel is waited for."""
    monkeypatch.setattr("whimbrel_ram.multifd.receiving.PATIENCE", 2.0)
    there = destination()
    incoming = kernel(there).incoming(f"unix:{tmp_path}/m")
    liar = Liar(f"{tmp_path}/m", 2)
    with contextlib.closing(liar):
        liar.begin()
        liar.packet(0, flags=wire.SYNC)
        for page in range(6):
            assert not incoming.done
            liar.packet(1, b"x" * PAGE, normal=one(page * PAGE), size=PAGE)
            threading.Event().wait(0.4)
        liar.packet(1, flags=wire.SYNC)
        liar.sync()
        liar.end()
        incoming.wait(30)
    assert there.is_running


def test_a_source_that_lies_and_then_is_silent(lie, monkeypatch):
    """Its channel is closed; what it says, or does not, on the main channel keeps nobody waiting."""
    monkeypatch.setattr("whimbrel_ram.multifd.receiving._GRACE", 0.5)

    def story(s):
        s.sync()
        s.packet(0, b"x" * PAGE, normal=one(24 * MIB), size=PAGE)

    said = lie(story)
    assert "multifd channel 0: a multifd packet with a page that is not in RAM block 'ram'" in said


def test_a_channel_that_ends_before_its_sync(lie):
    def story(s):
        s.packet(0, flags=wire.SYNC)
        s.extra[1].close()

    assert "multifd channel 1 ended before its sync" in lie(story)


def test_pages_before_the_blocks_are_known_or_behind_them(lie):
    def story(s):
        s.sync()
        s.packet(0, b"x" * PAGE, normal=one(24 * MIB), size=PAGE)
        s.sync()
        s.end()

    assert "page that is not in RAM block 'ram'" in lie(story)


def test_an_unknown_block(lie):
    def story(s):
        s.sync()
        s.packet(1, b"x" * PAGE, idstr=b"rom", normal=one(), size=PAGE)
        s.sync()
        s.end()

    assert "multifd channel 1: a multifd packet for an unknown RAM block 'rom'" in lie(story)


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_pages_without_data(lie, method):
    def story(s):
        s.sync()
        s.packet(0, normal=one(), flags=wire.METHODS[method])
        s.sync()
        s.end()

    assert "cannot be unpacked" in lie(story, multifd_compression=method)


def flushed(machine_type="pc-i440fx-9.2"):
    """With records of their own as markers."""
    return {"machine_type": machine_type, "marker": struct.pack(">Q", 0x200)}


def test_a_source_that_breaks_off_because_of_a_channel(lie):
    """Between two sections, where nobody looks at the channels."""

    def story(s):
        s.sync()
        s.packet(0, b"x" * PAGE, normal=one(24 * MIB), size=PAGE)
        with contextlib.suppress(ConnectionError):
            assert not s.extra[0].recv(1)
        s.main.close()

    assert "page that is not in RAM block 'ram'" in lie(story, **flushed())


def test_pages_behind_the_last_sync(lie):
    def story(s):
        s.sync()
        s.packet(0, b"x" * PAGE, normal=one(), size=PAGE)
        s.settle()
        s.end()

    assert "behind the last sync" in lie(story, **flushed())


def test_syncs_that_the_main_channel_does_not_tell_of(lie):
    """A source that takes each end of a section for a marker, where none is: what follows its first sync is never read."""

    def story(s):
        s.sync()
        s.settle()
        s.end()

    assert "tells of fewer syncs" in lie(story, **flushed() | {"marker": b""})


def test_nothing_is_written_once_the_machine_runs(tmp_path):
    there = destination()
    incoming = kernel(there).incoming(f"unix:{tmp_path}/m")
    liar = Liar(f"{tmp_path}/m", 2)
    with contextlib.closing(liar):
        liar.begin()
        liar.sync()
        liar.sync()
        liar.packet(0, b"x" * PAGE, normal=one(), size=PAGE)
        liar.end()
        with contextlib.suppress(MigrationError):  # where the page came soon enough to be missed
            incoming.wait(30)
        with contextlib.suppress(OSError):
            liar.packet(1, b"x" * PAGE, normal=one(), size=PAGE)
    if there.is_running:
        assert not there.parts(RAMBlock)[0].view[:PAGE].any()


@pytest.mark.parametrize(
    ("init", "why"),
    [
        (struct.pack(">II16sB39x", 0x11223345, 1, bytes(16), 1), "no multifd channel"),
        (struct.pack(">II16sB39x", 0x11223344, 2, bytes(16), 1), "no multifd channel"),
        (struct.pack(">II16sB39x", 0x11223344, 1, b"u" * 16, 1), "of another machine"),
        (struct.pack(">II16sB39x", 0x11223344, 1, bytes(16), 2), "a multifd channel too many"),
        (struct.pack(">II16sB39x", 0x11223344, 1, bytes(16), 0), "two multifd channels"),
    ],
)
def test_channels_that_are_none(tmp_path, init, why):
    there = destination()
    incoming = kernel(there).incoming(f"unix:{tmp_path}/m")
    liar = Liar(f"{tmp_path}/m", 1)
    with contextlib.closing(liar):
        liar.begin()
        bad = liar.connect()
        liar.extra.append(bad)
        liar.packet(0, flags=wire.SYNC)
        bad.sendall(init)
        with pytest.raises(MigrationError, match=why):
            incoming.wait(30)
    assert not there.is_running


def test_connections_that_say_nothing_are_passed_over(tmp_path):
    """Somebody looks whether the port is open; then the source comes."""
    there = destination()
    incoming = kernel(there).incoming(f"unix:{tmp_path}/m")
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"{tmp_path}/m")
    liar = Liar(f"{tmp_path}/m", 2)
    with contextlib.closing(liar):
        liar.begin()
        liar.sync()
        liar.settle()
        with liar.connect() as late:
            late.shutdown(socket.SHUT_WR)
            assert not late.recv(1)
        liar.sync()
        liar.end()
        incoming.wait(30)
    assert there.is_running


def test_channels_may_come_before_the_main_one(writer, tmp_path):
    """A QEMU opens them in any order; here all of them first."""
    there = destination()
    incoming = kernel(there).incoming(f"unix:{tmp_path}/m")
    path = f"{tmp_path}/m"
    extra = []
    for i in (1, 0):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        sock.sendall(wire.encode_init(None, i))
        extra.insert(0, sock)
    liar = Liar(path, 0)
    with contextlib.closing(liar):
        liar.begin()
        liar.extra = extra
        liar.sync()
        liar.packet(1, b"x" * PAGE, normal=one(5 * PAGE), size=PAGE)
        liar.sync()
        liar.end()
        incoming.wait(30)
    assert there.is_running
    assert bytes(there.parts(RAMBlock)[0].buffer[5 * PAGE : 6 * PAGE]) == b"x" * PAGE
