"""What a field can be on the wire. Each kind writes a value, says what it wrote in the words of the vmdescription, and
reads it back.

Format: QEMU's VMState. All integers are big-endian; an array has no count on the wire.
"""

from __future__ import annotations

import abc
import operator
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from whimbrel_device.runs import LoadRun, SaveRun

if TYPE_CHECKING:
    from whimbrel_device.layout import Layout

#: Members of a field in the vmdescription, all but its name.
Entry = dict[str, Any]

NULL_POINTER = b"0"
ELEMENT, END = b"\1", b"\0"  # before each element of a list; behind the last


class Kind(abc.ABC):
    """One field type. Stateless: one instance serves all objects."""

    #: The type's name in the vmdescription.
    type: str = ""
    #: Every value has the same layout and length, so that one entry can stand for all elements of an array.
    uniform: bool = True
    #: One value is one entry: it can be an element.
    single: bool = True
    #: The earlier field that says how long a value is.
    depends: str | None = None

    @abc.abstractmethod
    def default(self) -> Any:
        """The value of a new object."""

    @abc.abstractmethod
    def write(self, run: SaveRun, owner: object, value: Any) -> list[Entry]:
        """Append the bytes of value to run.out; what was written."""

    @abc.abstractmethod
    def read(self, run: LoadRun, owner: object, current: Any) -> Any:
        """The value in the stream, not yet settled; current is what the object has now."""

    def settle(self, run: LoadRun, current: Any, value: Any) -> Any:
        """Turn what read() gave into what is assigned. From here on things change; run.undo gets the way back."""
        return value


class Scalar(Kind):
    """A number of fixed width; code is that of the struct module."""

    def __init__(self, kind: str, code: str, default: Any = 0) -> None:
        self.type = kind
        self._one = struct.Struct(">" + code)
        self._code = code
        self._default = default
        self.size = self._one.size

    def default(self) -> Any:
        return self._default

    def to_wire(self, value: Any) -> Any:
        return value if self._code == "d" else operator.index(value)

    def from_wire(self, run: LoadRun, value: Any) -> Any:
        return value

    def write(self, run: SaveRun, owner: object, value: Any) -> list[Entry]:
        self.write_many(run, (value,))
        return [{"type": self.type, "size": self.size}]

    def read(self, run: LoadRun, owner: object, current: Any) -> Any:
        return self.from_wire(run, self._one.unpack(run.read(self.size))[0])

    def write_many(self, run: SaveRun, values: Sequence[Any]) -> None:
        try:
            wire = [self.to_wire(v) for v in values]
            run.out += struct.pack(f">{len(wire)}{self._code}", *wire)
        except (struct.error, TypeError, OverflowError) as error:
            shown = values[0] if len(values) == 1 else list(values)
            raise run.fail(f"{error}", expected=self.type, found=repr(shown)[:60]) from error

    def read_many(self, run: LoadRun, n: int) -> list[Any]:
        raw = struct.unpack(f">{n}{self._code}", run.read(n * self.size))
        return [self.from_wire(run, v) for v in raw]


class Bool(Scalar):
    def __init__(self) -> None:
        super().__init__("bool", "B", default=False)

    def to_wire(self, value: Any) -> Any:
        return int(bool(value))

    def from_wire(self, run: LoadRun, value: Any) -> Any:
        if value > 1:
            raise run.fail("not a boolean", expected="0 or 1", found=value)
        return bool(value)


class Timer(Scalar):
    """When it expires, in ns of the device's clock; None when it is not armed."""

    def __init__(self) -> None:
        super().__init__("timer", "q", default=None)

    def to_wire(self, value: Any) -> Any:
        return -1 if value is None else operator.index(value)

    def from_wire(self, run: LoadRun, value: Any) -> Any:
        return None if value == -1 else value


