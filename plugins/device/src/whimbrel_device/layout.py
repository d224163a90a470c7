"""The layout of a class: its fields and subsections in the order of the wire, and how an object passes it.

Loading changes nothing before the payload was read whole: values are staged, and predicates and validators see the
object as it will be. Then the values of all objects of the section are assigned, and after that post_load() is called,
inner objects first. If one of those fails, what was assigned is taken back.
"""

from __future__ import annotations

import functools
import struct
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs

from whimbrel.errors import EndOfStream
from whimbrel.wire.format import ItemType
from whimbrel.wire.items import counted
from whimbrel_device.kinds import Entry, Kind, Struct
from whimbrel_device.runs import LoadRun, SaveRun

#: Key of a FieldSpec in the metadata of an attrs field.
METADATA = "whimbrel_device.field"


@attrs.frozen(kw_only=True)
class FieldSpec:
    """What a field helper leaves in the metadata of the attrs field."""

    kind: Kind
    name: str | None = None
    since: int = 0
    until: int | None = None
    exists: Callable[[Any], bool] | None = None
    subsection: bool = False
    needed: Callable[[Any], bool] | None = None


@attrs.frozen(kw_only=True)
class Member:
    """A field of a layout."""

    attribute: Any  # the attrs Attribute
    spec: FieldSpec
    #: In the vmdescription; [k] is appended where several fields of the layout have one name.
    wire_name: str

    @property
    def name(self) -> str:
        """Of the Python attribute."""
        return str(self.attribute.name)

    def present(self, run: SaveRun | LoadRun, owner: object, version: int) -> bool:
        if version < self.spec.since or (self.spec.until is not None and version > self.spec.until):
            return False
        return self.spec.exists is None or bool(
            run.call("its exists() failed", self.spec.exists, owner)
        )


class Staged:
    """An object as it will be: the values read so far in front of those that it has."""

    __slots__ = ("_whimbrel_layout", "_whimbrel_target", "_whimbrel_values", "_whimbrel_version")

    def __init__(self, target: Any, layout: Layout, version: int) -> None:
        self._whimbrel_target = target
        self._whimbrel_layout = layout
        self._whimbrel_values: dict[str, Any] = {}
        self._whimbrel_version = version

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._whimbrel_target)

    def __getattr__(self, name: str) -> Any:
        if name in self._whimbrel_values:
            return self._whimbrel_values[name]
        found = getattr(type(self._whimbrel_target), name, None)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)
        if isinstance(found, types.FunctionType):
            return types.MethodType(found, self)
        return getattr(self._whimbrel_target, name)


class Layout:
    """Made once per class by @vmstate or @device."""

    def __init__(
        self, cls: type, name: str, *, version_id: int, minimum_version_id: int | None
    ) -> None:
        self.cls = cls
        self.name = name
        self.version_id = version_id
        self.minimum_version_id = version_id if minimum_version_id is None else minimum_version_id
        if not 0 <= self.minimum_version_id <= version_id <= 0xFFFFFFFF:
            raise ValueError(f"versions {self.minimum_version_id} to {version_id} of {name}")
        counted(name)  # raises where the name cannot be a section's
        if not name or not name.isascii():
            raise ValueError(f"a vmsd_name is not empty and ASCII, unlike {name!r}")
        specs = [(a, a.metadata[METADATA]) for a in attrs.fields(cls) if METADATA in a.metadata]
        names = [s.name or a.name for a, s in specs if not s.subsection]
        again = Counter(names)
        numbers: Counter[str] = Counter()
        members = []
        for (attribute, spec), name_ in zip(
            [e for e in specs if not e[1].subsection], names, strict=True
        ):
            wire = f"{name_}[{numbers[name_]}]" if again[name_] > 1 else name_
            numbers[name_] += 1
            members.append(Member(attribute=attribute, spec=spec, wire_name=wire))
            earlier = {m.name for m in members[:-1]}
            if spec.kind.depends is not None and spec.kind.depends not in earlier:
                raise TypeError(
                    f"{cls.__qualname__}.{attribute.name}: {spec.kind.depends!r} is no earlier field"
                )
        self.members = tuple(members)
        self.subsections = tuple(
            Member(attribute=a, spec=s, wire_name=s.name or a.name)
            for a, s in specs
            if s.subsection
        )

    @functools.cached_property
    def all_members(self) -> tuple[Member, ...]:
        return self.members + self.subsections

    @functools.cached_property
    def uniform(self) -> bool:
        """Every object has the same fields of the same length."""
        return not self.subsections and all(
            m.spec.exists is None and m.spec.kind.uniform for m in self.members
        )

    def new(self) -> Any:
        return self.cls()

    # ---- saving

    def write(self, run: SaveRun, obj: Any, *, version: int, full_name: str | None = None) -> Entry:
        """Append the payload; the members of the vmdescription for it."""
        _hook(run, obj, "pre_save")
        try:
            return self._write(run, obj, version, full_name or self.name)
        finally:
            _hook(run, obj, "post_save")

    def _write(self, run: SaveRun, obj: Any, version: int, name: str) -> Entry:
        fields: list[Entry] = []
        for member in self.members:
            if not member.present(run, obj, version):
                continue
            with run.at(f".{member.name}"):
                entries = member.spec.kind.write(run, obj, getattr(obj, member.name))
            fields += [{"name": member.wire_name, **e} for e in entries]
        described: Entry = {"vmsd_name": name, "version": version, "fields": fields}
        written = []
        for member in self.subsections:
            layout = _struct(member).layout
            value = getattr(obj, member.name)
            if not self._needed(run, member, obj, value):
                continue
            child = _child_name(name, layout.name)
            with run.at(f".{member.name}"):
                run.check_subsection(child)
                run.out += bytes((ItemType.SUBSECTION,)) + counted(child)
                run.out += struct.pack(">I", layout.version_id)
                written.append(layout.write(run, value, version=layout.version_id, full_name=child))
        if written:
            described["subsections"] = written
        run.ended(name)
        return described

    @staticmethod
    def _needed(run: SaveRun, member: Member, owner: object, value: object) -> bool:
        if member.spec.needed is not None:
            return bool(run.call("needed() failed", member.spec.needed, owner))
        own = getattr(value, "needed", None)
        return own is None or bool(run.call("needed() failed", own))

    # ---- loading

    def read(
        self, run: LoadRun, target: Any, *, version: int, full_name: str | None = None
    ) -> Staged:
        """Read a payload for target; it changes only when the run is settled."""
        staged = Staged(target, self, version)
        run.begun.append(staged)
        for member in self.members:
            if member.present(run, staged, version):
                with run.at(f".{member.name}"):
                    current = getattr(target, member.name)
                    self._stage(run, staged, member, member.spec.kind.read(run, staged, current))
        self._read_subsections(run, staged, full_name or self.name)
        run.finished.append(staged)
        return staged

    @staticmethod
    def _stage(run: LoadRun, staged: Staged, member: Member, value: Any) -> None:
        validator = member.attribute.validator
        if validator is not None:
            run.call("it is not valid", validator, staged, member.attribute, value)
        staged._whimbrel_values[member.name] = value

    def _read_subsections(self, run: LoadRun, staged: Staged, name: str) -> None:
        members = {_child_name(name, _struct(m).layout.name): m for m in self.subsections}
        while (found := _peek_subsection(run, name)) is not None:
            member = members.pop(found, None)
            if member is None:
                raise run.fail(
                    f"unknown subsection '{found}'",
                    expected=f"one of {', '.join(members)}" if members else "no more subsections",
                    hint="The source may be newer than this side",
                )
            kind = _struct(member)
            layout = kind.layout
            with run.at(f".{member.name}"):
                version = int.from_bytes(run.read(6 + len(found))[-4:], "big")
                if not layout.minimum_version_id <= version <= layout.version_id:
                    raise run.fail(
                        f"unsupported version of subsection '{found}'",
                        expected=f"{layout.minimum_version_id} to {layout.version_id}",
                        found=version,
                    )
                target = getattr(staged._whimbrel_target, member.name)
                if not isinstance(target, layout.cls):
                    target = run.call("making a new object", layout.new)
                value = layout.read(run, target, version=version, full_name=found)
                self._stage(run, staged, member, value)


