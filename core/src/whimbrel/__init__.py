"""whimbrel: live migration as a plugin framework, byte-compatible with QEMU's migration stream.

Names are imported at first use: `import whimbrel` itself costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: module: the public names in it
_WHERE = {
    "kernel": "Kernel get_current",
    "handle": "Monitor",
    "health": "Check Health",
    "machine": "Machine RunState",
    "channel": "Channel Filter FilterSpec Listener Role Transport TransportContext TransportSpec",
    "savevm": "Budget LiveSaveVMHandler LoadContext Mode Pending Priority SaveVMHandler",
    "settings": "Capability Parameter Settings Side Type When",
    "state": "MigrationState Outcome RunParams Status",
    "stream": "InStream OutStream",
    "wire.items": "SectionHeader",
    "hookspecs": "API hookimpl",
    "notifiers": "Notification What",
    "plugins": "PluginInfo Plugins",
    "errors": (
        "BlockedError Cancelled ChannelError DeadlineExceeded EndOfStream LocalError "
        "MachineError MigrationError OutcomeUnknown PeerError PluginError RemoteError "
        "SettingError StateError StreamError UriError"
    ),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names.split()}
__all__ = ["__version__", *sorted(_MODULE_OF)]  # noqa: PLE0604

if TYPE_CHECKING:
    from whimbrel.channel import (
        Channel as Channel,
        Filter as Filter,
        FilterSpec as FilterSpec,
        Listener as Listener,
        Role as Role,
        Transport as Transport,
        TransportContext as TransportContext,
        TransportSpec as TransportSpec,
    )
    from whimbrel.errors import (
        BlockedError as BlockedError,
        Cancelled as Cancelled,
        ChannelError as ChannelError,
        DeadlineExceeded as DeadlineExceeded,
        EndOfStream as EndOfStream,
        LocalError as LocalError,
        MachineError as MachineError,
        MigrationError as MigrationError,
        OutcomeUnknown as OutcomeUnknown,
        PeerError as PeerError,
        PluginError as PluginError,
        RemoteError as RemoteError,
        SettingError as SettingError,
        StateError as StateError,
        StreamError as StreamError,
        UriError as UriError,
    )
    from whimbrel.handle import Monitor as Monitor
    from whimbrel.health import Check as Check, Health as Health
    from whimbrel.hookspecs import API as API, hookimpl as hookimpl
    from whimbrel.kernel import Kernel as Kernel, get_current as get_current
    from whimbrel.machine import Machine as Machine, RunState as RunState
    from whimbrel.notifiers import Notification as Notification, What as What
    from whimbrel.plugins import PluginInfo as PluginInfo, Plugins as Plugins
    from whimbrel.savevm import (
        Budget as Budget,
        LiveSaveVMHandler as LiveSaveVMHandler,
        LoadContext as LoadContext,
        Mode as Mode,
        Pending as Pending,
        Priority as Priority,
        SaveVMHandler as SaveVMHandler,
    )
    from whimbrel.settings import (
        Capability as Capability,
        Parameter as Parameter,
        Settings as Settings,
        Side as Side,
        Type as Type,
        When as When,
    )
    from whimbrel.state import (
        MigrationState as MigrationState,
        Outcome as Outcome,
        RunParams as RunParams,
        Status as Status,
    )
    from whimbrel.stream import InStream as InStream, OutStream as OutStream
    from whimbrel.wire.items import SectionHeader as SectionHeader


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"whimbrel.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'whimbrel' has no attribute {name!r}")