class Checked(Scalar):
    """A number that must fit what this machine has: load compares and says no."""

    def __init__(
        self, kind: str, code: str, fits: Callable[[int, int], bool], relation: str
    ) -> None:
        super().__init__(kind, code)
        self._fits = fits
        self._relation = relation

    def read(self, run: LoadRun, owner: object, current: Any) -> Any:
        value = super().read(run, owner, current)
        if not self._fits(value, current):
            raise run.fail(
                "the source's machine differs from this one",
                expected=f"{self._relation} {current}",
                found=value,
                hint="Start the destination with the same configuration of that device",
            )
        return value


class Buffer(Kind):
    """Raw bytes of a fixed number, or as many as an earlier field says. What is writable is filled in place."""

    def __init__(
        self, size: int | str, limit: int, *, kind: str = "buffer", mutable: bool = False
    ) -> None:
        self._make = bytearray if mutable else bytes
        self._size = size
        self.depends = size if isinstance(size, str) else None
        self._limit = limit
        self.type = kind
        self.uniform = isinstance(size, int)

    def default(self) -> Any:
        return self._make(self._size if isinstance(self._size, int) else 0)

    def write(self, run: SaveRun, owner: object, value: Any) -> list[Entry]:
        size = run.number(self._size, owner, self._limit)
        try:
            data = memoryview(value).cast("B")
        except TypeError as error:
            raise run.fail(str(error), expected="bytes", found=repr(value)[:60]) from error
        if len(data) != size:
            raise run.fail("wrong length", expected=f"{size} bytes", found=len(data))
        run.out += data
        return [{"type": self.type, "size": size}]

    def read(self, run: LoadRun, owner: object, current: Any) -> Any:
        return run.read(run.number(self._size, owner, self._limit))

    def settle(self, run: LoadRun, current: Any, value: Any) -> Any:
        try:
            view = memoryview(current).cast("B")
        except TypeError:  # nothing there, or something that has no bytes in one piece
            return value
        if len(view) != len(value):
            return bytearray(value) if isinstance(current, bytearray) else value
        if view.readonly:
            return value
        old = bytes(view)

        def restore() -> None:
            view[:] = old

        run.undo.append(restore)
        view[:] = value
        return current


class Unused(Kind):
    """Bytes that once meant something: zero when saved, ignored when loaded."""

    type = "unused_buffer"

    def __init__(self, size: int) -> None:
        self._size = size

    def default(self) -> Any:
        return None

    def write(self, run: SaveRun, owner: object, value: Any) -> list[Entry]:
        run.out += bytes(self._size)
        return [{"type": self.type, "size": self._size}]

    def read(self, run: LoadRun, owner: object, current: Any) -> Any:
        run.read(self._size)


class Bitmap(Kind):
    """An int whose bit i is bit i%64 of the big-endian u64 word i//64."""

    type = "bitmap"

    def __init__(self, bits: int | str, limit: int) -> None:
        self._bits = bits
        self.depends = bits if isinstance(bits, str) else None
        self._limit = limit
        self.uniform = isinstance(bits, int)

    def default(self) -> Any:
        return 0

    def _words(self, run: SaveRun | LoadRun, owner: object) -> int:
        return (run.number(self._bits, owner, self._limit) + 63) // 64

    def write(self, run: SaveRun, owner: object, value: Any) -> list[Entry]:
        words = self._words(run, owner)
        try:
            little = operator.index(value).to_bytes(8 * words, "little")
        except (OverflowError, TypeError) as error:
            raise run.fail(str(error), expected=f"{self._bits} bits") from error
        run.out += struct.pack(f">{words}Q", *struct.unpack(f"<{words}Q", little))
        return [{"type": self.type, "size": 8 * words}]

    def read(self, run: LoadRun, owner: object, current: Any) -> Any:
        words = self._words(run, owner)
        values = struct.unpack(f">{words}Q", run.read(8 * words))
        return int.from_bytes(struct.pack(f"<{words}Q", *values), "little")


