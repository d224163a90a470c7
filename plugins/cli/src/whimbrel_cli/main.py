"""The entry point of migctl: runs a command line and turns whatever goes wrong into one line and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from whimbrel.errors import BlockedError, MigrationError
from whimbrel_cli import logs
from whimbrel_cli.exits import Exit, status_of


def main() -> NoReturn:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit status. A command may return an int as its status."""
    logs.set_up(0)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return _interrupted()
    except MigrationError as error:
        _say(_migration_error(error))
        return status_of(error)
    except OSError as error:
        if error.filename is None:
            return _defect(error)
        _say(f"{error.filename}: {error.strerror}. Check the path and your rights to it")
        return Exit.FAILED
    except Exception as error:
        return _defect(error)


def _run(argv: Sequence[str]) -> int:
    import click

    from whimbrel_cli.app import migctl

    try:
        status = migctl.main(args=list(argv), prog_name="migctl", standalone_mode=False)
    except click.Abort:
        return _interrupted()
    except click.UsageError as error:
        error.show()
        return Exit.USAGE
    except click.ClickException as error:
        _say(error.format_message())
        return error.exit_code
    return status if isinstance(status, int) else 0


def _migration_error(error: MigrationError) -> str:
    text = str(error)
    if isinstance(error, BlockedError) and len(error.reasons) > 1:
        text = f"{len(error.reasons)} reasons against it: " + "; ".join(error.reasons)
    if error.hint is None and not logs.is_verbose():
        text += " (-v shows how it came to this)"
    return text


def _defect(error: Exception) -> int:
    if logs.is_verbose():
        import traceback

        traceback.print_exception(error)
    advice = "please report it" if logs.is_verbose() else "run with -v for the traceback"
    _say(f"unexpected {type(error).__name__}: {error}; {advice}")
    return Exit.DEFECT


def _interrupted() -> int:
    _say("interrupted")
    return Exit.INTERRUPTED


def _say(text: str) -> None:
    print(f"migctl: error: {logs.printable(text)}", file=sys.stderr)
