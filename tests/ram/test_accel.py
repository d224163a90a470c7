"""whimbrel-accel beside numpy: the same bytes, the same refusals, and nothing outside of what it was given."""

import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from whimbrel import Budget, OutStream
from whimbrel.descriptors import DescriptorChannel
from whimbrel.pace import Pace
from whimbrel_ram import RAMBlock, StreamPages, native, xbzrle
from whimbrel_ram.multifd import wire
from whimbrel_ram.transport import SaveBlock
from whimbrel_ram.zero import as_words
from whimbrel_testing.peers import missing_peer, wait_until

PAGE = 256
NUMPY = {"encode": xbzrle._encode, "patch": xbzrle._patch}


@pytest.fixture(autouse=True)
def loops():
    """Both in each test."""


@pytest.fixture(autouse=True)
def accel():
    if native.deltas is None:
        missing_peer("whimbrel-accel was built without a compiler: install gcc and python3-dev")
    return native.deltas


def applied(patch, deltas, memory):
    """Memory behind one call, or the index and the words of what was refused."""
    data = np.frombuffer(b"".join(deltas) or b"\0", np.uint8)
    length = np.array([len(d) for d in deltas], np.int64)
    after = np.frombuffer(memory, np.uint8).copy()
    where = np.arange(len(deltas), dtype=np.int64) * PAGE
    try:
        patch(data, np.cumsum(length) - length, length, where, PAGE, after)
    except xbzrle.BadDelta as error:
        assert after.tobytes() == memory, "nothing is written of what is refused"
        return error.index, str(error)
    return after.tobytes()


runs = st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))


def delta_of(runs):
    """Runs as they should be written, or nearly: their bytes may be too many or too few."""
    out = b""
    for gap, run, have in runs:
        for n in (gap, run):
            out += bytes((n,)) if n < 128 else bytes((n & 127 | 128, n >> 7))
        out += b"\xaa" * (run if have > 30 else have)
    return out


@given(st.one_of(st.binary(max_size=40), st.lists(runs, max_size=4).map(delta_of)))
@settings(max_examples=1500, deadline=None)
def test_any_delta_is_applied_or_refused_alike(delta):
    memory = bytes(range(256))
    one, other = (applied(p, [delta], memory) for p in (xbzrle.patch, NUMPY["patch"]))
    if isinstance(one, bytes) or isinstance(other, bytes):
        assert one == other
    else:  # numpy looks at the byte behind a length that is cut off, so that the words may differ
        assert one[0] == other[0] == 0
        assert one[1] == other[1] or delta[-1] > 127


@given(st.lists(st.lists(runs, max_size=3).map(delta_of), min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_one_bad_delta_among_others_leaves_all_as_it_was(deltas):
    memory = bytes(range(256)) * len(deltas)
    one, other = (applied(p, deltas, memory) for p in (xbzrle.patch, NUMPY["patch"]))
    assert type(one) is type(other)
    if isinstance(one, bytes):
        assert one == other


@given(st.integers(0, 1 << 30), st.integers(1, 6), st.sampled_from([8, 64, 4096, 16384]))
@settings(max_examples=200, deadline=None)
def test_the_same_bytes(seed, pages, page_size):
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 256, (pages, page_size), np.uint8)
    new = old.copy()
    for row in new:
        n = int(rng.integers(0, page_size + 1))
        row[rng.integers(0, page_size, n)] ^= rng.integers(0, 3, n, dtype=np.uint8)
    words = old.view(np.uint64), new.view(np.uint64)
    (mine, length), (its, its_length) = xbzrle.encode(*words), NUMPY["encode"](*words)
    assert length.tolist() == its_length.tolist()
    assert mine.tobytes() == its.tobytes()


def numbers(*values):
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("start", "length", "where"),
    [
        *((-1, 3, 0), (0, -1, 0), (0, 4, 0), (3, 1, 0), (4, 0, 0), (0, 3, -1), (0, 3, PAGE + 1)),
        *((1 << 62, 1, 0), (0, 1 << 62, 0), (0, 3, 1 << 62), (-(1 << 63), -(1 << 63), 0)),
    ],
)
def test_what_lies_outside_is_refused(accel, start, length, where):
    memory = bytearray(2 * PAGE)
    with pytest.raises(ValueError, match="do not fit"):
        accel.patch(b"\0\1\7", numbers(start), numbers(length), numbers(where), PAGE, memory)
    assert not any(memory)


