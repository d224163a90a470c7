"""Page records: the batches and runs of the codec against a codec of one record at a time (conftest)."""

import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from whimbrel import EndOfStream, StreamError
from whimbrel_ram import Decoder, Encoder
from whimbrel_ram.decoder import DIRECT_PAGE, Event
from whimbrel_ram.target import Target
from whimbrel_ram.zero import as_words, zero_map

SMALL = 1024
BLOCKS = {"ram": 64 * SMALL, "vga.vram": 7 * SMALL}


def page_of(seed, size=SMALL):
    return random.Random(seed).randbytes(size)


@st.composite
def runs(draw):
    """Stretches of records of one kind in some order, long enough to be taken as runs, and lonely ones between."""
    pieces = []
    for _ in range(draw(st.integers(1, 8))):
        block = draw(st.sampled_from(sorted(BLOCKS)))
        pages = BLOCKS[block] // SMALL
        count = draw(st.integers(1, 40))
        order = draw(st.sampled_from(["up", "down", "stride", "random", "same"]))
        first = draw(st.integers(0, pages - 1))
        step = {"up": 1, "down": -1, "stride": 3, "same": 0, "random": 0}[order]
        numbers = [(first + i * step) % pages for i in range(count)]
        if order == "random":
            numbers = [draw(st.integers(0, pages - 1)) for _ in range(count)]
        kind = draw(st.sampled_from(["zero", "page", "fill", "mixed"]))
        named = draw(st.booleans())
        pieces.append((block, numbers, kind, named, draw(st.integers(0, 1 << 30))))
    return pieces


def records_of(slow, pieces):
    records = []
    last = None
    for block, numbers, kind, named, seed in pieces:
        rng = random.Random(seed)
        for number in numbers:
            what = rng.choice(["zero", "page", "fill"]) if kind == "mixed" else kind
            data = {"zero": 0, "fill": rng.randrange(1, 256)}.get(what)
            data = rng.randbytes(SMALL) if data is None else data
            records.append(slow.Record(block, number, data, block == last and not named))
            last = block
    return records


class Fast:
    """The decoder over fenced memory."""

    def __init__(self, slow, blocks, page_size, filled=0):
        self.fenced = {n: slow.Fenced(size) for n, size in blocks.items()}
        for fenced in self.fenced.values():
            fenced.memory[:] = filled
        self.targets = {
            n: Target(n, memoryview(f.memory), page_size) for n, f in self.fenced.items()
        }
        self.decoder = Decoder(page_size, self.targets.get)

    def run(self, inp):
        need = 8
        while True:
            taken, event = self.decoder.feed(inp.buffered(need), inp.position)
            inp.consume(taken)
            need = self.decoder.need if event is Event.MORE else 8
            if event is Event.FILL:
                inp.read_into(self.decoder.fill)
            elif event is not Event.MORE:
                return event

    def check_fences(self):
        for fenced in self.fenced.values():
            fenced.check()

    def memory(self):
        return {n: bytes(f.memory) for n, f in self.fenced.items()}


@given(
    pieces=runs(),
    chunks=st.lists(st.integers(1, 6000), min_size=1, max_size=5),
    filled=st.sampled_from([0, 9]),
)
@settings(deadline=None, max_examples=150)
def test_runs_are_decoded_as_their_records(slow, pieces, chunks, filled):
    records = records_of(slow, pieces)
    data = slow.encode(records, SMALL) + slow.EOS
    expected = {n: bytearray([filled]) * size for n, size in BLOCKS.items()}
    decoded, used, _ = slow.decode(data, BLOCKS, SMALL)
    slow.apply(decoded, expected, SMALL)

    fast = Fast(slow, BLOCKS, SMALL, filled)
    inp = slow.in_stream(data + b"what follows", chunks)
    assert fast.run(inp) is Event.EOS
    assert inp.position == used == len(data)
    assert fast.memory() == {n: bytes(m) for n, m in expected.items()}
    fast.check_fences()
    assert fast.decoder.duplicate == sum(isinstance(r.data, int) for r in records)
    assert fast.decoder.normal == len(records) - fast.decoder.duplicate


