"""What `migctl plan` works out: what a machine writes, measured by its monitor, and what follows for a link."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import attrs

from whimbrel.errors import LocalError
from whimbrel.forecast import Forecast, Writes, forecast
from whimbrel_cli import units

if TYPE_CHECKING:
    from whimbrel_cli.monitor import Monitor

_POLL = 0.05  # seconds
_PATIENCE = 10.0  # seconds for an answer, behind the end of a measurement
#: Since this QEMU a measurement may be shorter than a second.
_MILLISECONDS_SINCE = (8, 2)
#: The shortest measurement, in seconds.
_SHORTEST = 0.05
#: Pages that shall be sampled at least, of all; and what a monitor takes, per GiB.
_SAMPLES, _LEAST, _MOST = 4096, 512, 16_384
_GIB, _MIB = 1 << 30, 1 << 20
_PAGE, _ZERO_RECORD = 4096, 9  # bytes of a page, and of the record of one that is zero
#: A limit that is nearly as long as the shortest window is no other.
_NEAR = 0.9
#: What would just do is reached in no time that one could wait for.
_MARGIN = 1.05


@attrs.frozen(kw_only=True)
class Measured:
    """What a machine writes. Sizes in bytes."""

    #: (seconds, bytes written at least once within them), the shortest first.
    windows: tuple[tuple[float, float], ...]
    memory: int
    used: int | None  # of the memory, what is not zero; None: not known


@attrs.frozen(kw_only=True)
class Link:
    """How fast it is, in bytes/s, and who says so."""

    bandwidth: float
    by: str
    told: str  # the same for people


@attrs.frozen(kw_only=True)
class Plan:
    measured: Measured
    link: Link
    limit: float  # seconds
    used: int
    likely: Forecast
    #: If all that the shortest window saw is written within the downtime limit.
    worst: Forecast

    @property
    def converges(self) -> bool | None:
        """None: it cannot be told from what was measured."""
        if self.likely.switchover is None:
            return False
        return None if self.worst.switchover is None else True


# ---- measuring


def measure(monitor: Monitor, seconds: float, limit: float) -> Measured:
    """Over the downtime limit, as far as the monitor can, and over the rest of the time. Raises Refused, Gone, LocalError."""
    memory = None
    if monitor.has("query-memory-size-summary"):
        summary = monitor.execute("query-memory-size-summary")
        memory = summary["base-memory"] + summary.get("plugged-memory", 0)
    samples = {}
    if memory:
        samples["sample-pages"] = min(max(_SAMPLES * _GIB // memory, _LEAST), _MOST)
    windows, used = [], None
    for window in _windows(monitor, seconds, limit):
        answer, span = _measure(monitor, window, samples)
        rate = answer.get("dirty-rate", 0) * _MIB
        windows.append((span, answer.get("x-written", rate * span)))
        memory, used = answer.get("x-memory", memory), answer.get("x-used", used)
    if memory is None:
        raise LocalError(
            f"{monitor.address} does not tell how much memory the machine has",
            hint="QEMU does since 2.11 (query-memory-size-summary)",
        )
    return Measured(windows=tuple(windows), memory=memory, used=used)


def _windows(monitor: Monitor, seconds: float, limit: float) -> list[float]:
    """Two: what is written within the downtime limit says whether it converges, what is written in a longer time how much
    is written again and again.
    """
    if monitor.version < _MILLISECONDS_SINCE:  # whole seconds
        return [1.0, float(round(seconds - 1))] if seconds >= 2.5 else [1.0]
    first = round(min(max(limit, _SHORTEST), seconds / 2), 3)
    return [first, round(seconds - first, 3)]


def _measure(
    monitor: Monitor, window: float, samples: dict[str, Any]
) -> tuple[dict[str, Any], float]:
    """What it found, and over how many seconds."""
    unit, in_one = {"calc-time-unit": "millisecond"}, 1000
    if monitor.version < _MILLISECONDS_SINCE:
        unit, in_one = {}, 1
    monitor.execute("calc-dirty-rate", {"calc-time": round(window * in_one), **unit, **samples})
    deadline = time.monotonic() + window + _PATIENCE
    time.sleep(window)  # before that, there might be the answer of the one before
    while (answer := monitor.execute("query-dirty-rate", unit)).get("status") != "measured":
        if time.monotonic() > deadline:
            raise LocalError(
                f"{monitor.address} has not measured what the machine writes within"
                f" {units.time(window + _PATIENCE)}",
                hint="The machine is very busy: try again later",
            )
        time.sleep(_POLL)
    return answer, answer["calc-time"] / in_one or window


# ---- judging


def make(measured: Measured, link: Link, limit: float, used: int | None = None) -> Plan:
    """limit: seconds. used: bytes, where somebody knows better."""
    if used is None:
        used = measured.memory if measured.used is None else measured.used
    used = min(used, measured.memory)
    to_send = used + (measured.memory - used) / _PAGE * _ZERO_RECORD

    def of(windows: tuple[tuple[float, float], ...]) -> Forecast:
        writes = Writes.of(windows, measured.memory)
        return forecast(writes, to_send=to_send, bandwidth=link.bandwidth, downtime_limit=limit)

    shortest, written = measured.windows[0]
    worst = ((limit, written),) if 0 < limit < shortest * _NEAR else ()
    return Plan(
        measured=measured,
        link=link,
        limit=limit,
        used=used,
        likely=of(measured.windows),
        worst=of(worst + measured.windows),
    )


def needs(found: Plan) -> tuple[float, float]:
    """What would let one that does not converge end, whichever forecast is right: bytes/s, or a downtime limit in seconds."""
    both = (found.likely, found.worst)
    excess, downtime = max(f.excess for f in both), max(f.downtime for f in both)
    return found.link.bandwidth * excess * _MARGIN, downtime * _MARGIN
