"""What stands between the payloads of sections: header, configuration, section headers, footers, commands."""

from __future__ import annotations

import struct
from typing import Any, Protocol

import attrs

from whimbrel.errors import StreamError
from whimbrel.wire.format import (
    COMMAND_LENGTH,
    MAGIC,
    MAGIC_ZSTD,
    MAX_CAPABILITIES,
    MAX_MACHINE_NAME,
    MAX_VMDESCRIPTION,
    VERSION,
    Command,
    ItemType,
)

_U32 = struct.Struct(">I")
_SECTION = struct.Struct(">BI")
_INSTANCE = struct.Struct(">II")
_COMMAND = struct.Struct(">BHH")

_COMPRESSED = (
    "It is compressed with zstd: write zstd:: in front of the URI here, as the source does"
)


class Reader(Protocol):
    """Where decoders take their bytes from: an InStream, or a BufferReader."""

    @property
    def position(self) -> int:
        """Byte offset in the stream of the next byte."""

    def read(self, n: int) -> bytes:
        """Exactly n bytes; raises EndOfStream."""


@attrs.frozen
class SectionHeader:
    """What a section says of itself. For PART and END, driver and tools fill in what the START said."""

    type: ItemType
    section_id: int
    idstr: str = ""
    instance_id: int = 0
    version_id: int = 0

    def __str__(self) -> str:
        return f"{self.idstr or '?'} (id {self.section_id}, instance {self.instance_id})"


@attrs.frozen(kw_only=True)
class Configuration:
    """The configuration section: what the two machines must have in common."""

    machine_type: str
    target_page_bits: int | None = None
    #: Names of those capabilities that are on and on the wire.
    capabilities: tuple[str, ...] | None = None
    uuid: bytes | None = None


def counted(text: str | bytes) -> bytes:
    """A string behind a length byte. Raises ValueError above 255 bytes."""
    raw = text.encode() if isinstance(text, str) else text
    if len(raw) > 255:
        raise ValueError(
            f"a counted string holds at most 255 bytes, not {len(raw)}: {raw[:40]!r}..."
        )
    return bytes((len(raw),)) + raw