def test_buffers_that_do_not_fit_are_refused(accel):
    pages, lengths = bytes(2 * PAGE), numbers(0, 0)
    for old, new, size, out, told in (
        (pages, pages[:-1], PAGE, 2 * PAGE, lengths),
        (pages[:-1], pages[:-1], PAGE, 2 * PAGE, lengths),
        (pages, pages, PAGE, 2 * PAGE - 1, lengths),
        (pages, pages, PAGE, 2 * PAGE, lengths[:1]),
        (pages, pages, 0, 2 * PAGE, lengths),
        (pages, pages, -PAGE, 2 * PAGE, lengths),
        (bytes(1 << 15), bytes(1 << 15), 1 << 15, 1 << 15, lengths),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            accel.encode(old, new, size, bytearray(out), told)
    with pytest.raises(ValueError, match="do not fit"):
        accel.patch(b"", numbers(0), numbers(), numbers(0), PAGE, bytearray(PAGE))
    with pytest.raises((TypeError, BufferError)):
        accel.encode(pages, pages, PAGE, pages, lengths)


# ---- records and packets over a socket

BIG = 4096


@pytest.fixture
def ends():
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@pytest.fixture
def block():
    return np.random.default_rng(3).integers(1, 255, (40, BIG), np.uint8)


def received(sock, size):
    data = bytearray()
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return bytes(data)


def in_background(call, *args):
    """Its result, or its error, once asked for."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call, *args)
    pool.shutdown(wait=False)
    return future


def test_records_are_sent_as_they_are_gathered(ends, block):
    pages = numbers(0, 1, 2, 7, 9, 39)
    out = bytearray(6 * (8 + BIG))
    assert native.records.gather(out, block, pages, BIG) == len(out)
    ends[0].setblocking(False)  # it waits all the same
    sent = in_background(native.records.send, ends[0].fileno(), block, pages, BIG)
    assert received(ends[1], len(out)) == out
    assert sent.result(10) == len(out)


def test_more_records_than_one_call_takes(ends):
    block = np.random.default_rng(3).integers(1, 255, (1500, 1024), np.uint8)
    pages = np.arange(1500)[::-1].copy()
    sent = in_background(native.records.send, ends[0].fileno(), block, pages, 1024)
    data = np.frombuffer(received(ends[1], 1500 * 1032), np.uint8).reshape(1500, 1032)
    assert sent.result(10) == data.size
    assert np.array_equal(data[:, 8:], block[::-1])


@pytest.mark.parametrize("page", [40, -1, 1 << 52, -(1 << 63)])
def test_a_page_that_is_not_there_is_not_sent(ends, block, page):
    pages, fd = numbers(1, page), ends[0].fileno()
    for call in (
        lambda: native.records.gather(bytearray(3 * (8 + BIG)), block, pages, BIG),
        lambda: native.records.send(fd, block, pages, BIG),
        lambda: native.packets.send(fd, b"ram", block, pages, BIG, 1),
    ):
        with pytest.raises(ValueError, match="fit|not in the memory"):
            call()
    ends[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        ends[1].recv(1)


@pytest.mark.parametrize("size", [0, -BIG, 32, 3000])
def test_sizes_that_no_page_has(ends, block, size):
    fd, head, fresh = ends[0].fileno(), bytearray(1344), bytearray(40)
    for call in (
        lambda: native.records.gather(bytearray(8 + BIG), block, numbers(0), size),
        lambda: native.records.send(fd, block, numbers(0), size),
        lambda: native.records.take(bytes(100), block, fresh, size),
        lambda: native.packets.send(fd, b"ram", block, numbers(0), size, 1),
        lambda: native.packets.receive(fd, head, b"ram", block, fresh, size),
    ):
        with pytest.raises(ValueError, match="fit|not in the memory"):
            call()


def test_buffers_that_do_not_fit_each_other_are_refused(ends, block):
    fd, head = ends[0].fileno(), bytearray(1344)
    for call in (
        lambda: native.records.gather(bytearray(2 * BIG), block, numbers(0, 1), BIG),
        lambda: native.records.take(bytes(9), block, bytearray(39), BIG),
        lambda: native.records.take(bytes(9), block.reshape(-1)[1:], bytearray(39), BIG),
        lambda: native.packets.send(fd, bytes(256), block, numbers(0), BIG, 1),
        lambda: native.packets.receive(fd, head[:-1], b"ram", block, bytearray(40), BIG),
        lambda: native.packets.receive(fd, head, bytes(256), block, bytearray(40), BIG),
        lambda: native.packets.receive(fd, head, b"ram", block, bytearray(41), BIG),
    ):
        with pytest.raises(ValueError, match="fit|not in the memory"):
            call()


@pytest.mark.parametrize("send", ["records", "packets"])
def test_a_peer_that_is_gone_is_an_error(ends, block, send):
    ends[1].close()
    fd, pages = ends[0].fileno(), numbers(1)
    with pytest.raises(BrokenPipeError):
        if send == "records":
            native.records.send(fd, block, pages, BIG)
        else:
            native.packets.send(fd, b"ram", block, pages, BIG, 1)


def test_a_shutdown_ends_what_waits(ends):
    block = np.ones((2048, BIG), np.uint8)
    for call in (
        lambda fd: native.records.send(fd, block, np.arange(2048), BIG),
        lambda fd: native.packets.send(fd, b"ram", block, np.arange(2048), BIG, 1),
    ):
        one, other = socket.socketpair()
        with one, other:
            result = in_background(call, one.fileno())
            assert other.recv(1, socket.MSG_PEEK)
            one.shutdown(socket.SHUT_RDWR)
            with pytest.raises(BrokenPipeError):
                result.result(10)


class Records:
    """A block between canaries, a read buffer, and the socket that its records come from."""

    def __init__(self, slow, sock, capacity=4 * (8 + BIG)):
        self.sock = sock
        self.space = slow.Fenced(40 * BIG)
        self.space.memory[:] = 7
        self.fresh = bytearray(40)
        self.buffer = bytearray(capacity)
        self.start = self.end = 0

    def receive(self):
        """Bytes taken, pages and zero pages; what is left is in `rest`."""
        self.start, self.end, *told = native.records.receive(
            *(self.sock.fileno(), self.buffer, self.start, self.end),
            *(self.space.memory, self.fresh, BIG),
        )
        self.space.check()
        return tuple(told)

    @property
    def rest(self):
        return bytes(self.buffer[self.start : self.end])

    @property
    def rows(self):
        return self.space.memory.reshape(40, BIG)


def record(page, data):
    flags = 0x20 | (0x02 if len(data) == 1 else 0x08)
    return struct.pack(">Q", page * BIG | flags) + data


def test_records_are_received_until_another_comes(ends, slow, block):
    """More than the buffer holds, in pieces that end anywhere."""
    here = Records(slow, ends[1])
    here.fresh[30] = 1
    data = b"".join(record(i, block[i].tobytes()) for i in range(20))
    data += record(25, b"\0") + record(30, b"\0") + record(3, block[5].tobytes())
    other = struct.pack(">Q", 0x10)

    def send():
        for i in range(0, len(data), 5000):
            ends[0].sendall(data[i : i + 5000])
        ends[0].sendall(other)

    sending = in_background(send)
    told = np.zeros(3, int)
    while here.rest != other:
        told += here.receive()
    sending.result(10)
    assert told.tolist() == [len(data), 21, 2]
    expected = np.full((40, BIG), 7, np.uint8)
    expected[:20], expected[3], expected[25] = block[:20], block[5], 0
    assert np.array_equal(here.rows, expected), "a page that is known to be zero is not written"
    assert here.receive() == (0, 0, 0)


def test_the_end_is_left_to_the_next_who_reads(ends, slow, block):
    here = Records(slow, ends[1])
    whole = record(1, block[1].tobytes())
    ends[0].sendall(whole + whole[:100])
    ends[0].shutdown(socket.SHUT_WR)
    assert here.receive() == (len(whole), 1, 0)
    assert here.rest == whole[:100]
    assert here.receive() == (0, 0, 0)
    assert ends[1].recv(1) == b""


@pytest.mark.parametrize(
    "other",
    [
        *(record(40, b"\0"), record((1 << 52) - 1, b"\0"), record(0, b"\1")),
        *(
            struct.pack(">Q", BIG | flags)
            for flags in (0x08, 0x02, 0x48 | 0x20, 0x2A, 0x28 | 0x200)
        ),
    ],
)
def test_what_is_no_such_record_is_left_as_it_came(ends, slow, other):
    here = Records(slow, ends[1])
    other += bytes(20)
    ends[0].sendall(record(2, b"\0") + other)
    assert here.receive() == (9, 0, 1)
    assert here.rest == other
    assert (np.delete(here.rows, 2, axis=0) == 7).all()


def test_a_record_that_is_there_in_part_is_waited_for_and_a_shutdown_ends_that(ends, slow):
    here = Records(slow, ends[1])
    ends[0].sendall(record(1, bytes(BIG))[:9])
    result = in_background(here.receive)
    ends[1].shutdown(socket.SHUT_RDWR)
    assert result.result(10) == (0, 0, 0)


def test_a_limit_that_comes_while_a_batch_is_sent_is_for_what_follows(ends, monkeypatch):
    """What one call sends would be four seconds under the limit that comes meanwhile."""
    block = RAMBlock("ram", 1000 * BIG)
    block.view[:] = 1
    saved = SaveBlock(block, 0, as_words(block.rows))
    received = in_background(lambda: [*iter(lambda: ends[1].recv(1 << 20), b"")])
    limit = 0
    with DescriptorChannel(sock=ends[0].dup()) as channel:
        ends[0].close()
        out, pages = OutStream(channel), StreamPages(BIG)
        pages.send(saved, np.arange(1), out, Budget())  # with the name of the block
        out.pace = pace = Pace(lambda: limit)
        send = native.records.send

        def meanwhile(*arguments):
            nonlocal limit
            limit = 1_000_000
            return send(*arguments)

        monkeypatch.setattr(
            native, "records", SimpleNamespace(**vars(native.records) | {"send": meanwhile})
        )
        assert pages.send(saved, np.arange(1, 900), out, Budget()).pages == 899
        assert pace.left(time.monotonic() + 1) > 900_000
    assert sum(map(len, received.result(10))) == out.position


WAITING = """
import signal, socket, sys
import numpy as np
from whimbrel_ram import native

def stop(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, stop)
one, other = socket.socketpair()
fd, memory, fresh = one.fileno(), bytearray(4096 << 12), bytearray(4096)
calls = {
    "records.receive": lambda: native.records.receive(fd, bytearray(1 << 18), 0, 0, memory, fresh, 4096),
    "records.send": lambda: native.records.send(fd, memory, np.arange(4096), 4096),
    "packets.send": lambda: native.packets.send(fd, b"ram", memory, np.arange(4096), 4096, 1),
    "packets.receive": lambda: native.packets.receive(fd, head, b"ram", memory, fresh, 4096),
}
head = bytearray(1344)
head[:24] = bytes.fromhex("1122334400000001000000000000008000000001") + (4096).to_bytes(4, "big")
head[64:67] = b"ram"
print("ready", flush=True)
try:
    calls[sys.argv[1]]()
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(
    "call", ["records.receive", "records.send", "packets.send", "packets.receive"]
)
def test_ctrl_c_ends_what_waits_on_the_main_thread(call):
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, call], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        try:
            state = Path(f"/proc/{process.pid}/stat")
            wait_until(lambda: state.read_text().rsplit(")", 1)[1].split()[0] == "S", "its call")
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=10)[0] == "interrupted\n"
        finally:
            process.kill()


