"""XBZRLE against a codec of one byte at a time, written from the format's description alone."""

import random
import struct
import threading
import types

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from whimbrel import (
    Kernel,
    LocalError,
    Machine,
    Outcome,
    OutStream,
    RunParams,
    Side,
    StreamError,
    hookimpl,
)
from whimbrel.channel import MemoryChannel
from whimbrel.plugins import Plugins
from whimbrel_ram import RAMBlock, RamHandler, TrackerSpec, xbzrle
from whimbrel_ram.decoder import Decoder, Event
from whimbrel_ram.encoder import Encoder
from whimbrel_ram.target import Target
from whimbrel_ram.trackers.shadow import ShadowTracker
from whimbrel_ram.transport import SaveBlock
from whimbrel_ram.xbzrle_pages import XbzrlePages
from whimbrel_ram.zero import as_words
from whimbrel_testing.peers import wait_until

PAGE = 1024
CONTINUE, DELTA, EOS = 0x20, 0x40, struct.pack(">Q", 0x10)


def uleb(n):
    return bytes((n,)) if n < 128 else bytes((n & 127 | 128, n >> 7))


def slow_encode(old, new):
    out, i, end = bytearray(), 0, len(old)
    while i < end:
        start = i
        while i < end and old[i] == new[i]:
            i += 1
        if i == end:
            break
        first = i
        while i < end and old[i] != new[i]:
            i += 1
        out += uleb(first - start) + uleb(i - first) + new[first:i]
    return bytes(out)


def slow_apply(page, delta):
    def take():
        nonlocal i
        n = delta[i]
        i += 1
        if n > 127:
            n = n & 127 | delta[i] << 7
            i += 1
        return n

    i = at = 0
    while i < len(delta):
        at += take()
        n = take()
        page[at : at + n] = delta[i : i + n]
        i, at = i + n, at + n


#: The codec is the same for all examples of a test.
each_example = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def pairs(draw):
    """Pages as they were and as they are: nothing, some bytes, some stretches, everything changed."""
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    old, new = [], []
    for _ in range(draw(st.integers(1, 12))):
        before = rng.randbytes(PAGE)
        after = bytearray(before)
        kind = draw(st.sampled_from(["same", "bytes", "stretches", "all", "edges", "every second"]))
        if kind == "bytes":
            for _ in range(rng.randint(1, 40)):
                after[rng.randrange(PAGE)] ^= rng.randint(1, 255)
        elif kind == "stretches":
            for _ in range(rng.randint(1, 4)):
                start, n = rng.randrange(PAGE), rng.randint(1, 400)
                after[start : start + n] = bytes(b ^ 0xFF for b in after[start : start + n])
        elif kind == "all":
            after = bytearray(b ^ 0x55 for b in before)
        elif kind == "edges":
            after[0] ^= 1
            after[-1] ^= 1
        elif kind == "every second":
            after[::2] = bytes(b ^ 1 for b in before[::2])
        old.append(before)
        new.append(bytes(after))
    return old, new


def rows(pages):
    return as_words(np.frombuffer(b"".join(pages), np.uint8).reshape(-1, PAGE)).copy()


def records(words, data, lengths):
    """Page i as a delta, where it has one."""
    encoder = Encoder(PAGE)
    pages = np.flatnonzero(lengths)
    if not len(pages):
        return b""
    return b"".join(bytes(b) for b in encoder.deltas(b"ram", pages, data, lengths[pages]))


class Receiver:
    def __init__(self, memory):
        self.memory = bytearray(memory)
        self.target = Target("ram", memoryview(self.memory), PAGE)
        self.decoder = Decoder(PAGE, {"ram": self.target}.get)

    def take(self, data, chunk=1 << 20):
        """All of it, of which never more than `chunk` bytes lie ready beyond what is needed."""
        at = 0
        need = 8
        while True:
            piece = data[at : at + max(need, chunk)]
            if len(piece) < need:
                raise EOFError
            taken, event = self.decoder.feed(memoryview(piece), at)
            at += taken
            if event is Event.EOS:
                return at
            assert event is Event.MORE
            need = self.decoder.need


@given(pair=pairs())
@each_example
def test_deltas_are_those_of_one_byte_at_a_time(pair):
    old, new = pair
    data, lengths = xbzrle.encode(rows(old), rows(new))
    expected = [slow_encode(a, b) for a, b in zip(old, new, strict=True)]
    assert lengths.tolist() == [min(len(e), PAGE) for e in expected]
    assert data.tobytes() == b"".join(e for e in expected if len(e) < PAGE)


@given(pair=pairs(), chunk=st.integers(1, 3000))
@each_example
def test_a_page_and_its_delta_make_the_new_page(pair, chunk):
    old, new = pair
    data, lengths = xbzrle.encode(rows(old), rows(new))
    fits = lengths < PAGE
    lengths = np.where(fits, lengths, 0)
    receiver = Receiver(b"".join(old))
    stream = records(rows(new), data, lengths) + EOS
    assert receiver.take(stream, chunk) == len(stream)
    wanted = [n if fit else o for o, n, fit in zip(old, new, fits, strict=True)]
    assert bytes(receiver.memory) == b"".join(wanted)
    assert receiver.decoder.deltas == np.count_nonzero(lengths)


