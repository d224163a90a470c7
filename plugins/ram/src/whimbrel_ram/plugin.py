"""What the ram plugin declares. Light: numpy is imported by the first migration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from whimbrel.errors import PluginError, SettingError
from whimbrel.hookspecs import hookimpl
from whimbrel.settings import MIB, SIZE_MAX, Capability, Parameter, Side, Type
from whimbrel.state import Status
from whimbrel_ram import hookspecs
from whimbrel_ram.block import RAMBlock
from whimbrel_ram.trackers import AUTO, BUILT_IN, TrackerSpec, choose

if TYPE_CHECKING:
    from whimbrel.channel import Channel
    from whimbrel.health import Check
    from whimbrel.kernel import Kernel
    from whimbrel.machine import Machine
    from whimbrel.plugins import PluginInfo
    from whimbrel.savevm import SaveVMHandler
    from whimbrel.settings import Setting
    from whimbrel_ram.transport import PageTransport

whimbrel_api = (1, 0)
whimbrel_sections = ("ram",)
whimbrel_hookspecs = (hookspecs,)


@hookimpl
def settings() -> list[Setting]:
    return [
        Capability(
            name="xbzrle",
            conflicts=("multifd", "mapped-ram", "rdma-pin-all", "zero-copy-send"),
            help="Send pages that were sent before as what changed in them, against a cache of what was sent"
            " (xbzrle-cache-size). The destination needs no setting for it",
        ),
        Parameter(
            name="xbzrle-cache-size",
            type=Type.SIZE,
            unit="bytes",
            default=64 * MIB,
            minimum=4096,
            maximum=SIZE_MAX,
            power_of_two=True,
            help="Size of the cache of sent pages that deltas are taken against",
        ),
        Capability(
            name="multifd",
            side=Side.BOTH,
            opens_channels=True,
            help="Send the pages over several channels beside the main one",
        ),
        Parameter(
            name="multifd-channels",
            type=Type.INT,
            default=2,
            minimum=1,
            maximum=255,
            side=Side.BOTH,
            help="How many",
        ),
        Parameter(
            name="multifd-compression",
            type=Type.CHOICE,
            default="none",
            choices=("none", "zlib", "zstd"),
            side=Side.BOTH,
            help="How the pages of a packet are packed",
        ),
        Parameter(
            name="multifd-zlib-level",
            type=Type.INT,
            default=1,
            minimum=0,
            maximum=9,
            help="0: not at all; 1: fast; 9: small",
        ),
        Parameter(
            name="multifd-zstd-level",
            type=Type.INT,
            default=1,
            minimum=0,
            maximum=20,
            help="0: zstd's own choice; 1: fast; 20: small",
        ),
        Parameter(
            name="zero-page-detection",
            type=Type.CHOICE,
            default="legacy",
            choices=("none", "legacy", "multifd"),
            help="With multifd, where pages that are zero go: legacy, in the main channel, which every destination"
            " takes; multifd, in packets (QEMU 9.0 and newer); none, they are sent like others",
        ),
        Capability(
            name="auto-converge",
            help="Slow the machine down, step by step, where it writes its memory faster than it can be sent",
        ),
        _percent(
            "throttle-trigger-threshold",
            50,
            1,
            100,
            "Written memory, as a share of what was sent, from which on the machine is slowed down",
        ),
        _percent("cpu-throttle-initial", 20, 1, 99, "How much of its time it rests at first"),
        _percent(
            "cpu-throttle-increment",
            10,
            1,
            99,
            "How much more it rests each time that this was not enough",
        ),
        _percent(
            "max-cpu-throttle",
            99,
            1,
            99,
            "How much of its time it rests at most",
            not_below="cpu-throttle-initial",
        ),
        Parameter(
            name="cpu-throttle-tailslow",
            type=Type.BOOL,
            default=False,
            help="Slow it down by no more than what it takes to make it write little enough",
        ),
        Parameter(
            name="prefault",
            type=Type.BOOL,
            default=False,
            side=Side.DESTINATION,
            help="While it waits, the destination takes memory of the host for all RAM: the first pass is then faster,"
            " and pages that were never used cost memory as well",
        ),
        Parameter(
            name="dirty-tracker",
            type=Type.STR,
            default=AUTO,
            help="Who says what the machine has written: auto, "
            + ", ".join(f"{s.name} ({s.summary})" for s in BUILT_IN)
            + ", or one that a plugin brings",
        ),
    ]


def _percent(
    name: str,
    default: int,
    minimum: int,
    maximum: int,
    help: str,  # noqa: A002
    *,
    not_below: str | None = None,
) -> Parameter:
    return Parameter(
        name=name,
        type=Type.INT,
        unit="%",
        default=default,
        minimum=minimum,
        maximum=maximum,
        not_below=not_below,
        help=help,
    )


@hookimpl
def dirty_trackers() -> list[TrackerSpec]:
    return list(BUILT_IN)


@hookimpl
def preflight(kernel: Kernel, uri: str) -> list[str]:
    """Whether the chosen tracker can watch the machine's memory."""
    blocks = kernel.machine.parts(RAMBlock) if kernel.machine is not None else []
    if not blocks:
        return []
    reasons = []
    try:
        choose(kernel.settings["dirty-tracker"], _trackers(kernel), blocks)
    except SettingError as error:
        reasons.append(str(error))
    if kernel.settings["multifd"]:
        from whimbrel_ram.multifd import packing

        missing = packing.missing(kernel.settings["multifd-compression"])
        reasons += [missing] if missing is not None else []
    if kernel.settings["auto-converge"] and not kernel.machine.has("throttle"):
        reasons.append(
            "auto-converge is on, and the machine cannot be slowed down: it has no throttle()"
        )
    return reasons


