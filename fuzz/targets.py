"""What is fuzzed: functions of bytes. Each takes them, refuses them with a MigrationError, or has a bug.

A further target is a function here, its name in TARGETS, and its seeds in seeds.py.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import attrs
import zstandard

import whimbrel_device as wd
from whimbrel import EndOfStream, Plugins, Role
from whimbrel.channel import MemoryChannel
from whimbrel.errors import MigrationError, StreamError
from whimbrel.stream import InStream
from whimbrel_block import codec
from whimbrel_device import vmdesc
from whimbrel_monitor.reader import Reader
from whimbrel_monitor.session import Session
from whimbrel_rdma import protocol
from whimbrel_testing.wrong.mutate import keep_and_take_again, load_app

#: Bytes of a payload that a description is laid over.
MAX_PAYLOAD = 64 << 10
#: Bytes that a target unpacks.
MAX_UNPACKED = 4 << 20


def stream(data: bytes) -> None:
    """Whole streams: into an app's machine, and through a keeper, whose file must come back as the same."""
    for load in (load_app, keep_and_take_again):
        with contextlib.suppress(MigrationError):
            load(data)


def vmdescription(data: bytes) -> None:
    """The text behind a stream, and the walk through what it describes. The payload is behind a NUL, which no text has."""
    text, _, payload = data.partition(b"\0")
    try:
        description = vmdesc.parse(text)
    except StreamError:
        return
    for device in description.devices:
        if device.size > MAX_PAYLOAD:
            continue
        whole = payload[: device.size].ljust(device.size, b"\0")
        pieces = []
        with contextlib.suppress(StreamError):
            pieces.extend(vmdesc.walk(device, whole))
            assert b"".join(piece.data for piece in pieces) == whole
            assert device.payload_size(memoryview(whole + b"\5\5")) == device.size


def vmstate(data: bytes) -> None:
    """A device with a field of every kind. The first byte is the version; what loads is saved and loads as the same."""
    if not data:
        return
    one, other = Everything(), Everything()
    try:
        wd.decode(one, data[1:], version=data[0])
    except StreamError:
        assert one == Everything(), "refused, and changed all the same"
        return
    except MigrationError:
        return
    payload, members = wd.encode(one)
    wd.decode(other, payload)
    again, members_again = wd.encode(other)
    assert (again, members_again) == (payload, members)


def qmp(data: bytes) -> None:
    """What a client sends to a monitor. The first byte says how much of it comes at a time."""
    if not data:
        return
    text, step = data[1:] + b"\xff", data[0] + 1
    whole = _read_qmp(text, len(text))
    assert _read_qmp(text, step) == whole, "read in pieces, it is something else"
    assert _read_qmp(text + b'{"a":1}', step)[-1] == {"a": 1}
    session = Session()
    for value in whole:
        answer = session.receive(value)
        line = answer if isinstance(answer, bytes) else answer.reply(None)
        assert line.endswith(b"}\r\n")
        assert len(json.loads(line)) <= 2


def block(data: bytes) -> None:
    """Records of a disk, without the bytes of its chunks: what is read is written again as it came."""
    inp = InStream(MemoryChannel(data))
    with contextlib.suppress(MigrationError):
        while True:
            at = inp.position
            record = codec.read_record(inp)
            came = data[at : inp.position]
            if isinstance(record, codec.Chunk):
                name = codec.encode_device(record.device)
                assert codec.encode_chunk(name, record.offset, zero=record.zero) == came
                more = codec.zeros_behind(inp.buffered(), name, record.offset)
                inp.consume(more * (8 + len(name)))
            elif record is None:
                assert came == codec.EOS_RECORD
            else:
                assert 0 <= record.percent <= 100


def _read_qmp(text: bytes, step: int) -> list[Any]:
    reader, found = Reader(), []
    for at in range(0, len(text), step):
        reader.feed(text[at : at + step])
        found += list(reader)
    return found


