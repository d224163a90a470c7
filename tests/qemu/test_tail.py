"""Finding the end of device sections that only the vmdescription behind them describes."""

import json
import struct

import pytest
from hypothesis import given, settings, strategies as st

from whimbrel.channel import MemoryChannel
from whimbrel.errors import StreamError
from whimbrel.savevm import TailTaken
from whimbrel.stream import InStream, OutStream
from whimbrel.wire.format import ItemType
from whimbrel.wire.items import SectionHeader
from whimbrel_qemu.tail import ForeignTail, TailReader

COMMIT = b"\x08\0\x02\0\x04" + struct.pack(">I", 0x8000_0007)


def section(number: int, name: str, payload: bytes, instance: int = 0) -> bytes:
    """A FULL section, written out by hand from the format."""
    head = b"\x04" + struct.pack(">I", number) + bytes((len(name),)) + name.encode()
    return head + struct.pack(">II", instance, 1) + payload + b"\x7e" + struct.pack(">I", number)


def described(*sections: tuple[str, int]) -> bytes:
    devices = [
        {
            "name": name,
            "instance_id": 0,
            "size": size,
            "fields": [{"name": "data", "size": size, "type": "buffer"}],
        }
        for name, size in sections
    ]
    return json.dumps({"page_size": 4096, "devices": devices}).encode()


def ended(sections: bytes, text: bytes) -> bytes:
    return sections + b"\0\x06" + struct.pack(">I", len(text)) + text


STATE = struct.pack(">I", 8) + b"running".ljust(100, b"\0")
PAYLOADS = [("timer", b"\x01" * 24), ("cpu", b"\0\x06\0\0\0\x02{}"), ("globalstate", STATE)]
SECTIONS = b"".join(section(i, name, payload) for i, (name, payload) in enumerate(PAYLOADS))
TEXT = described(*((name, len(payload)) for name, payload in PAYLOADS))


def fed(data: bytes, chunk: int) -> TailReader:
    reader = TailReader()
    for start in range(0, len(data), chunk):
        assert reader.tail is None
        reader.feed(data[start : start + chunk])
    return reader


@pytest.mark.parametrize("chunk", [1, 2, 7, 100, 1 << 20])
def test_end_is_found_however_the_bytes_arrive(chunk: int) -> None:
    tail = fed(ended(SECTIONS, TEXT), chunk).tail
    assert tail is not None
    assert tail.sections == SECTIONS
    assert tail.vmdescription == TEXT
    assert tail.run_state == "running"


def test_end_is_not_found_one_byte_early() -> None:
    assert fed(ended(SECTIONS, TEXT)[:-1], 5).tail is None


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_payloads_that_look_like_an_end_do_not_end_it(data: st.DataObject) -> None:
    """Payloads put together of pieces of real ends, cut anywhere."""
    end = ended(b"", TEXT)
    piece = st.one_of(
        st.binary(max_size=6),
        st.builds(lambda a, b: end[min(a, b) : max(a, b)], *(st.integers(0, len(end)),) * 2),
    )
    payloads = [b"".join(p) for p in data.draw(st.lists(st.lists(piece, max_size=4), max_size=4))]
    sections = b"".join(section(i, f"d{i}", p) for i, p in enumerate(payloads))
    text = described(*((f"d{i}", len(p)) for i, p in enumerate(payloads)))
    tail = fed(ended(sections, text), data.draw(st.integers(1, 200))).tail
    assert tail is not None
    assert tail.sections == sections


def test_a_whole_stream_inside_a_payload_is_not_the_end() -> None:
    inner = ended(SECTIONS, TEXT)
    sections = section(9, "flash", inner)
    assert fed(ended(sections, described(("flash", len(inner)))), 64).tail is not None


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        (SECTIONS, described(("timer", 24), ("cpu", 8))),
        (SECTIONS, described(("timer", 24), ("cpu", 9), ("globalstate", 104))),
        (SECTIONS, described(("timer", 24), ("gpu", 8), ("globalstate", 104))),
        (SECTIONS[:-1] + b"\x09", TEXT),
        (SECTIONS + b"\x05", TEXT),
        (SECTIONS + b"\x08\0\x03\0\0", TEXT),  # a command that has no business there
        (SECTIONS, b'{"page_size": 4096}'),
        (SECTIONS, b"{" * 5000),
        (SECTIONS, b'{"page_size": 4096, "devices": [1]}'),
    ],
    ids=["fewer", "longer", "other", "footer", "surplus", "command", "empty", "nested", "type"],
)
def test_description_that_does_not_fit_is_refused_with_its_reason(
    sections: bytes, text: bytes
) -> None:
    reader = fed(ended(sections, text), 1 << 20)
    assert reader.tail is None
    assert reader.rejected is not None