@hookimpl
def savevm_handlers(kernel: Kernel, machine: Machine) -> list[SaveVMHandler]:
    blocks = machine.parts(RAMBlock)
    if not blocks:
        return []
    from whimbrel_ram.converge import AutoConverge, Rules
    from whimbrel_ram.handler import RamHandler

    settings = kernel.settings
    converge = None
    if settings["auto-converge"]:
        converge = AutoConverge(
            lambda: Rules.of(settings), lambda percent: machine.invoke("throttle", percent)
        )
    return [
        RamHandler(
            blocks,
            page_size=1 << machine.target_page_bits,
            tracker=lambda: str(kernel.settings["dirty-tracker"]),
            trackers=_trackers(kernel),
            running=lambda: machine.is_running,
            mbps=lambda: max(0.0, kernel.state.figures.mbps),
            find_pages=lambda channel: _page_transport(kernel, channel),
            converge=converge,
            prefault=settings["prefault"],
        )
    ]


@hookimpl
def monitor_commands() -> list[Any]:
    from whimbrel_ram import commands

    return [commands.calc_dirty_rate, commands.query_dirty_rate]


@hookimpl
def health() -> list[Check]:
    from whimbrel_ram.health import checks

    return list(checks())


def _trackers(kernel: Kernel) -> list[TrackerSpec]:
    return [spec for _, specs in kernel.plugins.collect("dirty_trackers") for spec in specs or ()]


def _page_transport(kernel: Kernel, channel: Channel) -> PageTransport | None:
    answers = kernel.plugins.each("page_transports", kernel=kernel, channel=channel)
    found: list[tuple[PluginInfo, PageTransport]] = [(i, p) for i, p in answers if p is not None]
    if len(found) > 1:
        raise PluginError(
            f"the pages are claimed by {' and '.join(info.source for info, _ in found)}",
            hint="Switch one of their capabilities off, or disable one of the plugins",
        )
    if found:
        return found[0][1]
    if kernel.settings["multifd"]:
        return _multifd(kernel, channel)
    if not kernel.settings["xbzrle"]:
        return None
    from whimbrel_ram.xbzrle_pages import XbzrlePages

    page_size = 1 << kernel.machine.target_page_bits
    return XbzrlePages(page_size, lambda: int(kernel.settings["xbzrle-cache-size"]))


def _multifd(kernel: Kernel, channel: Channel) -> PageTransport:
    from whimbrel_ram.multifd.pages import MultifdPages, Options

    machine = kernel.machine
    options = Options.of(
        kernel.settings,
        page_size=1 << machine.target_page_bits,
        flush_records=kernel.dialect.multifd_flush,
        uuid=machine.uuid,
    )
    return MultifdPages(
        options,
        lambda: kernel.state.status in (Status.CANCELLING, Status.CANCELLED),
        channel.abort,
    )
