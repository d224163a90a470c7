"""The types of arguments: what a client may send for each, what it is told otherwise, and how query-qmp-schema shows it.

They come from annotations: str, bool, int (64 bits, signed), U64, Size, float (any number), Any, an enum of str, list[...],
and an attrs class for an object. `... | None` is an argument that may be left out; null is no value of it.
"""

from __future__ import annotations

import enum
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import attrs

from whimbrel import LocalError


class ArgumentError(LocalError):
    """An argument that is missing, unexpected, or not of its type. The texts are QEMU's."""


class Kind:
    """One type."""

    def check(self, value: Any, path: str) -> Any:
        """The value as the command gets it. Raises ArgumentError; `path` is the argument's name, with where in it."""
        return value


@attrs.frozen
class Builtin(Kind):
    """A type that the schema has a name for. `said`: what it is called in errors."""

    name: str
    json_type: str
    said: str
    accepts: Callable[[Any], bool] = lambda _: True

    def check(self, value: Any, path: str) -> Any:
        if not self.accepts(value):
            raise _wrong_type(path, self.said)
        return value


@attrs.frozen(kw_only=True)
class Unsigned(Kind):
    """0 to 2^bits - 1. A negative size is taken as the unsigned number of the same bits, as QEMU does: -1 is the most there is."""

    bits: int = 64
    wraps: bool = False

    def check(self, value: Any, path: str) -> int:
        if _is_int(value) and self.wraps and -(1 << 63) <= value < 0:
            value += 1 << 64
        if not _is_int(value) or not -(1 << 63) <= value < 1 << 64:
            raise ArgumentError(f"Parameter '{path}' expects uint64")
        if not 0 <= value < 1 << self.bits:
            named = "uint64" if self.bits == 64 else f"uint{self.bits}_t"
            raise ArgumentError(f"Parameter '{path}' expects {named}")
        return int(value)


@attrs.frozen
class Choice(Kind):
    """One of some words; `make` turns it into what the command gets."""

    words: tuple[str, ...]
    make: Callable[[str], Any] = str

    def check(self, value: Any, path: str) -> Any:
        if not isinstance(value, str):
            raise _wrong_type(path, "string")
        if value not in self.words:
            leaf = path.rpartition(".")[2].partition("[")[0]
            raise ArgumentError(f"Parameter '{leaf}' does not accept value '{value}'")
        return self.make(value)


@attrs.frozen
class Array(Kind):
    of: Kind

    def check(self, value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise _wrong_type(path, "array")
        return [self.of.check(each, f"{path}[{n}]") for n, each in enumerate(value)]


@attrs.frozen
class Member:
    """An argument, or a member of an object. `name` is the client's, `attribute` the program's."""

    name: str
    kind: Kind
    required: bool = True
    attribute: str = attrs.Factory(lambda self: self.name, takes_self=True)


@attrs.frozen
class Object(Kind):
    members: tuple[Member, ...]
    make: Callable[..., Any] = dict

    def check(self, value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            raise _wrong_type(path, "object")
        return self.make(**check_members(self.members, value, f"{path}."))


@attrs.frozen
class Union(Kind):
    """An object whose member `tag` says which others it has."""

    tag: str
    cases: Mapping[str, Object | Union]

    @property
    def choice(self) -> Member:
        return Member(self.tag, Choice(tuple(self.cases)))

    def check(self, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong_type(path, "object")
        return check_members(self._members(value, path), value, f"{path}.")

    def _members(self, value: Mapping[str, Any], path: str) -> tuple[Member, ...]:
        if self.tag not in value:
            raise ArgumentError(f"Parameter '{path}.{self.tag}' is missing")
        case = self.cases[self.choice.kind.check(value[self.tag], f"{path}.{self.tag}")]
        inner = case.members if isinstance(case, Object) else case._members(value, path)
        return (self.choice, *inner)


def check_members(
    members: Iterable[Member], given: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """By attribute. Raises ArgumentError for what is missing, wrong or unexpected, in this order."""
    checked, known = {}, set()
    for member in members:
        known.add(member.name)
        if member.name in given:
            value = member.kind.check(given[member.name], prefix + member.name)
            checked[member.attribute] = value
        elif member.required:
            raise ArgumentError(f"Parameter '{prefix}{member.name}' is missing")
    for name in given:
        if name not in known:
            raise ArgumentError(f"Parameter '{prefix}{name}' is unexpected")
    return checked


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong_type(path: str, expected: str) -> ArgumentError:
    return ArgumentError(f"Invalid parameter type for '{path}', expected: {expected}")


# ---- from annotations

STR = Builtin("str", "string", "string", lambda value: isinstance(value, str))
BOOL = Builtin("bool", "boolean", "boolean", lambda value: isinstance(value, bool))
INT = Builtin("int", "int", "integer", lambda value: _is_int(value) and -1 << 63 <= value < 1 << 63)
WHOLE = Builtin("int", "int", "integer", _is_int)
NUMBER = Builtin("number", "number", "number", lambda v: _is_int(v) or isinstance(v, float))
ANY = Builtin("any", "value", "value")
ANY_OBJECT = Builtin("any", "value", "object", lambda value: isinstance(value, dict))

U64 = Annotated[int, Unsigned()]
Size = Annotated[int, Unsigned(wraps=True)]
#: Of any length, for a command that clamps.
Whole = Annotated[int, WHOLE]

_PLAIN = {str: STR, bool: BOOL, int: INT, float: NUMBER, Any: ANY}


def of(annotation: Any) -> Kind:
    """The kind of an annotation. Raises TypeError for one that QMP has no type for."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Annotated:
        return next(a for a in arguments if isinstance(a, Kind))
    if origin is list:
        return Array(of(arguments[0]))
    if origin in (types.UnionType, typing.Union):
        (inner,) = (a for a in arguments if a is not type(None))
        return of(inner)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if isinstance(annotation, type) and issubclass(annotation, enum.StrEnum):
        return Choice(tuple(map(str, annotation)), annotation)
    if attrs.has(annotation):
        hints = typing.get_type_hints(annotation, include_extras=True)
        members = (
            _member(f.name, hints[f.name], required=f.default is attrs.NOTHING)
            for f in attrs.fields(annotation)
        )
        return Object(tuple(members), annotation)
    if annotation is dict or origin is dict:
        return ANY_OBJECT
    raise TypeError(f"{annotation} is no type of QMP's")


def _member(name: str, annotation: Any, *, required: bool) -> Member:
    return Member(name.replace("_", "-"), of(annotation), required, name)


def of_function(function: Callable[..., Any]) -> tuple[Member, ...]:
    """The arguments of a command: those of the function behind the first, which is the Context. Raises TypeError."""
    hints = typing.get_type_hints(function, include_extras=True)
    _, *parameters = inspect.signature(function).parameters.values()
    return tuple(
        _member(p.name, hints[p.name], required=p.default is p.empty)
        for p in parameters
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    )


def returned(function: Callable[..., Any]) -> Kind:
    """What a command returns: no answer is an empty object; of an object without declared members nothing is said."""
    annotation = typing.get_type_hints(function, include_extras=True).get("return", Any)
    if annotation in (None, type(None)):
        return Object(())
    return of(annotation)
