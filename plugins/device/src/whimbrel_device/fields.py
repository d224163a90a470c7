"""The fields of a VMState, to be written into the body of a class that @device or @vmstate decorates.

Every helper takes, beside what its type needs:

default     the value of a new object (None of the types asks for one)
validator   an attrs validator; it also runs when the field was loaded, and refuses the section
name        in the vmdescription, where it shall not be the attribute's
since       the first version of the class that has the field; until: the last
exists      exists(obj) -> bool: whether the field is present, judged by earlier fields
repr, eq, kw_only, init   as in attrs

The JSON types in the vmdescription are QEMU's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack

import attrs

from whimbrel_device import kinds
from whimbrel_device.kinds import Kind
from whimbrel_device.layout import METADATA, FieldSpec, Layout
from whimbrel_device.runs import MAX_BYTES, MAX_ELEMENTS

#: Attribute of a class that has a Layout.
LAYOUT = "__whimbrel_vmstate__"


class Options(TypedDict, total=False):
    """What every helper takes."""

    default: Any
    validator: Any
    name: str
    since: int
    until: int
    exists: Callable[[Any], bool]
    repr: bool
    eq: bool
    kw_only: bool
    init: bool


#: A class with a layout, or (for one that is not defined yet) a function that gives it.
StructClass = type | Callable[[], type]


def layout_of(cls: type) -> Layout:
    """The layout of a class that @vmstate or @device has decorated. Raises TypeError."""
    layout = getattr(cls, LAYOUT, None)
    if not isinstance(layout, Layout):
        raise TypeError(f"{cls!r} has no layout: decorate it with @vmstate or @device")
    return layout


def _field(kind: Kind, options: Options, **spec: Any) -> Any:
    rest: dict[str, Any] = dict(options)
    for key in ("name", "since", "until", "exists"):
        if key in rest:
            spec[key] = rest.pop(key)
    if "default" not in rest:
        rest["factory"] = kind.default
    return attrs.field(metadata={METADATA: FieldSpec(kind=kind, **spec)}, **rest)


def _lazy(of: StructClass) -> Callable[[], Layout]:
    if isinstance(of, type):
        layout = layout_of(of)
        return lambda: layout
    return lambda: layout_of(of())


def _kind(of: Any) -> Kind:
    """An element: a helper (u32), what a helper gave (buffer(8)), or a class with a layout."""
    if callable(of) and getattr(of, "__module__", None) == __name__:
        of = of()
    metadata = getattr(of, "metadata", None)
    if isinstance(metadata, dict) and METADATA in metadata:
        spec: FieldSpec = metadata[METADATA]
        return spec.kind
    if isinstance(of, Kind):
        return of
    if not callable(of):
        raise TypeError(f"{of!r} is no field and no class")
    return kinds.Struct(_lazy(of))


# ---- numbers


def bool_(**options: Unpack[Options]) -> Any:
    """One byte, 0 or 1."""
    return _field(kinds.Bool(), options)


def i8(**options: Unpack[Options]) -> Any:
    return _field(kinds.Scalar("int8", "b"), options)


def i16(**options: Unpack[Options]) -> Any:
    return _field(kinds.Scalar("int16", "h"), options)


def i32(**options: Unpack[Options]) -> Any:
    return _field(kinds.Scalar("int32", "i"), options)


def i64(**options: Unpack[Options]) -> Any:
    return _field(kinds.Scalar("int64", "q"), options)


def u8(**options: Unpack[Options]) -> Any:
    return _field(kinds.Scalar("uint8", "B"), options)


def u16(**options: Unpack[Options]) -> Any:
    return _field(kinds.Scalar("uint16", "H"), options)


def u32(**options: Unpack[Options]) -> Any:
    return _field(kinds.Scalar("uint32", "I"), options)


def u64(**options: Unpack[Options]) -> Any:
    return _field(kinds.Scalar("uint64", "Q"), options)


def _equal(kind: str, code: str, options: Options) -> Any:
    return _field(kinds.Checked(kind, code, lambda a, b: a == b, "exactly"), options)


def u8_equal(**options: Unpack[Options]) -> Any:
    """Must be what the destination has; so for all of the *_equal."""
    return _equal("uint8 equal", "B", options)


def u16_equal(**options: Unpack[Options]) -> Any:
    return _equal("uint16 equal", "H", options)


def i32_equal(**options: Unpack[Options]) -> Any:
    return _equal("int32 equal", "i", options)


def u32_equal(**options: Unpack[Options]) -> Any:
    return _equal("uint32 equal", "I", options)


def i64_equal(**options: Unpack[Options]) -> Any:
    return _equal("int64 equal", "q", options)


def u64_equal(**options: Unpack[Options]) -> Any:
    """QEMU calls this one 'int64 equal' in the vmdescription, and so do we."""
    return _equal("int64 equal", "Q", options)


def int32_le(**options: Unpack[Options]) -> Any:
    """An i32 that must be less than or equal to what the destination has (it has nothing to do with byte order)."""
    return _field(kinds.Checked("int32 le", "i", lambda a, b: a <= b, "at most"), options)


def timer(**options: Unpack[Options]) -> Any:
    """When a timer expires, in ns of the device's clock (i64), or None while it is not armed."""
    return _field(kinds.Timer(), options)