class ByteArray(Kind):
    """Bytes behind their u32 length."""

    type = "GByteArray"
    uniform = False

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def default(self) -> Any:
        return b""

    def write(self, run: SaveRun, owner: object, value: Any) -> list[Entry]:
        if len(value) > self._limit:
            raise run.fail("too long", expected=f"at most {self._limit} bytes", found=len(value))
        run.out += struct.pack(">I", len(value)) + bytes(value)
        return [{"type": self.type, "size": 4 + len(value)}]

    def read(self, run: LoadRun, owner: object, current: Any) -> Any:
        length = int.from_bytes(run.read(4), "big")
        if length > self._limit:
            raise run.fail("too long", expected=f"at most {self._limit} bytes", found=length)
        return run.read(length)


# ---- structs


class Struct(Kind):
    """An object of a class with a layout, in place: its fields, then its subsections. No version on the wire."""

    type = "struct"

    def __init__(self, layout: Callable[[], Layout]) -> None:
        self._layout = layout

    @property
    def layout(self) -> Layout:
        return self._layout()

    @property
    def uniform(self) -> bool:  # type: ignore[override]
        return self.layout.uniform

    def version(self) -> int:
        return self.layout.version_id

    def default(self) -> Any:
        return self.layout.new()

    def write(self, run: SaveRun, owner: object, value: Any) -> list[Entry]:
        start = len(run.out)
        described = self._write(run, value)
        return [{"type": self.type, "struct": described, "size": len(run.out) - start}]

    def _write(self, run: SaveRun, value: Any) -> Entry:
        if not isinstance(value, self.layout.cls):
            raise run.fail(
                "not an object of its class",
                expected=self.layout.cls.__qualname__,
                found=repr(value)[:60],
            )
        return self.layout.write(run, value, version=self.version())

    def read(self, run: LoadRun, owner: object, current: Any) -> Any:
        if not isinstance(current, self.layout.cls):
            current = run.call("making a new object", self.layout.new)
        return self.layout.read(run, current, version=self.version())

    def settle(self, run: LoadRun, current: Any, value: Any) -> Any:
        return value._whimbrel_target  # its own values are assigned by the run


class VStruct(Struct):
    """A struct in a version of its own choosing, whatever version its class has by now."""

    type = "vstruct"

    def __init__(self, layout: Callable[[], Layout], version: int) -> None:
        super().__init__(layout)
        self._version = version

    def version(self) -> int:
        return self._version

    def write(self, run: SaveRun, owner: object, value: Any) -> list[Entry]:
        start = len(run.out)
        described = self._write(run, value)
        return [{"type": self.type, **described, "size": len(run.out) - start}]


class Tmp(Struct):
    """A helper that exists while it is saved or loaded: its pre_save takes values from `parent`, its post_load puts them
    there.
    """

    type = "tmp"

    def default(self) -> Any:
        return None

    def _helper(self, run: SaveRun | LoadRun, owner: object) -> Any:
        helper = run.call("making a helper", self.layout.new)
        object.__setattr__(helper, "parent", owner)
        return helper

    def write(self, run: SaveRun, owner: object, value: Any) -> list[Entry]:
        start = len(run.out)
        described = self._write(run, self._helper(run, owner))
        return [{"type": self.type, **described, "size": len(run.out) - start}]

    def read(self, run: LoadRun, owner: Any, current: Any) -> Any:
        return self.layout.read(
            run, self._helper(run, owner._whimbrel_target), version=self.version()
        )

    def settle(self, run: LoadRun, current: Any, value: Any) -> Any:
        return None


# ---- several


