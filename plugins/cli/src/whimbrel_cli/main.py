"""The entry point of migctl: runs a command line and turns whatever goes wrong into one line and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from whimbrel.errors import BlockedError, Cancelled, MigrationError
from whimbrel_cli import logs
from whimbrel_cli.exits import Exit, status_of

#: Options of migctl itself, which people write behind the command.
_BEFORE = ("-m", "--monitor", "-p", "-v", "--verbose")


def main() -> NoReturn:
    """The console script."""
    if os.environ.get("_MIGCTL_COMPLETE") == "bash_complete":
        _mend_words()
    sys.exit(run(sys.argv[1:]))


def _mend_words() -> None:
    from whimbrel_cli.completing import join_colons

    try:
        words, at = join_colons(os.environ["COMP_WORDS"].split(), int(os.environ["COMP_CWORD"]))
    except (KeyError, ValueError):
        return
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = " ".join(words), str(at)


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit status. A command may return an int as its status.

    What goes wrong is one line on standard error; with --json it is an object on standard output as well.
    """
    logs.set_up(0)
    as_json = "--json" in argv
    try:
        return _run(argv, as_json)
    except KeyboardInterrupt:
        return _failed("interrupted", Exit.INTERRUPTED, as_json)
    except MigrationError as error:
        more = {"reasons": list(error.reasons)} if isinstance(error, BlockedError) else {}
        return _failed(str(error), status_of(error), as_json, said=_migration_error(error), **more)
    except OSError as error:
        if error.filename is None:
            return _defect(error, as_json)
        text = f"{error.filename}: {error.strerror}. Check the path and your rights to it"
        return _failed(text, Exit.FAILED, as_json)
    except Exception as error:
        return _defect(error, as_json)


def _run(argv: Sequence[str], as_json: bool) -> int:
    import click

    from whimbrel_cli.app import migctl

    try:
        status = migctl.main(args=list(argv), prog_name="migctl", standalone_mode=False)
    except click.Abort:
        return _failed("interrupted", Exit.INTERRUPTED, as_json)
    except click.UsageError as error:
        if isinstance(error, click.NoSuchOption) and error.option_name in _BEFORE:
            name = error.ctx.info_name if error.ctx is not None else "COMMAND"
            before = f"It comes before the command: migctl {error.option_name} ... {name}"
            error = click.UsageError(f"No such option '{error.option_name}'. {before}", error.ctx)
        error.show()
        if as_json:
            _tell_json(error.format_message(), Exit.USAGE)
        return Exit.USAGE
    except click.ClickException as error:
        return _failed(error.format_message(), error.exit_code, as_json)
    return status if isinstance(status, int) else 0


def _failed(text: str, status: int, as_json: bool, *, said: str = "", **more: Any) -> int:
    """Tell it; `said`, if any, is what standard error gets."""
    if as_json:
        _tell_json(text, status, **more)
    print(
        logs.folded(f"migctl: error: {logs.printable(said or text)}", sys.stderr), file=sys.stderr
    )
    return status


def _tell_json(text: str, status: int, **more: Any) -> None:
    import json

    told = {"event": "error", "error": text, "exit-status": int(status), **more}
    print(json.dumps(told), flush=True)


def _migration_error(error: MigrationError) -> str:
    text = str(error)
    if isinstance(error, BlockedError) and len(error.reasons) > 1:
        text = f"{len(error.reasons)} reasons against it: " + "; ".join(error.reasons)
    told = isinstance(error, (BlockedError, Cancelled))  # nothing more to show
    if error.hint is None and not told and not logs.is_verbose():
        text += " (-v shows how it came to this)"
    return text


def _defect(error: Exception, as_json: bool) -> int:
    if logs.is_verbose():
        import traceback

        traceback.print_exception(error)
    advice = "please report it" if logs.is_verbose() else "run with -v for the traceback"
    text = f"unexpected {type(error).__name__}: {error}; {advice}"
    return _failed(text, Exit.DEFECT, as_json)
