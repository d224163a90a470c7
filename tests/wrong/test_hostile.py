"""Streams made to be expensive: reading ten times as much takes ten times the steps, not a hundred."""

import sys

import pytest

from whimbrel.errors import MigrationError
from whimbrel_testing.wrong.loaders import load_keep
from whimbrel_testing.wrong.pieces import (
    END,
    EOF,
    HEADER,
    PART,
    START,
    TIMER,
    TIMER_TEXT,
    configuration,
    described,
    description,
    footer,
    full,
    head,
    opaque,
)

LIVE = HEADER + configuration() + START + head(1, 9, "weather") + bytes(8) + footer(9)
DEVICES = HEADER + configuration() + START + PART + END
DEVICE, NOTHING = full(1, "d", b""), opaque("d", 0)

MADE = {
    "starts-of-devices-behind-what-nobody-reads": lambda n: (
        LIVE + head(4, 1, "timer", 0, 2) * n + EOF + description(TIMER_TEXT)
    ),
    "devices-behind-what-nobody-reads": lambda n: (
        LIVE + DEVICE * n + b"x" + EOF + description(*[NOTHING] * n)
    ),
    "devices-that-came-before": lambda n: (
        LIVE + DEVICE * n + b"x" + EOF + description(TIMER_TEXT, *[NOTHING] * n)
    ),
    "ends": lambda n: DEVICES + TIMER + b"\0\6\0\0\0\x40{" * n,
    "small-descriptions": lambda n: DEVICES + TIMER + (EOF + described(b"{}")) * n,
    "good-descriptions": lambda n: DEVICES + TIMER + b"x" + (EOF + description(TIMER_TEXT)) * n,
    "long-descriptions": lambda n: (
        DEVICES + DEVICE * 199 + (EOF + description(*[NOTHING] * 200)) * (n // 100)
    ),
    "pings": lambda n: DEVICES + TIMER + b"\x08\0\2\0\4\x80\0\0\0" * n,
}


def calls(data):
    """How many functions are called to refuse it, those in C included."""
    count = 0

    def count_call(_frame, event, _arg):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count_call)
    try:
        with pytest.raises(MigrationError):
            load_keep(data)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("name", MADE)
def test_the_price_is_in_proportion(name):
    make = MADE[name]
    calls(make(10))  # imports, once
    few, many = calls(make(100)), calls(make(1000))
    assert many < 12 * few
