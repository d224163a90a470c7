"""What an operator sees of a wrong stream: one line that says what, where and what to do; never a traceback."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from whimbrel_testing.peers import PATIENCE
from whimbrel_testing.wrong import all_cases

BY_NAME = {case.name: case for case in all_cases()}
SEEN = (
    "header-http",
    "configuration-name-of-4-gib",
    "section-live-name-for-a-format",
    "section-live-name-for-a-terminal",
    "setup-total-of-8-eib",
    "page-behind-the-end",
    "command-package-of-4-gib",
    "end-vmdescription-nested",
    "cut-part-2072",
)


@pytest.mark.parametrize("name", SEEN)
def test_one_line_and_no_file(name, tmp_path):
    case = BY_NAME[name]
    sent = tmp_path / "sent"
    sent.write_bytes(case.data())
    program = shutil.which("migctl", path=str(Path(sys.executable).parent))
    done = subprocess.run(
        [program, "receive", f"exec:cat {sent}", tmp_path / "kept"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("listening at")]
    assert done.returncode == 1
    assert len(said) == 1, done.stderr
    assert said[0].startswith("migctl: error: ")
    assert said[0].isprintable()
    assert case.keep.says in said[0]
    assert "byte offset" in said[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sent"]
