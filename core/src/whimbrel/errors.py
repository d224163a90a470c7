"""One tree of errors. Facts are attributes; the message ends with what to do next.

MigrationError
├── LocalError             this side refused or could not
│   ├── StateError         not now: a migration runs, the machine is in postmigrate, ...
│   ├── BlockedError       blockers are present (reasons: newest first)
│   ├── SettingError       unknown setting, bad value, combination refused
│   ├── UriError           a URI that cannot be parsed, or whose scheme nobody provides
│   ├── MachineError       a callback of the embedder failed
│   └── Cancelled          somebody called cancel()
├── RemoteError            the peer, or the way to it
│   ├── ChannelError       connect, read or write failed
│   │   ├── EndOfStream    the channel ended where more was due
│   │   └── DeadlineExceeded
│   ├── StreamError        the bytes are wrong: section, offset, expected, found
│   ├── PeerError          the peer said that it failed (SHUT with a status other than 0)
│   └── OutcomeUnknown     the link was lost after the point of no return
└── PluginError            a plugin is missing, broken, or in conflict with another
"""

from __future__ import annotations

from collections.abc import Sequence


class MigrationError(Exception):
    """Base of all. `section` is an idstr, `offset` a byte offset in the stream."""

    def __init__(
        self,
        message: str,
        *,
        section: str | None = None,
        offset: int | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.section = section
        self.offset = offset
        self.expected = expected
        self.found = found
        self.hint = hint

    def __str__(self) -> str:
        facts = []
        if self.section is not None:
            facts.append(f"section '{self.section}'")
        if self.offset is not None:
            facts.append(f"byte offset {self.offset}")
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        if self.found is not None:
            facts.append(f"found {self.found}")
        text = self.message + (f" ({', '.join(facts)})" if facts else "")
        return f"{text}. {self.hint}" if self.hint else text

    def at(self, *, section: str | None = None, offset: int | None = None) -> None:
        """Fill in where it happened, unless that is known already."""
        if self.section is None:
            self.section = section
        if self.offset is None:
            self.offset = offset


class LocalError(MigrationError):
    """Refused on this side, or not possible there."""


class StateError(LocalError):
    """Not in this state."""


class BlockedError(LocalError):
    """Migration is blocked; `reasons` lists all of them, newest first."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__(reasons[0])
        self.reasons = tuple(reasons)


class SettingError(LocalError):
    """Unknown setting, value out of range, or a refused combination."""


class UriError(LocalError):
    """A URI that cannot be parsed or whose scheme is unknown."""


class MachineError(LocalError):
    """A callback of the embedder failed or refused."""


class Cancelled(LocalError):
    """The migration was cancelled."""


class RemoteError(MigrationError):
    """The peer, or the way to it."""


class ChannelError(RemoteError):
    """Connecting, reading or writing failed."""


class EndOfStream(ChannelError):
    """The channel ended where more was due."""


class DeadlineExceeded(ChannelError):
    """Nothing came before the deadline."""


class StreamError(RemoteError):
    """The bytes of the stream are not what they must be."""


class PeerError(RemoteError):
    """The destination said that it failed."""


class OutcomeUnknown(RemoteError):
    """The link was lost after the point of no return: the peer may run the machine, or not."""


class PluginError(MigrationError):
    """A plugin is missing, broken, or in conflict with another."""
