"""@vmstate makes a class a VMState, @device makes it a section of the stream as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import attrs

from whimbrel.savevm import Priority
from whimbrel_device.fields import LAYOUT
from whimbrel_device.layout import Layout

#: Attribute of a class whose objects are sections.
DEVICE = "__whimbrel_device__"
T = TypeVar("T")


@attrs.frozen(kw_only=True)
class DeviceInfo:
    """How objects of a class appear in the stream. Callables are asked with the object."""

    idstr: str
    instance_id: int | Callable[[Any], int | None] | None = None
    path: Callable[[Any], str | None] | None = None
    priority: int = Priority.DEFAULT
    unmigratable: str | Callable[[Any], str | None] | None = None
    early_setup: bool = False
    optional: bool = False


def _attrs_class(cls: type[T]) -> type[T]:
    # A class that attrs made has the fields in its own dict; one that merely inherits them is not one itself.
    if "__attrs_attrs__" in cls.__dict__:
        return cls
    return attrs.define(cls, slots=False)


@dataclass_transform()
def vmstate(
    vmsd_name: str, *, version_id: int = 1, minimum_version_id: int | None = None
) -> Callable[[type[T]], type[T]]:
    """Give a class a layout, for use in struct(), array(), subsection() and the like.

    The class is an attrs class, or one with annotated fields, which becomes one (attrs.define without slots). Fields
    that were made by this package's helpers are on the wire, in their order; others are the object's own.
    minimum_version_id is the oldest version that can still be loaded; by default version_id itself.

    Methods that are called if they exist:

    pre_save()              before the object is saved; post_save() after it, also when that failed
    pre_load()              the payload has been read whole and was found good: just before values are assigned
    post_load(version_id)   all values of the section are assigned; it may raise to refuse them, and they are taken back
    needed() -> bool        of a subsection: whether it must be sent
    """

    def decorate(cls: type[T]) -> type[T]:
        made = _attrs_class(cls)
        layout = Layout(
            made, vmsd_name, version_id=version_id, minimum_version_id=minimum_version_id
        )
        setattr(made, LAYOUT, layout)
        return made

    return decorate


@dataclass_transform()
def device(
    idstr: str,
    *,
    vmsd_name: str | None = None,
    version_id: int = 1,
    minimum_version_id: int | None = None,
    instance_id: int | Callable[[Any], int | None] | None = None,
    path: Callable[[Any], str | None] | None = None,
    priority: int = Priority.DEFAULT,
    unmigratable: str | Callable[[Any], str | None] | None = None,
    early_setup: bool = False,
    optional: bool = False,
) -> Callable[[type[T]], type[T]]:
    """Make a class a device: `machine.add(it())` and it migrates. See vmstate() for the class and its methods.

    idstr          name of the section, and of its layout unless vmsd_name gives another
    path           path(obj): where it sits on a bus with addresses ('0000:00:04.0'), to stand before the idstr
    instance_id    fixed, or instance_id(obj); otherwise objects with equal idstr are counted in the order of adding
    priority       FULL sections go by descending priority, then in the order of adding
    unmigratable   why the machine cannot migrate while it has this device, or unmigratable(obj)
    early_setup    sent before the RAM
    optional       a stream without this section still makes a whole machine
    """

    def decorate(cls: type[T]) -> type[T]:
        made = vmstate(
            vmsd_name or idstr, version_id=version_id, minimum_version_id=minimum_version_id
        )(cls)
        info = DeviceInfo(
            idstr=idstr,
            instance_id=instance_id,
            path=path,
            priority=priority,
            unmigratable=unmigratable,
            early_setup=early_setup,
            optional=optional,
        )
        setattr(made, DEVICE, info)
        return made

    return decorate
