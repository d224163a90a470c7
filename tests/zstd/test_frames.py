"""Frames: what goes in comes out, and what does not belong there is refused where it stands."""

import io
import struct

import pytest
import zstandard
from hypothesis import given, strategies as st

from whimbrel import StreamError
from whimbrel_testing.transport_suite import pattern
from whimbrel_zstd import frames
from whimbrel_zstd.frames import FRAME, MAGIC, MAX_BLOCK, MAX_PIECE, MAX_WINDOW, Packer, Unpacker
from whimbrel_zstd.plugin import LEVELS

MIB = 1 << 20


def unpack(data, step=None):
    """All of data, given to an Unpacker in steps of so many bytes; what it does not take yet is left."""
    unpacker, out, have = Unpacker(), bytearray(), b""
    step = step or max(1, len(data))
    for start in range(0, len(data), step):
        have += data[start : start + step]
        while have and (taken := unpacker.take(memoryview(have))) is not None:
            size, some = taken
            assert len(some) <= MAX_BLOCK
            out += some
            have = have[size:]
        assert len(have) < MAX_PIECE
    return bytes(out), unpacker, have


def packed(*portions, level=3):
    packer = Packer()
    parts = [part for some in portions for part in packer.pack([memoryview(some)], level)]
    return b"".join(parts) + packer.finish()


def half_random(size):
    """Each byte has four bits of entropy."""
    return pattern(size).translate(bytes(value & 15 for value in range(256)))


@pytest.mark.parametrize("level", LEVELS)
def test_what_was_packed_at_any_level_is_unpacked(level):
    data = half_random(300_000)
    small = packed(data, b"", b"x", level=level)
    if level > 0:  # below, only repetitions make it shorter
        assert len(small) < len(data) * 0.7
    out, unpacker, rest = unpack(small)
    assert (out, unpacker.in_frame, rest) == (data + b"x", False, b"")
    assert unpacker.offset == len(small)


@given(
    st.lists(st.tuples(st.binary(max_size=50), st.integers(1, 5000), st.booleans()), max_size=8),
    st.integers(1, 3000),
)
def test_any_portions_in_any_steps(portions, step):
    """Each is there when it was packed; zstd itself reads all as well."""
    packer, plain, small = Packer(), b"", b""
    for data, times, end in portions:
        plain += data * times
        small += b"".join(packer.pack([memoryview(data * times)], 1, end=end))
        assert unpack(small)[0] == plain
    small += packer.finish()
    out, unpacker, rest = unpack(small, step)
    assert (out, unpacker.in_frame, rest) == (plain, False, b"")
    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(small), read_across_frames=True)
    assert reader.read() == plain


