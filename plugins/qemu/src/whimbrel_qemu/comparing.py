"""A guest beside one of the QEMU that it is to go to: what that QEMU would refuse, and what it would take in silence.

    other = load("other.mig")        # of the other QEMU, with the machine type that both have
    for difference in compare(load("guest.mig"), other).differences:
        print(difference)

The other one need not have run: `qemu-system-x86_64 ... -S`, then `migrate "exec:cat >other.mig"`. What counts as refused
was seen to be refused by QEMU 7.2 and 10.0; a field that depends on what a guest has been doing is doubtful at most.
"""

from __future__ import annotations

import collections
import enum
import re
from collections.abc import Iterable, Iterator, Mapping

import attrs

from whimbrel.wire.items import Configuration
from whimbrel_device import vmdesc
from whimbrel_qemu import advice, pci
from whimbrel_qemu.guest import Guest
from whimbrel_qemu.milestones import CONFIGURATION, RAM
from whimbrel_qemu.tail import Section

#: Blocks that QEMU resizes to what comes.
_RESIZABLE = "/rom@"
#: Types whose value a destination compares with its own; the second is signed, and has to be at most as large.
_EQUAL, _AT_MOST = " equal", "int32 le"
#: What every guest has in its own way.
_OF_THE_GUEST = frozenset({"globalstate"})
_MIB = 1 << 20
_NEWER = "Send to a QEMU at least as new as the source"
_OLDER = "Send to a QEMU that still knows this version"


class Verdict(enum.Enum):
    """What a difference does, the worst first."""

    REFUSED = "refused"
    #: The destination keeps what it has, and nobody is told.
    SILENT = "silent"
    #: Refused, unless it is due to what one of the two guests has been doing; or an older version, which may be taken.
    DOUBTFUL = "doubtful"
    #: Known to be taken.
    HARMLESS = "harmless"


@attrs.frozen(kw_only=True)
class Difference:
    """One fact in which the two differ."""

    verdict: Verdict
    section: str
    instance_id: int | None = None
    #: Path in the section, without the numbers of elements; the name of a RAM block for `ram`.
    field: str | None = None
    what: str
    guest: str | None = None
    there: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        place = self.section if not self.instance_id else f"{self.section} {self.instance_id}"
        return f"{self.verdict.value}: {place}{f' {self.field}' if self.field else ''}: {self.what}"


@attrs.frozen
class Comparison:
    """All differences, the worst first."""

    differences: tuple[Difference, ...]

    @property
    def refused(self) -> tuple[Difference, ...]:
        return self.of(Verdict.REFUSED)

    def of(self, *verdicts: Verdict) -> tuple[Difference, ...]:
        return tuple(d for d in self.differences if d.verdict in verdicts)

    def about(self, section: str, instance_id: int | None = None) -> tuple[Difference, ...]:
        """Those of one section."""
        return tuple(
            d
            for d in self.differences
            if d.section == section and instance_id in (None, d.instance_id)
        )


def compare(guest: Guest, other: Guest) -> Comparison:
    """What stands against sending the guest to a machine like the other one."""
    found = [*_configurations(guest.configuration, other.configuration)]
    if guest.rest is None and other.rest is None:
        found += _blocks(_sizes(guest), _sizes(other))
    else:
        found.append(_unknown(RAM, "it was kept as it came, so that its blocks are not known"))
    if guest.sections is None or other.sections is None:
        found.append(_unknown("(devices)", "nothing describes the device sections of one of them"))
    else:
        found += _sections(_by_key(guest), _by_key(other))
    order = list(Verdict)
    return Comparison(tuple(sorted(found, key=lambda d: order.index(d.verdict))))


def _unknown(section: str, why: str) -> Difference:
    return Difference(verdict=Verdict.DOUBTFUL, section=section, what=f"cannot be compared: {why}")


# ---- configuration


def _configurations(
    guest: Configuration | None, other: Configuration | None
) -> Iterator[Difference]:
    if guest is None or other is None:
        if guest is not other:
            old, new = ("guest", "other") if guest is None else ("other", "guest")
            yield Difference(
                verdict=Verdict.REFUSED,
                section=CONFIGURATION,
                field="machine type",
                what=f"the machine type of the {old} is older than 2.4, that of the {new} is not",
                hint="Start the destination with the machine type of the source",
            )
        return
    members = (
        ("machine type", guest.machine_type, other.machine_type, "Start it with -machine {}"),
        ("target page bits", guest.target_page_bits, other.target_page_bits, "Start it as {} bits"),
        ("uuid", _hex(guest.uuid), _hex(other.uuid), "Start it with -uuid {}"),
        (
            "capabilities",
            _joined(guest.capabilities),
            _joined(other.capabilities),
            "Give both the same: {}",
        ),
    )
    for name, here, there, hint in members:
        if here == there or (name == "uuid" and None in (here, there)):
            continue
        yield Difference(
            verdict=Verdict.REFUSED,
            section=CONFIGURATION,
            field=name,
            what=f"{here or 'none'} in the guest, {there or 'none'} there",
            guest=None if here is None else str(here),
            there=None if there is None else str(there),
            hint=hint.format(here or "none"),
        )


