"""What tests with real QEMUs of both versions share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from whimbrel_testing.peers import QemuFactory


@pytest.fixture(scope="session")
def streams() -> dict[object, bytes]:
    """What was kept before: machines that never ran do not change."""
    return {}


@pytest.fixture
def keep(qemu: QemuFactory, tmp_path: Path, streams: dict[object, bytes]) -> Callable[..., Path]:
    """Keeps a machine that never ran as QEMU itself writes it: `keep("7.2", arguments)`."""

    def kept(version: str, args: tuple[str, ...], **capabilities: bool) -> Path:
        file = tmp_path / f"{version}-{len(list(tmp_path.iterdir()))}.mig"
        key = (version, args, tuple(capabilities.items()))
        if key in streams:
            file.write_bytes(streams[key])
            return file
        source = qemu(*args, version=version, capabilities=capabilities)
        source.migrate(f"exec:cat >{file}", max_bandwidth=0)
        source.wait_migration("completed")
        source.kill()
        streams[key] = file.read_bytes()
        return file

    return kept
