"""What migctl and the process that bridges say to each other, and both of a machine."""

from __future__ import annotations

import enum

import attrs

#: The names of the descriptors in the machine.
CHANNEL, KEPT = "migctl", "migctl-kept"
#: No message is longer.
MESSAGE_MAX = 1 << 16
#: Run states in which a source has not written the end of its stream.
_NOT_STOPPED = frozenset(
    {
        "running",
        "paused",
        "prelaunch",
        "suspended",
        "io-error",
        "internal-error",
        "guest-panicked",
        "watchdog",
        "debug",
        "shutdown",
    }
)


class State(enum.StrEnum):
    """How it stands, or ended."""

    CONNECTING = "connecting"
    LISTENING = "listening"
    PUMPING = "pumping"
    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"


@attrs.frozen
class Result:
    state: State
    error: str | None = None


@attrs.frozen
class Standing:
    """What the source says of itself."""

    run_state: str
    status: str  # of its migration

    @property
    def may_see_the_end(self) -> bool:
        """An end of the connection makes no second machine. In postcopy it makes the source wait for a new one."""
        return self.run_state in _NOT_STOPPED or self.status.startswith("postcopy")


@attrs.frozen(kw_only=True)
class Job:
    """What the process is there for; goes to it as JSON."""

    role: str
    uri: str
    monitor: str
    disabled: list[str]
    prefer: dict[str, str]
    #: Pump, also where the machine could have the descriptor.
    pump: bool
    #: Seconds until there must be a connection.
    timeout: float | None
    #: The destination is to outlive a migration that fails.
    survive: bool
