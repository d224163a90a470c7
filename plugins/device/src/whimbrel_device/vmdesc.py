"""The vmdescription: what the device sections of a stream consist of, as JSON text behind the end of the stream.

    description = parse(text)
    for device in description.devices:
        size = device.payload_size(payload)      # where the footer of this section stands
        for item in walk(device, payload):       # every byte of it, named
            print(item.path, item.type, item.offset, item.size)

It works on streams of others: sizes come from the text alone, so that a section can be skipped or shown without knowing
the device. The text is the peer's claim; everything in it is bounded and checked, and what does not fit raises StreamError.

Format: QEMU 2.3 and newer. top = {"configuration"?: vmsd, "page_size", "devices": [{"name", "instance_id", vmsd...}]};
vmsd = {"vmsd_name", "version", "fields": [...], "subsections"?: [vmsd...]}; field = {"name", ("array_len" | "index")?,
"type", "struct"?: vmsd, "size"}. `vstruct` and `tmp` have the members of their vmsd in the field itself; lists repeat
those keys for each element, and are opaque bytes to us.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import attrs

from whimbrel.errors import StreamError
from whimbrel.wire.format import MAX_VMDESCRIPTION, ItemType
from whimbrel.wire.items import counted

#: Bounds on what a peer may claim. QEMU's own descriptions nest 6 structs deep, and a section has some MiB at most.
MAX_DEPTH = 32
MAX_SIZE = 1 << 40  # bytes of one section
MAX_ITEMS = 1 << 22  # named pieces of one section
MAX_NAME = 1024  # characters of a field's name or type; QEMU's have some 30

#: Types whose field carries the members of a vmsd itself, once, and consists of nothing else on the wire.
_INLINE = frozenset({"vstruct", "tmp"})
SECTION = "vmdescription"


@attrs.frozen
class Vmsd:
    """The layout of a device, a struct or a subsection. name is "" for a device of opaque bytes."""

    name: str
    version: int
    fields: tuple[Field, ...]
    subsections: tuple[Vmsd, ...] = ()
    #: Bytes of the fields and the subsections with their headers.
    size: int = 0

    @property
    def header(self) -> bytes:
        """What precedes it on the wire when it is a subsection."""
        prefix = bytes((ItemType.SUBSECTION,)) + counted(self.name)
        return prefix + struct.pack(">I", self.version)


@attrs.frozen(kw_only=True)
class Field:
    """One field, one element of an array (index), or a whole array of equal elements (array_len)."""

    name: str
    type: str
    #: Bytes on the wire, of one element where there is array_len.
    size: int
    array_len: int | None = None
    index: int | None = None
    struct: Vmsd | None = None

    @property
    def total(self) -> int:
        """Bytes on the wire, all elements."""
        return self.size if self.array_len is None else self.size * self.array_len


@attrs.frozen(kw_only=True)
class Device:
    """One FULL section."""

    name: str
    instance_id: int
    vmsd: Vmsd

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return self.vmsd.size

    def payload_size(self, payload: memoryview) -> int:
        """Bytes of the payload that starts where `payload` does (more may follow).

        Raises StreamError when payload is shorter, or has no subsection where one is described.
        """
        if len(payload) < self.size:
            raise _too_short(self.name, self.size, len(payload))
        for offset, sub in _subsections(self.vmsd, 0):
            _check_header(self.name, sub.name, sub.header, payload, offset)
        return self.size


@attrs.frozen
class Extent:
    """How long one FULL section is, and where in it subsections begin: all that is needed to pass it by."""

    name: str
    instance_id: int
    #: Bytes of the payload.
    size: int
    #: (offset in the payload, name, header) of each subsection of the device itself.
    headers: tuple[tuple[int, str, bytes], ...]

    def payload_size(self, payload: memoryview) -> int:
        """As Device.payload_size()."""
        if len(payload) < self.size:
            raise _too_short(self.name, self.size, len(payload))
        for offset, sub, header in self.headers:
            _check_header(self.name, sub, header, payload, offset)
        return self.size


@attrs.frozen(kw_only=True)
class Description:
    """A whole vmdescription. `page_size` is the target's, in bytes; `configuration` is known since QEMU 8.2."""

    page_size: int
    devices: tuple[Device, ...]
    configuration: Vmsd | None = None

    @property
    def section_lengths(self) -> tuple[tuple[str, int, int], ...]:
        """(name, instance_id, bytes of the payload) of the FULL sections, in the order of the stream."""
        return tuple((d.name, d.instance_id, d.size) for d in self.devices)


