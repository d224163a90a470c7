"""Which pages of a block were never touched: they are zero, and reading them would take memory of the host."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import numpy as np

from whimbrel_ram.block import HOST_PAGE, RAMBlock
from whimbrel_ram.kernelapi import PagemapScan

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Data and holes looked at one after the other; memory in more pieces than that counts as touched behind them.
_MAX_EXTENTS = 4096


def per_page(block: RAMBlock, host: NDArray[np.bool_], *, every: bool) -> NDArray[np.bool_]:
    """One bool a host page as one a target page: true if any, or if every, host page in it is."""
    if block.page_size == HOST_PAGE:
        return host
    if block.page_size > HOST_PAGE:
        inside = host.reshape(block.pages, block.page_size // HOST_PAGE)
        reduce = np.logical_and.reduce if every else np.logical_or.reduce
        return np.asarray(reduce(inside, axis=1), np.bool_)
    return np.repeat(host, HOST_PAGE // block.page_size)


def untouched(block: RAMBlock) -> NDArray[np.bool_] | None:
    """Pages of the block without memory behind them now; None where that cannot be told.

    Known for memfds of our own (SEEK_DATA), for private anonymous memory (PAGEMAP_SCAN) that no userfaultfd protects,
    and, with the privilege to open /proc/self/map_files, for shared anonymous memory.
    """
    if not block.aligned:
        return None
    if block.fd is not None:
        return _holes(block, block.fd, 0)
    area = _area(block)
    if area is None:
        return None
    if area == _PRIVATE:
        try:
            scan = PagemapScan()
        except OSError:
            return None
        try:
            host = scan.populated(block.address, block.size)
        except OSError:
            return None
        finally:
            scan.close()
        return per_page(block, ~host, every=True)
    try:
        fd = os.open(f"/proc/self/map_files/{area}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _holes(block, fd, block.address - int(area.split("-")[0], 16))
    finally:
        os.close(fd)


_PRIVATE = "private"


def is_private_anonymous(block: RAMBlock) -> bool:
    return block.fd is None and _area(block) == _PRIVATE


def _area(block: RAMBlock) -> str | None:
    """_PRIVATE for private anonymous memory, the name in map_files of the one shared anonymous mapping that holds the
    whole block, None for anything else (files, several mappings).
    """
    start, end = block.address, block.address + block.size
    covered = 0
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            for line in file:
                fields = line.split(maxsplit=5)
                low, high = (int(x, 16) for x in fields[0].split("-"))
                if high <= start or low >= end:
                    continue
                path = fields[5].strip() if len(fields) > 5 else ""
                if fields[1][3] == "s":
                    whole = low <= start and high >= end and int(fields[2], 16) == 0
                    shared = path.startswith("/dev/zero (deleted)")
                    return fields[0] if whole and shared else None
                if fields[4] != "0":
                    return None
                covered += min(high, end) - max(low, start)
    except OSError:
        return None
    return _PRIVATE if covered == block.size else None


def _holes(block: RAMBlock, fd: int, offset: int) -> NDArray[np.bool_] | None:
    """From the block's bytes at `offset` of fd, by SEEK_DATA and SEEK_HOLE."""
    host = np.ones(block.size // HOST_PAGE, np.bool_)
    position, end = offset, offset + block.size
    try:
        status = os.fstat(fd)
        if (
            status.st_blocks * 512 >= status.st_size
        ):  # no holes: do not walk all of it to learn that
            return None
        for _ in range(_MAX_EXTENTS):
            try:
                data = os.lseek(fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no more data
                    break
                raise
            if data >= end:
                break
            position = min(os.lseek(fd, data, os.SEEK_HOLE), end)
            host[(data - offset) // HOST_PAGE : -(-(position - offset) // HOST_PAGE)] = False
            if position >= end:
                break
        else:
            host[(position - offset) // HOST_PAGE :] = False
    except OSError:
        return None
    return per_page(block, host, every=True)
