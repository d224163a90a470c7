"""The click application: global options, and a group of commands: those on monitors, and those that plugins bring."""

from __future__ import annotations

import importlib
import logging
import platform
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

import whimbrel
from whimbrel_cli import __version__, logs

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from whimbrel import Plugins

log = logging.getLogger("whimbrel.cli")

EPILOG = """\b
Examples:
  migctl -m unix:/run/src.qmp plan    how it would go, before it begins
  migctl -m unix:/run/src.qmp migrate tcp:host2:4444
  migctl -m unix:/run/a.qmp -m unix:/run/b.qmp watch
  migctl doctor                       what is missing here, with remedies
  migctl --plugins                    what is installed, what is not ready
  migctl --plugins --json             the same for a program
  migctl -p no:exec COMMAND ...       as if the plugin exec were not there
  migctl -p tcp=whimbrel-tcp COMMAND  who provides tcp, where two do
  migctl -v COMMAND ...               say what happens; -vv says everything

WHIMBREL_DISABLE=NAME,NAME in the environment disables plugins as well."""


#: The commands on monitors, imported when one is run or listed.
_OWN = {
    "blockers": "control:blockers",
    "cancel": "control:cancel",
    "caps": "settings:caps",
    "cont": "control:cont",
    "doctor": "doctor:doctor",
    "incoming": "incoming:incoming",
    "migrate": "migrate:migrate",
    "params": "settings:params",
    "plan": "plan:plan",
    "resolve": "control:resolve",
    "set": "settings:set_",
    "status": "control:status",
    "stop": "control:stop",
    "watch": "watch:watch",
}


def similar(word: str, known: Iterable[str]) -> str:
    """'Did you mean ...?', or nothing."""
    import difflib

    found = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean '{found[0]}'?" if found else ""


class Selection:
    """What -m and -p chose, and the plugins under that choice: loaded when somebody asks for them, once."""

    def __init__(self) -> None:
        self.monitors: tuple[str, ...] = ()
        self.disabled: list[str] = []
        self.prefer: dict[str, str] = {}
        self._plugins: Plugins | None = None

    def add(self, text: str) -> None:
        """Take one value of -p. Raises click.BadParameter."""
        what, equals, distribution = text.partition("=")
        if equals and what and distribution:
            self.prefer[what] = distribution
        elif text.startswith("no:") and len(text) > 3:
            self.disabled.append(text[3:])
        else:
            raise click.BadParameter(
                f"'{text}' is neither no:NAME (disable a plugin) nor SCHEME=DISTRIBUTION"
                " (settle which one provides it)"
            )

    @property
    def plugins(self) -> Plugins:
        """The process-wide plugins: a Kernel that a command makes gets these."""
        if self._plugins is None:
            from whimbrel import Plugins

            self._plugins = Plugins.load(disabled=self.disabled, prefer=self.prefer)
            Plugins.share(self._plugins)
            self._warn_of_misspellings(self._plugins)
        return self._plugins

    def _warn_of_misspellings(self, plugins: Plugins) -> None:
        names = {i.name for i in plugins.infos()}
        distributions = names | {i.distribution for i in plugins.infos()}
        for name in self.disabled:
            if name not in names:
                log.warning("-p no:%s: there is no such plugin (migctl --plugins lists them)", name)
        for what, name in self.prefer.items():
            if name not in distributions:
                log.warning("-p %s=%s: that distribution has no plugin here", what, name)


class PluginGroup(click.Group):
    """The commands of its own, and those that are contributed. Plugins are loaded when one of theirs is looked up, or all
    are listed. A command of its own is never taken over.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*_OWN, *self._contributed(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _OWN:
            module, _, name = _OWN[cmd_name].partition(":")
            own: click.Command = getattr(importlib.import_module(f"whimbrel_cli.{module}"), name)
            return own
        claims = self._contributed(ctx).get(cmd_name, {})
        if len(claims) > 1:
            raise whimbrel.PluginError(
                f"the command '{cmd_name}' is claimed by {' and '.join(claims)}",
                hint="Disable one of them with -p no:NAME",
            )
        return next(iter(claims.values()), None)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = similar(args[0], self.list_commands(ctx))
            raise click.UsageError(f"No such command '{args[0]}'. {close}".rstrip(), ctx) from error

    def _contributed(self, ctx: click.Context) -> dict[str, dict[str, click.Command]]:
        """Command name → plugin → command."""
        found: dict[str, dict[str, click.Command]] = {}
        for info, commands in ctx.ensure_object(Selection).plugins.collect("cli_commands"):
            for command in commands or ():
                if isinstance(command, click.Command) and command.name in _OWN:
                    log.warning(
                        "plugin %s offers the command '%s', which is migctl's own: left out",
                        info.source,
                        command.name,
                    )
                elif isinstance(command, click.Command) and command.name:
                    found.setdefault(command.name, {})[info.source] = command
                else:
                    log.warning("plugin %s offers a command that is no click.Command", info.source)
        return found


def _complete_monitor(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from whimbrel_cli.completing import a_path

    return a_path(ctx, parameter, incomplete)


def _set_verbosity(ctx: click.Context, _: click.Parameter, value: int) -> int:
    logs.set_up(value)
    return value


def _select_monitors(ctx: click.Context, _: click.Parameter, value: tuple[str, ...]) -> None:
    ctx.ensure_object(Selection).monitors = value


def _select_plugins(ctx: click.Context, _: click.Parameter, value: tuple[str, ...]) -> None:
    selection = ctx.ensure_object(Selection)
    for text in value:
        selection.add(text)


@click.group(
    cls=PluginGroup,
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "-v",
    "--verbose",
    count=True,
    is_eager=True,
    expose_value=False,
    callback=_set_verbosity,
    help="Say what happens (-v) or everything (-vv), on standard error.",
)
@click.option(
    "-p",
    "select",
    multiple=True,
    is_eager=True,
    expose_value=False,
    callback=_select_plugins,
    metavar="no:NAME|SCHEME=DIST",
    help="Disable a plugin, or choose who provides a scheme that two claim. Repeatable.",
)
@click.option(
    "-m",
    "--monitor",
    "monitors",
    multiple=True,
    expose_value=False,
    callback=_select_monitors,
    metavar="unix:PATH|HOST:PORT",
    envvar="MIGCTL_MONITOR",
    shell_complete=_complete_monitor,
    help="The monitor (QMP) of the machine that a command is about. Repeatable for watch.  [env: MIGCTL_MONITOR]",
)
@click.option("--plugins", "list_plugins", is_flag=True, help="List the plugins and exit.")
@click.option("--json", "as_json", is_flag=True, help="With --plugins: as JSON.")
@click.version_option(
    __version__,
    prog_name="migctl",
    message=f"%(prog)s %(version)s (whimbrel-core {whimbrel.__version__},"
    f" Python {platform.python_version()})",
)
@click.pass_context
def migctl(ctx: click.Context, list_plugins: bool, as_json: bool) -> None:
    """Watch and drive live migrations of whimbrel apps and of QEMU guests."""
    if as_json and not list_plugins:
        raise click.UsageError("--json goes with --plugins, or behind a command", ctx)
    if list_plugins:
        _list(ctx, as_json)
        ctx.exit()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(2)


def _list(ctx: click.Context, as_json: bool) -> None:
    from whimbrel_cli import listing

    if not logs.is_verbose():  # the listing says it all
        logging.getLogger("whimbrel.plugins").setLevel(logging.CRITICAL)
    infos = ctx.ensure_object(Selection).plugins.infos()
    if as_json:
        click.echo(listing.as_json(infos))
    else:
        listing.print_table(infos)