@attrs.frozen
class Item:
    """A piece of a payload: a field that is no struct, or the header of a subsection (type 'subsection').

    The pieces of a section, put together, are its payload. The path names structs, array elements and subsections:
    `ints[2].count`, `cpu/xsave.xcr0`. The offset counts from the start of the payload.
    """

    path: str
    type: str
    offset: int
    size: int
    data: memoryview


# ---- parsing


def parse(text: bytes) -> Description:
    """The description in the text. Raises StreamError for all that is not one."""
    if len(text) > MAX_VMDESCRIPTION:
        raise _error(
            "the text is too long", expected=f"at most {MAX_VMDESCRIPTION}", found=len(text)
        )
    if not text:  # a source may send an empty one
        return Description(page_size=0, devices=())
    try:
        top = json.loads(text.decode("ascii"), object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise _error(f"the text is not JSON: {error}") from error
    if not isinstance(top, _Object):
        raise _error("the text is no JSON object")
    configuration = top.optional("configuration", _Object)
    return Description(
        page_size=top.number("page_size", 1 << 31),
        devices=tuple(_device(_as_object(d)) for d in top.items_of("devices")),
        configuration=_vmsd(configuration, 0) if configuration is not None else None,
    )


class _Object(dict[str, Any]):
    """A JSON object that remembers whether a key was repeated, with accessors that check."""

    __slots__ = ("repeated",)

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = len(self) != len(pairs)

    def _checked(self, key: str, value: object, kind: type[Any]) -> Any:
        if not isinstance(value, kind) or isinstance(value, bool):
            what = "an object" if kind is _Object else f"a {kind.__name__}"
            raise _error(f"'{key}' is not {what}", found=repr(value)[:40])
        return value

    def get_as(self, key: str, kind: type[Any]) -> Any:
        if key not in self:
            raise _error(f"'{key}' is missing", found=f"the keys {', '.join(self)[:80]}")
        return self._checked(key, self[key], kind)

    def optional(self, key: str, kind: type[Any]) -> Any:
        return self._checked(key, self[key], kind) if key in self else None

    def number(self, key: str, limit: int = MAX_SIZE) -> int:
        value: int = self.get_as(key, int)
        if not 0 <= value <= limit:
            raise _error(f"'{key}' is out of bounds", expected=f"0 to {limit}", found=value)
        return value

    def text(self, key: str) -> str:
        value: str = self.get_as(key, str)
        if len(value) > MAX_NAME:
            raise _error(f"'{key}' is too long", expected=f"at most {MAX_NAME}", found=len(value))
        return value

    def items_of(self, key: str) -> list[Any]:
        value: list[Any] = self.get_as(key, list)
        return value


def _as_object(value: object) -> _Object:
    if not isinstance(value, _Object):
        raise _error("an element of a list is not an object", found=repr(value)[:40])
    return value


def _device(entry: _Object) -> Device:
    name: str = entry.text("name")
    try:
        device = Device(
            name=name,
            instance_id=entry.number("instance_id", 0xFFFFFFFF),
            vmsd=_vmsd(entry, 0),
        )
    except StreamError as error:
        error.message = f"{error.message}, in the description of {name!r}"
        raise
    if (size := entry.optional("size", int)) is not None and size != device.size:
        raise _error(f"the fields of {name!r} do not add up", expected=size, found=device.size)
    return device


def _vmsd(entry: _Object, depth: int) -> Vmsd:
    if depth > MAX_DEPTH:
        raise _error("nested too deep", expected=f"at most {MAX_DEPTH} levels")
    if entry.repeated:
        raise _error("a key is repeated", found=f"the keys {', '.join(entry)[:80]}")
    named = "vmsd_name" in entry  # an opaque device has neither name nor version
    name: str = entry.text("vmsd_name") if named else ""
    if not name.isascii() or len(name) > 255:
        raise _error("a vmsd_name is not what a stream can carry", found=repr(name)[:40])
    fields = tuple(_field(_as_object(f), depth) for f in entry.items_of("fields"))
    listed = entry.optional("subsections", list) or ()
    subsections = tuple(_vmsd(_as_object(s), depth + 1) for s in listed)
    for sub in subsections:
        if not sub.name:
            raise _error("a subsection has no name")
    size = sum(f.total for f in fields) + sum(s.size + 6 + len(s.name) for s in subsections)
    if size > MAX_SIZE:
        raise _error("a section is too long", expected=f"at most {MAX_SIZE} bytes", found=size)
    version = entry.number("version", 0xFFFFFFFF) if named else 0
    return Vmsd(name, version, fields, subsections, size)


def _field(entry: _Object, depth: int) -> Field:
    kind: str = entry.text("type")
    size = entry.number("size")
    inner: Vmsd | None = None
    if kind == "struct" and "struct" in entry:
        inner = _vmsd(entry.get_as("struct", _Object), depth + 1)
    elif kind in _INLINE and "fields" in entry and not entry.repeated:
        inner = _vmsd(entry, depth + 1)
    if inner is not None and inner.size != size:
        # Elements of a list that are not announced as such: the measured size is right, the layout is not ours to say.
        inner = None
    return Field(
        name=entry.text("name"),
        type=kind,
        size=size,
        array_len=entry.number("array_len") if "array_len" in entry else None,
        index=entry.number("index") if "index" in entry else None,
        struct=inner,
    )


# ---- walking a payload


def walk(device: Device, payload: memoryview | bytes) -> Iterator[Item]:
    """Every piece of a payload in order, up to its very last byte.

    Raises StreamError when the payload is longer or shorter than described, or has no subsection where one is.
    """
    view = memoryview(payload)
    if len(view) != device.size:
        raise _error(
            "the payload is not as long as described",
            device.name,
            expected=f"{device.size} bytes",
            found=len(view),
        )
    for count, item in enumerate(_walk_vmsd(device, device.vmsd, view, 0, "")):
        if count == MAX_ITEMS:
            raise _error("the section has too many pieces", device.name, expected=MAX_ITEMS)
        yield item


def _walk_vmsd(
    device: Device, vmsd: Vmsd, view: memoryview, offset: int, prefix: str
) -> Iterator[Item]:
    runs: dict[str, int] = {}
    for field in vmsd.fields:
        first = runs.get(field.name, 0) if field.index is None else field.index
        n = 1 if field.array_len is None else field.array_len
        plain = field.array_len is None and field.index is None
        for k in range(n if field.size else min(n, 1)):
            path = prefix + (field.name if plain else f"{field.name}[{first + k}]")
            if field.struct is not None:
                yield from _walk_vmsd(device, field.struct, view, offset, path + ".")
            else:
                data = view[offset : offset + field.size]
                yield Item(path, field.type, offset, field.size, data)
            offset += field.size
        runs[field.name] = first + n
    for sub in vmsd.subsections:
        header = sub.header
        _check_header(device.name, sub.name, header, view, offset)
        data = view[offset : offset + len(header)]
        yield Item(prefix + sub.name, "subsection", offset, len(header), data)
        offset += len(header)
        yield from _walk_vmsd(device, sub, view, offset, f"{prefix}{sub.name}.")
        offset += sub.size


def _subsections(vmsd: Vmsd, offset: int) -> Iterator[tuple[int, Vmsd]]:
    """(offset in the payload, subsection) of the device itself; those inside of structs are for walk()."""
    offset += sum(f.total for f in vmsd.fields)
    for sub in vmsd.subsections:
        yield offset, sub
        offset += len(sub.header)
        yield from _subsections(sub, offset)
        offset += sub.size


def _check_header(device: str, name: str, header: bytes, view: memoryview, offset: int) -> None:
    found = bytes(view[offset : offset + len(header)])
    if found != header:
        raise _error(
            f"no subsection {name} at byte {offset} of the payload",
            device,
            expected=header[:40].hex(" "),
            found=found[:40].hex(" "),
        )


def _too_short(device: str, size: int, found: int) -> StreamError:
    return _error(
        "the section is shorter than described", device, expected=f"{size} bytes", found=found
    )


# ---- passing sections by


#: What comes of taking any JSON for a vmdescription.
_NONSENSE = (ValueError, LookupError, TypeError, AttributeError, struct.error)


def extents(text: bytes) -> tuple[Extent, ...]:
    """Of each device in the text, in the order of the stream. In a fifth of parse()'s time, since what is inside of fields
    is not looked at: for whoever passes the sections by while a machine stands still.

    Raises StreamError where it cannot tell; what parse() takes, it takes.
    """
    try:
        top = json.loads(text.decode("ascii")) if text else {"devices": ()}
        return tuple(map(_extent, top["devices"]))
    except (*_NONSENSE, RecursionError) as error:
        raise _error(f"the text is no vmdescription: {error!r}") from error


def _extent(device: dict[str, Any]) -> Extent:
    headers: list[tuple[int, str, bytes]] = []
    size = _measure(device, 0, headers)
    name, instance_id = device["name"], device["instance_id"]
    if device.get("size", size) != size:
        raise ValueError(f"the fields of {name!r} do not add up to its size")
    name.encode()  # can it be on the wire?
    if type(instance_id) is not int:
        raise ValueError(f"'instance_id' is no number: {instance_id!r}")
    return Extent(name, instance_id, size, tuple(headers))


def _measure(vmsd: dict[str, Any], offset: int, headers: list[tuple[int, str, bytes]]) -> int:
    """The offset in the payload behind a vmsd that begins at `offset`."""
    for field in vmsd["fields"]:
        size, count = field["size"], field.get("array_len", 1)
        if type(size) is not int or type(count) is not int or size < 0 or count < 0:
            raise ValueError(f"no size or array_len: {size!r}, {count!r}")
        offset += size * count
    for sub in vmsd.get("subsections", ()):
        name = sub["vmsd_name"]
        header = bytes((ItemType.SUBSECTION,)) + counted(name) + struct.pack(">I", sub["version"])
        headers.append((offset, name, header))
        offset = _measure(sub, offset + len(header), headers)
    return offset


# ---- finding it


def find(data: memoryview | bytes) -> tuple[int, bytes] | None:
    """Where a stream that ends with a vmdescription has it: the offset of the byte 06, and the text. None: nowhere.

    For a stream that is whole; the text is not parsed here.
    """
    tail_start = max(0, len(data) - MAX_VMDESCRIPTION - 5)
    tail = bytes(data[tail_start:])
    end = len(tail) - 4
    while (at := tail.rfind(ItemType.VMDESCRIPTION, 0, max(0, end))) >= 0:
        text_at = at + 5
        length = int.from_bytes(tail[at + 1 : text_at], "big")
        if length == len(tail) - text_at and tail[text_at : text_at + 1] in (b"{", b""):
            return tail_start + at, tail[text_at:]
        end = at
    return None


# ---- writing


def encode(page_size: int, devices: list[dict[str, Any]]) -> bytes:
    """The text for members as describe() gives them, each with name and instance_id. page_size in bytes."""
    return json.dumps({"page_size": page_size, "devices": devices}).encode("ascii")


def _error(
    message: str, section: str = SECTION, *, expected: object = None, found: object = None
) -> StreamError:
    return StreamError(message, section=section, expected=expected, found=found)
