"""The short form of what runs over real verbs: one boot, each way once, with and without pin-all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from whimbrel_testing.peers import missing_peer

HERE = Path(__file__).parent
PYVERBS = Path("/usr/lib/python3/dist-packages/pyverbs")

#: Files of which nothing is in the short form: importing them takes seconds there.
SLOW = ["--ignore-glob=*/test_guest.py", "--ignore-glob=*/test_silence.py"]

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif("RDMALAB" in os.environ, reason="this is the lab"),
]


def need_packages() -> None:
    for tool in ("qemu-system-x86_64", "busybox", "ip", "apt-get"):
        if shutil.which(tool) is None:
            missing_peer(f"the RDMA lab needs {tool} (tests/rdma_lab/README.md)")
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    if not any(PYVERBS.glob(f"cmid.{tag}*.so")):
        if PYVERBS.is_dir():
            pytest.skip(f"Debian's pyverbs is not built for {tag}")
        missing_peer("the RDMA lab needs python3-pyverbs (tests/rdma_lab/README.md)")


@pytest.mark.timeout(300)
def test_in_the_lab() -> None:
    need_packages()
    done = subprocess.run(
        [sys.executable, HERE / "lab.py", "tests", "-m", "not slow", *SLOW],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