def test_deltas_of_one_page_apply_in_their_order():
    page = bytearray(PAGE)
    stream = b""
    rng = random.Random(5)
    word = DELTA
    for i in range(50):
        new = bytearray(page)
        for _ in range(3):
            new[rng.randrange(PAGE)] ^= rng.randint(1, 255)
        delta = slow_encode(page, new)
        stream += struct.pack(">Q", word) + (b"" if i else b"\3ram")
        stream += struct.pack(">BH", 1, len(delta)) + delta
        word, page = DELTA | CONTINUE, new
    receiver = Receiver(bytes(2 * PAGE))
    receiver.take(stream + EOS)
    assert receiver.memory[:PAGE] == page


def test_examples_of_the_format():
    """The worked examples of the description, literally."""
    old = bytes(4096)
    cases = [
        ("00 01 f9", {0: b"\xf9"}),
        ("00 02 5a 5a 05 01 51", {0: b"ZZ", 7: b"Q"}),
        ("ff 1f 01 07", {4095: b"\x07"}),
        ("ac 02 c8 01" + "ab" * 200, {300: b"\xab" * 200}),
    ]
    for text, changes in cases:
        new = bytearray(old)
        for at, some in changes.items():
            new[at : at + len(some)] = some
        data, _ = xbzrle.encode(
            as_words(np.frombuffer(old, np.uint8).reshape(1, -1)),
            as_words(np.frombuffer(new, np.uint8).reshape(1, -1)),
        )
        assert data.tobytes() == bytes.fromhex(text)
        page = bytearray(old)
        slow_apply(page, bytes.fromhex(text))
        assert page == new


@pytest.mark.parametrize(
    ("delta", "why"),
    [
        ("05", "ends with an unchanged run"),
        ("00 01 f9 05", "ends with an unchanged run"),
        ("00 01 f9 00 01 f9", "unchanged run of 0 bytes inside"),
        ("01 00", "changed run of 0 bytes"),
        ("01 04 f9", "behind the end of the delta"),
        ("ff 07 02 f9 f9", "behind the end of the page"),
        ("ff ff", "ends with an unchanged run"),
        ("81", "ends with an unchanged run"),
        ("00 81", "behind the end of the delta"),
    ],
)
def test_what_cannot_be_decoded_is_refused_where_it_stands(delta, why):
    data = bytes.fromhex(delta)
    good = struct.pack(">Q", PAGE | DELTA) + b"\3ram" + b"\1\0\3\0\1\7"
    bad = struct.pack(">QBH", DELTA | CONTINUE, 1, len(data)) + data
    receiver = Receiver(bytes(2 * PAGE))
    with pytest.raises(StreamError, match=why) as caught:
        receiver.take(good + bad + EOS)
    assert (caught.value.section, caught.value.offset) == ("ram", len(good))
    assert not any(receiver.memory), "nothing is written of what is refused"


@pytest.mark.parametrize("head", [b"\0\0\1", b"\2\0\1", b"\1\4\1", b"\1\xff\xff"])
def test_bad_heads_are_refused(head):
    start = struct.pack(">Q", DELTA) + b"\3ram"
    with pytest.raises(StreamError, match="bad head") as caught:
        Receiver(bytes(PAGE)).take(start + head + bytes(70000) + EOS)
    assert caught.value.offset == len(start)


def test_a_page_beyond_the_block_is_refused():
    start = struct.pack(">Q", 2 * PAGE | DELTA) + b"\3ram"
    with pytest.raises(StreamError, match="behind the end of RAM block"):
        Receiver(bytes(2 * PAGE)).take(start + b"\1\0\3\0\1\7" + EOS)


# ---- the cache


def numbers(*pages):
    return np.array(pages, np.intp)


