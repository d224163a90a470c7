"""What a plugin finds when it looks at the host: is all there that it needs? Answers of the hook health()."""

from __future__ import annotations

import enum

import attrs


class Health(enum.StrEnum):
    """Of one thing that was looked at, best first."""

    OK = "ok"
    WARNING = "warning"  # works, but slower or with less than it could
    FAILED = "failed"  # something cannot work


@attrs.frozen
class Check:
    """One thing that was looked at: what it is called, how it is, what was found, and the command that mends it."""

    name: str
    health: Health
    found: str
    #: Empty where there is nothing to mend.
    remedy: str = ""
