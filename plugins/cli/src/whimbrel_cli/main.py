"""The entry point of migctl: runs a command line and turns whatever goes wrong into one line and an exit status.

0    done
1    the migration, the file or the plugin at fault is named on standard error, with what to do next
2    the command line is wrong
6    the outcome is unknown: the other side may run the machine, or not
70   a defect: `-v` shows the traceback
130  interrupted with Ctrl-C
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from whimbrel.errors import BlockedError, MigrationError, OutcomeUnknown
from whimbrel_cli import logs

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNKNOWN = 6
EXIT_DEFECT = 70
EXIT_INTERRUPTED = 130


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
        return EXIT_UNKNOWN if isinstance(error, OutcomeUnknown) else EXIT_FAILED
    except OSError as error:
        if error.filename is None:
            return _defect(error)
        _say(f"{error.filename}: {error.strerror}. Check the path and your rights to it")
        return EXIT_FAILED
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
        return EXIT_USAGE
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
    return EXIT_DEFECT


def _interrupted() -> int:
    _say("interrupted")
    return EXIT_INTERRUPTED


def _say(text: str) -> None:
    print(f"migctl: error: {logs.printable(text)}", file=sys.stderr)
