"""What is missing for RDMA on this machine, without importing pyverbs: its import loads libraries and opens devices."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

#: Where Debian and its kin put modules for their own Python.
_SYSTEM = Path("/usr/lib/python3/dist-packages")
_DEVICES = Path("/sys/class/infiniband")
_CM = Path("/dev/infiniband/rdma_cm")


def needs() -> str | None:
    """The first thing that is missing, and how to get it; None when ready."""
    return _pyverbs() or _device()


def _pyverbs() -> str | None:
    spec = importlib.util.find_spec("pyverbs")
    here = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if spec is None:
        if (_SYSTEM / "pyverbs").is_dir():
            return (
                f"pyverbs is installed for the system's Python, and not found by this {here}: if they are the same"
                f" version, ln -s {_SYSTEM}/pyverbs into its site-packages"
            )
        return "pyverbs is not installed: apt install python3-pyverbs ibverbs-providers (dnf: python3-pyverbs)"
    folders = [Path(p) for p in spec.submodule_search_locations or ()]
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    if not any((folder / f"cmid{suffix}").exists() for folder in folders for suffix in suffixes):
        where = ", ".join(map(str, folders))
        return f"pyverbs in {where} was not built for this {here}: run the Python that it came with"
    return None


def _device() -> str | None:
    if not _DEVICES.is_dir() or not any(_DEVICES.iterdir()):
        return (
            "there is no RDMA device: load the driver of the card (rdma link shows what there is), or make one in"
            " software: modprobe rdma_rxe && rdma link add rxe0 type rxe netdev eth0"
        )
    if not _CM.exists():
        return f"{_CM} is missing: modprobe rdma_ucm"
    return None
