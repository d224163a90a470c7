"""What QEMU says when it refuses a migration, and what that means: section, field, both sides, what to do.

The left column is what QEMU 7.2 and 10.0 were seen to write to their standard error output when a stream did not fit
them; nothing of it is documented. A message that is not in the table is passed on as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import attrs

from whimbrel_qemu import advice, pci
from whimbrel_qemu.milestones import CONFIGURATION, RAM

#: Lines that are kept, the last ones, and characters of each.
_LINES, _LENGTH = 20, 500
_MIB = 1 << 20

_SAME = "Give the device in the destination the same properties, and the same ports, disks and queues behind it"
_LAYOUT = (
    "The device has another layout there: its properties differ (slots, ports, queues), or that version of QEMU writes"
    " it in another way; --against a file of that QEMU shows the fields"
)


@attrs.frozen(kw_only=True)
class Reason:
    """Why a destination refused. Where nothing is known of a fact, it is None."""

    what: str
    section: str | None = None
    instance_id: int | None = None
    #: Path within the section, as in the vmdescription; the name of a RAM block for `ram`.
    field: str | None = None
    #: What the guest has, and what the destination has.
    guest: str | None = None
    there: str | None = None
    hint: str | None = None
    #: Where in the PCI configuration space it is, if it is there.
    config_byte: int | None = None


Make = Callable[[re.Match[str]], Reason]


def _size(number: int) -> str:
    return f"{number // _MIB} MiB" if number and number % _MIB == 0 else f"{number} bytes"


def _machine(m: re.Match[str]) -> Reason:
    return Reason(
        section=CONFIGURATION,
        field="machine type",
        guest=m[1],
        there=m[2],
        what=f"the guest's machine type is {m[1]}, the destination's is {m[2]}",
        hint=f"Start the destination with -machine {m[1]}: names without a version mean another machine in each QEMU",
    )


def _no_configuration(m: re.Match[str]) -> Reason:
    return Reason(
        section=CONFIGURATION,
        what="the guest's machine type is older than 2.4, the destination's is newer",
        hint="Start the destination with the machine type of the source",
    )


def _unexpected_configuration(m: re.Match[str]) -> Reason:
    return Reason(
        section=CONFIGURATION,
        what="the destination's machine type is older than 2.4, the guest's is newer",
        hint="Start the destination with the machine type of the source",
    )


def _uuid(m: re.Match[str]) -> Reason:
    return Reason(
        section=CONFIGURATION,
        field="uuid",
        guest=m[1],
        there=m[2],
        what=f"the guest's UUID is {m[1]}, the destination's is {m[2]}",
        hint=f"Start the destination with -uuid {m[1]}",
    )


def _page_bits(m: re.Match[str]) -> Reason:
    return Reason(
        section=CONFIGURATION,
        field="target page bits",
        guest=m[1],
        there=m[2],
        what=f"the guest's pages have {1 << int(m[1])} bytes, the destination's {1 << int(m[2])}",
        hint="Start the destination with the machine type and CPU of the source",
    )


def _capability(m: re.Match[str]) -> Reason:
    name, there, guest = m.groups()
    return Reason(
        section=CONFIGURATION,
        field=name,
        guest=guest,
        there=there,
        what=f"the capability {name} is {guest} in the guest's stream, and {there} there",
        hint=f"Switch it {guest} in the destination: migrate_set_capability {name} {guest}",
    )


def _unknown_capability(m: re.Match[str]) -> Reason:
    return Reason(
        section=CONFIGURATION,
        field=m[1],
        guest="on",
        what=f"the destination does not know the capability {m[1]}",
        hint="Send to a QEMU that has it, or migrate to the file without it",
    )


def _block_size(m: re.Match[str]) -> Reason:
    block, guest, there = m[1], int(m[2], 16), int(m[3], 16)
    return Reason(
        section=RAM,
        instance_id=0,
        field=block,
        guest=_size(guest),
        there=_size(there),
        what=f"RAM block '{block}' has {_size(guest)} in the guest and {_size(there)} there",
        hint=advice.resize_block(block, guest),
    )


def _unknown_block(m: re.Match[str]) -> Reason:
    return Reason(
        section=RAM,
        instance_id=0,
        field=m[1],
        what=f"the destination has no RAM block '{m[1]}'",
        hint=advice.have_block(m[1]),
    )


def _unknown_section(m: re.Match[str]) -> Reason:
    section, instance = m[1], int(m[2])
    return Reason(
        section=section,
        instance_id=instance,
        what=f"the destination has no section '{section}' instance {instance}",
        hint=advice.have(section, instance),
    )


def _too_new(m: re.Match[str]) -> Reason:
    guest, section, there = m.groups()
    return Reason(
        section=section,
        field="version_id",
        guest=guest,
        there=there,
        what=f"the guest's section has version {guest}, the destination knows it up to version {there}",
        hint="Send to a QEMU at least as new as the source, or start the guest with an older machine type",
    )


def _part_version(m: re.Match[str]) -> Reason:
    name, guest, how, there = m.groups()
    return Reason(
        field=name,
        guest=guest,
        there=there,
        what=f"'{name}' has version {guest} in the guest, too {how} for the destination (its own is {there})",
        hint="Send to a QEMU nearer to the source's version, with the machine type of the source",
    )


def _pci_config(m: re.Match[str]) -> Reason:
    offset, guest, there = (int(x, 16) for x in m.groups())
    name = pci.name_of(offset)
    return Reason(
        guest=f"{guest:02x}",
        there=f"{there:02x}",
        config_byte=offset,
        what=f"byte 0x{offset:02x} of its PCI configuration ({name}) is {guest:02x} in the guest and {there:02x} there",
        hint="It is another model of the device there, or has other properties: make them the same",
    )


def _not_equal(m: re.Match[str]) -> Reason:
    there, guest = m.groups()
    return Reason(
        guest=guest,
        there=there,
        what=f"a value that must be the same is {guest} (hex) in the guest and {there} there",
        hint=_SAME,
    )


def _not_less(m: re.Match[str]) -> Reason:
    guest, there = m.groups()
    return Reason(
        guest=guest,
        there=there,
        what=f"a value is {guest} in the guest, and at most {there} there",
        hint=_SAME,
    )


def _no_footer(m: re.Match[str]) -> Reason:
    return Reason(
        section=m[1],
        what="the section is longer or shorter in the guest than the destination takes it to be",
        hint=_LAYOUT,
    )


def _wrong_footer(m: re.Match[str]) -> Reason:
    return Reason(
        section=m[1],
        guest=m[2],
        there=m[3],
        what=f"behind the section stands the number {m[2]} where {m[3]} belongs: the stream is damaged",
        hint="Receive the guest again",
    )


def _crash(m: re.Match[str]) -> Reason:
    return Reason(
        what="QEMU itself failed over the guest's state: a device behind another one may be missing there",
        hint="Start the destination with the devices of the source, those on its buses included",
    )


def _no_answer(m: re.Match[str]) -> Reason:
    return Reason(
        section=CONFIGURATION,
        what="the destination cannot answer",
        hint="Send with --no-return-path",
    )


#: The first row that is found anywhere decides.
_TABLE: tuple[tuple[re.Pattern[str], Make], ...] = tuple(
    (re.compile(pattern), make)
    for pattern, make in (
        (r"Machine type received is '([^']*)' and local is '([^']*)'", _machine),
        (r"Configuration section missing", _no_configuration),
        (r"Unknown savevm section type 7\b", _unexpected_configuration),
        (r"UUID received is ([0-9a-f-]{36}) and local is ([0-9a-f-]{36})", _uuid),
        (r"Received TARGET_PAGE_BITS is (\d\d?) but local is (\d\d?)", _page_bits),
        (r"Capability (\S+) is (on|off), but received capability is (on|off)", _capability),
        (r"Received unknown capability (\S+)", _unknown_capability),
        (r"Size mismatch: (\S+): (0x[0-9a-f]{1,16}) != (0x[0-9a-f]{1,16})", _block_size),
        (r'Unknown ramblock "([^"]*)"', _unknown_block),
        (r"Unknown savevm section or instance '([^']*)' (\d{1,10})", _unknown_section),
        (r"unsupported version (\d{1,10}) for '([^']*)' v(\d{1,10})", _too_new),
        (
            (
                r"(\S{1,255}): incoming version_id (\d{1,10}) is too (new|old)"
                r" for local (?:minimum )?version_id +(\d{1,10})"
            ),
            _part_version,
        ),
        (
            r"Bad config data: i=0x([0-9a-f]{1,4}) read: ([0-9a-f]{1,2}) device: ([0-9a-f]{1,2})",
            _pci_config,
        ),
        (r"Invalid value (-?\d{1,20}) expecting positive value <= (\d{1,20})", _not_less),
        (r"(?m)\b([0-9a-f]{1,16}) != ([0-9a-f]{1,16})$", _not_equal),
        (r"Mismatched section id in footer for (\S+) - read (\S+) expected (\S+)", _wrong_footer),
        (r"Missing section footer for (\S+)", _no_footer),
        (r"Assertion `.*' failed", _crash),
        (r"CMD_PING \(\S+\) received with no return path", _no_answer),
    )
)
_AT = re.compile(r"error while loading state for instance (0x[0-9a-f]{1,8}) of device '([^']*)'")
_FIELD = re.compile(r"Failed to load (\S+):(\S+)")
_LAST = re.compile(r"load of migration failed|Assertion `.*' failed")
#: What is said of a section in which nothing but this was wrong.
UNKNOWN_SUBSECTION = "it has a subsection that the destination does not know"
_NOT_KNOWN = "load of migration failed: No such file or directory"


def explain(said: str) -> Reason | None:
    """What QEMU's words come to; None when they say nothing that is known."""
    reason = next((make(m) for pattern, make in _TABLE if (m := pattern.search(said))), None)
    at, path = _AT.search(said), field_path(said)
    if reason is None and at is None:
        return None
    if reason is None:
        reason = _by_place(said, path)
    if at is not None and reason.section is None:
        reason = attrs.evolve(reason, section=at[2], instance_id=int(at[1], 16))
    if path and reason.field is None:
        reason = attrs.evolve(reason, field=path)
    if reason.section in advice.CPU and reason.hint in (_SAME, _LAYOUT):
        reason = attrs.evolve(reason, hint=advice.SAME_CPU)
    return reason


def ended(said: str) -> bool:
    """Whether nothing more is to come: QEMU says the place first, and the reason in a line of its own behind it."""
    return _LAST.search(said) is not None


def _by_place(said: str, path: str | None) -> Reason:
    """Where nothing but the place of it was told."""
    if path is not None:
        return Reason(what="the destination could not take a field of it", hint=_SAME)
    if _NOT_KNOWN in said:
        return Reason(
            what=UNKNOWN_SUBSECTION,
            hint="Send to a QEMU at least as new as the source, with the device's properties of the source",
        )
    return Reason(what="the destination could not take it", hint=_LAYOUT)


def field_path(said: str) -> str | None:
    """The field that was being loaded, from the outermost struct to the innermost."""
    names = [m[2] for m in _FIELD.finditer(said)]  # the innermost fails first
    return ".".join(reversed(names)) or None


def lines(said: str) -> tuple[str, ...]:
    """What is worth repeating: the last lines, warnings left out."""
    kept = [line.strip() for line in said.splitlines() if line.strip() and "warning:" not in line]
    return tuple(line[:_LENGTH] for line in kept[-_LINES:])
