"""Disks in memory, so that nothing waits for a real one."""

import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def shm():
    """A folder in memory."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)
