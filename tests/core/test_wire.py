"""Codecs: round trips over all values, bounds, and the bytes of real streams."""

import pytest
from hypothesis import given, strategies as st

from whimbrel import EndOfStream, SectionHeader, StreamError
from whimbrel.wire import items, return_path
from whimbrel.wire.format import COMMAND_LENGTH, Answer, Command, ItemType
from whimbrel.wire.items import Configuration

from .conftest import stream_of

u32 = st.integers(0, 2**32 - 1)
names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=255)


def item(data):
    """A reader behind the type byte, as decoders expect it."""
    reader = stream_of(data)
    return reader.u8(), reader


@given(st.sampled_from([ItemType.SECTION_START, ItemType.SECTION_FULL]), u32, names, u32, u32)
def test_named_section_headers(kind, section_id, idstr, instance, version):
    header = SectionHeader(kind, section_id, idstr, instance, version)
    byte, reader = item(items.encode_section_header(header))
    assert items.read_section_header(reader, ItemType(byte)) == header
    assert reader.at_end()


@given(u32)
def test_part_headers(section_id):
    header = SectionHeader(ItemType.SECTION_PART, section_id)
    byte, reader = item(items.encode_section_header(header))
    assert items.read_section_header(reader, ItemType(byte)) == header


def test_a_name_of_length_0_is_refused():
    byte, reader = item(bytes.fromhex("04 00000001 00 00000000 00000001"))
    with pytest.raises(StreamError, match="without a printable name"):
        items.read_section_header(reader, ItemType(byte))


@given(
    st.builds(
        Configuration,
        machine_type=names,
        target_page_bits=st.none() | u32,
        capabilities=st.none() | st.lists(names, min_size=1, max_size=5).map(tuple),
        uuid=st.none() | st.binary(min_size=16, max_size=16),
    ),
    st.integers(0, 255).filter(lambda b: b != ItemType.SUBSECTION),
)
def test_configurations(configuration, next_type):
    byte, reader = item(items.encode_configuration(configuration) + bytes((next_type,)))
    assert items.read_configuration(reader, byte) == (configuration, next_type)


def test_the_configuration_of_a_real_qemu():
    """The example of the reference: capabilities and uuid, QEMU 7.2."""
    uuid = bytes(range(16))
    data = bytes.fromhex("07 0000000d") + b"pc-i440fx-7.2"
    data += (
        bytes.fromhex("05 1a")
        + b"configuration/capabilities"
        + bytes.fromhex("00000001 00000001 0f")
        + b"x-ignore-shared"
    )
    data += bytes.fromhex("05 12") + b"configuration/uuid" + bytes.fromhex("00000001") + uuid
    expected = Configuration(
        machine_type="pc-i440fx-7.2", capabilities=("x-ignore-shared",), uuid=uuid
    )
    assert items.encode_configuration(expected) == data
    byte, reader = item(data + b"\x01")
    assert items.read_configuration(reader, byte) == (expected, 1)


def test_the_head_of_a_real_qemu_stream():
    """Offsets 0 to 0x2b of the annotated capture."""
    data = b"QEVM" + bytes.fromhex("00000003 07") + bytes.fromhex("0000000d") + b"pc-i440fx-7.2"
    data += bytes.fromhex("01 00000002 03 72616d 00000000 00000004")
    ours = items.encode_header() + items.encode_configuration(
        Configuration(machine_type="pc-i440fx-7.2")
    )
    ours += items.encode_section_header(SectionHeader(ItemType.SECTION_START, 2, "ram", 0, 4))
    assert ours == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("07 00000101", "machine type in the configuration is too long"),
        ("07 00000001 61 05 01 78 00000001", "unknown subsection 'x'"),
        ("07 00000001 61 05 12" + b"configuration/uuid".hex() + "00000002", "unsupported version"),
        (
            "07 00000001 61 05 1a" + b"configuration/capabilities".hex() + "00000001 ffffffff",
            "too many capabilities",
        ),
        ("01", "configuration section is missing"),
    ],
)
def test_wrong_configurations(data, message):
    byte, reader = item(bytes.fromhex(data))
    with pytest.raises(StreamError, match=message):
        items.read_configuration(reader, byte)


@pytest.mark.parametrize("command", list(Command))
def test_commands(command):
    payload = bytes(range(COMMAND_LENGTH.get(command, 7)))
    byte, reader = item(items.encode_command(command, payload))
    assert byte == ItemType.COMMAND
    assert items.read_command(reader) == (command, payload)
    assert reader.at_end()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("08 0000 0000", "unknown command"),
        ("08 000c 0000", "unknown command"),
        ("08 0002 0003 000000", "bad length of command PING"),
    ],
)
def test_wrong_commands(data, message):
    _, reader = item(bytes.fromhex(data))
    with pytest.raises(StreamError, match=message):
        items.read_command(reader)


@given(st.sampled_from(list(Answer)), st.binary(max_size=512))
def test_answers(answer, data):
    fixed = return_path._LENGTH.get(answer)
    reader = stream_of(return_path.encode_answer(answer, data))
    if fixed in (None, len(data)):
        assert return_path.read_answer(reader) == (answer, data)
    else:
        with pytest.raises(StreamError, match="bad length"):
            return_path.read_answer(reader)


@pytest.mark.parametrize("data", ["0000 0000", "0008 0000", "0001 0005", "0003 0201"])
def test_wrong_answers(data):
    with pytest.raises(StreamError):
        return_path.read_answer(stream_of(bytes.fromhex(data)))


def test_a_vmdescription_is_bounded_before_it_is_read():
    byte, reader = item(bytes.fromhex("06 ffffffff"))
    with pytest.raises(StreamError, match="too long"):
        items.read_vmdescription(reader)


@given(st.binary(max_size=64))
def test_any_bytes_are_an_error_or_a_value(data):
    """Every decoder: a StreamError or EndOfStream, never another exception."""
    decoders = [
        items.read_header,
        lambda r: items.read_configuration(r, 7),
        lambda r: items.read_section_header(r, ItemType.SECTION_FULL),
        lambda r: items.read_footer(r, SectionHeader(ItemType.SECTION_FULL, 1, "a")),
        items.read_command,
        items.read_vmdescription,
        return_path.read_answer,
    ]
    for decode in decoders:
        try:
            decode(
                stream_of(b"\0" + data) if decode is items.read_vmdescription else stream_of(data)
            )
        except (StreamError, EndOfStream) as error:
            assert error.offset is not None


def test_counted_strings_are_bounded():
    with pytest.raises(ValueError, match="at most 255"):
        items.counted("x" * 256)