def some():
    return np.empty((4, PAGE // 8), np.uint64)


def test_a_slot_is_kept_while_its_page_is_in_use():
    cache = xbzrle.Cache(4 * PAGE, PAGE)
    cache.put(numbers(0, 1), rows([b"a" * PAGE, b"b" * PAGE]), 1)
    assert cache.holds(numbers(0, 1, 4, 2)).tolist() == [True, True, False, False]
    cache.put(numbers(4), rows([b"c" * PAGE]), 2)  # page 0 was sent in the round before
    assert cache.holds(numbers(0, 4)).tolist() == [True, False]
    cache.put(numbers(1), 0, 2)
    cache.put(numbers(4, 5), rows([b"d" * PAGE, b"e" * PAGE]), 3)
    assert cache.holds(numbers(0, 4, 1, 5)).tolist() == [False, True, True, False]
    assert cache.get(numbers(4, 1), some()).tobytes() == b"d" * PAGE + bytes(PAGE)


@pytest.mark.parametrize("size", [2, 4, 16])
def test_a_resized_cache_keeps_what_fits(size):
    cache = xbzrle.Cache(4 * PAGE, PAGE)
    for age, page in enumerate((0, 5, 2, 7), 1):
        cache.put(numbers(page), rows([bytes([page]) * PAGE]), age)
    other = cache.resized(size * PAGE)
    kept = [p for p in (0, 5, 2, 7) if other.holds(numbers(p))[0]]
    assert kept == ([2, 7] if size == 2 else [0, 5, 2, 7])
    for page in kept:
        assert other.get(numbers(page), some()).tobytes() == bytes([page]) * PAGE


# ---- the whole


def test_a_machine_that_goes_on_writing_moves_in_deltas(tmp_path):
    """Every page is written a little, again and again, while it moves: what arrives is what the source stopped with."""
    size, page = 16 << 20, 4096
    here, there = RAMBlock("ram", size), RAMBlock("ram", size)
    here.view[:] = np.random.default_rng(1).integers(256, size=size, dtype=np.uint8)
    hot = here.view.reshape(-1, page)[:1500]
    stop = threading.Event()
    here_and_there = [np.random.default_rng(seed) for seed in (2, 3)]

    def write(rng):
        hot[rng.integers(len(hot), size=200), rng.integers(page, size=200)] += 1

    def write_on():
        while not stop.wait(0.001):
            write(here_and_there[0])

    class WrittenAtEachLook(ShadowTracker):
        """However fast it is looked at, there is something new until the machine stops."""

        def sync(self, block):
            if not stop.is_set():
                write(here_and_there[1])
            return super().sync(block)

    def trackers():
        return [TrackerSpec(name="t", priority=0, factory=WrittenAtEachLook, probe=lambda _: None)]

    plugin = types.ModuleType("writes at each look")
    plugin.whimbrel_api = (1, 0)
    plugin.dirty_trackers = hookimpl(trackers, specname="dirty_trackers")
    plugins = Plugins.load()
    plugins.register(plugin, "test")
    writer = threading.Thread(target=write_on)

    def halt():
        stop.set()
        writer.join()

    source = Machine("m-1", stop=halt)
    source.add(here)
    destination = Machine("m-1")
    destination.add(there)
    kernel = Kernel(source, plugins=plugins)
    kernel.settings.update({"xbzrle": True, "xbzrle-cache-size": 8 << 20, "downtime-limit": 0})
    kernel.settings["dirty-tracker"] = "t"
    kernel.settings["max-bandwidth"] = 64 << 20
    incoming = Kernel(destination).incoming(f"unix:{tmp_path}/m")
    writer.start()
    outgoing = kernel.migrate(f"unix:{tmp_path}/m")
    wait_until(lambda: kernel.query().get("xbzrle-cache", {}).get("pages", 0) > 2000, "deltas")
    kernel.settings["xbzrle-cache-size"] = 4 << 20  # while it runs
    wait_until(lambda: kernel.query()["xbzrle-cache"]["cache-size"] == 4 << 20, "a smaller cache")
    kernel.settings["downtime-limit"] = 2000
    outgoing.wait(60)
    incoming.wait(60)
    assert there.view.tobytes() == here.view.tobytes()
    figures = kernel.query()
    cache, ram = figures["xbzrle-cache"], figures["ram"]
    assert 0 < cache["bytes"] < cache["pages"] * page
    assert cache["encoding-rate"] > 1
    assert (
        ram["normal"] * page < ram["transferred"] < ram["normal"] * page * 1.1 + cache["bytes"] * 2
    )
    assert ram["remaining"] == 0


def test_it_is_the_source_s_to_switch():
    kernel = Kernel(Machine("m-1"))
    assert kernel.settings["xbzrle"] is False
    (capability,) = [s for s in kernel.settings.declared() if s.name == "xbzrle"]
    assert capability.side is Side.SOURCE


def test_pages_too_large_for_its_runs_are_refused(tmp_path):
    block = RAMBlock("ram", 1 << 20, page_size=65536)
    handler = RamHandler(
        [block], page_size=65536, find_pages=lambda _: XbzrlePages(65536, lambda: 1 << 20)
    )
    with pytest.raises(LocalError, match="Switch xbzrle off"):
        handler.setup(OutStream(MemoryChannel()), RunParams())
    handler.cleanup(Outcome.FAILED)


def test_a_cache_larger_than_the_ram_takes_no_more_than_that():
    block = RAMBlock("ram", 5 * PAGE, page_size=PAGE)
    pages = XbzrlePages(PAGE, lambda: 1 << 62)
    pages.begin([SaveBlock(block, 0, as_words(block.rows))], OutStream(MemoryChannel()))
    assert pages._fit_cache().slots == 8
    assert pages.query()["xbzrle-cache"]["cache-size"] == 1 << 62
