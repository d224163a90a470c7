"""The commands that the ram plugin adds to a monitor, in QEMU's words. Imported when whimbrel-monitor asks for them."""

from __future__ import annotations

import enum
from typing import Any

from whimbrel.errors import LocalError
from whimbrel_monitor import Context, command
from whimbrel_ram import dirty_rate

#: Milliseconds, and pages per GiB: the ranges of QEMU 10.0.
_TIMES = (50, 60_000)
_SAMPLES = (128, 16_384)
_MIB = 1 << 20


class Unit(enum.StrEnum):
    """Of calc-time."""

    SECOND = "second"
    MILLISECOND = "millisecond"

    @property
    def milliseconds(self) -> int:
        return 1000 if self is Unit.SECOND else 1


class Mode(enum.StrEnum):
    """How it is measured. QEMU has others; they switch tracking on, which this leaves alone."""

    PAGE_SAMPLING = "page-sampling"


@command("calc-dirty-rate")
def calc_dirty_rate(
    ctx: Context,
    calc_time: int,
    calc_time_unit: Unit = Unit.SECOND,
    sample_pages: int = dirty_rate.DEFAULT_SAMPLES,
    mode: Mode = Mode.PAGE_SAMPLING,
) -> None:
    """Begin to measure how much the machine writes, for `calc-time`; query-dirty-rate tells the result. Pages are sampled,
    `sample-pages` per GiB and 2048 of a block at least: nothing is tracked, the machine is not disturbed.
    """
    milliseconds = calc_time * calc_time_unit.milliseconds
    low, high = _TIMES
    if not low <= milliseconds <= high:
        raise LocalError(f"Calculation time is out of range [{low}ms, {high}ms].")
    low, high = _SAMPLES
    if not low <= sample_pages <= high:
        raise LocalError(f"sample-pages is out of range[{low}, {high}].")
    dirty_rate.of(ctx.kernel).begin(milliseconds / 1000, sample_pages)


@command("query-dirty-rate")
def query_dirty_rate(ctx: Context, calc_time_unit: Unit = Unit.SECOND) -> dict[str, Any]:
    """The measurement under way, or the last one: `dirty-rate` in whole MiB/s over `calc-time`, and what that
    is of, `x-written` bytes; the machine's RAM, `x-memory`, and how much of it is not zero, `x-used`.
    """
    rate = dirty_rate.of(ctx.kernel)
    found = rate.written
    status = "measuring" if rate.is_measuring else "unstarted" if found is None else "measured"
    seconds = rate.seconds if found is None else found.seconds
    result: dict[str, Any] = {
        "status": status,
        "sample-pages": rate.samples,
        "mode": str(Mode.PAGE_SAMPLING),
        "calc-time-unit": str(calc_time_unit),
        "start-time": rate.began,
        "calc-time": round(seconds * 1000) // calc_time_unit.milliseconds,
    }
    if found is not None:
        result |= {
            "dirty-rate": int(found.rate) // _MIB,
            "x-written": round(found.size),
            "x-memory": found.memory,
            "x-used": round(found.used),
        }
    return result
