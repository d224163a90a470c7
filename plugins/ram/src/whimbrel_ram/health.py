"""What tracking of writes and shared memory need of this host, for `migctl doctor`."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from whimbrel import Check, Health
from whimbrel_ram import kernelapi
from whimbrel_ram.block import HOST_PAGE, RAMBlock
from whimbrel_ram.trackers import AUTO, BUILT_IN, choose, uffd

_VM = Path("/proc/sys/vm")
_HUGE = Path("/sys/kernel/mm/transparent_hugepage")
_NEWER = f"run Linux 6.7 or newer, with CONFIG_USERFAULTFD (this is {platform.release()})"
_ALLOW = (
    "podman or docker run --security-opt seccomp=PROFILE, with a profile that allows userfaultfd"
)
_SHADOW = "without it, writes are found by comparing with a copy, which takes the memory twice"


def checks() -> Iterator[Check]:
    yield from _kernel()
    yield from _memory()


def _kernel() -> Iterator[Check]:
    """From the oldest feature to the newest: each needs the one before it."""
    try:
        os.close(kernelapi.open_uffd(0))
    except OSError as error:
        refused = isinstance(error, PermissionError)
        yield Check(
            "userfaultfd",
            Health.WARNING,
            f"{uffd.why_not(error)}; {_SHADOW}",
            _ALLOW if refused else _NEWER,
        )
        return
    yield Check("userfaultfd", Health.OK, _privilege())
    try:
        fd = kernelapi.open_uffd(kernelapi.WP_FEATURES)
    except OSError as error:
        yield Check("write-protection", Health.WARNING, f"{uffd.why_not(error)}; {_SHADOW}", _NEWER)
        return
    try:
        yield Check("write-protection", Health.OK, "asynchronous (WP_ASYNC, Linux 6.7)")
        reason = uffd.probe_scan(fd)
    finally:
        os.close(fd)
    if reason is None:
        yield Check("PAGEMAP_SCAN", Health.OK, "reports what was written (Linux 6.7)")
    else:
        yield Check("PAGEMAP_SCAN", Health.WARNING, f"{reason}; {_SHADOW}", _NEWER)


def _privilege() -> str:
    if _read(_VM / "unprivileged_userfaultfd") == "0" and os.geteuid():
        return "for faults of programs (vm.unprivileged_userfaultfd=0), which is enough"
    return "for all faults"


def _memory() -> Iterator[Check]:
    try:
        block = RAMBlock("doctor", HOST_PAGE)
    except (OSError, AttributeError) as error:
        yield Check(
            "memfd",
            Health.FAILED,
            f"no memory that can be shared: {error}",
            "allow memfd_create (seccomp), or give RAMBlock memory of your own",
        )
    else:
        yield Check("memfd", Health.OK, "shared memory with seals")
        chosen = choose(AUTO, BUILT_IN, [block])  # shadow always works for a page
        yield Check("dirty tracker", Health.OK, f"auto takes {chosen.name}")
    yield _overcommit()
    if (pages := _read(_HUGE / "shmem_enabled")) is not None:
        yield Check("huge pages", Health.OK, f"for shared memory: {_selected(pages)}")


def _overcommit() -> Check:
    mode = _read(_VM / "overcommit_memory")
    if mode == "2":
        return Check(
            "overcommit",
            Health.WARNING,
            "vm.overcommit_memory=2: memory that a machine never touches is counted as well",
            "sudo sysctl vm.overcommit_memory=0",
        )
    return Check("overcommit", Health.OK, f"vm.overcommit_memory={mode}")


def _selected(text: str) -> str:
    """The word in brackets."""
    return text.partition("[")[2].partition("]")[0] or text


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
