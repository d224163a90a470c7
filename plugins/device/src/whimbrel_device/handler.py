"""Devices of a machine as sections of the stream."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from whimbrel.errors import LocalError
from whimbrel.savevm import SaveVMHandler
from whimbrel_device.codec import decode_from, encode
from whimbrel_device.declare import DEVICE, DeviceInfo
from whimbrel_device.fields import layout_of

if TYPE_CHECKING:
    from whimbrel.machine import Machine
    from whimbrel.stream import InStream, OutStream
    from whimbrel.wire.items import SectionHeader


_LONGEST = 255  # a counted string


def info_of(device: object) -> DeviceInfo | None:
    """What @device noted for the class of this object, or None: it is not a device."""
    info = getattr(type(device), DEVICE, None)
    return info if isinstance(info, DeviceInfo) else None


def idstr_of(device: object, info: DeviceInfo) -> str:
    """The name of the section. Raises LocalError where it is too long for one."""
    path = info.path(device) if info.path is not None else None
    idstr = f"{path}/{info.idstr}" if path else info.idstr
    if len(idstr) > _LONGEST or not idstr.isascii():
        raise LocalError(
            "this cannot be the name of a section",
            section=idstr,
            expected=f"ASCII, at most {_LONGEST} characters",
        )
    return idstr


class DeviceHandler(SaveVMHandler):
    """The section of one device object. It is loaded in place, all or nothing."""

    def __init__(self, device: Any, *, instance_id: int = 0) -> None:
        info = info_of(device)
        if info is None:
            raise TypeError(f"{type(device)!r} is no device: decorate it with @device")
        layout = layout_of(type(device))
        self.device = device
        self.idstr = idstr_of(device, info)
        self.instance_id = instance_id
        self.version_id = layout.version_id
        self.minimum_version_id = layout.minimum_version_id
        self.priority = info.priority
        self.early_setup = info.early_setup
        self.optional = info.optional
        self.unmigratable = (
            info.unmigratable(device) if callable(info.unmigratable) else info.unmigratable
        )
        self._described: dict[str, Any] | None = None

    def save(self, out: OutStream) -> None:
        payload, self._described = encode(self.device, section=self.idstr)
        out.write(payload)

    def load(self, inp: InStream, header: SectionHeader) -> None:
        decode_from(self.device, inp, version=header.version_id, section=self.idstr)

    def describe(self) -> dict[str, Any] | None:
        return self._described


def handlers_for(machine: Machine) -> list[SaveVMHandler]:
    """A handler for each device among the parts of the machine, in the order of adding.

    Raises LocalError where two devices ask for the same instance_id.
    """
    handlers: list[SaveVMHandler] = []
    devices = [(d, i) for d in machine.all_parts if (i := info_of(d)) is not None]
    taken: dict[str, dict[int, object]] = defaultdict(dict)
    counted = []
    for device, info in devices:
        wanted = info.instance_id(device) if callable(info.instance_id) else info.instance_id
        idstr = idstr_of(device, info)
        counted.append((device, idstr, wanted))
        if wanted is None:
            continue
        if not 0 <= wanted <= 0xFFFFFFFF:
            raise LocalError(
                "an instance_id must fit 32 bits",
                section=idstr,
                expected="0 to 2^32-1",
                found=wanted,
            )
        other = taken[idstr].setdefault(wanted, device)
        if other is not device:
            raise LocalError(
                f"two devices want instance_id {wanted}: {other!r} and {device!r}",
                section=idstr,
                hint="Give one of them another instance_id, or none to have them counted",
            )
    for device, idstr, wanted in counted:
        instance_id = wanted
        if instance_id is None:
            instance_id = next(n for n in range(len(devices) + 1) if n not in taken[idstr])
            taken[idstr][instance_id] = device
        handlers.append(DeviceHandler(device, instance_id=instance_id))
    return handlers
