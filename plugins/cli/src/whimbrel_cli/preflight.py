"""All reasons against a migration, found before it is begun: on the source, in the URI, between the two sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from whimbrel.errors import MigrationError
from whimbrel_cli import uris
from whimbrel_cli.logs import printable
from whimbrel_cli.monitor import Refused
from whimbrel_cli.progress import ENDED

if TYPE_CHECKING:
    from whimbrel import Plugins
    from whimbrel_cli.monitor import Monitor

#: Both sides must agree on these, wherever both know them.
_SHARED_CAPABILITIES = (
    "multifd",
    "postcopy-ram",
    "postcopy-preempt",
    "mapped-ram",
    "x-ignore-shared",
    "x-colo",
    "compress",
    "rdma-pin-all",
)
_SHARED_WITH_MULTIFD = ("multifd-channels", "multifd-compression")
_NO_DISKS_SINCE = (9, 1)
#: They open further connections.
_SEVERAL_CHANNELS = ("multifd", "postcopy-preempt")


def reasons(
    source: Monitor,
    uri: str,
    *,
    plugins: Plugins,
    destination: Monitor | None = None,
    force_bridge: bool = False,
    disks: bool = False,
) -> list[str]:
    """All of them; none: nothing is known against it. Raises Gone."""
    found = [*_of_source(source, uri), *_of_uri(source, uri, plugins, force_bridge)]
    if disks and not uris.is_app(source) and source.version >= _NO_DISKS_SINCE:
        version = ".".join(map(str, source.version))
        found.append(
            f"QEMU {version} does not copy disks (9.0 was the last): leave --blk and --inc out"
        )
    found += [
        f"{uri} is the monitor of {monitor.address}, no place to migrate to"
        for monitor in (source, destination)
        if monitor is not None and uris.same(uri, monitor.address)
    ]
    if destination is not None:
        found += _between(source, destination)
    return [printable(reason) for reason in found]


def _of_source(source: Monitor, uri: str) -> Iterator[str]:
    migration = source.migration()
    if source.has(
        "x-whimbrel-blockers"
    ):  # an app knows more than what blocks it: the scheme, what its plugins say
        yield from source.execute("x-whimbrel-blockers", {"uri": uri})
    else:
        yield from migration.get("blocked-reasons", ())
    run_state = source.run_state()
    if run_state == "inmigrate":
        yield "the source waits itself for an incoming migration"
    if run_state == "postmigrate":
        yield "the source has been migrated already (postmigrate): migctl resolve says who has the machine"
    status = migration.get("status", "none")
    if status not in (*ENDED, "none") and run_state != "inmigrate":
        yield f"a migration is in progress ({status}): wait for its end, or migctl cancel"


def _of_uri(source: Monitor, uri: str, plugins: Plugins, force_bridge: bool) -> Iterator[str]:
    try:
        bridged = force_bridge or not uris.spoken_by(source, uri)
    except MigrationError as error:
        yield str(error)
        return
    if bridged:
        yield from against_bridge(source, uri, plugins)
    elif uri.startswith(("fd:", "exec:")):
        yield from _several_channels(source, uri)


def against_bridge(monitor: Monitor, uri: str, plugins: Plugins) -> Iterator[str]:
    """Why a channel that a plugin opens at uri could not be handed to that machine."""
    from whimbrel.route import Route

    try:
        Route.resolve(plugins, uri)
    except MigrationError as error:
        yield str(error)
        return
    if uris.is_tcp(monitor.address):
        yield (
            f"{uri.partition(':')[0]}: reaches the machine by a descriptor, which only a monitor at a UNIX socket takes;"
            f" {monitor.address} is none"
        )
    yield from _several_channels(monitor, uri)


def _several_channels(monitor: Monitor, uri: str) -> Iterator[str]:
    capabilities = _ask(monitor, monitor.capabilities) or {}
    for name in _SEVERAL_CHANNELS:
        if capabilities.get(name):
            yield f"the capability {name} needs further connections, and {uri} has one: switch it off on both sides"


def _between(source: Monitor, destination: Monitor) -> Iterator[str]:
    if uris.same(source.address, destination.address):
        yield "source and destination are the same machine"
        return
    if (run_state := destination.run_state()) != "inmigrate":
        yield f"the destination waits for no migration: it is {run_state}"
    elif destination.migration().get("status") == "failed":
        yield "the destination has refused a migration already: start it anew"
    ours, theirs = _ask(source, source.capabilities), _ask(destination, destination.capabilities)
    for name in _SHARED_CAPABILITIES if ours is not None and theirs is not None else ():
        here, there = (ours or {}).get(name, False), (theirs or {}).get(name, False)
        if here != there:
            on, off = ("source", "destination") if here else ("destination", "source")
            lacks = name not in ((theirs if here else ours) or {})
            yield f"the capability {name} is on at the {on}, and {'not known' if lacks else 'off'} at the {off}"
    if (ours or {}).get("multifd") and (theirs or {}).get("multifd"):
        yield from _different(source.parameters(), destination.parameters())
    yield from _different_machines(source, destination)


def _different(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    for name in _SHARED_WITH_MULTIFD:
        if ours.get(name) != theirs.get(name):
            yield f"the parameter {name} is {ours.get(name)} at the source, and {theirs.get(name)} at the destination"


def _different_machines(source: Monitor, destination: Monitor) -> Iterator[str]:
    for what, question in (
        ("architecture", _architecture),
        ("machine type", _machine_type),
        ("memory size", _memory),
        ("number of CPUs", _cpus),
    ):
        here = _ask(source, lambda: question(source))  # noqa: B023 - called at once
        there = _ask(destination, lambda: question(destination))  # noqa: B023
        if here is not None and there is not None and here != there:
            yield f"the {what} is {here} at the source, and {there} at the destination"


def _architecture(monitor: Monitor) -> str:
    return str(monitor.execute("query-target")["arch"])


def _machine_type(monitor: Monitor) -> str:
    answer = monitor.execute("qom-get", {"path": "/machine", "property": "type"})
    return str(answer).removesuffix("-machine")


def _memory(monitor: Monitor) -> str:
    from whimbrel_cli import units

    return units.size(monitor.execute("query-memory-size-summary")["base-memory"])


def _cpus(monitor: Monitor) -> int:
    return len(monitor.execute("query-cpus-fast"))


def _ask(monitor: Monitor, question: Any) -> Any:
    """The answer, or None where the monitor does not know the question: an app has no CPUs."""
    try:
        return question()
    except Refused:
        return None
