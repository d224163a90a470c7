"""The forms of the stream by version of the machine type: the one table of them.

Source: what QEMU 7.2 and 10.0 send for machine types from pc-i440fx-1.7 to -10.0, and QEMU's machine compatibility
properties (send-configuration, send-section-footer, store-global-state, suppress-vmdesc, send-switchover-start).
"""

from __future__ import annotations

import re

import attrs

from whimbrel.wire.format import Dialect, GlobalStateForm

#: The form since that version of the machine type, oldest first.
_BY_VERSION: tuple[tuple[tuple[int, int], Dialect], ...] = (
    # QEMU of 2013 itself. A newer QEMU with a machine type of 1.x adds a vmdescription, which a reader takes if it comes.
    (
        (0, 0),
        Dialect(
            configuration=False,
            footers=False,
            vmdescription=False,
            globalstate=GlobalStateForm.NEVER,
        ),
    ),
    (
        (2, 0),
        Dialect(
            configuration=False,
            footers=False,
            vmdescription=False,
            globalstate=GlobalStateForm.ODD,
        ),
    ),
    (
        (2, 3),
        Dialect(configuration=False, footers=False, globalstate=GlobalStateForm.ODD),
    ),
    ((2, 4), Dialect()),
    ((8, 1), Dialect(multifd_flush=True)),
    ((8, 2), Dialect(multifd_flush=True, described_configuration=True)),
    (
        (9, 0),
        Dialect(
            multifd_flush=True,
            described_configuration=True,
            globalstate=GlobalStateForm.SPLIT,
        ),
    ),
    (
        (10, 0),
        Dialect(
            multifd_flush=True,
            described_configuration=True,
            globalstate=GlobalStateForm.SPLIT,
            switchover_start=True,
        ),
    ),
)

#: Families of machine types whose names end with the version of QEMU; an app's own `game-1.0` is none of them.
_VERSIONED = re.compile(
    r"(?:pc-i440fx|pc-q35|pc|virt|pseries|s390-ccw-virtio)-(\d+)\.(\d+)(?:\.\d+)?"
)
#: Names for --dialect and for profiles; "2013" is QEMU 1.7.
NAMES = ("2013", *(f"{major}.{minor}" for (major, minor), _ in _BY_VERSION if major))


def for_version(major: int, minor: int) -> Dialect:
    """What a machine type of that version speaks."""
    return [dialect for since, dialect in _BY_VERSION if since <= (major, minor)][-1]


def for_machine(machine_type: str) -> Dialect:
    """What QEMU speaks for a machine of that type. Types without a version of QEMU in their names (isapc, microvm, none,
    those of embedding apps) speak the form that every QEMU since 2.4 accepts.
    """
    match = _VERSIONED.fullmatch(machine_type)
    return for_version(int(match[1]), int(match[2])) if match else Dialect()


def by_name(name: str) -> Dialect:
    """By a name that a person gives: a version of the machine type such as 2.3, or 2013, or a whole machine type.

    Raises ValueError that says what there is.
    """
    if name == "2013":
        return for_version(1, 7)
    if match := re.fullmatch(r"(\d+)\.(\d+)", name):
        return for_version(int(match[1]), int(match[2]))
    if _VERSIONED.fullmatch(name):
        return for_machine(name)
    raise ValueError(
        f"'{name}' is no version of a machine type such as {', '.join(NAMES)} or pc-i440fx-2.3"
    )


#: Arm boards whose pages are of 1 KiB, as QEMU 7.2 has them. Others that QEMU has for processors that old are not known
#: here by name.
_SMALL_PAGES = re.compile(r"virt-2\.[67]|versatile[ap]b|integratorcp|realview-.*|vexpress-a.*")


def unsaid_page_bits(machine_type: str | None) -> int:
    """The target page bits of a stream that does not say any: the fewest that its architecture has, 12 on a PC."""
    return 10 if machine_type is not None and _SMALL_PAGES.fullmatch(machine_type) else 12


def described(dialect: Dialect) -> dict[str, object]:
    """Its members, for people and for JSON."""
    return attrs.asdict(dialect, value_serializer=lambda _, __, v: getattr(v, "value", v))