def zstd(data: bytes) -> None:
    """What a channel with the filter receives. The first byte is how much is asked for at once; what comes out whole is what
    zstd itself makes of it.
    """
    if not data:
        return
    step, data = 1 + data[0] * 64, data[1:]
    channel = PLUGINS.filter("zstd").wrap(MemoryChannel(data), Role.DESTINATION)
    out, view = bytearray(), memoryview(bytearray(step))
    try:
        while n := channel.recv_into(view):
            out += view[:n]
            if len(out) > MAX_UNPACKED:
                return
    except (EndOfStream, StreamError) as error:
        if error.offset is None or error.offset > len(data):
            raise AssertionError("an error at no place of the input") from error
        return
    whole = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True)
    assert whole.read(MAX_UNPACKED + 1) == out


def rdma(data: bytes) -> None:
    """A control message, and what it asks for, in a machine of three blocks; what is taken is sent as the same."""
    try:
        message = protocol.decode_message(data)
    except StreamError:
        return
    kind, again = message.kind, message
    space = protocol.RamSpace((3 << 20, 4096, (1 << 20) + 4096))
    with contextlib.suppress(StreamError):
        if kind is protocol.Kind.RAM_BLOCKS_RESULT:
            again = protocol.encode_blocks(protocol.decode_blocks(message))
        elif kind is protocol.Kind.COMPRESS:
            for zero in protocol.decode_zeros(message):
                where = space.locate(zero.index, zero.offset, zero.length)
                assert where + zero.length <= space.lengths[zero.index]
        elif kind is protocol.Kind.REGISTER_RESULT:
            again = protocol.encode_result(protocol.decode_result(message, message.repeat))
        elif kind in (protocol.Kind.REGISTER_REQUEST, protocol.Kind.UNREGISTER_REQUEST):
            requests = protocol.decode_register(message)
            again = protocol.encode_register(kind, requests)
            for request in requests:
                start, length = space.chunk_range(request.index, request.at, request.extra)
                assert start + length <= space.lengths[request.index]
    assert len(again.encode()) == len(data)


PLUGINS = Plugins.load()
TARGETS: dict[str, Callable[[bytes], None]] = {
    "stream": stream,
    "vmdescription": vmdescription,
    "vmstate": vmstate,
    "qmp": qmp,
    "zstd": zstd,
    "block": block,
    "rdma": rdma,
}

# ---- a field of every kind


@wd.vmstate("inner", version_id=2)
class Inner:
    a: int = wd.u8()
    b: int = wd.u16(since=2)


@wd.vmstate("node")
class Node:
    key: int = wd.u32()
    inner: Inner = wd.struct(Inner)


@wd.vmstate("more")
class More:
    flag: bool = wd.bool_()
    data: bytes = wd.gbytearray()

    def needed(self) -> bool:
        return self.flag


@wd.vmstate("everything", version_id=3, minimum_version_id=1)
class Everything:
    flag: bool = wd.bool_()
    small: int = wd.i8()
    big: int = wd.u64()
    number: float = wd.float64()
    double: float = wd.cpu_double()
    when: int | None = wd.timer()
    magic: int = wd.u8_equal(default=7)
    at_most: int = wd.int32_le(default=100)
    _hole: None = wd.unused(3)
    text: bytes = wd.buffer(5)
    bits: int = wd.bitmap(70)
    blob: bytes = wd.gbytearray()
    inner: Inner = wd.struct(Inner)
    other: Inner = wd.vstruct(Inner, 1)
    row: list[int] = wd.array(wd.u16, 3)
    rows: list[Inner] = wd.array(Inner, 2)
    queue: list[Node] = wd.qtailq(Node)
    chain: list[int] = wd.qlist(wd.u32)
    tree: dict[int, Inner] = wd.gtree(Inner)
    nodes: list[Inner | None] = wd.pointers(
        Inner, 3, default=attrs.Factory(lambda: [Inner(), None, Inner()])
    )
    late: int = wd.u32(since=3)
    if_flag: int = wd.u32(exists=lambda self: self.flag)
    more: More = wd.subsection(More)