@pytest.mark.parametrize("place", [(-1, 0), (2, 1), (0, 1 << 20), (1 << 62, 1 << 62)])
def test_a_place_outside_of_the_buffer_is_refused(ends, slow, place):
    here = Records(slow, ends[1])
    here.start, here.end = place
    with pytest.raises(ValueError, match="outside of the buffer"):
        here.receive()
    here = Records(slow, ends[1], capacity=2 * (8 + BIG) - 1)
    with pytest.raises(ValueError, match="outside of the buffer"):
        here.receive()


def packet(pages, number=1, **changed):
    facts = {"idstr": b"ram", "size": len(pages) * BIG, "flags": 0, **changed}
    return wire.Packet(number=number, normal=np.array(pages, np.uint64) * np.uint64(BIG), **facts)


def test_packets_are_those_of_the_codec(ends, block):
    pages = np.concatenate([np.arange(40)] * 4)  # two packets
    sent = in_background(native.packets.send, ends[0].fileno(), b"ram", block, pages, BIG, 7)
    expected = b""
    for number, some in ((7, pages[:128]), (8, pages[128:])):
        expected += wire.encode(packet(some, number), BIG) + block[some].tobytes()
    assert received(ends[1], len(expected)) == expected
    assert sent.result(10) == len(expected)


