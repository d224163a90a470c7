"""userfaultfd and PAGEMAP_SCAN, by fcntl and ctypes: the numbers of <linux/userfaultfd.h> and <linux/fs.h> (6.7).

They are spelt out because the headers of many distributions do not carry them yet.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Number of the userfaultfd system call.
_NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "loongarch64": 282}
_UFFD_USER_MODE_ONLY = 1
_UFFD_API = 0xAA


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | number


_READ, _READ_WRITE = 2, 3
_UFFDIO_API = _ioc(_READ_WRITE, 0xAA, 0x3F, 24)
_UFFDIO_REGISTER = _ioc(_READ_WRITE, 0xAA, 0x00, 32)
_UFFDIO_UNREGISTER = _ioc(_READ, 0xAA, 0x01, 16)
_PAGEMAP_SCAN = _ioc(_READ_WRITE, ord("f"), 16, 96)

_REGISTER_MODE_WP = 2

#: UFFD_FEATURE_: PAGEFAULT_FLAG_WP, WP_HUGETLBFS_SHMEM, WP_UNPOPULATED, WP_ASYNC.
WP_FEATURES = 1 << 0 | 1 << 12 | 1 << 13 | 1 << 15

PAGE_IS_WRITTEN = 2
PAGE_IS_PRESENT = 8
PAGE_IS_SWAPPED = 16
_PM_SCAN_WP_MATCHING, _PM_SCAN_CHECK_WPASYNC = 1, 2

_SCAN = struct.Struct("=12Q")
_PAGE = os.sysconf("SC_PAGESIZE")
#: Regions taken from the kernel in one call: 768 KiB of memory.
_REGIONS = 32768


def open_uffd(features: int) -> int:
    """A userfaultfd with these features. Falls back to user-mode faults only, which needs no privilege.

    Raises OSError: ENOSYS (no such call), EPERM, EINVAL (a feature is missing).
    """
    number = _NR_USERFAULTFD.get(platform.machine())
    if number is None:
        raise OSError(
            errno.ENOSYS, f"the number of userfaultfd is not known on {platform.machine()}"
        )
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    fd = int(libc.syscall(ctypes.c_long(number), ctypes.c_long(flags)))
    if fd < 0 and ctypes.get_errno() == errno.EPERM:
        fd = int(libc.syscall(ctypes.c_long(number), ctypes.c_long(flags | _UFFD_USER_MODE_ONLY)))
    if fd < 0:
        raise OSError(ctypes.get_errno(), f"userfaultfd: {os.strerror(ctypes.get_errno())}")
    try:
        fcntl.ioctl(fd, _UFFDIO_API, bytearray(struct.pack("=3Q", _UFFD_API, features, 0)))
    except OSError:
        os.close(fd)
        raise
    return fd


def register_wp(fd: int, start: int, length: int) -> None:
    """Track writes to this range. Raises OSError: EBUSY (another userfaultfd has it), EINVAL (kind or alignment)."""
    fcntl.ioctl(
        fd, _UFFDIO_REGISTER, bytearray(struct.pack("=4Q", start, length, _REGISTER_MODE_WP, 0))
    )


def unregister(fd: int, start: int, length: int) -> None:
    fcntl.ioctl(fd, _UFFDIO_UNREGISTER, bytearray(struct.pack("=2Q", start, length)))


@attrs.frozen(kw_only=True)
class _What:
    """Which pages are told, and in what way they are touched."""

    flags: int = 0
    inverted: int = 0
    mask: int = 0
    any_of: int = 0
    ret: int = 0


_EITHER = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
_PROTECT = _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC
_WRITTEN = _What(flags=_PROTECT, mask=PAGE_IS_WRITTEN, ret=PAGE_IS_WRITTEN)
_ABSENT = _What(flags=_PROTECT, inverted=_EITHER, mask=_EITHER, ret=_EITHER)
_POPULATED = _What(any_of=_EITHER, ret=_EITHER)


class PagemapScan:
    """Asks the kernel for the pages of this process that are in some state. PAGEMAP_SCAN, Linux 6.7."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._regions = np.zeros((_REGIONS, 3), np.uint64)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _call(self, start: int, end: int, what: _What, *, silent: bool = False) -> tuple[int, int]:
        """One call: how many regions it found, and where it ended. silent: none are told."""
        told = (0, 0) if silent else (self._regions.ctypes.data, len(self._regions))
        argument = bytearray(
            _SCAN.pack(
                *(_SCAN.size, what.flags, start, end, 0, *told, 0),
                *(what.inverted, what.mask, what.any_of, what.ret),
            )
        )
        n = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument)
        return n, _SCAN.unpack(argument)[4]

    def _scan(self, start: int, end: int, what: _What) -> Iterator[NDArray[np.uint64]]:
        while start < end:
            n, start = self._call(start, end, what)
            if n:
                yield self._regions[:n]

    def _map(
        self, start: int, length: int, regions: Iterator[NDArray[np.uint64]]
    ) -> NDArray[np.bool_]:
        """Regions of addresses as one bool a host page."""
        found = np.zeros(length // _PAGE, np.bool_)
        for some in regions:
            first = ((some[:, 0] - np.uint64(start)) // np.uint64(_PAGE)).astype(np.intp)
            last = ((some[:, 1] - np.uint64(start)) // np.uint64(_PAGE)).astype(np.intp)
            if len(some) < 64:
                for i, j in zip(first.tolist(), last.tolist(), strict=True):
                    found[i:j] = True
                continue
            lengths = last - first
            steps = np.ones(int(lengths.sum()), np.intp)  # page numbers as a running sum of steps
            starts = np.cumsum(lengths)[:-1]
            steps[0] = first[0]
            steps[starts] = first[1:] - last[:-1] + 1
            found[np.cumsum(steps)] = True
        return found

    def protect(self, start: int, length: int) -> None:
        """Protect everything in the range, what has no memory included. A tenth of what UFFDIO_WRITEPROTECT takes for the
        same: 3 ms per GiB that is in use. Raises OSError.
        """
        end = start + length
        while start < end:
            _, start = self._call(start, end, _WRITTEN, silent=True)

    def take_written(self, start: int, length: int) -> NDArray[np.bool_]:
        """Host pages written since they were protected; each is protected again in the same step.

        With exactly this mask the kernel also reports what was given back by MADV_DONTNEED. Raises OSError: EPERM when
        the range is not, or no longer, tracked.
        """
        return self._map(start, length, self._scan(start, start + length, _WRITTEN))

    def protect_absent(self, start: int, length: int) -> NDArray[np.bool_]:
        """Host pages that have no memory; each is protected in the same step, so that no write to it is missed."""
        return self._map(start, length, self._scan(start, start + length, _ABSENT))

    def populated(self, start: int, length: int) -> NDArray[np.bool_]:
        """Host pages that are in memory or in swap. Once a range is protected, that looks like swap."""
        return self._map(start, length, self._scan(start, start + length, _POPULATED))