def _hex(uuid: bytes | None) -> str | None:
    return None if uuid is None else uuid.hex()


def _joined(names: tuple[str, ...] | None) -> str | None:
    return ", ".join(sorted(names)) if names else None


# ---- RAM


def _sizes(guest: Guest) -> dict[str, int]:
    return {block.idstr: block.size for block in guest.blocks}


def _size(number: int) -> str:
    return f"{number // _MIB} MiB" if number and number % _MIB == 0 else f"{number} bytes"


def _blocks(guest: dict[str, int], other: dict[str, int]) -> Iterator[Difference]:
    for name in guest | other:
        here, there = guest.get(name), other.get(name)
        if here == there:
            continue
        if here is None:
            verdict, hint = Verdict.SILENT, None
            what = "only there: it keeps what it holds there"
        elif there is None:
            verdict, hint = Verdict.REFUSED, advice.have_block(name)
            what = "only in the guest"
        else:
            resized = name.startswith(_RESIZABLE)
            verdict = Verdict.HARMLESS if resized else Verdict.REFUSED
            hint = None if resized else advice.resize_block(name, here)
            what = f"{_size(here)} in the guest, {_size(there)} there"
        yield Difference(
            verdict=verdict,
            section=RAM,
            instance_id=0,
            field=name,
            what=what,
            guest=None if here is None else str(here),
            there=None if there is None else str(there),
            hint=hint,
        )


# ---- device sections

_Key = tuple[str, int]


def _by_key(guest: Guest) -> dict[_Key, Section]:
    sections = guest.tail.split() if guest.tail is not None else []
    return {(s.device.name, s.device.instance_id): s for s in sections}


def _sections(guest: dict[_Key, Section], other: dict[_Key, Section]) -> Iterator[Difference]:
    for key in guest | other:
        section, instance_id = key
        if key not in other:
            yield Difference(
                verdict=Verdict.REFUSED,
                section=section,
                instance_id=instance_id,
                what="only in the guest",
                hint=advice.have(section, instance_id),
            )
        elif key not in guest:
            yield Difference(
                verdict=Verdict.SILENT,
                section=section,
                instance_id=instance_id,
                what="only there: it begins there as after a reset",
                hint="Leave it out of the destination if the guest has none",
            )
        else:
            for difference in _section(guest[key], other[key]):
                yield attrs.evolve(difference, section=section, instance_id=instance_id)


def _section(guest: Section, other: Section) -> Iterator[Difference]:
    if guest.version_id != other.version_id:
        newer = guest.version_id > other.version_id
        yield Difference(
            verdict=Verdict.REFUSED if newer else Verdict.DOUBTFUL,
            section="",
            field="version_id",
            what=f"version {guest.version_id} in the guest, {other.version_id} there",
            guest=str(guest.version_id),
            there=str(other.version_id),
            hint=_NEWER if newer else _OLDER,
        )
    if guest.device.name in _OF_THE_GUEST:
        return
    yield from _identities(guest, other)
    here, there = _Layout(guest), _Layout(other)
    yield from _subsections(here.subsections, there.subsections)
    one_sided = here.subsections.keys() ^ there.subsections.keys()  # said of each as a whole
    here.leave_out(one_sided)
    there.leave_out(one_sided)
    yield from _values(here, there)
    yield from _fields(here, there)


def config_of(section: Section) -> memoryview | None:
    """The PCI configuration space that the section holds."""
    for item in vmdesc.walk(section.device, section.payload):
        if item.type == "pci config":
            return item.data
        if item.type == "virtio" and item.offset == 0 and advice.place(section.device.name):
            # A virtio device begins as other PCI devices do: a version, the configuration, the interrupts.
            return item.data[4 : 4 + 256] if len(item.data) >= 4 + 256 else None
    return None


def _identities(guest: Section, other: Section) -> Iterator[Difference]:
    here, there = config_of(guest), config_of(other)
    if here is None or there is None:
        return
    ours, theirs = (
        collections.OrderedDict((i.name, i.value) for i in pci.identity(c)) for c in (here, there)
    )
    for name in ours | theirs:
        a, b = ours.get(name), theirs.get(name)
        if a == b:
            continue
        yield Difference(
            verdict=Verdict.REFUSED,
            section="",
            field="config",
            what=f"PCI {name}: {_maybe_hex(a)} in the guest, {_maybe_hex(b)} there",
            guest=_maybe_hex(a),
            there=_maybe_hex(b),
            hint="Give the destination the same model of the device, with the same properties",
        )
        return  # one that differs moves the others