class Incoming:
    """A block between canaries, and what has come for it."""

    def __init__(self, slow, sock):
        self.sock = sock
        self.space = slow.Fenced(40 * BIG)
        self.head = bytearray(1344)
        self.fresh = bytearray(b"\1" * 40)

    def take(self, header, data=b"", *, end=True):
        """The packet with that header, which has come, and the data behind it."""
        self.head[:] = header
        self.sock.sendall(data)
        if end:
            self.sock.shutdown(socket.SHUT_WR)
        return self.take_further()

    def take_further(self):
        memory = self.space.memory
        result = native.packets.receive(self.fd, self.head, b"ram", memory, self.fresh, BIG)
        self.space.check()
        return result


@pytest.fixture
def incoming(ends, slow):
    incoming = Incoming(slow, ends[0])
    incoming.fd = ends[1].fileno()
    return incoming


def test_packets_are_put_in_place_until_one_is_another(incoming, block):
    sync = wire.encode(packet([], 3, flags=wire.SYNC), BIG)
    data = block[[5, 6, 9]].tobytes() + wire.encode(packet([1, 0], 2), BIG) + block[:2].tobytes()
    assert incoming.take(wire.encode(packet([5, 6, 9]), BIG), data + sync, end=False) == (
        *(5, len(data) + len(sync)),
        0,
    )
    assert incoming.head == sync
    rows = incoming.space.memory.reshape(40, BIG)
    assert np.array_equal(rows[[5, 6, 9]], block[[5, 6, 9]])
    assert np.array_equal(rows[[1, 0]], block[:2])
    assert [i for i in range(40) if not incoming.fresh[i]] == [0, 1, 5, 6, 9]
    assert not rows[[2, 3, 4, 7, 8, *range(10, 40)]].any()
    assert incoming.take_further() == (0, 0, 0)


