"""Inputs to begin with: streams made by hand, right and wrong, and what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import targets

import whimbrel_device as wd
from whimbrel_block import codec
from whimbrel_rdma import protocol
from whimbrel_testing.wrong import all_cases
from whimbrel_testing.wrong.pieces import STATE_TEXT, TIMER_PAYLOAD, TIMER_TEXT, opaque, text
from whimbrel_zstd.frames import Packer

#: Committed: one file for each bug that was found, and a name that tells which.
REGRESSIONS = Path(__file__).parent / "regressions"
LONGEST = 20_000


def _stream() -> Iterator[bytes]:
    yield from (case.data() for case in all_cases() if len(case.data()) <= LONGEST)


def _vmdescription() -> Iterator[bytes]:
    nested = {"name": "n", "type": "struct", "size": 1, "struct": {
        "vmsd_name": "s", "version": 1, "fields": [{"name": "x", "type": "uint8", "size": 1}]}}  # fmt: skip
    subsection = {"vmsd_name": "timer/sub", "version": 1, "fields": [nested]}
    array = {"name": "a", "type": "uint32", "size": 4, "array_len": 3}
    for devices in (
        [],
        [TIMER_TEXT],
        [TIMER_TEXT, STATE_TEXT],
        [opaque("opaque", 5)],
        [TIMER_TEXT | {"subsections": [subsection]}],
        [TIMER_TEXT | {"fields": [nested, array, array | {"index": 1}]}],
    ):
        yield text(*devices)
        yield text(*devices) + b"\0" + TIMER_PAYLOAD
        yield text(*devices) + b"\0" + TIMER_PAYLOAD + b"\5\x09timer/sub\0\0\0\1\0"


def _vmstate() -> Iterator[bytes]:
    everything = targets.Everything()
    for version in (1, 3, 4):
        yield bytes((version,)) + wd.encode(everything)[0]
    everything.flag, everything.more = True, targets.More(flag=True, data=b"xyz")
    everything.queue = [targets.Node(key=n) for n in range(3)]
    everything.chain, everything.tree, everything.blob = [1, 2], {7: targets.Inner(a=1)}, b"abc"
    yield b"\3" + wd.encode(everything)[0]


def _qmp() -> Iterator[bytes]:
    for said in (
        b'{"execute":"qmp_capabilities"}{"execute":"query-status","id":[1,{"a":null}]}',
        b"{'execute': 'it\\'s', 'arguments': {'x': [-1.5e+3, true, \"\\ud83d\\ude00\"]}}\r\n",
        b'{"execute":@,"x":1} nope 01 1. \xff{"a" 1}[1,2}]}{,}{1:2}[1 2]',
        b"[" * 600 + b"]" * 600 + b'"\\u00e9\\n\xc3\xa9\xed\xa0\x80"',
    ):
        yield b"\0" + said
        yield b"\6" + said


def _zstd() -> Iterator[bytes]:
    block = (128 << 10 << 3 | 2).to_bytes(3, "little") + b"x"  # that byte, 128 KiB times
    yield b"\x10\x28\xb5\x2f\xfd\x00\x38" + block * 3
    for level in (-7, 1, 12):
        packer = Packer()
        packed = packer.pack([memoryview(b"text " * 100), memoryview(bytes(range(256)))], level)
        yield b"\x00" + b"".join(packed)
        yield b"\xff" + b"".join(packed) + packer.finish()
        packed += packer.pack([memoryview(b"another frame")], level, end=True)
        yield b"\x01" + b"".join(packed)


def _block() -> Iterator[bytes]:
    name = codec.encode_device("drv0")
    zeros = codec.encode_zeros(name, (n * codec.CHUNK for n in range(5)))
    yield from (
        zeros + codec.EOS_RECORD,
        codec.encode_progress(50) + codec.encode_chunk(name, 512, zero=True) + zeros,
        codec.encode_chunk(codec.encode_device("x"), 1 << 60) + codec.EOS_RECORD,
        zeros[:20] + zeros[30:] + codec.encode_progress(100) + codec.EOS_RECORD,
    )


def _rdma() -> Iterator[bytes]:
    for kind in protocol.Kind:
        yield protocol.Message(kind).encode()
    yield protocol.Message(protocol.Kind.QEMU_FILE, b"QEVM", 0).encode()
    yield protocol.encode_blocks([protocol.BlockInfo(1 << 40, 0, 4096, 7)]).encode()
    yield protocol.encode_zero(protocol.ZeroRange(2, (3 << 20) + 4096, 4096)).encode()
    yield protocol.encode_result([protocol.Registered(7, 1 << 40)] * 2).encode()
    for kind in (protocol.Kind.REGISTER_REQUEST, protocol.Kind.UNREGISTER_REQUEST):
        yield protocol.encode_register(kind, [protocol.Register(1, 0, 1)] * 2).encode()


SEEDS = {
    "stream": _stream,
    "vmdescription": _vmdescription,
    "vmstate": _vmstate,
    "qmp": _qmp,
    "zstd": _zstd,
    "block": _block,
    "rdma": _rdma,
}


def seeds(target: str) -> Iterator[bytes]:
    """Those made here, and the regressions."""
    yield from SEEDS[target]()
    folder = REGRESSIONS / target
    if folder.is_dir():
        yield from (path.read_bytes() for path in sorted(folder.iterdir()))


def write(target: str, folder: Path) -> None:
    """As files, named by what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    for data in seeds(target):
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