class Array(Kind):
    """Elements one after the other; how many is fixed or the value of an earlier field."""

    single = False

    def __init__(self, of: Kind, count: int | str, limit: int) -> None:
        if not of.single:
            raise TypeError("an array of arrays: make it one array of all elements")
        self.of = of
        self.type = of.type
        self._count = count
        self.depends = count if isinstance(count, str) else None
        self._limit = limit

    @property
    def uniform(self) -> bool:  # type: ignore[override]
        return isinstance(self._count, int) and self.of.uniform

    def default(self) -> Any:
        return [
            self.of.default() for _ in range(self._count if isinstance(self._count, int) else 0)
        ]

    def _check(self, run: SaveRun, owner: object, value: Any) -> int:
        n = run.number(self._count, owner, self._limit)
        if len(value) != n:
            raise run.fail("wrong number of elements", expected=n, found=len(value))
        return n

    def write(self, run: SaveRun, owner: object, value: Any) -> list[Entry]:
        n = self._check(run, owner, value)
        if isinstance(self.of, Scalar):
            self.of.write_many(run, value)
            return _run_of(n, [{"type": self.type, "size": self.of.size}])
        entries = []
        for k, element in enumerate(value):
            with run.at(f"[{k}]"):
                entries += self.of.write(run, owner, element)
        if self.of.uniform:
            return _run_of(n, entries)
        return _indexed(entries, range(n)) if n > 1 else entries

    def read(self, run: LoadRun, owner: object, current: Any) -> Any:
        n = run.number(self._count, owner, self._limit)
        if isinstance(self.of, Scalar) and not isinstance(self.of, Checked):
            return self.of.read_many(run, n)
        values = []
        for k in range(n):
            with run.at(f"[{k}]"):
                values.append(self.of.read(run, owner, _element(current, k, self.of)))
        return values

    def settle(self, run: LoadRun, current: Any, value: Any) -> Any:
        if isinstance(self.of, Scalar):
            return value
        return [self.of.settle(run, _element(current, k, None), v) for k, v in enumerate(value)]


class Pointers(Array):
    """An array whose elements may be missing (None). Which ones are is the same on both sides: a missing one is a marker
    on the wire, one that is there has none.
    """

    uniform = False

    def default(self) -> Any:
        return [None] * (self._count if isinstance(self._count, int) else 0)

    def write(self, run: SaveRun, owner: object, value: Any) -> list[Entry]:
        n = self._check(run, owner, value)
        entries: list[Entry] = []
        for k, element in enumerate(value):
            with run.at(f"[{k}]"):
                if element is None:
                    run.out += NULL_POINTER
                    entries.append({"type": "nullptr", "size": len(NULL_POINTER)})
                else:
                    entries += self.of.write(run, owner, element)
        described: list[Entry] = []
        start = 0
        while start < n:  # one entry for each run of equal layout
            null = value[start] is None
            end = start + 1
            while end < n and (value[end] is None) == null and (null or self.of.uniform):
                end += 1
            if end - start > 1:
                described += _run_of(end - start, entries[start:end])
            else:
                described += _indexed(entries[start:end], [start]) if n > 1 else entries
            start = end
        return described

    def read(self, run: LoadRun, owner: object, current: Any) -> Any:
        n = run.number(self._count, owner, self._limit)
        if len(current) != n:
            raise run.fail("wrong number of elements on this side", expected=len(current), found=n)
        values = []
        for k, element in enumerate(current):
            with run.at(f"[{k}]"):
                if element is not None:
                    values.append(self.of.read(run, owner, element))
                    continue
                marker = run.read(1)
                if marker != NULL_POINTER:
                    raise run.fail(
                        "this side has no such element", expected=repr(NULL_POINTER), found=marker
                    )
                values.append(None)
        return values

    def settle(self, run: LoadRun, current: Any, value: Any) -> Any:
        return [
            None if v is None else self.of.settle(run, c, v)
            for c, v in zip(current, value, strict=True)
        ]