def _maybe_hex(value: int | None) -> str:
    return "none" if value is None else f"0x{value:x}"


@attrs.frozen
class _Kind:
    """A field, all elements of an array of it taken together."""

    type: str
    size: int


class _Layout:
    """What a section consists of. Elements of an array have the name of the array: versions of QEMU number them in
    different ways.
    """

    def __init__(self, section: Section) -> None:
        self.subsections = dict(_named(section.device.vmsd))
        items = vmdesc.walk(section.device, section.payload)
        self._items = [item for item in items if item.type != "subsection"]

    def leave_out(self, subsections: Iterable[str]) -> None:
        """Forget the fields of these."""
        prefixes = tuple(f"{name}." for name in subsections)
        if prefixes:
            self._items = [i for i in self._items if not any(p in i.path for p in prefixes)]

    @property
    def sizes(self) -> list[int]:
        """Of all fields in their order: what matters on the wire. Names and types change from version to version."""
        return [item.size for item in self._items]

    @property
    def fields(self) -> dict[str, collections.Counter[_Kind]]:
        fields: dict[str, collections.Counter[_Kind]] = {}
        for item in self._items:
            kinds = fields.setdefault(_array(item.path), collections.Counter())
            kinds[_Kind(item.type, item.size)] += 1
        return fields

    @property
    def values(self) -> dict[str, tuple[str, list[int]]]:
        """Those that a destination compares with its own: the type, and the values of all elements."""
        values: dict[str, tuple[str, list[int]]] = {}
        for item in self._items:
            if item.type.endswith((_EQUAL, _AT_MOST)):
                number = int.from_bytes(item.data, "big", signed=item.type.startswith("int"))
                values.setdefault(_array(item.path), (item.type, []))[1].append(number)
        return values


def _array(path: str) -> str:
    """Without the numbers of elements."""
    return re.sub(r"\[[^\]]*\]", "", path)


def _named(vmsd: vmdesc.Vmsd) -> Iterator[tuple[str, int]]:
    """Every subsection with its version, those of structs included."""
    for sub in vmsd.subsections:
        yield sub.name, sub.version
        yield from _named(sub)
    for field in vmsd.fields:
        if field.struct is not None:
            yield from _named(field.struct)


def _subsections(guest: Mapping[str, int], other: Mapping[str, int]) -> Iterator[Difference]:
    for name in guest:
        here, there = guest[name], other.get(name)
        if there is None:
            yield Difference(
                verdict=Verdict.DOUBTFUL,
                section="",
                field=name,
                what="a subsection that the other does not send: it may not know it",
                hint="Is the destination's QEMU at least as new, and are the properties of the device the same?",
            )
        elif here != there:
            yield Difference(
                verdict=Verdict.REFUSED if here > there else Verdict.DOUBTFUL,
                section="",
                field=name,
                what=f"version {here} of the subsection in the guest, {there} there",
                guest=str(here),
                there=str(there),
                hint=_NEWER if here > there else _OLDER,
            )


def _fields(guest: _Layout, other: _Layout) -> Iterator[Difference]:
    if guest.sizes == other.sizes:
        return
    here, there = guest.fields, other.fields
    for path in here | there:
        if here.get(path) == there.get(path):
            continue
        a, b = _kinds(here.get(path)), _kinds(there.get(path))
        yield Difference(
            verdict=Verdict.DOUBTFUL,
            section="",
            field=path,
            what=f"{a} in the guest, {b} there",
            guest=a,
            there=b,
            hint="Give the device the same properties there, and the same ports, disks and queues behind it",
        )


def _kinds(kinds: collections.Counter[_Kind] | None) -> str:
    if kinds is None:
        return "nothing"
    return " + ".join(
        f"{f'{n} ' if n > 1 else ''}{kind.type} of {kind.size} bytes" for kind, n in kinds.items()
    )


def _values(guest: _Layout, other: _Layout) -> Iterator[Difference]:
    theirs = other.values
    for path, (kind, ours) in guest.values.items():
        for here, there in zip(ours, theirs.get(path, ("", []))[1], strict=False):
            if here == there or (kind.endswith(_AT_MOST) and 0 <= here <= there):
                continue
            most = "at most " if kind.endswith(_AT_MOST) else ""
            yield Difference(
                verdict=Verdict.REFUSED,
                section="",
                field=path,
                what=f"{here} in the guest, {most}{there} there",
                guest=str(here),
                there=str(there),
                hint="Give the device the same properties there",
            )
            break
