"""`make demo`: a running machine moves from one process to another, and proves that nothing was lost.

Two processes, each an embedding app with a StressMachine. The source's machine keeps writing numbered pages while it is
migrated; the destination's replays all of them afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from whimbrel.settings import parse_duration, parse_size
from whimbrel_testing.harness import AppError, AppGone, AppProcess, Pair
from whimbrel_testing.sequence import BATCH_BYTES
from whimbrel_testing.stress import StressConfig

MIB = 1 << 20
_LOOK = 0.05  # seconds between two looks at the progress
_PLAIN_EVERY = 0.5  # seconds between two lines of progress where there is no terminal
_RUN_ON = 0.5  # seconds that the machine runs at the destination before it is checked
_WIDTH = 80


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Duration(click.ParamType[int]):
    name = "time"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return value if isinstance(value, int) else parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


# ---- how the two processes reach each other


@attrs.frozen(kw_only=True)
class Wiring:
    """Where the destination listens and the source connects (None: to what the destination says)."""

    listen: str
    connect: str | None = None
    source_fds: tuple[int, ...] = ()
    destination_fds: tuple[int, ...] = ()
    #: To be called once both processes have inherited their descriptors: only they may hold them.
    handed_over: Callable[[], object] = lambda: None


@contextlib.contextmanager
def wiring(uri: str, incoming: str | None) -> Iterator[Wiring]:
    """The wiring for a --uri: what bare `exec:` and `fd:` need is made here, and goes away with it."""
    if incoming is not None:
        yield Wiring(listen=incoming, connect=uri)
    elif uri == "exec:":
        directory = tempfile.mkdtemp(prefix="whimbrel-demo-")
        try:
            fifo = os.path.join(directory, "stream")
            os.mkfifo(fifo, 0o600)
            yield Wiring(listen=f"exec:cat {fifo}", connect=f"exec:cat > {fifo}")
        finally:
            shutil.rmtree(directory)
    elif uri == "fd:":
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as both:
            both.enter_context(ours)
            both.enter_context(theirs)
            one, other = ours.fileno(), theirs.fileno()
            yield Wiring(
                listen=f"fd:{other}",
                connect=f"fd:{one}",
                source_fds=(one,),
                destination_fds=(other,),
                handed_over=both.close,
            )
    elif uri.startswith(("exec:", "fd:")):
        raise click.UsageError(
            f"--uri {uri} says how the source sends; say with --incoming how the destination receives"
        )
    elif uri == "unix:":
        directory = tempfile.mkdtemp(prefix="whimbrel-demo-")
        try:
            yield Wiring(listen=f"unix:{directory}/migration")
        finally:
            shutil.rmtree(directory)
    else:
        yield Wiring(listen=uri)


# ---- what is shown


def _mib(n: float) -> str:
    return f"{n / MIB:,.1f} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"


@attrs.define
class Progress:
    """The progress of the source's migration, worked out from query-migrate."""

    total: int
    status: str = "setup"
    passes: int = 0
    sent: int = 0
    remaining: int = 0
    rate: float = 0.0
    _since: float = attrs.field(factory=time.monotonic)
    _last: tuple[float, int] | None = None

    def update(self, info: dict[str, Any]) -> None:
        ram, disk = info.get("ram", {}), info.get("disk", {})
        self.status = info.get("status", self.status)
        self.passes = ram.get("dirty-sync-count", self.passes)
        if ram:
            self.sent = ram["transferred"] + disk.get("transferred", 0)
            self.remaining = ram["remaining"] + disk.get("remaining", 0)
        now = time.monotonic()
        if self._last is None or now - self._last[0] >= 0.3:
            if self._last is not None:
                self.rate = max(0, self.sent - self._last[1]) / (now - self._last[0])
            self._last = (now, self.sent)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._since

    def facts(self) -> str:
        return (
            f"pass {max(1, self.passes)}   {_mib(self.sent)} sent   {_mib(self.remaining)} left"
            f"   {_mib(self.rate)}/s"
        )

    def __rich__(self) -> Group:
        done = max(0, self.total - self.remaining) if self.sent else 0
        bar = Table.grid(padding=(0, 1), expand=False)
        bar.add_row(
            Text(f"{self.status:>9}", style="bold"),
            ProgressBar(total=self.total, completed=done, width=46),
            f"{done / self.total:4.0%}",
            f"{self.elapsed:5.1f} s",
        )
        return Group(bar, Text(" " * 10 + self.facts(), style="dim"))


