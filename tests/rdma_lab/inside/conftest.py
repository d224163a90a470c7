"""What runs inside the lab only: outside there is no RDMA device, and nothing here is collected (see ../README.md)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from itertools import count

import pytest

if "RDMALAB" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    from whimbrel_testing.peers import wait_until

_ports = count(4700)


@pytest.fixture
def uri() -> str:
    return f"rdma:{os.environ['RDMALAB_IP0']}:{next(_ports)}"


def registered() -> str:
    """How many memory regions and queue pairs the kernel has for user programs."""
    text = subprocess.run(
        ["rdma", "resource", "show"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    words = text.split()
    return " ".join(f"{name} {words[words.index(name) + 1]}" for name in ("qp", "mr", "cm_id"))


@pytest.fixture(autouse=True)
def nothing_left_registered() -> Iterator[None]:
    before = registered()
    yield
    wait_until(lambda: registered() == before or None, f"{before}, found {registered()}", 20)