def shown(raw: bytes) -> str:
    """Text for messages: what is not printable ASCII comes out escaped, so that no terminal obeys a peer."""
    text = raw.decode("ascii", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def read_counted(reader: Reader) -> str:
    """A counted string, for messages: see shown()."""
    return shown(reader.read(reader.read(1)[0]))


def read_name(
    reader: Reader, what: str, *, length: int | None = None, section: str | None = None
) -> str:
    """The name of `what`, exactly as it came: it may have to be sent on. length: None where a byte gives it.

    Raises StreamError for one that is not printable ASCII; no machine has such parts.
    """
    offset = reader.position
    raw = reader.read(reader.read(1)[0] if length is None else length)
    name = shown(raw)
    if not raw or name.encode() != raw:
        raise StreamError(
            f"{what} without a printable name",
            section=section,
            offset=offset,
            expected="a name in ASCII",
            found=f"'{name}'",
        )
    return name


def read_u32(reader: Reader) -> int:
    return int(_U32.unpack(reader.read(4))[0])


# ---- header


def encode_header() -> bytes:
    return struct.pack(">II", MAGIC, VERSION)


def read_header(reader: Reader) -> None:
    offset = reader.position
    magic = read_u32(reader)
    if magic != MAGIC:
        raise StreamError(
            "this is not a migration stream",
            offset=offset,
            expected="51 45 56 4d ('QEVM')",
            found=_U32.pack(magic).hex(" "),
            hint=_COMPRESSED if magic == MAGIC_ZSTD else None,
        )
    version = read_u32(reader)
    if version != VERSION:
        raise StreamError(
            "unsupported stream version", offset=offset + 4, expected=VERSION, found=version
        )


# ---- configuration

_PAGE_BITS, _CAPABILITIES, _UUID = "target-page-bits", "capabilities", "uuid"


def _subsection(name: str, payload: bytes) -> bytes:
    return bytes((ItemType.SUBSECTION,)) + counted(f"configuration/{name}") + _U32.pack(1) + payload


def encode_configuration(config: Configuration) -> bytes:
    name = config.machine_type.encode()
    parts = [bytes((ItemType.CONFIGURATION,)), _U32.pack(len(name)), name]
    if config.target_page_bits is not None:
        parts.append(_subsection(_PAGE_BITS, _U32.pack(config.target_page_bits)))
    if config.capabilities:
        payload = _U32.pack(len(config.capabilities))
        payload += b"".join(counted(c) for c in config.capabilities)
        parts.append(_subsection(_CAPABILITIES, payload))
    if config.uuid is not None:
        parts.append(_subsection(_UUID, config.uuid))
    return b"".join(parts)


def describe_configuration(config: Configuration) -> dict[str, Any]:
    """Its member of the vmdescription, as QEMU has it since 8.2."""

    def vmsd(name: str, *fields: tuple[str, str, int]) -> dict[str, Any]:
        members = [{"name": n, "type": t, "size": s} for n, t, s in fields]
        return {"vmsd_name": name, "version": 1, "fields": members}

    length = len(config.machine_type.encode())
    text = vmsd("configuration", ("len", "uint32", 4), ("name", "buffer", length))
    subsections = []
    if config.target_page_bits is not None:
        name = f"configuration/{_PAGE_BITS}"
        subsections.append(vmsd(name, ("target_page_bits", "uint32", 4)))
    if config.capabilities:
        fields = [("capabilities", "capability", len(counted(c))) for c in config.capabilities]
        name = f"configuration/{_CAPABILITIES}"
        subsections.append(vmsd(name, ("caps_count", "uint32", 4), *fields))
    if config.uuid is not None:
        subsections.append(vmsd(f"configuration/{_UUID}", ("uuid", "uint8", 1)))
        subsections[-1]["fields"][0]["array_len"] = 16
    if subsections:
        text["subsections"] = subsections
    return text


def read_configuration(reader: Reader, next_type: int) -> tuple[Configuration, int]:
    """The section whose type byte was just read; returns it and the type byte of the item behind it."""
    if next_type != ItemType.CONFIGURATION:
        raise StreamError(
            "the configuration section is missing",
            offset=reader.position - 1,
            expected="07",
            found=f"{next_type:02x}",
            hint="A source of the 2013 form sends none: choose that profile to receive from it",
        )
    offset = reader.position
    length = read_u32(reader)
    if length > MAX_MACHINE_NAME:
        raise StreamError(
            "the machine type in the configuration is too long",
            section="configuration",
            offset=offset,
            expected=f"at most {MAX_MACHINE_NAME} bytes",
            found=length,
        )
    machine_type = read_name(reader, "a machine type", length=length, section="configuration")
    bits: int | None = None
    capabilities: tuple[str, ...] | None = None
    uuid: bytes | None = None
    while (next_type := reader.read(1)[0]) == ItemType.SUBSECTION:
        offset = reader.position
        name = read_counted(reader).removeprefix("configuration/")
        version = read_u32(reader)
        if version != 1:
            raise StreamError(
                f"subsection {name} has an unsupported version",
                section="configuration",
                offset=offset,
                expected=1,
                found=version,
            )
        if name == _PAGE_BITS:
            bits = read_u32(reader)
        elif name == _CAPABILITIES:
            count = read_u32(reader)
            if count > MAX_CAPABILITIES:
                raise StreamError(
                    "too many capabilities",
                    section="configuration",
                    offset=offset,
                    expected=f"at most {MAX_CAPABILITIES}",
                    found=count,
                )
            capabilities = tuple(
                read_name(reader, "a capability", section="configuration") for _ in range(count)
            )
        elif name == _UUID:
            uuid = reader.read(16)
        else:
            raise StreamError(
                f"unknown subsection '{name}'",
                section="configuration",
                offset=offset,
                expected=f"one of {_PAGE_BITS}, {_CAPABILITIES}, {_UUID}",
            )
    config = Configuration(
        machine_type=machine_type, target_page_bits=bits, capabilities=capabilities, uuid=uuid
    )
    return config, next_type


# ---- sections


def encode_section_header(header: SectionHeader) -> bytes:
    head = _SECTION.pack(header.type, header.section_id)
    if header.type in (ItemType.SECTION_START, ItemType.SECTION_FULL):
        head += counted(header.idstr) + _INSTANCE.pack(header.instance_id, header.version_id)
    return head


def read_section_header(reader: Reader, item: ItemType) -> SectionHeader:
    """The header whose type byte was just read."""
    section_id = read_u32(reader)
    if item not in (ItemType.SECTION_START, ItemType.SECTION_FULL):
        return SectionHeader(item, section_id)
    idstr = read_name(reader, "a section")
    instance_id, version_id = _INSTANCE.unpack(reader.read(8))
    return SectionHeader(item, section_id, idstr, instance_id, version_id)


def encode_footer(section_id: int) -> bytes:
    return _SECTION.pack(ItemType.FOOTER, section_id)


def read_footer(reader: Reader, header: SectionHeader) -> None:
    offset = reader.position
    found = reader.read(5)
    expected = encode_footer(header.section_id)
    if found != expected:
        what = (
            "wrong section id in the footer" if found[0] == expected[0] else "the footer is missing"
        )
        raise StreamError(
            f"{what}: the payload is longer or shorter than this side's description of the section",
            section=header.idstr,
            offset=offset,
            expected=expected.hex(" "),
            found=found.hex(" "),
        )


# ---- commands and the end


def encode_command(command: Command, data: bytes = b"") -> bytes:
    return _COMMAND.pack(ItemType.COMMAND, command, len(data)) + data


def read_command(reader: Reader) -> tuple[Command, bytes]:
    """The command whose type byte was just read."""
    offset = reader.position - 1
    number, length = struct.unpack(">HH", reader.read(4))
    try:
        command = Command(number)
    except ValueError:
        raise StreamError(
            "unknown command", offset=offset, expected="1 to 11", found=number
        ) from None
    fixed = COMMAND_LENGTH.get(command)
    if fixed is not None and length != fixed:
        raise StreamError(
            f"bad length of command {command.name}", offset=offset, expected=fixed, found=length
        )
    return command, reader.read(length)


def encode_vmdescription(text: bytes) -> bytes:
    return bytes((ItemType.VMDESCRIPTION,)) + _U32.pack(len(text)) + text


def read_vmdescription(reader: Reader) -> bytes:
    """The JSON text of the vmdescription whose type byte was just read."""
    offset = reader.position - 1
    length = read_u32(reader)
    if length > MAX_VMDESCRIPTION:
        raise StreamError(
            "the vmdescription is too long",
            section="vmdescription",
            offset=offset,
            expected=f"at most {MAX_VMDESCRIPTION} bytes",
            found=length,
        )
    return reader.read(length)