class Display:
    """A live one on a terminal, lines elsewhere, nothing for --json."""

    def __init__(self, *, quiet: bool) -> None:
        tty = sys.stdout.isatty()
        self._live = tty and not quiet
        self._console = Console(
            highlight=False, quiet=quiet, width=None if tty else _WIDTH, soft_wrap=not tty
        )

    def say(self, text: str = "", style: str | None = None) -> None:
        self._console.print(text, style=style)

    def rows(self, rows: list[tuple[str, str]], style: str | None = None) -> None:
        """Names and values in two columns; long values are wrapped within theirs."""
        indent = 4 + max(len(name) for name, _ in rows)
        for name, value in rows:
            head = f"  {name}".ljust(indent)
            wrapped = textwrap.fill(
                head + value,
                _WIDTH,
                subsequent_indent=" " * indent,
                break_on_hyphens=False,
                break_long_words=False,
            )
            self._console.print(Text(wrapped, style=style or ""))

    @contextlib.contextmanager
    def following(self, progress: Progress) -> Iterator[None]:
        """Show the progress until the block ends; what the block updates is seen."""
        if self._live:
            with Live(progress, console=self._console, refresh_per_second=20):
                yield
            return
        over = threading.Event()

        def lines() -> None:
            while not over.wait(_PLAIN_EVERY):
                self.say(f"  {progress.status}: {progress.facts()}")

        thread = threading.Thread(target=lines, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


# ---- the demo itself


@attrs.frozen(kw_only=True)
class Demo:
    """What was asked for."""

    uri: str
    incoming: str | None
    config: StressConfig
    downtime: int  # ms
    bandwidth: int  # bytes per second, 0: unlimited

    def run(self, display: Display) -> dict[str, Any]:
        """Migrate; returns all that is known at the end. Raises AppError, AppGone, KeyboardInterrupt."""
        display.say("A running machine moves from one process to another.", "bold")
        settings = {"downtime-limit": self.downtime, "max-bandwidth": self.bandwidth}
        with (
            wiring(self.uri, self.incoming) as wires,
            Pair(
                self.config,
                settings=settings,
                source_fds=wires.source_fds,
                destination_fds=wires.destination_fds,
            ) as pair,
        ):
            wires.handed_over()
            return self._migrate(pair, wires, display)

    def _migrate(self, pair: Pair, wires: Wiring, display: Display) -> dict[str, Any]:
        source, destination = pair.source, pair.destination
        source.call("boot")
        heard = destination.call("incoming", uri=wires.listen)["addresses"]
        uri = wires.connect or heard[0]
        display.rows(
            [
                ("machine", self._machine()),
                ("source", f"process {source.pid}, where it runs now"),
                ("destination", f"process {destination.pid}, waiting at {heard[0]}"),
                ("link", f"at most {_mib(self.bandwidth)}/s" if self.bandwidth else "no limit"),
                ("downtime", f"at most {self.downtime} ms"),
            ]
        )
        display.say()
        progress = Progress(self.config.ram + self.config.small + self.config.disk)
        try:
            source.call("migrate", uri=uri, blk=bool(self.config.disk))
            result = _follow(source, progress, display)
            return self._conclude(pair, uri, progress, result, display)
        except KeyboardInterrupt:
            self._cancel(pair, display)
            raise

    def _machine(self) -> str:
        config = self.config
        disk = f", {_mib(config.disk)} of disk ({_mib(config.disk_rate)})" if config.disk else ""
        return (
            f"{_mib(config.ram)} of RAM, of which it writes {_mib(config.rate)} a second{disk}, "
            "and 4 devices"
        )

    def _conclude(
        self,
        pair: Pair,
        uri: str,
        progress: Progress,
        result: dict[str, Any],
        display: Display,
    ) -> dict[str, Any]:
        arrived = _arrival(pair.destination, patience=30 if result["outcome"] == "completed" else 3)
        completed = (result["outcome"], arrived["outcome"]) == ("completed", "completed")
        display.say()
        if not completed:
            ends = {"source says": result, "destination says": arrived}
            told = [
                (who, f"{end['outcome']}{': ' + end['error']['message'] if end['error'] else ''}")
                for who, end in ends.items()
            ]
            display.rows(told, "red")
            display.say()
        here = pair.destination if completed else pair.source
        if completed:
            here.call("ticked")
        _pause(_RUN_ON)
        felt, proof = here.call("report"), here.call("verify")
        violations, running = pair.violations(), pair.running()
        if completed:
            display.rows(self._figures(progress, result, felt, here))
            display.say()
        # Where the outcome is unknown, or nobody can answer, neither side starts by itself.
        expected = [here.role] if completed or result["outcome"] == "failed" else []
        once = not violations and running == expected
        display.rows(
            [("nothing lost" if proof["holds"] else "DAMAGED", proof["text"])],
            "green" if proof["holds"] else "bold red",
        )
        where = f"only the {here.role}'s machine runs" if running else "the machine runs nowhere"
        shown = (
            f"the lease was held by one process at a time; {where}"
            if once
            else f"running in: {', '.join(running) or 'none'}; {'; '.join(violations)}"
        )
        display.rows(
            [("never twice " if once else "TWICE", shown)], "green" if once else "bold red"
        )
        return {
            "uri": uri,
            "ram": self.config.ram,
            "disk": self.config.disk,
            "dirty_rate": self.config.rate,
            "max_bandwidth": self.bandwidth,
            "downtime_limit": self.downtime / 1000,
            "outcome": result["outcome"],
            "error": result["error"],
            "acknowledged": result["acknowledged"],
            "passes": progress.passes,
            "transferred": result["transferred"],
            "total_time": result["total_time"],
            "throughput": result["transferred"] / result["total_time"],
            "downtime": result["downtime"],
            "felt_downtime": felt["felt_downtime"],
            "longest_stall": felt["longest_stall"],
            "writes": proof["writes"],
            "disk_writes": proof["disk_writes"],
            "proof_holds": proof["holds"],
            "faults": proof["faults"],
            "running": running,
            "violations": violations,
            "ok": completed and proof["holds"] and once,
        }

    def _figures(
        self, progress: Progress, result: dict[str, Any], felt: dict[str, Any], here: AppProcess
    ) -> list[tuple[str, str]]:
        sent, total = result["transferred"], result["total_time"]
        known = (
            "the destination said so" if result["acknowledged"] else "nobody can say so on this way"
        )
        return [
            ("moved to", f"process {here.pid} ({known})"),
            ("passes", f"{progress.passes} over the memory, the last one while it stood still"),
            ("sent", f"{_mib(sent)} in {total:.2f} s: {_mib(sent / total)}/s"),
            (
                "downtime",
                f"{_ms(result['downtime'])} as the engine measured it, {_ms(felt['felt_downtime'])} as the guest felt it",
            ),
        ]

    def _cancel(self, pair: Pair, display: Display) -> None:
        """Ctrl-C: the machine stays with, or goes back to, the source."""
        with contextlib.suppress(AppError, AppGone, TimeoutError):
            pair.source.call("cancel", patience=5)
            result = pair.source.call("wait", patience=5)
            display.say()
            display.say(f"The migration was interrupted: {result['outcome']}.", "bold")
            if result["outcome"] == "cancelled":
                proof = pair.source.call("verify", patience=30)
                display.say(f"The machine ran on at the source: {proof['text']}.")


def _follow(source: AppProcess, progress: Progress, display: Display) -> dict[str, Any]:
    """Show the progress until the migration is over; returns how it ended."""
    answer = source.ask("wait", timeout=86400)
    with display.following(progress):
        while True:
            progress.update(source.call("query"))
            with contextlib.suppress(TimeoutError):
                result: dict[str, Any] = answer(_LOOK)
                progress.update(source.call("query"))
                return result


def _arrival(destination: AppProcess, *, patience: float) -> dict[str, Any]:
    """How it ended at the destination; nobody may have come there."""
    try:
        end: dict[str, Any] = destination.call("wait", timeout=patience)
        return end
    except AppError as error:
        return {"outcome": "waiting", "error": {"message": error.message}}
    except (AppGone, TimeoutError) as error:
        return {"outcome": "gone", "error": {"message": str(error)}}


def _pause(seconds: float) -> None:
    """Let the machine run on for so long."""
    threading.Event().wait(seconds)


def _up_to_batches(size: int) -> int:
    return -(-size // BATCH_BYTES) * BATCH_BYTES


_HELP = """A running machine moves from one process to another.

Two processes start, each with a stress machine: RAM, a disk, four devices, and a workload that keeps writing numbered
pages and blocks. The machine of the first migrates to the second while it runs, disk and all, and proves there that no
write was lost, repeated or torn.

\b
Ways to go (--uri):
  tcp:HOST:PORT   default; port 0 takes a free one
  unix:PATH       `unix:` alone makes a socket in a directory of its own
  fd:             a socket pair that both processes inherit
  exec:           a pipe: cat on either side of a FIFO. No way back, so nobody
                  acknowledges. For your own commands give both sides:
                  --uri 'exec:zstd > /tmp/f' --incoming 'exec:zstd -d < /tmp/f'

\b
Examples:
  make demo
  make demo ARGS="--uri unix: --ram 1G --dirty-rate 100M --downtime 300ms"
  make demo ARGS="--uri exec: --bandwidth 0 --json"
"""


@click.command(help=_HELP, context_settings={"max_content_width": _WIDTH})
@click.option("--uri", default="tcp:127.0.0.1:0", show_default=True, help="How to get there.")
@click.option("--incoming", metavar="URI", help="How the destination receives, if not at --uri.")
@click.option("--ram", type=_Size(), default="256M", show_default=True, help="RAM of the machine.")
@click.option(
    "--disk",
    type=_Size(),
    default="32M",
    show_default=True,
    help="Its disk, which travels in the stream; 0 for none.",
)
@click.option(
    "--dirty-rate",
    type=_Size(),
    default="50M",
    show_default=True,
    help="Bytes of pages that the machine writes each second.",
)
@click.option(
    "--downtime",
    type=_Duration(),
    default="50ms",
    show_default=True,
    help="Longest time that it may stand still.",
)
@click.option(
    "--bandwidth",
    type=_Size(),
    default="200M",
    show_default=True,
    help="Most bytes a second for the migration; 0 is no limit.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, nothing else.")
def main(
    *,
    uri: str,
    incoming: str | None,
    ram: int,
    disk: int,
    dirty_rate: int,
    downtime: int,
    bandwidth: int,
    as_json: bool,
) -> None:
    ram = max(BATCH_BYTES, _up_to_batches(ram))
    disk = max(MIB, _up_to_batches(disk)) if disk else 0
    demo = Demo(
        uri=uri,
        incoming=incoming,
        config=StressConfig(ram=ram, rate=dirty_rate, disk=disk),
        downtime=downtime,
        bandwidth=bandwidth,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    display = Display(quiet=as_json)
    try:
        result = demo.run(display)
    except KeyboardInterrupt:
        display.say("Both processes are gone.")
        sys.exit(130)
    except (AppError, AppGone, TimeoutError) as error:
        click.echo(f"demo: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