def test_more_can_come_after_a_description_that_did_not_fit() -> None:
    """Its error must not hold on to the data: what is viewed cannot grow."""
    sub = {"vmsd_name": "cpu/x", "version": 1, "fields": []}
    device = {"name": "cpu", "instance_id": 0, "vmsd_name": "cpu", "version": 1, "fields": []}
    lure = {"page_size": 4096, "devices": [device | {"subsections": [sub]}]}
    first = section(0, "cpu", bytes(40))
    inner = ended(first, json.dumps(lure).encode())
    payload = inner[len(section(0, "cpu", b"")) - 5 :]
    reader = TailReader()
    outer = section(0, "cpu", payload)
    reader.feed(outer[:-5])
    assert reader.rejected is not None
    kept = reader.rejected
    reader.feed(ended(outer[-5:], described(("cpu", len(payload)))))
    assert kept is not None
    assert reader.tail is not None


def test_effort_is_linear_in_what_arrives() -> None:
    """Beginnings of long texts, 300,000 of them: looking through each would take hours, and the test has 2 minutes."""
    lure = b"\0\x06\0\x7f\xff\xff{"
    reader = TailReader()
    for _ in range(300):
        reader.feed(lure * 1000 + b"{" * 5000)
    assert reader.tail is None


def test_ping_of_a_source_that_holds_back_the_end_is_seen_and_dropped() -> None:
    reader = TailReader()
    reader.feed(SECTIONS + COMMIT)
    assert reader.ping() == 0x8000_0007
    reader.ping_answered()
    assert reader.ping() is None
    reader.feed(ended(b"", TEXT))
    assert reader.tail is not None
    assert reader.tail.sections == SECTIONS


@pytest.mark.parametrize(
    "data",
    [
        SECTIONS,
        SECTIONS + COMMIT[:-1],
        SECTIONS + COMMIT + b"\0",
        SECTIONS[:-1] + COMMIT,
        SECTIONS + b"\x08\0\x02\0\x04\0\0\0\x01",
        COMMIT,
    ],
    ids=["none", "cut", "not last", "no footer", "not a commit", "no section"],
)
def test_what_is_no_commit_ping_is_not_answered(data: bytes) -> None:
    reader = TailReader()
    reader.feed(data)
    assert reader.ping() is None


def load(data: bytes) -> tuple[ForeignTail, InStream]:
    """The handler reads all of data, as behind the header of the first section."""
    handler = ForeignTail()
    inp = InStream(MemoryChannel(data))
    header = SectionHeader(ItemType.SECTION_FULL, 0, "timer", 0, 1)
    inp.read(1 + 4 + 6 + 8)
    with pytest.raises(TailTaken):
        handler.load(inp, header)
    return handler, inp


def test_handler_writes_back_what_it_loaded() -> None:
    handler, inp = load(ended(SECTIONS, TEXT))
    assert inp.at_end()
    channel = MemoryChannel()
    out = OutStream(channel)
    handler.save(out)
    out.flush()
    assert bytes(channel.data) == SECTIONS
    assert handler.vmdescription == TEXT


def test_stream_without_a_vmdescription_is_refused_with_offset_and_reason() -> None:
    with pytest.raises(StreamError, match="suppress-vmdesc") as caught:
        load(SECTIONS + b"\0")
    assert caught.value.offset == len(SECTIONS) + 1


def test_description_that_does_not_fit_is_named_at_the_end() -> None:
    with pytest.raises(StreamError, match="does not fit") as caught:
        load(ended(SECTIONS, described(("timer", 25))))
    assert "footer" in str(caught.value)
