"""What query-migrate says of a run, in QMP's words: MigrationInfo, every member optional."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from whimbrel.incoming import Incoming
from whimbrel.state import MigrationState, Status

if TYPE_CHECKING:
    from whimbrel.run import Run

#: Those that show neither times nor sections, as in QEMU.
_STATUS_ALONE = (Status.SETUP, Status.FAILED, Status.CANCELLED)


def migration_info(state: MigrationState, run: Run | None) -> dict[str, Any]:
    """The state of the last run; None: it never came to be one. Members beginning with x- are ours."""
    status, figures = state.status, state.figures
    if status is Status.NONE:
        return {}
    info: dict[str, Any] = {"status": str(status)}
    if isinstance(run, Incoming):
        if not run.done:
            info["x-addresses"] = list(run.addresses)
            if run.socket_addresses:
                info["socket-address"] = list(run.socket_addresses)
    elif run is not None and status not in _STATUS_ALONE:
        info |= {k: round(v * 1000) for k, v in figures.times().items() if v is not None}
        for handler in run.handlers:
            info |= handler.query()
    if run is not None:
        info |= run.route.query()
    if status is Status.FAILED and state.error is not None:
        info["error-desc"] = str(state.error)
    if state.has_finished and state.outcome is not None:
        info["x-outcome"] = str(state.outcome)
        if figures.acknowledged is not None:
            info["x-acknowledged"] = figures.acknowledged
    return info
