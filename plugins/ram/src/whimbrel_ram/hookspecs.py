"""The hooks of the ram plugin. They collect, like those of the kernel, and are implemented with whimbrel.hookimpl."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whimbrel.hookspecs import hookspec

if TYPE_CHECKING:
    from whimbrel.channel import Channel
    from whimbrel.kernel import Kernel
    from whimbrel_ram.trackers import TrackerSpec
    from whimbrel_ram.transport import PageTransport


@hookspec
def dirty_trackers() -> list[TrackerSpec]:  # type: ignore[empty-body]
    """Dirty trackers, to be chosen by the parameter `dirty-tracker`. Called at the start of each migration; a failure
    is the plugin's alone.
    """


@hookspec
def page_transports(kernel: Kernel, channel: Channel) -> PageTransport | None:
    """Another way for pages than records in the stream, for this migration over this channel; None: not mine (a
    capability is off, say). Called once the channel is open, on both sides, only when the channel itself brings no
    PageTransport. Two answers fail the migration.
    """
