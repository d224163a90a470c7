"""query-qmp-schema: what the commands take and return, from their annotations. Of a return value that has no declared
members it says `any`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from whimbrel_monitor import kinds
from whimbrel_monitor.events import EVENTS

if TYPE_CHECKING:
    from whimbrel import Kernel
    from whimbrel_monitor.command import Command


def schema(commands: Iterable[Command], kernel: Kernel) -> list[dict[str, Any]]:
    """In the form of QEMU's SchemaInfo: types stand for themselves by numbers, as they do there."""
    types = _Types()
    entries: list[dict[str, Any]] = [
        {
            "name": command.name,
            "meta-type": "command",
            "arg-type": types.name(kinds.Object(command.members(kernel))),
            "ret-type": types.name(kinds.returned(command.function)),
            "allow-oob": False,
        }
        for command in commands
    ]
    entries += [
        {"name": name, "meta-type": "event", "arg-type": types.name(kinds.Object(members))}
        for name, members in EVENTS.items()
    ]
    return entries + types.entries


class _Types:
    """Each type once."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}

    def name(self, kind: kinds.Kind) -> str:
        if isinstance(kind, kinds.Object):
            members = [self._member(member) for member in kind.members]
            return self._add({"meta-type": "object", "members": members})
        if isinstance(kind, kinds.Union):
            union = {
                "meta-type": "object",
                "members": [self._member(kind.choice)],
                "tag": kind.tag,
                "variants": [{"case": c, "type": self.name(k)} for c, k in kind.cases.items()],
            }
            return self._add(union)
        if isinstance(kind, kinds.Array):
            of = self.name(kind.of)
            return self._add({"meta-type": "array", "element-type": of}, f"[{of}]")
        if isinstance(kind, kinds.Choice):
            words = list(kind.words)
            members = [{"name": word} for word in words]
            return self._add({"meta-type": "enum", "members": members, "values": words})
        # The schema knows no ranges.
        plain = kind if isinstance(kind, kinds.Builtin) else kinds.INT
        builtin = {"meta-type": "builtin", "json-type": plain.json_type}
        return self._add(builtin, plain.name)

    def _member(self, member: kinds.Member) -> dict[str, Any]:
        optional = {} if member.required else {"default": None}
        return {"name": member.name, "type": self.name(member.kind), **optional}

    def _add(self, entry: dict[str, Any], name: str | None = None) -> str:
        key = name or repr(entry)
        if key not in self._names:
            self._names[key] = name or str(len(self._names))
            self.entries.append({"name": self._names[key], **entry})
        return self._names[key]
