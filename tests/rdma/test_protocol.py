"""The protocol without verbs: what is encoded is decoded, and anything else is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, strategies as st

from whimbrel.errors import StreamError
from whimbrel_rdma import protocol as p
from whimbrel_rdma.protocol import Kind, Message

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


def sent(message: Message) -> Message:
    return p.decode_message(message.encode())


@pytest.mark.parametrize("kind", list(Kind))
def test_each_kind_arrives_as_it_was_sent(kind: Kind):
    message = {
        Kind.QEMU_FILE: Message(kind, b"QEVM", 0),
        Kind.RAM_BLOCKS_RESULT: p.encode_blocks([p.BlockInfo(1, 2, 3, 4)]),
        Kind.COMPRESS: p.encode_zero(p.ZeroRange(1, 2, 3)),
        Kind.REGISTER_REQUEST: p.encode_register(kind, [p.Register(1, 2, 3)]),
        Kind.UNREGISTER_REQUEST: p.encode_register(kind, [p.Register(1, 2, 3)]),
        Kind.REGISTER_RESULT: p.encode_result([p.Registered(1, 2)]),
    }.get(kind, Message(kind))
    assert sent(message) == message


def test_layout():
    """Numbers and places of the fields, byte by byte."""
    header = bytes.fromhex("00000018 00000007 00000001 00000000")
    body = bytes.fromhex("0000000000500000 00000002 00000000 0000000000000003")
    message = p.encode_register(Kind.REGISTER_REQUEST, [p.Register(0x500000, 2, 3)])
    assert message.encode() == header + body
    zero = p.encode_zero(p.ZeroRange(index=3, offset=0x2040000, length=0x20000))
    assert zero.data == bytes.fromhex("00000000 00000003 0000000002040000 0000000000020000")
    result = p.encode_result([p.Registered(0x167C, 0x7F14B1E00000)])
    assert result.data == bytes.fromhex("0000167c 00000000 00007f14b1e00000")
    block = p.encode_blocks([p.BlockInfo(0x7F14B1E00000, 0x2080000, 0x20000, 0x99)])
    assert block.data == bytes.fromhex(
        "00007f14b1e00000 0000000002080000 0000000000020000 00000099 00000000"
    )
    assert p.encode_private(p.PIN_ALL) == bytes.fromhex("00000001 00000001")


@given(st.lists(st.builds(p.BlockInfo, U64, U64, U64, U32), max_size=50))
def test_blocks(blocks: list[p.BlockInfo]):
    assert p.decode_blocks(sent(p.encode_blocks(blocks))) == blocks


@given(st.lists(st.builds(p.Register, U64, U32, U64), min_size=1, max_size=50))
def test_register(requests: list[p.Register]):
    assert p.decode_register(sent(p.encode_register(Kind.REGISTER_REQUEST, requests))) == requests


@given(st.lists(st.builds(p.Registered, U32, U64), min_size=1, max_size=50))
def test_result(results: list[p.Registered]):
    message = sent(p.encode_result(results))
    assert p.decode_result(message, len(results)) == results
    with pytest.raises(StreamError, match="does not answer"):
        p.decode_result(message, len(results) + 1)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes):
    try:
        message = p.decode_message(data)
    except StreamError:
        return
    assert message.encode()[:12] == data[:12]
    assert message.encode()[16:] == data[16:]


@pytest.mark.parametrize(
    ("header", "size", "why"),
    [
        ((0, 0, 1, 0), 0, "unknown RDMA control message"),
        ((0, 12, 1, 0), 0, "unknown RDMA control message"),
        ((1, 2, 1, 0), 0, "wrong length"),
        ((0xFFFFFFFF, 3, 0, 0), 16, "wrong length"),
        ((24, 7, 0xFFFFFFFF, 0), 24, "repeats too often"),
        ((24, 7, 2, 0), 24, "data of the wrong length"),
        ((0, 7, 0, 0), 0, "data of the wrong length"),
        ((33, 5, 1, 0), 33, "data of the wrong length"),
        ((0, 3, 0, 0), 0, "data of the wrong length"),
        ((p.MAX_FILE + 1, 3, 0, 0), p.MAX_FILE + 1, "data of the wrong length"),
        ((4, 9, 1, 0), 4, "data of the wrong length"),
    ],
)
def test_refused(header: tuple[int, ...], size: int, why: str):
    with pytest.raises(StreamError, match=why) as caught:
        p.decode_message(struct.pack(">IIII", *header) + bytes(size))
    assert caught.value.found is not None


def test_compress_of_something_else_than_zero():
    with pytest.raises(StreamError, match="other than zero"):
        p.decode_zeros(sent(p.encode_zero(p.ZeroRange(0, 0, 1, value=7))))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no private data"),
        (struct.pack(">II", 0, 1), "another version"),
        (struct.pack(">II", 2, 1), "another version"),
    ],
)
def test_private_data_refused(data: bytes, why: str):
    with pytest.raises(StreamError, match=why):
        p.decode_private(data)


def test_unknown_flags_are_masked():
    assert p.decode_private(struct.pack(">II", 1, 0xFFFFFFFF) + bytes(48)) == p.PIN_ALL
    assert p.decode_private(struct.pack(">II", 1, 0xFFFFFFFE)) == 0


BLOCKS = [3 << 20, 4096, (1 << 20) + 4096]


@given(U32, U64, U64)
def test_places_outside_are_refused(index: int, offset: int, length: int):
    space = p.RamSpace(BLOCKS)
    try:
        where = space.locate(index, offset, length)
    except StreamError:
        return
    assert 0 <= where <= where + length <= BLOCKS[index]


@given(st.integers(0, 2), st.data())
def test_places_inside_are_found(index: int, data: st.DataObject):
    space = p.RamSpace(BLOCKS)
    where = data.draw(st.integers(0, BLOCKS[index] - 1))
    length = data.draw(st.integers(1, BLOCKS[index] - where))
    assert space.locate(index, space.offsets[index] + where, length) == where
    for beyond in (BLOCKS[index] - where + 1, 2**64 - 1):
        with pytest.raises(StreamError, match="outside RAM block"):
            space.locate(index, space.offsets[index] + where, beyond)


def test_chunks():
    space = p.RamSpace(BLOCKS)
    assert [space.chunks(i) for i in range(3)] == [3, 1, 2]
    assert space.chunk_range(0, 1, 1) == (p.CHUNK, 2 * p.CHUNK)
    assert space.chunk_range(2, 1, 0) == (p.CHUNK, 4096)
    for index, first, extra in ((0, 3, 0), (0, 0, 3), (2, 0, 2**64 - 1), (3, 0, 0)):
        with pytest.raises(StreamError):
            space.chunk_range(index, first, extra)
