"""JSON as QMP's clients write it, taken apart incrementally. Sans-I/O: feed bytes, get values and errors.

Values follow each other with or without white space between them; strings may stand in single quotes (and escape them);
a key comes once. After an error the reader goes on with what follows. A byte 0xFF is in no JSON: a client sends it to
end whatever it has begun. The behaviour, the texts of errors included, is what QEMU 7.2 was seen to do; see
docs/reference/monitor.md for where this differs.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import Any, NoReturn

import attrs


@attrs.frozen(kw_only=True)
class Limits:
    """Of one message. QEMU takes 64 MiB, 2 Mi tokens and a nesting of 1024, for the sake of commands that have nothing to do
    with migration. The longest request here has some hundred bytes, but for the command of an exec: channel.
    """

    size: int = 256 << 10  # bytes
    tokens: int = 16 << 10
    nesting: int = 512  # what is echoed as an id must be written again, and json.dumps() recurses


@attrs.frozen
class SyntaxFault:
    """What was fed is not JSON, or too much of it. `text` is QEMU's."""

    text: str


class _Fault(Exception):
    """A SyntaxFault on its way."""


_SPACE = re.compile(rb"[ \t\r\n]*")
_PUNCTUATION = frozenset(b"{}[],:")
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
#: What may stand in a number or be the beginning of one: where it ends, the number does.
_NUMBER_LIKE = re.compile(rb"-?[0-9]*(?:(?<=[0-9])\.[0-9]*)?(?:(?<=[0-9])[eE][+-]?[0-9]*)?")
_LEADING_ZERO = re.compile(rb"-?0[0-9]")
_WORD = re.compile(rb"[a-z]*")
#: Of a string, up to its end quote; control characters must be escaped.
_INSIDE = {
    quote: re.compile(rb"(?:[^%b\\\x00-\x1f\xfe\xff]++|\\[^\x00-\x1f\xfe\xff])*+" % quote)
    for quote in (b'"', b"'")
}
#: What is skipped after a byte that begins nothing.
_LOST = re.compile(rb"[^{}\[\],:\x00-\x08\x0a-\x1f\xfe\xff]*")
#: No number or word is longer.
_LONGEST = 1000
_KEYWORDS = {"true": True, "false": False, "null": None}
#: With the second half of a pair of surrogates.
_ESCAPE = re.compile(r"\\(?:u(.{0,4})(?:(?<=u[dD][89abAB]..)\\u(....))?|(.))", re.DOTALL)
_ESCAPES = {**{c: c for c in "\"'\\/"}, "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class Reader:
    """Give bytes to feed() and iterate: values (any of JSON) and SyntaxFaults, as far as they are whole.

    What has been fed and not yet been asked for is kept as bytes; feed little at a time.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._data = bytearray()
        self._at = 0  # up to here it has been taken apart
        self._scanned = 0  # in a string that is not whole yet: up to here it has been looked at
        self._skipping = False
        self._begin()

    def _begin(self) -> None:
        self._tokens: list[tuple[str, Any]] = []
        self._size = self._braces = self._brackets = 0

    def feed(self, data: bytes) -> None:
        del self._data[: self._at]
        self._scanned = max(0, self._scanned - self._at)
        self._at = 0
        self._data += data

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next value or SyntaxFault; StopIteration when more must be fed."""
        try:
            while True:
                token = self._next_token()
                if token is None:
                    raise StopIteration
                if self._add(*token):
                    tokens = self._tokens
                    self._begin()
                    return parse(tokens)
        except _Fault as fault:
            return SyntaxFault(str(fault))

    # ---- tokens

    def _next_token(self) -> tuple[str, Any] | None:
        """Kind and value of the next token, or None when it is not whole yet. The kind of punctuation is itself."""
        data = self._data
        if self._skipping:
            self._at = _match_end(_LOST, data, self._at)
            if self._at == len(data):
                return None
            self._skipping = False
        if not self._scanned:
            self._at = _match_end(_SPACE, data, self._at)
        if self._at == len(data):
            return None
        first = data[self._at]
        if first in _PUNCTUATION:
            return self._take(chr(first), self._at + 1)
        if first in b"\"'":
            return self._string(bytes((first,)))
        if first in b"-0123456789":
            return self._number()
        end = _match_end(_WORD, data, self._at)
        if end == self._at:
            self._stray(end)
        if end == len(data) and end - self._at <= _LONGEST:
            return None  # it may go on
        word = data[self._at : end].decode()
        return self._take("word", end, word)

    def _take(self, kind: str, end: int, value: Any = None) -> tuple[str, Any]:
        self._size += end - self._at
        self._at, self._scanned = end, 0
        return kind, value

    def _stray(self, end: int) -> None:
        """The byte at `end` does not go on with what stands before it. Raises _Fault."""
        text = self._data[self._at : end + 1][-80:].decode(errors="replace")
        self._at, self._scanned = end + 1, 0
        self._skipping = True
        self._begin()
        raise _Fault(f"JSON parse error, stray '{text}'")

    def _string(self, quote: bytes) -> tuple[str, Any] | None:
        data = self._data
        end = _match_end(_INSIDE[quote], data, max(self._scanned, self._at + 1))
        if self._size + end - self._at > self._limits.size:
            self._too_much("size", end)
        if end == len(data) or (data[end] == 0x5C and end + 1 == len(data)):
            self._scanned = end
            return None
        if data[end : end + 1] != quote:
            self._stray(end + (data[end] == 0x5C))
        return self._take("string", end + 1, bytes(data[self._at + 1 : end + 1]))

    def _number(self) -> tuple[str, Any] | None:
        data = self._data
        like = _match_end(_NUMBER_LIKE, data, self._at)
        if like == len(data) and like - self._at <= _LONGEST:
            return None
        match = _NUMBER.match(data, self._at)
        if match is None or match.end() != like or like - self._at > _LONGEST:
            # 01 is wrong at its second digit; others where they stop.
            leading_zero = _LEADING_ZERO.match(data, self._at)
            self._stray(leading_zero.end() - 1 if leading_zero else like)
        text = data[self._at : like].decode()
        if set(text) <= set("-0123456789"):
            return self._take("number", like, int(text))
        value = float(text)
        if value in (float("inf"), -float("inf")):
            self._stray(like - 1)  # JSON has no word for it
        return self._take("number", like, value)

    # ---- messages

    def _add(self, kind: str, value: Any) -> bool:
        """Whether a message is whole with this token. Raises _Fault when it has become too long."""
        self._tokens.append((kind, value))
        self._braces += (kind == "{") - (kind == "}")
        self._brackets += (kind == "[") - (kind == "]")
        if self._braces + self._brackets > self._limits.nesting:
            self._begin()
            raise _Fault("JSON nesting depth limit exceeded")
        if self._size > self._limits.size:
            self._too_much("size", self._at)
        if len(self._tokens) > self._limits.tokens:
            self._too_much("count", self._at)
        depths = (self._braces, self._brackets)
        return min(depths) < 0 or not any(depths)

    def _too_much(self, what: str, at: int) -> None:
        self._at, self._scanned = at, 0
        self._skipping = True
        self._begin()
        raise _Fault(f"JSON token {what} limit exceeded")


def _match_end(pattern: re.Pattern[bytes], data: bytearray, at: int) -> int:
    match = pattern.match(data, at)
    assert match is not None  # all of them match nothing as well
    return match.end()


# ---- values


def parse(tokens: list[tuple[str, Any]]) -> Any:
    """The value that the tokens of a message are. Raises _Fault. It does not recurse: hostile nesting costs no stack."""
    following = deque(tokens)
    #: Those that are open, each with the key that it has in the one around it.
    containers: list[tuple[Any, str]] = []
    key = ""
    while True:
        kind, text = _next(following)
        if kind in ("{", "["):
            value: Any = {} if kind == "{" else []
            containers.append((value, key))
            ahead = _next(following)
            if ahead[0] != _CLOSING[kind]:
                if kind == "{":
                    key = _key(ahead, following, value)
                else:
                    following.appendleft(ahead)
                continue
            containers.pop()
        else:
            value = _scalar(kind, text)
        # A value has ended: it has its place in what is around it, which may end as well.
        while containers:
            around, outer_key = containers[-1]
            if isinstance(around, dict):
                around[key] = value
            else:
                around.append(value)
            kind, _ = _next(following)
            if kind == ",":
                if isinstance(around, dict):
                    key = _key(_next(following), following, around)
                break
            if kind != ("}" if isinstance(around, dict) else "]"):
                _fail(f"expected separator in {'dict' if isinstance(around, dict) else 'list'}")
            containers.pop()
            value, key = around, outer_key
        if not containers:
            return value


_CLOSING = {"{": "}", "[": "]"}


def _fail(text: str) -> NoReturn:
    raise _Fault(f"JSON parse error, {text}")


def _next(tokens: deque[tuple[str, Any]]) -> tuple[str, Any]:
    """A message ends only where its brackets do: so there is one, but in what is wrong anyway."""
    if not tokens:
        _fail("premature EOI")
    return tokens.popleft()


def _key(token: tuple[str, Any], following: deque[tuple[str, Any]], around: dict[str, Any]) -> str:
    """The key that begins with `token`, and the colon behind it."""
    key = None if token[0] in _CLOSING else _scalar(*token)
    if not isinstance(key, str):
        _fail("key is not a string in object")
    if _next(following)[0] != ":":
        _fail("missing : in object pair")
    if key in around:
        _fail("duplicate key")
    return key


def _scalar(kind: str, value: Any) -> Any:
    if kind == "number":
        return value
    if kind == "string":
        return _text(value)
    if kind != "word":
        _fail("expecting value")
    if value not in _KEYWORDS:
        _fail(f"invalid keyword '{value}'")
    return _KEYWORDS[value]


def _text(data: bytes) -> str:
    """What stands before the end quote, which comes with it: an escape that is cut short is shown with it, as QEMU does.
    Surrogates must come in pairs; what is no character in Unicode is refused.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        _fail("invalid UTF-8 sequence in string")
    if "\\" in text:
        text = _ESCAPE.sub(_unescape, text)
    return text[:-1]


def _unescape(match: re.Match[str]) -> str:
    high, low, other = match.groups()
    if other is not None:
        if other not in _ESCAPES:
            _fail("invalid escape sequence in string")
        return _ESCAPES[other]
    try:
        code = _hex(high)
        if 0xD800 <= code < 0xDC00:
            code = 0x10000 + ((code - 0xD800) << 10) + _hex(low or "") - 0xDC00
            if not low or not 0xDC00 <= _hex(low) < 0xE000:
                raise ValueError(low)
        if 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code < 0xFDF0:
            raise ValueError(high)
    except ValueError:
        _fail(f"\\u{high} is not a valid Unicode character")
    return chr(code)


def _hex(digits: str) -> int:
    if not re.fullmatch("[0-9a-fA-F]{4}", digits):
        raise ValueError(digits)
    return int(digits, 16)
