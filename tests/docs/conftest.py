"""The Markdown files of the project, and the fenced blocks in them."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Page(NamedTuple):
    """One Markdown file."""

    path: Path

    def blocks(self, *languages):
        """(line number, text) of the fenced blocks in one of these languages."""
        text = self.path.read_text()
        return [
            (text.count("\n", 0, match.start(2)) + 1, match[2])
            for match in FENCE.finditer(text)
            if match[1] in languages
        ]

    @property
    def name(self):
        return str(self.path.relative_to(ROOT))


PAGES = [
    Page(path)
    for path in sorted(
        [
            *ROOT.glob("*.md"),
            *ROOT.glob("core/*.md"),
            *ROOT.glob("plugins/*/README.md"),
            *ROOT.glob("examples/**/*.md"),
            *ROOT.glob("docs/**/*.md"),
        ]
    )
]


def pytest_generate_tests(metafunc):
    for fixture, languages in (
        ("page", None),
        ("python_page", ["python"]),
        ("console_page", ["console", "sh"]),
    ):
        if fixture in metafunc.fixturenames:
            chosen = [p for p in PAGES if languages is None or p.blocks(*languages)]
            metafunc.parametrize(fixture, chosen, ids=lambda p: p.name)


@pytest.fixture
def root():
    return ROOT
