"""The setters of 2013, which have no place in newer QEMUs, for scripts that use them. They set today's parameters."""

from __future__ import annotations

import math

from whimbrel import LocalError, Parameter
from whimbrel.settings import SIZE_MAX
from whimbrel_monitor import Context, command
from whimbrel_monitor.kinds import Whole

_CACHE = "xbzrle-cache-size"


@command("migrate_set_speed")
def migrate_set_speed(ctx: Context, value: Whole) -> None:
    """Set max-bandwidth to `value` bytes per second. 0, or less, is unlimited; more than 2^64-1 is 2^64-1."""
    ctx.kernel.settings["max-bandwidth"] = min(max(value, 0), SIZE_MAX)


@command("migrate_set_downtime")
def migrate_set_downtime(ctx: Context, value: float) -> None:
    """Set downtime-limit to `value` seconds, in whole milliseconds; a fraction of one is one. Less than 0 is 0, more than that
    parameter can hold is the most that it can hold.
    """
    if math.isnan(value):
        raise LocalError("Parameter 'value' expects a number of seconds")
    limit = ctx.kernel.settings.find("downtime-limit")
    assert isinstance(limit, Parameter)
    assert limit.maximum is not None
    longest = min(limit.maximum, SIZE_MAX / 1e6)
    milliseconds = min(max(value * 1000, 0), longest)
    ctx.kernel.settings[limit.name] = round(milliseconds) or math.ceil(milliseconds)


@command("migrate-set-cache-size")
def migrate_set_cache_size(ctx: Context, value: Whole) -> None:
    """Set xbzrle-cache-size to `value` bytes, rounded down to a power of two."""
    if not 0 <= value <= SIZE_MAX:
        raise LocalError("Parameter 'cache size' expects exceeding address space")
    page = 1 << ctx.kernel.machine.target_page_bits
    if value < page:
        raise LocalError(f"Parameter 'cache size' expects at least a page of {page} bytes")
    ctx.kernel.settings[_CACHE] = 1 << (value.bit_length() - 1)


@command("query-migrate-cache-size")
def query_migrate_cache_size(ctx: Context) -> int:
    """The parameter xbzrle-cache-size, in bytes."""
    return int(ctx.kernel.settings[_CACHE])