@given(seed=st.integers(0, 1 << 30), share=st.sampled_from([0, 10, 50, 90, 100]))
@settings(deadline=None, max_examples=60)
def test_what_the_encoder_writes_is_what_the_pages_were(slow, seed, share):
    rng = random.Random(seed)
    pages = 3 * (1 << 20) // 4096
    memory = np.zeros((pages, 4096), np.uint8)
    for i in range(pages):
        if rng.randrange(100) >= share:
            memory[i, rng.randrange(4096)] = rng.randrange(1, 256)
    words = as_words(memory)
    assert (zero_map(words) == ~memory.any(axis=1)).all()
    encoder = Encoder(4096)
    chosen = np.array(sorted(rng.sample(range(pages), rng.randint(1, encoder.batch))), np.intp)
    is_zero = ~memory[chosen].any(axis=1)
    data = b""
    for some, encode in (
        (chosen[is_zero], lambda p: encoder.zeros(b"pc.ram", p)),
        (chosen[~is_zero], lambda p: encoder.pages(b"pc.ram", words, p)),
    ):
        if len(some):
            data += b"".join(bytes(b) for b in encode(some))
    records, used, _ = slow.decode(data + slow.EOS, {"pc.ram": memory.nbytes}, 4096)
    assert used == len(data) + 8
    assert [r.short for r in records] == [False] + [True] * (len(chosen) - 1)
    assert sorted(r.page for r in records) == chosen.tolist()
    for r in records:
        assert (bytes(4096) if r.data == 0 else r.data) == memory[r.page].tobytes()


def test_each_block_is_named_once_and_again_after_another(slow):
    encoder = Encoder(SMALL)
    words = as_words(np.ones((8, SMALL), np.uint8))
    data = b""
    for idstr, zero, pages in ((b"a", True, [1, 2]), (b"a", False, [3, 5]), (b"b", False, [0])):
        numbers = np.array(pages, np.intp)
        buffers = encoder.zeros(idstr, numbers) if zero else encoder.pages(idstr, words, numbers)
        data += b"".join(bytes(b) for b in buffers)
    encoder.restart()
    data += b"".join(bytes(b) for b in encoder.zeros(b"b", np.array([7], np.intp)))
    records, _, _ = slow.decode(data + slow.EOS, {"a": 8 * SMALL, "b": 8 * SMALL}, SMALL)
    assert [(r.idstr, r.page, r.short) for r in records] == [
        ("a", 1, False), ("a", 2, True), ("a", 3, True), ("a", 5, True), ("b", 0, False), ("b", 7, False),
    ]  # fmt: skip
    assert {len(r.data) for r in records[2:5]} == {SMALL}


@pytest.mark.parametrize("last_words", [[0], [511], [204], [203], [1], [300], []])
def test_the_zero_test_looks_at_every_word(last_words):
    words = np.zeros((300, 512), np.uint64)
    words[7, last_words] = 1
    words[100:200] = 5
    zero = zero_map(words)
    assert not zero[100:200].any()
    assert zero[7] == (not last_words)
    assert zero.sum() == 200 - (not zero[7])


def test_continue_persists_over_the_end_of_a_section(slow):
    first = slow.encode([slow.Record("vga.vram", 1, page_of(1), False)], SMALL) + slow.EOS
    second = slow.encode([slow.Record("", 2, page_of(2), True)], SMALL) + slow.EOS
    fast = Fast(slow, BLOCKS, SMALL)
    inp = slow.in_stream(first + second)
    assert fast.run(inp) is Event.EOS
    assert fast.run(inp) is Event.EOS
    vram = fast.memory()["vga.vram"]
    assert vram[SMALL : 2 * SMALL] == page_of(1)
    assert vram[2 * SMALL : 3 * SMALL] == page_of(2)


@pytest.mark.parametrize("word", [0x10, 0x30, 0x5000 | 0x10, 0xFFFFFFFFFFFFFC00 | 0x10])
def test_address_bits_and_continue_of_eos_are_ignored(slow, word):
    fast = Fast(slow, BLOCKS, SMALL)
    assert fast.run(slow.in_stream(struct.pack(">Q", word))) is Event.EOS


