"""Tables of what the tests have seen, at the end of pytest's output: no cell is empty without a reason."""

from collections.abc import Iterable
from typing import Protocol

import pytest

#: Properties of a test's report that are cells: (table, row, column, what was seen).
CELL = "cell"
#: What stands in a cell until its test has seen something.
BEGUN = "FAILED"


class Record(Protocol):
    """The `record` fixture."""

    def __call__(self, table: str, row: str, column: str, seen: str = BEGUN) -> None:
        """Enter it into that cell; what is said last counts. A reason for an empty cell begins with 'none: '."""


Tables = dict[str, dict[str, dict[str, str]]]


def tables(reports: Iterable[pytest.TestReport]) -> Tables:
    """What the tests entered: table → row → column → cell."""
    found: Tables = {}
    for report in reports:
        for name, value in report.user_properties:
            if name == CELL:
                table, row, column, seen = value  # type: ignore[misc]
                if seen == BEGUN and report.skipped:
                    seen = f"none: {_why(report)}"
                found.setdefault(table, {}).setdefault(row, {})[column] = seen
    return found


def _why(report: pytest.TestReport) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else "skipped"


def lines(rows: dict[str, dict[str, str]]) -> list[str]:
    """A table as text, the reasons of its empty cells below it."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    reasons: list[str] = []

    def cell(seen: str) -> str:
        if not seen.startswith("none: "):
            return seen
        if seen not in reasons:
            reasons.append(seen)
        return f"-({reasons.index(seen) + 1})"

    body = [["", *columns]]
    body += [[name, *(cell(row.get(c, "not run")) for c in columns)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    text = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in body
    ]
    return text + [f"({n}) {reason}" for n, reason in enumerate(reasons, start=1)]
