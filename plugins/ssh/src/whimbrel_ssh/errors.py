"""What can go wrong on the way, told apart. All are ChannelErrors.

ChannelError
├── Unreachable        no SSH server answers there: name, route, port, protocol
├── HostKeyRefused     it is not, or not known to be, the host that is meant
├── AuthRefused        the host does not let us in
├── FarEndRefused      sshd, or what is behind it, refused: forwarding forbidden, nobody listens, the command failed
└── LinkLost           the connection broke while it was in use
"""

from __future__ import annotations

from whimbrel import ChannelError


class Unreachable(ChannelError):
    """No SSH server answers there."""


class HostKeyRefused(ChannelError):
    """The host showed a key that is unknown, changed or revoked."""


class AuthRefused(ChannelError):
    """No key was accepted."""


class FarEndRefused(ChannelError):
    """The connection stands, but its far end does not do what was asked, or failed. status: a command's exit status."""

    def __init__(self, message: str, *, hint: str | None = None, status: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class LinkLost(ChannelError):
    """The connection broke."""
