"""Capabilities and parameters: those that the kernel and its plugins declare, and no others."""

from __future__ import annotations

from typing import Any

from whimbrel import Capability, Kernel, Parameter, Type
from whimbrel_monitor import Context, command, kinds

_KINDS: dict[Type, kinds.Kind] = {
    Type.BOOL: kinds.BOOL,
    Type.SIZE: kinds.Unsigned(wraps=True),
    Type.DURATION: kinds.Unsigned(wraps=True),
    Type.STR: kinds.STR,
}


def _names(kernel: Kernel, kind: type[Capability | Parameter]) -> tuple[str, ...]:
    """With aliases."""
    found = (s for s in kernel.settings.declared() if isinstance(s, kind))
    return tuple(name for s in found for name in (s.name, *s.aliases))


def _capabilities(kernel: Kernel) -> tuple[kinds.Member, ...]:
    status = kinds.Object(
        (
            kinds.Member("capability", kinds.Choice(_names(kernel, Capability))),
            kinds.Member("state", kinds.BOOL),
        )
    )
    return (kinds.Member("capabilities", kinds.Array(status)),)


def _integer(parameter: Parameter) -> kinds.Kind:
    """The narrowest that holds all that is allowed, as QEMU's own parameters have it."""
    low, high = parameter.minimum, parameter.maximum
    if low is None or low < 0:
        return kinds.INT
    widths = (bits for bits in (8, 32) if high is not None and high < 1 << bits)
    return kinds.Unsigned(bits=next(widths, 64))


def _parameters(kernel: Kernel) -> tuple[kinds.Member, ...]:
    def kind(name: str) -> kinds.Kind:
        parameter = kernel.settings.find(name)
        assert isinstance(parameter, Parameter)
        if parameter.type is Type.CHOICE:
            return kinds.Choice(parameter.choices)
        return _integer(parameter) if parameter.type is Type.INT else _KINDS[parameter.type]

    return tuple(
        kinds.Member(name, kind(name), required=False) for name in _names(kernel, Parameter)
    )


@command("query-migrate-capabilities")
def query_capabilities(ctx: Context) -> list[dict[str, Any]]:
    """Every capability, and whether it is on."""
    settings = ctx.kernel.settings
    return [
        {"capability": s.name, "state": settings[s.name]}
        for s in settings.declared()
        if isinstance(s, Capability)
    ]


@command("migrate-set-capabilities", arguments=_capabilities)
def set_capabilities(ctx: Context, capabilities: list[dict[str, Any]]) -> None:
    """Switch capabilities: all that are named, or none. Refused while a migration runs."""
    ctx.kernel.settings.update({c["capability"]: c["state"] for c in capabilities})


@command("query-migrate-parameters")
def query_parameters(ctx: Context) -> dict[str, Any]:
    """Every parameter and its value."""
    settings = ctx.kernel.settings
    return {s.name: settings[s.name] for s in settings.declared() if isinstance(s, Parameter)}


@command("migrate-set-parameters", arguments=_parameters)
def set_parameters(ctx: Context, **parameters: Any) -> None:
    """Set parameters: all that are named, or none. Most may be changed while a migration runs."""
    ctx.kernel.settings.update(parameters)
