"""The figures of the ram section, in QEMU's words (MigrationStats)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from whimbrel_ram.transport import Sent

#: Seconds over which pages-per-second is taken.
_WINDOW = 0.1


@attrs.define(kw_only=True)
class RamStats:
    """Written by the migration's thread, read by any. Sizes in bytes."""

    page_size: int
    total: int
    transferred: int = 0
    duplicate: int = 0
    normal: int = 0
    remaining_pages: int = 0
    sync_count: int = 0
    #: Pages found by the last sync, per second since the one before; None before there were two.
    dirty_pages_rate: float | None = None
    pages_per_second: float = 0.0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    _synced: float = attrs.field(factory=time.monotonic)
    _window: float = attrs.field(factory=time.monotonic)
    _window_pages: int = 0

    def sent(self, sent: Sent, size: int, *, stopped: bool) -> None:
        self.duplicate += sent.zero
        self.normal += sent.pages - sent.zero - sent.partly
        self.remaining_pages -= sent.pages
        self.transferred += size
        if stopped:
            self.downtime_bytes += size
        else:
            self.precopy_bytes += size
        now = time.monotonic()
        self._window_pages += sent.pages
        if now - self._window >= _WINDOW:
            self.pages_per_second = self._window_pages / (now - self._window)
            self._window, self._window_pages = now, 0

    def synced(self, dirty: int, remaining: int) -> None:
        """The trackers found `dirty` pages; `remaining` are to be sent now."""
        now = time.monotonic()
        if self.sync_count and now > self._synced:
            self.dirty_pages_rate = dirty / (now - self._synced)
        self._synced = now
        self.sync_count += 1
        self.remaining_pages = remaining

    def query(self, mbps: float) -> dict[str, Any]:
        """mbps: throughput of the whole stream in 10^6 bit per second, which the kernel measures."""
        return {
            "transferred": self.transferred,
            "remaining": self.remaining_pages * self.page_size,
            "total": self.total,
            "duplicate": self.duplicate,
            "skipped": 0,
            "normal": self.normal,
            "normal-bytes": self.normal * self.page_size,
            "dirty-pages-rate": round(self.dirty_pages_rate or 0),
            "mbps": mbps,
            "dirty-sync-count": self.sync_count,
            "postcopy-requests": 0,
            "page-size": self.page_size,
            "multifd-bytes": 0,
            "pages-per-second": round(self.pages_per_second),
            "precopy-bytes": self.precopy_bytes,
            "downtime-bytes": self.downtime_bytes,
            "postcopy-bytes": 0,
            "dirty-sync-missed-zero-copy": 0,
        }