@pytest.mark.parametrize("cut", [0, 1, BIG - 1, BIG, 2 * BIG, 2 * BIG + 1, 2 * BIG + 1343])
def test_an_end_says_how_much_is_missing(incoming, block, cut):
    data = (block[:2].tobytes() + bytes(1344))[:cut]
    pages = 2 if cut >= 2 * BIG else 0
    assert incoming.take(wire.encode(packet([0, 1]), BIG), data) == (
        *(pages, cut),
        2 * BIG + 1344 - cut,
    )


HEADERS = {
    "another magic": lambda h: h[:3] + b"\0" + h[4:],
    "another version": lambda h: h[:7] + b"\2" + h[8:],
    "a sync": lambda h: wire.encode(packet([0], flags=wire.SYNC), BIG),
    "packed": lambda h: wire.encode(packet([0], flags=wire.METHODS["zlib"]), BIG),
    "a flag that nobody knows": lambda h: wire.encode(packet([0], flags=0x100), BIG),
    "zero pages": lambda h: wire.encode(
        wire.Packet(idstr=b"ram", zero=np.zeros(1, np.uint64)), BIG
    ),
    "no pages": lambda h: wire.encode(packet([]), BIG),
    "more pages than a packet has": lambda h: h[:16] + struct.pack(">II", 129, 129 * BIG) + h[24:],
    "more pages than were allocated": lambda h: h[:12] + struct.pack(">I", 0) + h[16:],
    "too much allocated": lambda h: h[:12] + struct.pack(">I", 129) + h[16:],
    "too short": lambda h: wire.encode(packet([0], size=BIG - 1), BIG),
    "too long": lambda h: wire.encode(packet([0], size=2 * BIG), BIG),
    "another block": lambda h: wire.encode(packet([0], idstr=b"rom"), BIG),
    "a longer name": lambda h: wire.encode(packet([0], idstr=b"ram0"), BIG),
    "a shorter name": lambda h: wire.encode(packet([0], idstr=b"ra"), BIG),
    "a page behind the end": lambda h: wire.encode(packet([0, 40]), BIG),
    "a page far behind the end": lambda h: wire.encode(packet([0, (1 << 52) - 1]), BIG),
    "half a page": lambda h: h[:320] + struct.pack(">Q", BIG // 2) + h[328:],
}


@pytest.mark.parametrize("what", HEADERS)
def test_any_other_header_is_left_as_it_came(incoming, what):
    header = bytes(HEADERS[what](bytes(wire.encode(packet([0]), BIG))))
    assert incoming.take(header, bytes(4 * BIG)) == (0, 0, 0)
    assert incoming.head == header
    assert all(incoming.fresh)


@given(st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_header_puts_nothing_outside(slow, data):
    header = bytearray(wire.encode(packet([0, 1, 39]), BIG))
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, 343))] = data.draw(st.integers(0, 255))
    one, other = socket.socketpair()
    with one, other:
        incoming = Incoming(slow, one)
        incoming.fd = other.fileno()
        pages, got, missing = incoming.take(header, bytes(3 * BIG))
        assert (pages, got, missing) in {(0, 0, 0), (3, 3 * BIG, 1344)} or got == 3 * BIG < missing