def settle(run: LoadRun) -> None:
    """Assign what was read: pre_load() of each object, then all values, then post_load() of each, inner ones first."""
    for staged in run.begun:
        run.undo.append(_snapshot(staged))
    try:
        for staged in run.begun:
            _hook(run, staged._whimbrel_target, "pre_load")
        for staged in run.finished:
            for member in staged._whimbrel_layout.all_members:
                if member.name in staged._whimbrel_values:
                    with run.at(f".{member.name}"):
                        _assign(run, staged, member)
        for staged in run.finished:
            _hook(run, staged._whimbrel_target, "post_load", staged._whimbrel_version)
    except BaseException:
        for undo in reversed(run.undo):
            undo()
        raise


def _snapshot(staged: Staged) -> Callable[[], None]:
    target = staged._whimbrel_target
    names = [m.name for m in staged._whimbrel_layout.all_members]
    values = [getattr(target, name) for name in names]

    def restore() -> None:
        for name, value in zip(names, values, strict=True):
            object.__setattr__(target, name, value)

    return restore


def _assign(run: LoadRun, staged: Staged, member: Member) -> None:
    target, name = staged._whimbrel_target, member.name
    value = staged._whimbrel_values[name]
    value = run.call(
        "it cannot be assigned", member.spec.kind.settle, run, getattr(target, name), value
    )
    object.__setattr__(target, name, value)  # validated already, whatever attrs does on setattr


def _hook(run: SaveRun | LoadRun, obj: object, name: str, *args: object) -> None:
    function = getattr(obj, name, None)
    if function is not None:
        run.call(f"{name}() of {type(obj).__name__} failed", function, *args)


def _struct(member: Member) -> Struct:
    kind = member.spec.kind
    assert isinstance(kind, Struct)
    return kind


def _child_name(parent: str, name: str) -> str:
    """A name that begins with the parent's, up to the end of a word, is whole already (QEMU's apic has apic_sipi)."""
    whole = name.startswith(parent) and not name[len(parent) :][:1].isalnum()
    return name if whole and name != parent else f"{parent}/{name}"


def _peek_subsection(run: LoadRun, parent: str) -> str | None:
    """The name of the subsection that comes next, if one of parent's does: 05, and a name that begins with parent's.

    Looks no further ahead than needed to say no: the stream may end a byte later.
    """
    inp = run.inp
    run.offset = inp.position
    if inp.at_end() or inp.buffered(1)[0] != ItemType.SUBSECTION:
        return None
    prefix = parent.encode()
    try:
        length = inp.buffered(2)[1]
        if length <= len(prefix):
            return None
        for k, byte in enumerate(prefix):
            if inp.buffered(3 + k)[2 + k] != byte:
                return None
    except EndOfStream:
        inp.error = None  # nothing was consumed: whoever reads on gets that error again
        return None
    return run.peek(2 + length)[2:].decode("ascii", "backslashreplace")
