"""What receive, send and relay let be set by name: settings that mean something where no machine runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from whimbrel.errors import SettingError
from whimbrel.kernel import Kernel

#: Those of transports and filters can always be set.
RELAYING: tuple[str, ...] = ()
RECEIVING = ("multifd", "multifd-channels", "multifd-compression")
SENDING = (
    *RECEIVING,
    "multifd-zlib-level",
    "multifd-zstd-level",
    "zero-page-detection",
    "commit-timeout",
)


def settable(kernel: Kernel, beside: Iterable[str]) -> list[str]:
    """Names of all settings that a kernel has of them, sorted."""
    infos = kernel.plugins.infos()
    ways = [n for i in infos if i.kind != "savevm" and i.provides for n in i.settings]
    return sorted(name for name in {*ways, *beside} if name in kernel.settings)


def set_those(kernel: Kernel, values: Mapping[str, Any] | None, beside: Iterable[str]) -> None:
    """All of them, or none. Raises SettingError, with what there is to set."""
    known = settable(kernel, beside)
    changes = {}
    for name, value in (values or {}).items():
        full = kernel.settings.find(name).name if name in kernel.settings else name
        if full not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise SettingError(
                f"'{name}' cannot be set here",
                hint=(f"Did you mean '{close[0]}'? " if close else "")
                + f"There are: {', '.join(known)}",
            )
        changes[full] = value
    kernel.settings.update(changes)