class List(Kind):
    """Any number of elements, each behind 01, then 00. Loading makes new elements."""

    uniform = False

    def __init__(self, kind: str, of: Kind, limit: int) -> None:
        self.type = kind
        self._of = of
        self._limit = limit

    def default(self) -> Any:
        return []

    def write(self, run: SaveRun, owner: object, value: Any) -> list[Entry]:
        start = len(run.out)
        if len(value) > self._limit:
            raise run.fail("too many elements", expected=f"at most {self._limit}", found=len(value))
        for k, element in enumerate(value):
            with run.at(f"[{k}]"):
                run.out += ELEMENT
                self._of.write(run, owner, element)
        run.out += END
        # With the layout of each element the same keys would stand several times in one JSON object.
        return [{"type": self.type, "size": len(run.out) - start}]

    def read(self, run: LoadRun, owner: object, current: Any) -> Any:
        values: list[Any] = []
        while _more(run):
            if len(values) == self._limit:
                raise run.fail("too many elements", expected=f"at most {self._limit}")
            with run.at(f"[{len(values)}]"):
                values.append(self._of.read(run, owner, None))
        return values

    def settle(self, run: LoadRun, current: Any, value: Any) -> Any:
        return [self._of.settle(run, None, v) for v in value]


class Tree(Kind):
    """A dict: u32 count, then key and value of each behind 01, then 00. Sorted by key, as a GTree is."""

    type = "gtree"
    uniform = False

    def __init__(self, key: Kind, of: Kind, limit: int) -> None:
        self._key = key
        self._of = of
        self._limit = limit

    def default(self) -> Any:
        return {}

    def write(self, run: SaveRun, owner: object, value: Any) -> list[Entry]:
        start = len(run.out)
        if len(value) > self._limit:
            raise run.fail("too many nodes", expected=f"at most {self._limit}", found=len(value))
        run.out += struct.pack(">I", len(value))
        for key in run.call("sorting the keys", sorted, value):
            with run.at(f"[{key}]"):
                run.out += ELEMENT
                self._key.write(run, owner, key)
                self._of.write(run, owner, value[key])
        run.out += END
        return [{"type": self.type, "size": len(run.out) - start}]

    def read(self, run: LoadRun, owner: object, current: Any) -> Any:
        n = int.from_bytes(run.read(4), "big")
        if n > self._limit:
            raise run.fail("too many nodes", expected=f"at most {self._limit}", found=n)
        nodes: list[tuple[Any, Any]] = []
        while _more(run):
            if len(nodes) == n:
                raise run.fail("more nodes than were announced", expected=n)
            with run.at(f"[{len(nodes)}]"):
                key = self._key.read(run, owner, None)
                nodes.append((key, self._of.read(run, owner, None)))
        if len(nodes) != n:
            raise run.fail("fewer nodes than were announced", expected=n, found=len(nodes))
        return nodes

    def settle(self, run: LoadRun, current: Any, value: Any) -> Any:
        tree = {self._key.settle(run, None, k): self._of.settle(run, None, v) for k, v in value}
        if len(tree) != len(value):
            raise run.fail("a key stands twice", expected=f"{len(value)} different keys")
        return tree


def _more(run: LoadRun) -> bool:
    """The byte before an element, or behind the last."""
    mark = run.read(1)
    if mark not in (ELEMENT, END):
        raise run.fail("neither an element nor the end", expected="01 or 00", found=mark.hex())
    return mark == ELEMENT


def _element(current: Any, k: int, kind: Kind | None) -> Any:
    """What stands at k now; for a kind that compares with it, the default if nothing does."""
    try:
        return current[k]
    except (TypeError, IndexError, KeyError):
        return None if kind is None or not isinstance(kind, Checked) else kind.default()


def _run_of(n: int, entries: list[Entry]) -> list[Entry]:
    """One entry for n elements of equal layout: without a count for a single one, none for no element."""
    if n == 0:
        return []
    return [entries[0]] if n == 1 else [{"array_len": n, **entries[0]}]


def _indexed(entries: list[Entry], indexes: Sequence[int]) -> list[Entry]:
    return [{"index": k, **e} for k, e in zip(indexes, entries, strict=True)]