@pytest.mark.parametrize("flags", [0, 1, 0x0A, 0x18, 0x06, 0x12, 0x20, 0x21, 0x2A, 0x3FF, 0x240])
def test_combinations_of_flags_are_refused(slow, flags):
    data = slow.encode([slow.Record("ram", 0, 0, False)], SMALL) + struct.pack(">Q", flags)
    with pytest.raises(StreamError, match="flags") as caught:
        Fast(slow, BLOCKS, SMALL).run(slow.in_stream(data))
    assert caught.value.section == "ram"
    assert caught.value.offset == len(data) - 8
    assert caught.value.found == f"{flags:#05x}"


@pytest.mark.parametrize(
    ("flags", "words"), [(0x100, "capability compress"), (0x120, "capability compress")]
)
def test_records_of_capabilities_are_refused_by_name(slow, flags, words):
    with pytest.raises(StreamError, match=words) as caught:
        Fast(slow, BLOCKS, SMALL).run(slow.in_stream(struct.pack(">Q", flags)))
    assert caught.value.offset == 0


def test_continue_without_a_block_is_refused(slow):
    with pytest.raises(StreamError, match="CONTINUE comes first"):
        Fast(slow, BLOCKS, SMALL).run(
            slow.in_stream(slow.encode([slow.Record("ram", 0, 0, True)], SMALL))
        )


@pytest.mark.parametrize("name", ["rom", "", "ram2", "ra", "x" * 255])
def test_an_unknown_block_is_refused(slow, name):
    data = slow.encode([slow.Record("ram", 1, 0, False), slow.Record(name, 0, 0, False)], SMALL)
    with pytest.raises(StreamError, match="unknown RAM block") as caught:
        Fast(slow, BLOCKS, SMALL).run(slow.in_stream(data + bytes(300)))
    assert caught.value.offset == 13 + 8
    assert caught.value.found == repr(name)


