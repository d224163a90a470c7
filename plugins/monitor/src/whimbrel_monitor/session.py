"""What one client has said so far, and what it is told. Sans-I/O: JSON values in, requests and replies out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from whimbrel import LocalError, __version__
from whimbrel_monitor import kinds
from whimbrel_monitor.reader import SyntaxFault

#: Which QEMU's surface this is, for clients that ask for the version: the one with the state `device` on the way to
#: `completed`, with channels and exit-on-error. What is not there is missing in query-commands, as in a QEMU that was
#: built without it.
VERSION: dict[str, Any] = {
    "qemu": {"micro": 0, "minor": 0, "major": 10},
    "package": f"whimbrel {__version__}",
}

GENERIC, NOT_FOUND = "GenericError", "CommandNotFound"
NEGOTIATE = "qmp_capabilities"
#: There is nothing to enable: oob is not offered.
NEGOTIATE_ARGUMENTS = (kinds.Member("enable", kinds.Array(kinds.Choice(())), required=False),)


class QmpError(LocalError):
    """An error of another class than GenericError."""

    def __init__(self, error_class: str, text: str) -> None:
        super().__init__(text)
        self.error_class = error_class


@attrs.frozen(kw_only=True)
class Request:
    """What a client asks. `id` is there only if it gave one, as a list of one, since null is one."""

    execute: str
    arguments: Mapping[str, Any]
    id: tuple[Any, ...] = ()

    def reply(self, value: Any) -> bytes:
        """The answer: {} for None."""
        returned = {} if value is None else value
        return encode({"return": returned, **({"id": self.id[0]} if self.id else {})})

    def refusal(self, error: BaseException) -> bytes:
        return refusal(error, self.id)


def encode(message: Mapping[str, Any]) -> bytes:
    """One line of ASCII. Raises ValueError or TypeError for what JSON cannot say."""
    return json.dumps(message, allow_nan=False).encode("ascii") + b"\r\n"


def refusal(error: BaseException, of: tuple[Any, ...] = ()) -> bytes:
    error_class = error.error_class if isinstance(error, QmpError) else GENERIC
    told = {"class": error_class, "desc": str(error)}
    return encode({**({"id": of[0]} if of else {}), "error": told})


def greeting() -> bytes:
    return encode({"QMP": {"version": VERSION, "capabilities": []}})


class Session:
    """Whether a client has negotiated, and the checks that come before any command."""

    def __init__(self) -> None:
        self.negotiated = False

    def receive(self, value: Any) -> Request | bytes:
        """A request to execute, or the answer to what is none."""
        if isinstance(value, SyntaxFault):
            return refusal(LocalError(value.text))
        given: tuple[Any, ...] = ()
        try:
            if not isinstance(value, dict):
                raise LocalError("QMP input must be a JSON object")
            if "id" in value:
                given = (value["id"],)
            request = Request(id=given, **_checked(value))
            if self.negotiated:
                return request  # qmp_capabilities is a command then, which refuses
            if request.execute != NEGOTIATE:
                raise QmpError(NOT_FOUND, f"Expecting capabilities negotiation with '{NEGOTIATE}'")
            kinds.check_members(NEGOTIATE_ARGUMENTS, request.arguments)
            self.negotiated = True
            return request.reply(None)
        except LocalError as error:
            return refusal(error, given)


def _checked(message: Mapping[str, Any]) -> dict[str, Any]:
    """Command and arguments of a message. Raises LocalError."""
    for name, value in message.items():
        if name == "execute" and not isinstance(value, str):
            raise LocalError("QMP input member 'execute' must be a string")
        if name == "arguments" and not isinstance(value, dict):
            raise LocalError("QMP input member 'arguments' must be an object")
        if name not in ("execute", "arguments", "id"):
            raise LocalError(f"QMP input member '{name}' is unexpected")
    if "execute" not in message:
        raise LocalError("QMP input lacks member 'execute'")
    return {"execute": message["execute"], "arguments": message.get("arguments", {})}
