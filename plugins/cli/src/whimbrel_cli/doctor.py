"""`migctl doctor`: what is missing here, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import resource
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

import whimbrel
from whimbrel import Check, Health, PluginInfo
from whimbrel_cli import __version__, remote, units
from whimbrel_cli.logs import printable

if TYPE_CHECKING:
    from whimbrel import Plugins
    from whimbrel_cli.app import Selection

_COLOURS = {Health.OK: "green", Health.WARNING: "yellow", Health.FAILED: "bold red"}
_STATES = {"ready": Health.OK, "disabled": Health.OK, "needs": Health.WARNING}
#: A connection, a descriptor or two a channel, and what the machine itself has open.
_DESCRIPTORS = 1024
_LIBRARIES = ("click", "rich", "qemu.qmp")


@click.command(
    short_help="Look for what is missing on this host, and say how to mend it.",
    epilog="""\b
Examples:
  $ migctl doctor
  $ migctl -m unix:/run/vm.qmp doctor      does that monitor answer, too
  $ migctl doctor --json""",
)
@remote.json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Look at the kernel's features, the limits, the packages and the plugins of this host; each with what mends it.

    The exit status is 1 where something cannot work, and 0 otherwise: a warning says that it works with less than it could.
    """
    import logging

    from whimbrel_cli import logs
    from whimbrel_cli.app import Selection

    if not logs.is_verbose():  # what is wrong with a plugin is one of the checks
        logging.getLogger("whimbrel.plugins").setLevel(logging.CRITICAL)
    found = [(source, check) for source, check in _all(ctx.ensure_object(Selection))]
    if as_json:
        remote.tell_json([_record(source, check) for source, check in found])
    else:
        _print(found)
    if any(check.health is Health.FAILED for _, check in found):
        ctx.exit(1)


def _all(selection: Selection) -> Iterator[tuple[str, Check]]:
    """Who looked, and what there is to say."""
    for check in (*_versions(), *_limits()):
        yield "migctl", check
    for info in selection.plugins.infos():
        yield "migctl", _plugin(info)
    yield from _contributed(selection.plugins)
    for address in selection.monitors:
        yield "migctl", _monitor(address)


def _versions() -> Iterator[Check]:
    yield Check("migctl", Health.OK, f"{__version__} (whimbrel-core {whimbrel.__version__})")
    yield Check("Python", Health.OK, f"{platform.python_version()} ({platform.machine()})")
    yield Check("kernel", Health.OK, f"{platform.system()} {platform.release()}")
    for name in _LIBRARIES:
        yield _library(name)


def _library(name: str) -> Check:
    try:
        return Check(name, Health.OK, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, Health.FAILED, "not installed", f"pip install {name}")


def _limits() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)} (at most {_limit(hard)})"
    if 0 <= soft < _DESCRIPTORS:
        enough = hard < 0 or hard >= _DESCRIPTORS
        raised = f"sudo prlimit --pid $$ --nofile={_DESCRIPTORS}:{_DESCRIPTORS}"
        more = f"ulimit -n {_DESCRIPTORS}" if enough else raised
        yield Check("open files", Health.WARNING, found, more)
    else:
        yield Check("open files", Health.OK, found)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "unlimited" if soft < 0 else units.size(soft)
    yield Check("locked memory", Health.OK, f"{found}: what is pinned (rdma) must fit")


def _limit(value: int) -> str:
    return "unlimited" if value < 0 else str(value)


def _plugin(info: PluginInfo) -> Check:
    """Its state; of one that is ready, whether all is installed that its distribution requires."""
    name = f"plugin {info.name}"
    found = f"{info.distribution} {info.version}".rstrip()
    if info.state == "needs":  # its detail is 'what is missing: what to do'
        what, _, remedy = info.detail.partition(": ")
        return Check(name, _STATES["needs"], f"{found}: {what}", remedy)
    if info.state != "ready":
        health = _STATES.get(info.state, Health.FAILED)
        return Check(name, health, f"{found} is {info.state}: {info.detail}", _remedy(info))
    if missing := list(_missing(info.distribution)):
        names = " ".join(f"'{requirement}'" for requirement in missing)
        return Check(
            name, Health.WARNING, f"{found} lacks {', '.join(missing)}", f"pip install {names}"
        )
    return Check(name, Health.OK, found)


def _remedy(info: PluginInfo) -> str:
    return {
        "broken": f"pip install --force-reinstall {info.distribution}",
        "incompatible": f"pip install --upgrade {info.distribution} whimbrel-core",
        "conflict": "choose with migctl -p SCHEME=DISTRIBUTION, or pip uninstall one of them",
    }.get(info.state, "")


def _missing(distribution: str) -> Iterator[str]:
    """Requirements of a distribution that are not installed; those with a marker (extras) aside."""
    try:
        required = importlib.metadata.requires(distribution) or ()
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in required:
        name = re.match(r"[\w.-]+", requirement)
        if ";" in requirement or name is None:
            continue
        try:
            importlib.metadata.version(name[0])
        except importlib.metadata.PackageNotFoundError:
            yield requirement


def _contributed(plugins: Plugins) -> Iterator[tuple[str, Check]]:
    for info, checks, error in plugins.attempt("health"):
        wrong = "" if error is None else f"{type(error).__name__}: {error}"
        try:
            sound = [check for check in checks or () if isinstance(check, Check)]
        except TypeError:
            sound, wrong = [], "answers with what is no list of checks"
        for check in sound:
            yield info.name, check
        if wrong:
            yield (
                info.name,
                Check(
                    "health",
                    Health.FAILED,
                    f"the plugin cannot tell: {wrong}",
                    f"migctl -p no:{info.name} ... does without it; report it to {info.distribution}",
                ),
            )


def _monitor(address: str) -> Check:
    from whimbrel.errors import MigrationError
    from whimbrel_cli.monitor import Monitor

    try:
        with Monitor(address) as monitor:
            major, minor = monitor.version
            app = monitor.has("x-whimbrel-plugins")
            what = "an app of whimbrel" if app else f"QEMU {major}.{minor}"
            found = f"{what}, {monitor.run_state()}"
            return Check(f"monitor {address}", Health.OK, found)
    except MigrationError as error:
        return Check(f"monitor {address}", Health.FAILED, error.message, error.hint or "")


def _record(source: str, check: Check) -> dict[str, Any]:
    return {
        "source": source,
        "name": check.name,
        "health": check.health,
        "found": check.found,
        "remedy": check.remedy or None,
    }


def _print(found: list[tuple[str, Check]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=max(20, console.width // 3))
    table.add_column(overflow="fold")
    for _, check in found:
        text = Text(printable(check.found))
        if check.remedy:
            text.append(f"\n-> {printable(check.remedy)}", style="bold")
        table.add_row(
            Text(check.health, style=_COLOURS[check.health]), Text(printable(check.name)), text
        )
    console.print(table)
    count = {h: sum(check.health is h for _, check in found) for h in Health}
    warnings = f"{count[Health.WARNING]} warning{'s' * (count[Health.WARNING] != 1)}"
    console.print(
        f"{count[Health.FAILED]} failed, {warnings}, {count[Health.OK]} ok",
        style=_COLOURS[max((c.health for _, c in found), key=list(Health).index)],
    )
