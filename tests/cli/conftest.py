"""A folder of third-party distributions on the path of a migctl of its own process."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

RUN = "from whimbrel_cli.main import main; main()"


class Site:
    """Distributions as an installer leaves them: modules and a .dist-info beside them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(
        self, distribution, *, group, name, source, version="1.0", requires="whimbrel-core>=0.1"
    ):
        module = distribution.replace("-", "_")
        (self.path / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
            f"Requires-Dist: {requires}\n"
        )
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")

    def environment(self, **changes):
        return {
            **{k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")},
            "PYTHONPATH": str(self.path),
            "PYTHONWARNINGS": "error",
            "TERM": "xterm-256color",
            "COLUMNS": "80",
            "WHIMBREL_DISABLE": "",
            **changes,
        }

    def command(self, *args, prelude=""):
        """`prelude`: Python that runs first."""
        return [sys.executable, "-c", f"{prelude}\n{RUN}", *args]

    def migctl(self, *args, prelude="", **changes):
        return subprocess.run(
            self.command(*args, prelude=prelude),
            env=self.environment(**changes),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)
