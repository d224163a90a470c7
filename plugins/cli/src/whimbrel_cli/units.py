"""Units of the command line, both ways: 300ms, 30m, 2GiB/s."""

from __future__ import annotations

import re
from collections.abc import Callable

import click

_TIME = re.compile(r"(?i)(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|m|min|h)?")
_BITS = re.compile(r"(?i)(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(?:bit(?:/s)?|bps)")
_DECIMAL = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600}


def seconds(text: str) -> float:
    """Seconds from '300ms', '150s', '30m', '1.5h', '20'. Raises ValueError."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not a time such as 300ms, 150s or 30m")
    return float(match[1]) * _SECONDS[(match[2] or "s").lower()]


def option(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Callback of an option that is a time."""
    try:
        return None if value is None else seconds(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def rate(text: str) -> float:
    """Bytes/s from '10Gbit/s' (powers of 1000), '500MiB/s', '1G' (powers of 1024). Raises ValueError."""
    from whimbrel.settings import parse_size

    if match := _BITS.fullmatch(text.strip()):
        return float(match[1]) * _DECIMAL[match[2].lower()] / 8
    try:
        return float(parse_size(text))
    except ValueError:
        raise ValueError(f"'{text}' is not a rate such as 10Gbit/s or 500MiB/s") from None


def _callback(parse: Callable[[str], float]) -> Callable[..., float | None]:
    """Of an option whose value parse() understands, and which must be above 0."""

    def convert(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
        try:
            found = None if value is None else parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
        if found is not None and found <= 0:
            raise click.BadParameter(f"'{value}' is not above 0")
        return found

    return convert


def _limit(text: str) -> float:
    from whimbrel.settings import parse_duration

    return parse_duration(text) / 1000


def _size(text: str) -> int:
    from whimbrel.settings import parse_size

    return parse_size(text)


#: Bytes/s.
rate_option = _callback(rate)
#: Seconds from '300ms', '0.3s', and, as in the parameter downtime-limit, '300'.
limit_option = _callback(_limit)
#: Bytes.
size_option = _callback(_size)


def size(count: float) -> str:
    """Bytes for people: 4.6 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def time(value: float) -> str:
    """Seconds for people: 31 ms, 4.2 s, 3 min 20 s, 2 h 05 min."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