def float64(**options: Unpack[Options]) -> Any:
    """A float, as the big-endian bits of an IEEE double."""
    return _field(kinds.Scalar("float64", "d", default=0.0), options)


def cpu_double(**options: Unpack[Options]) -> Any:
    """A float, as the high and then the low u32 of an IEEE double."""
    return _field(kinds.Scalar("CPU_Double_U", "d", default=0.0), options)


# ---- bytes and bits


def buffer(
    size: int | str,
    *,
    mutable: bool = False,
    limit: int = MAX_BYTES,
    **options: Unpack[Options],
) -> Any:
    """Raw bytes: size of them, or as many as the earlier field of that name says (at most limit).

    The value is bytes. A bytearray (which mutable=True starts with) or anything else that gives a writable memoryview of
    that length (mmap, an array) is filled in place by a load.
    """
    return _field(kinds.Buffer(size, limit, mutable=mutable), options)


def opaque(
    size: int | str, kind: str, *, limit: int = MAX_BYTES, **options: Unpack[Options]
) -> Any:
    """A buffer that has another type in the vmdescription: 'pci config', 'msix state', ..."""
    return _field(kinds.Buffer(size, limit, kind=kind), options)


def unused(size: int, **options: Unpack[Options]) -> Any:
    """So many bytes that once meant something: zero when saved, ignored when loaded. Annotate it with None."""
    options.setdefault("name", "unused")
    options.setdefault("repr", False)
    options.setdefault("eq", False)
    options.setdefault("init", False)
    return _field(kinds.Unused(size), options)


def bitmap(bits: int | str, *, limit: int = 8 * MAX_BYTES, **options: Unpack[Options]) -> Any:
    """An int as so many bits, in u64 words."""
    return _field(kinds.Bitmap(bits, limit), options)


def gbytearray(*, limit: int = MAX_BYTES, **options: Unpack[Options]) -> Any:
    """Bytes behind their u32 length; at most limit."""
    return _field(kinds.ByteArray(limit), options)


# ---- structs


def struct(of: StructClass, **options: Unpack[Options]) -> Any:
    """An object of a class with a layout; it is loaded in place."""
    return _field(kinds.Struct(_lazy(of)), options)


def vstruct(of: StructClass, version: int, **options: Unpack[Options]) -> Any:
    """The same, in that version of its class."""
    return _field(kinds.VStruct(_lazy(of), version), options)


def tmp(of: StructClass, **options: Unpack[Options]) -> Any:
    """Values in another form than the object has them: a helper of class `of` is made whenever the object is saved or
    loaded, with the object as its `parent`; its pre_save() takes values from there, its post_load() puts them there.
    The field itself is always None: annotate it so.
    """
    options.setdefault("repr", False)
    options.setdefault("eq", False)
    options.setdefault("init", False)
    return _field(kinds.Tmp(_lazy(of)), options)


def subsection(
    of: StructClass,
    *,
    needed: Callable[[Any], bool] | None = None,
    **options: Unpack[Options],
) -> Any:
    """An object that is sent only when needed(parent) says so (or needed() of its own class; always where there is
    neither). Its name is that of the parent, a slash, and that of its class, or the latter alone where that begins with
    the parent's. Where the stream has none, the object stays as it is.
    """
    for key in ("since", "until", "exists"):
        if key in options:
            raise TypeError(f"a subsection has needed= and versions of its own, not {key}=")
    return _field(kinds.Struct(_lazy(of)), options, subsection=True, needed=needed)


# ---- several


def array(
    of: Any, count: int | str, *, limit: int = MAX_ELEMENTS, **options: Unpack[Options]
) -> Any:
    """A list of count elements, or as many as the earlier field of that name says (at most limit).

    of: a helper (u32), what a helper gave (buffer(8)), or a class with a layout. Elements of a class are loaded in place
    as far as there are some.
    """
    return _field(kinds.Array(_kind(of), count, limit), options)


def pointers(
    of: Any, count: int | str, *, limit: int = MAX_ELEMENTS, **options: Unpack[Options]
) -> Any:
    """An array whose elements may be None. Source and destination must have None at the same places."""
    return _field(kinds.Pointers(_kind(of), count, limit), options)


def qtailq(of: Any, *, limit: int = MAX_ELEMENTS, **options: Unpack[Options]) -> Any:
    """A list of any number of elements (at most limit); loading makes new ones."""
    return _field(kinds.List("qtailq", _kind(of), limit), options)


def qlist(of: Any, *, limit: int = MAX_ELEMENTS, **options: Unpack[Options]) -> Any:
    """The same under QEMU's other name."""
    return _field(kinds.List("qlist", _kind(of), limit), options)


def gtree(
    of: Any,
    *,
    key: Any | Literal["u64"] = "u64",
    limit: int = MAX_ELEMENTS,
    **options: Unpack[Options],
) -> Any:
    """A dict, sorted by key on the wire; keys are u64 or of a hashable, ordered class with a layout."""
    key_kind = kinds.Scalar("uint64", "Q") if key == "u64" else _kind(key)
    return _field(kinds.Tree(key_kind, _kind(of), limit), options)
