"""What is said before any verbs: addresses, what is missing, and what does not go together."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from whimbrel import Kernel, Machine, SettingError, UriError
from whimbrel.errors import MigrationError
from whimbrel_ram import RAMBlock
from whimbrel_rdma import limits, needs
from whimbrel_rdma.address import RdmaAddress, parse


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("dst:4444", RdmaAddress("dst", 4444)),
        ("[fe80::1%eth0]:1", RdmaAddress("fe80::1%eth0", 1)),
        (":65535", RdmaAddress("", 65535)),
    ],
)
def test_addresses(text: str, address: RdmaAddress):
    assert parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text", ["", "dst", "dst:", "dst:0", "dst:65536", "a:b:1", "dst:x", "dst:²"]
)
def test_addresses_refused(text: str):
    with pytest.raises(UriError):
        parse(text)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, whimbrel; p = whimbrel.Plugins.load(); p.infos if hasattr(p, 'infos') else 0;"
        "from whimbrel_rdma.plugin import needs; needs();"
        "sys.exit(any(m.split('.')[0] in ('pyverbs', 'numpy') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has nothing."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr(needs, "_SYSTEM", tmp_path / "dist-packages")
    monkeypatch.setattr(needs, "_DEVICES", tmp_path / "infiniband")
    monkeypatch.setattr(needs, "_CM", tmp_path / "rdma_cm")
    monkeypatch.delitem(sys.modules, "pyverbs", raising=False)
    return tmp_path


def test_what_is_missing_is_said_one_after_the_other(bare: Path):
    assert "apt install python3-pyverbs" in (needs.needs() or "")
    (bare / "dist-packages" / "pyverbs").mkdir(parents=True)
    assert "ln -s" in (needs.needs() or "")
    package = bare / "site" / "pyverbs"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cmid.cpython-27-x.so").touch()
    importlib.invalidate_caches()
    assert "not built for this Python" in (needs.needs() or "")
    (package / "cmid.abi3.so").touch()
    assert "no RDMA device" in (needs.needs() or "")
    (bare / "infiniband" / "rxe0").mkdir(parents=True)
    assert "modprobe rdma_ucm" in (needs.needs() or "")
    (bare / "rdma_cm").touch()
    assert needs.needs() is None


@pytest.fixture
def kernel() -> Kernel:
    machine = Machine("test-1.0")
    machine.add(RAMBlock("ram", 64 << 20))
    return Kernel(machine)


@pytest.mark.parametrize("other", ["xbzrle", "multifd"])
def test_what_pin_all_excludes(kernel: Kernel, other: str):
    kernel.settings["x-rdma-pin-all"] = True
    with pytest.raises(SettingError, match="exclude each other"):
        kernel.settings[other] = True


@pytest.mark.parametrize("other", ["xbzrle", "multifd"])
def test_what_rdma_excludes_is_refused_at_the_start(
    kernel: Kernel, other: str, monkeypatch: pytest.MonkeyPatch
):
    kernel.settings[other] = True
    assert other in limits.refusals(kernel.settings, kernel.machine)[0]
    with pytest.raises(MigrationError, match=f"{other}|pyverbs|no RDMA device"):
        kernel.migrate("rdma:192.0.2.1:4444").wait(10)


def test_pin_all_beyond_the_limit(kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    kernel.settings["rdma-pin-all"] = True
    monkeypatch.setattr(limits, "pin_limit", lambda: 64 << 20)
    assert limits.refusals(kernel.settings, kernel.machine) == []
    monkeypatch.setattr(limits, "pin_limit", lambda: 63 << 20)
    (reason,) = limits.refusals(kernel.settings, kernel.machine)
    assert "64 MiB" in reason
    assert "63 MiB" in reason
    assert "ulimit -l" in reason