@pytest.mark.parametrize("count", [0, 3, 12, 50])
@pytest.mark.parametrize("data", [0, 7, page_of(5)], ids=["zero", "fill", "page"])
@pytest.mark.parametrize("beyond", [64, 65, 1 << 40, (1 << 64) // SMALL - 1])
def test_a_page_behind_the_end_is_refused_where_it_is(slow, count, data, beyond):
    """Also in the middle of what is taken as a run; nothing beside the memory is written."""
    good = [slow.Record("ram", 0, data, False)] + [
        slow.Record("ram", i % 64, data, True) for i in range(1, count + 1)
    ]
    start = slow.encode(good, SMALL)
    bad = slow.encode([slow.Record("ram", beyond, data, True)] * 20, SMALL)
    fast = Fast(slow, BLOCKS, SMALL)
    with pytest.raises(StreamError, match="behind the end of RAM block 'ram'") as caught:
        fast.run(slow.in_stream(start + bad))
    assert caught.value.offset == len(start)
    assert caught.value.found == f"{beyond * SMALL:#x}"
    fast.check_fences()


def outcome(slow, data, fast, chunks=(1 << 20,)):
    """What became of a stream: how many bytes it was, or why not. A record that is not a page is refused here."""
    inp = slow.in_stream(data, chunks, buffer_size=1 << 16)
    try:
        event = fast.run(inp)
    except EndOfStream:
        return "ended"
    except StreamError as error:
        located = error.section == "ram" and error.offset in range(len(data) + 1)
        return "refused" if located else f"an error without its place: {error}"
    return inp.position if event is Event.EOS else "refused"


def expectation(slow, data):
    try:
        records, used, _ = slow.decode(data, BLOCKS, SMALL)
    except slow.Refused:
        return "refused", None
    except EOFError:
        return "ended", None
    memory = {n: bytearray(size) for n, size in BLOCKS.items()}
    slow.apply(records, memory, SMALL)
    return used, {n: bytes(m) for n, m in memory.items()}


def sample(slow):
    records = [slow.Record("ram", 0, 0, False)]
    records += [slow.Record("ram", i, 0, True) for i in range(1, 20)]
    records += [slow.Record("ram", i, page_of(i), True) for i in range(20, 27)]
    records += [slow.Record("vga.vram", 3, page_of(99), False), slow.Record("ram", 30, 4, False)]
    deltas = b"".join(
        struct.pack(">QBH", page * SMALL | 0x60, 1, 10) + b"\3\2ab\x81\1\3xyz"
        for page in (5, 21, 5, 9)
    )
    return slow.encode(records, SMALL) + deltas + slow.EOS


def test_a_stream_cut_at_any_byte_ended_early(slow):
    data = sample(slow)
    for end in range(len(data)):
        assert outcome(slow, data[:end], Fast(slow, BLOCKS, SMALL)) == "ended", end


def test_flipped_bytes_do_what_they_do_one_record_at_a_time(slow):
    """2,000 flips: the same verdict, the same memory, and nothing written beside it."""
    data = sample(slow)
    rng = random.Random(2)
    heads = [i for i in range(len(data)) if i < 200 or i % (SMALL + 8) < 40]
    seen = set()
    for _ in range(2000):
        broken = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            where = rng.choice(heads) if rng.random() < 0.8 else rng.randrange(len(data))
            broken[where] ^= 1 << rng.randrange(8)
        expected, memory = expectation(slow, bytes(broken))
        fast = Fast(slow, BLOCKS, SMALL)
        assert outcome(slow, bytes(broken), fast) == expected
        fast.check_fences()
        if memory is not None:
            assert fast.memory() == memory
        seen.add(expected if isinstance(expected, str) else "loaded")
    assert seen >= {"refused", "loaded"}


@given(data=st.binary(max_size=4000))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_an_error_or_records(slow, data):
    fast = Fast(slow, BLOCKS, SMALL)
    assert outcome(slow, data, fast) == expectation(slow, data)[0]
    fast.check_fences()


@pytest.mark.parametrize("page_size", [SMALL, 4096, 16384, DIRECT_PAGE, 1 << 20])
def test_other_page_sizes(slow, page_size):
    blocks = {"ram": 24 * page_size}
    memory = np.zeros((24, page_size), np.uint8)
    memory[2:20, :] = np.arange(2, 20, dtype=np.uint8)[:, None]
    encoder = Encoder(page_size)
    data = b"".join(bytes(b) for b in encoder.zeros(b"ram", np.array([0, 1, 20, 23], np.intp)))
    for i in range(2, 20, encoder.batch):
        some = np.arange(i, min(i + encoder.batch, 20))
        data += b"".join(bytes(b) for b in encoder.pages(b"ram", as_words(memory), some))
    fast = Fast(slow, blocks, page_size, filled=7)
    fast.fenced["ram"].memory.reshape(24, page_size)[21:23] = 0
    assert fast.run(slow.in_stream(data + slow.EOS)) is Event.EOS
    assert fast.memory()["ram"] == memory.tobytes()


def test_zero_records_write_nothing_where_there_is_zero_already(slow):
    """Untouched memory is not even looked at: its pages are marked fresh, and stay without memory."""
    fast = Fast(slow, BLOCKS, SMALL)
    ram = fast.targets["ram"]
    ram.fresh_map[10:] = True
    fast.fenced["ram"].memory.reshape(64, SMALL)[12] = (
        1  # against the mark: would be seen if it were looked at
    )
    records = [slow.Record("ram", 0, 0, False)]
    records += [slow.Record("ram", i, 0, True) for i in range(1, 40)]
    records += [slow.Record("ram", 12 + i, page_of(i), True) for i in range(1, 9)]
    fast.run(slow.in_stream(slow.encode(records, SMALL) + slow.EOS))
    assert fast.fenced["ram"].memory.reshape(64, SMALL)[12].all()
    assert [i for i in range(64) if ram.fresh[i]] == [10, 11, 12, *range(21, 64)]
    again = [slow.Record("ram", 13 + i, 0, True) for i in range(8)]
    fast.run(slow.in_stream(slow.encode(again, SMALL) + slow.EOS))
    assert not fast.fenced["ram"].memory.reshape(64, SMALL)[13:21].any()
