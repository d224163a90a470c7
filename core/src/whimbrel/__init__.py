"""whimbrel: live migration as a plugin framework, byte-compatible with QEMU's migration stream.

Names are imported at first use: `import whimbrel` itself costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "kernel": ("Kernel", "get_current"),
    "machine": ("Machine", "RunState"),
    "channel": (
        "Channel",
        "Filter",
        "FilterSpec",
        "Listener",
        "Role",
        "Transport",
        "TransportContext",
        "TransportSpec",
    ),
    "savevm": (
        "Budget",
        "LiveSaveVMHandler",
        "LoadContext",
        "Mode",
        "Pending",
        "Priority",
        "SaveVMHandler",
    ),
    "settings": ("Capability", "Parameter", "Settings", "Side", "Type", "When"),
    "state": ("MigrationState", "Outcome", "RunParams", "Status"),
    "stream": ("InStream", "OutStream"),
    "wire.items": ("SectionHeader",),
    "hookspecs": ("API", "hookimpl"),
    "notifiers": ("Notification", "What"),
    "plugins": ("PluginInfo", "Plugins"),
    "errors": (
        "BlockedError",
        "Cancelled",
        "ChannelError",
        "DeadlineExceeded",
        "EndOfStream",
        "LocalError",
        "MachineError",
        "MigrationError",
        "OutcomeUnknown",
        "PeerError",
        "PluginError",
        "RemoteError",
        "SettingError",
        "StateError",
        "StreamError",
        "UriError",
    ),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE_OF)]  # noqa: PLE0604

if TYPE_CHECKING:
    from whimbrel.channel import (
        Channel as Channel,
    )
    from whimbrel.channel import (
        Filter as Filter,
    )
    from whimbrel.channel import (
        FilterSpec as FilterSpec,
    )
    from whimbrel.channel import (
        Listener as Listener,
    )
    from whimbrel.channel import (
        Role as Role,
    )
    from whimbrel.channel import (
        Transport as Transport,
    )
    from whimbrel.channel import (
        TransportContext as TransportContext,
    )
    from whimbrel.channel import (
        TransportSpec as TransportSpec,
    )
    from whimbrel.errors import (
        BlockedError as BlockedError,
    )
    from whimbrel.errors import (
        Cancelled as Cancelled,
    )
    from whimbrel.errors import (
        ChannelError as ChannelError,
    )
    from whimbrel.errors import (
        DeadlineExceeded as DeadlineExceeded,
    )
    from whimbrel.errors import (
        EndOfStream as EndOfStream,
    )
    from whimbrel.errors import (
        LocalError as LocalError,
    )
    from whimbrel.errors import (
        MachineError as MachineError,
    )
    from whimbrel.errors import (
        MigrationError as MigrationError,
    )
    from whimbrel.errors import (
        OutcomeUnknown as OutcomeUnknown,
    )
    from whimbrel.errors import (
        PeerError as PeerError,
    )
    from whimbrel.errors import (
        PluginError as PluginError,
    )
    from whimbrel.errors import (
        RemoteError as RemoteError,
    )
    from whimbrel.errors import (
        SettingError as SettingError,
    )
    from whimbrel.errors import (
        StateError as StateError,
    )
    from whimbrel.errors import (
        StreamError as StreamError,
    )
    from whimbrel.errors import (
        UriError as UriError,
    )
    from whimbrel.hookspecs import API as API
    from whimbrel.hookspecs import hookimpl as hookimpl
    from whimbrel.kernel import Kernel as Kernel
    from whimbrel.kernel import get_current as get_current
    from whimbrel.machine import Machine as Machine
    from whimbrel.machine import RunState as RunState
    from whimbrel.notifiers import Notification as Notification
    from whimbrel.notifiers import What as What
    from whimbrel.plugins import PluginInfo as PluginInfo
    from whimbrel.plugins import Plugins as Plugins
    from whimbrel.savevm import (
        Budget as Budget,
    )
    from whimbrel.savevm import (
        LiveSaveVMHandler as LiveSaveVMHandler,
    )
    from whimbrel.savevm import (
        LoadContext as LoadContext,
    )
    from whimbrel.savevm import (
        Mode as Mode,
    )
    from whimbrel.savevm import (
        Pending as Pending,
    )
    from whimbrel.savevm import (
        Priority as Priority,
    )
    from whimbrel.savevm import (
        SaveVMHandler as SaveVMHandler,
    )
    from whimbrel.settings import (
        Capability as Capability,
    )
    from whimbrel.settings import (
        Parameter as Parameter,
    )
    from whimbrel.settings import (
        Settings as Settings,
    )
    from whimbrel.settings import (
        Side as Side,
    )
    from whimbrel.settings import (
        Type as Type,
    )
    from whimbrel.settings import (
        When as When,
    )
    from whimbrel.state import (
        MigrationState as MigrationState,
    )
    from whimbrel.state import (
        Outcome as Outcome,
    )
    from whimbrel.state import (
        RunParams as RunParams,
    )
    from whimbrel.state import (
        Status as Status,
    )
    from whimbrel.stream import InStream as InStream
    from whimbrel.stream import OutStream as OutStream
    from whimbrel.wire.items import SectionHeader as SectionHeader


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"whimbrel.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'whimbrel' has no attribute {name!r}")