def test_another_level_and_many_bytes_begin_a_new_frame():
    packer, small = Packer(), b""

    def ends_with(data, level):
        nonlocal small
        small += b"".join(packer.pack([memoryview(data)], level))
        return not unpack(small)[1].in_frame

    assert not ends_with(bytes(FRAME // 2), 1)
    assert ends_with(bytes(FRAME // 2), 1), "as many bytes as a frame has"
    assert not ends_with(b"x", 1)
    assert ends_with(b"x", 2), "the next one has the new level"
    assert not ends_with(b"x", 2)
    assert packer.finish()
    assert packer.finish() == b""


def test_every_changed_bit_is_noticed():
    """At the latest by the checksum: then what came out before it was wrong, and nothing comes behind it."""
    data = half_random(3000)
    small = packed(data)
    for at in range(len(small)):
        for bit in (0x01, 0x10, 0x80):
            wrong = bytearray(small)
            wrong[at] ^= bit
            try:
                out, unpacker, rest = unpack(bytes(wrong))
            except StreamError as error:
                assert error.offset is not None
                assert error.offset <= len(small)
                continue
            assert out == data or unpacker.in_frame or rest, f"bit {bit:#x} of byte {at}"


def test_a_wrong_checksum_is_an_error_with_its_offset():
    small = packed(b"hello " * 100)
    wrong = small[:-1] + bytes((small[-1] ^ 1,))
    with pytest.raises(StreamError, match="checksum") as caught:
        unpack(wrong)
    assert 0 < caught.value.offset < len(small)


def test_what_is_no_zstd_is_refused_with_what_to_do():
    with pytest.raises(StreamError, match="not compressed") as caught:
        unpack(b"QEVM\0\0\0\3")
    assert caught.value.offset == 0
    assert "'QEVM', as it is" in caught.value.found
    assert "zstd::" in caught.value.hint
    with pytest.raises(StreamError, match="not compressed"):
        unpack(b"G")  # no need to wait for more


def test_garbage_between_frames():
    small = packed(b"first")
    with pytest.raises(StreamError, match="no zstd frame follows") as caught:
        unpack(small + b"\0" + small)
    assert caught.value.offset == len(small)


def header(descriptor, *rest):
    return MAGIC + bytes((descriptor,)) + b"".join(rest)


def block(kind, size, data=b"", *, last=False):
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + data


#: Window_Descriptor 0x00 is 1 KiB, 0x38 128 KiB, 0x68 8 MiB, 0x69 9 MiB, 0xa8 2 GiB.
BAD = {
    "a window of 9 MiB": (header(0x00, b"\x69"), "too much memory"),
    "a window of 2 GiB": (header(0x00, b"\xa8"), "too much memory"),
    "a single segment of 8 EiB": (header(0xE0, struct.pack("<Q", 1 << 63)), "too much memory"),
    "a dictionary": (header(0x01, b"\x38", b"\x07"), "dictionary 7"),
    "a reserved bit": (header(0x08, b"\x38", bytes(8)), "header of a zstd frame is wrong"),
    "a skippable frame": (b"\x50\x2a\x4d\x18" + bytes(8), "not compressed"),
    "a reserved type of block": (header(0x00, b"\x38") + block(3, 1), "a block .* is wrong"),
    "a block of 2 MiB": (header(0x00, b"\x38") + block(0, (1 << 21) - 1), "a block .* is wrong"),
    "a repetition of 2 MiB": (
        header(0x00, b"\x38") + block(1, (1 << 21) - 1, b"x"),
        "a block .* is wrong",
    ),
    "a block larger than its window": (
        header(0x00, b"\x00") + block(0, 2000, bytes(2000)),
        "not what was compressed",
    ),
    "more than the header says": (
        header(0x20, b"\x05") + block(1, 6, b"x", last=True),
        "not what was compressed",
    ),
    "a packed block of garbage": (
        header(0x00, b"\x38") + block(2, 9, b"\xff" * 9),
        "not what was compressed",
    ),
}


@pytest.mark.parametrize(("data", "said"), BAD.values(), ids=BAD)
def test_bad_frames(data, said):
    with pytest.raises(StreamError, match=said) as caught:
        unpack(data)
    assert caught.value.offset is not None


def test_a_bomb_comes_out_block_by_block():
    """Four bytes each that unpack to 128 KiB: no more than that at once, however many follow."""
    bomb = header(0x00, b"\x38") + block(1, MAX_BLOCK, b"x") * 1000
    unpacker, view, sizes = Unpacker(), memoryview(bomb), []
    while view:
        size, out = unpacker.take(view)
        sizes.append(len(out))
        view = view[size:]
    assert max(sizes) == MAX_BLOCK
    assert sum(sizes) == 1000 * MAX_BLOCK


def test_the_widest_window_is_taken():
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=23)
    small = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    data = small.compress(half_random(100)) + small.flush()
    assert zstandard.get_frame_parameters(data).window_size == MAX_WINDOW
    assert unpack(data)[0] == half_random(100)


def test_what_is_sent_never_needs_more_than_is_taken():
    for level in LEVELS:
        sent = b"".join(Packer().pack([memoryview(b"x")], level))
        assert zstandard.get_frame_parameters(sent).window_size <= frames.MAX_WINDOW
