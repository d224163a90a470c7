"""The disks of the source while they are sent: holes and chunks, in rounds, within a budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from whimbrel.errors import LocalError
from whimbrel.savevm import Budget
from whimbrel_block.chunks import Chunks
from whimbrel_block.codec import (
    CHUNK,
    SECTOR,
    encode_chunk,
    encode_progress,
    encode_zeros,
)
from whimbrel_block.device import BlockDevice
from whimbrel_block.reading import Base, Read, ReadAhead

if TYPE_CHECKING:
    from whimbrel.stream import OutStream

log = logging.getLogger("whimbrel.block")

#: Records of zeros written at once.
_HOLES = 4096
#: Seconds that the end of a migration waits for a read that hangs.
_LAST_PATIENCE = 5.0
#: Seconds that a machine stands still for one read.
_STANDSTILL = 30.0
_ZEROS = bytes(CHUNK)


@attrs.define
class Disk:
    """One of them."""

    device: BlockDevice
    chunks: Chunks
    base: Base | None = None
    #: Bytes of its records.
    transferred: int = 0

    @property
    def remaining(self) -> int:
        """Bytes of the disk that were not sent yet, or were written since."""
        left = self.chunks.left()
        return min(self.device.size, (left.full + left.holes) * CHUNK)


class Sender:
    """All disks of one migration. Belongs to the migration's thread; the figures may be read from any."""

    def __init__(
        self, devices: Sequence[BlockDevice], *, incremental: bool, zero_blocks: bool
    ) -> None:
        """Tracking starts. Raises LocalError when a disk or its base cannot be used."""
        self.disks: list[Disk] = []
        #: The last send() left off because a disk is slow.
        self.waiting = False
        self._short_zeros = zero_blocks
        self._percent = -1
        self._flushed = False
        self._rate: float | None = None
        self._looked: tuple[float, int] | None = None
        self._reader = ReadAhead()
        try:
            for device in devices:
                disk = Disk(device, device.start_tracking())
                self.disks.append(disk)
                if incremental:
                    disk.base = _base(device)
                else:
                    _look_for_holes(disk)
                # The last chunk goes first, and in any case: it tells the destination how large the disk is.
                disk.chunks.mark(device.chunks - 1, device.chunks - 1)
                disk.chunks.start_at(device.chunks - 1)
        except BaseException:
            self.close()
            raise

    def announce(self, out: OutStream) -> None:
        """A zero for the last sector of each disk, whose chunk follows in any case: a destination whose disk is too small
        knows it before it has written anything.
        """
        if self._short_zeros:
            for disk in self.disks:
                last = disk.device.size - SECTOR
                out.write(encode_chunk(disk.device.wire_name, last, zero=True))

    # ---- how much

    def left(self) -> int:
        """Bytes on the wire of what is left, what is being read included."""
        again = sum(disk.chunks.again for disk in self.disks)
        total = (self._reader.pending - again) * CHUNK
        for disk in self.disks:
            left = disk.chunks.left()
            hole = 8 + len(disk.device.wire_name) if self._short_zeros else CHUNK
            total += left.full * CHUNK + left.holes * hole
        return total

    def dirty_rate(self, *, exact: bool) -> float | None:
        """Bytes a second that became dirty between the last two exact looks; None before there were two."""
        if exact:
            now, known = time.monotonic(), self.left() + self.transferred
            if self._looked is not None and now > self._looked[0]:
                self._rate = max(0, known - self._looked[1]) / (now - self._looked[0])
            self._looked = (now, known)
        return self._rate

    @property
    def transferred(self) -> int:
        return sum(d.transferred for d in self.disks)

    def figures(self) -> dict[str, Any]:
        """The members of query-migrate: `disk` is QEMU's MigrationStats, `x-disks` tells the disks apart."""
        each: list[dict[str, Any]] = [
            {
                "device": d.device.name,
                "transferred": d.transferred,
                "remaining": d.remaining,
                "total": d.device.size,
            }
            for d in self.disks
        ]
        unused = (
            *(
                "duplicate",
                "normal",
                "normal-bytes",
                "dirty-pages-rate",
                "mbps",
                "dirty-sync-count",
            ),
            *(
                "postcopy-requests",
                "page-size",
                "multifd-bytes",
                "pages-per-second",
                "precopy-bytes",
            ),
            *("downtime-bytes", "postcopy-bytes", "dirty-sync-missed-zero-copy"),
        )
        sums = {n: sum(e[n] for e in each) for n in ("transferred", "remaining", "total")}
        return {"disk": {**sums, **dict.fromkeys(unused, 0)}, "x-disks": each}

    # ---- sending

    def send(
        self, out: OutStream, budget: Budget, patience: float, *, standstill: bool = False
    ) -> bool:
        """Records, until none is left (True), the budget is spent, or a disk is slow (False, and `waiting`)."""
        reader = self._reader
        self.waiting = False
        start = out.position
        while True:
            self._read_ahead()
            read = reader.take(0)
            if read is not None:
                self._send_read(read, out, standstill=standstill)
            elif not self._send_holes(out):
                if not reader.pending:
                    self._flush_early()
                    return True
                read = reader.take(patience)
                if read is None:
                    self.waiting = True
                    return False
                self._send_read(read, out, standstill=standstill)
            if budget.spent(out.position - start):
                return False

    def send_rest(self, out: OutStream) -> None:
        """All that is left, while the machine stands still. Raises LocalError when a disk does not answer: it runs on then."""
        if not self.send(out, Budget(), _STANDSTILL, standstill=True):
            raise LocalError(
                f"a disk did not answer for {_STANDSTILL:.0f} s while the machine stood still",
                section="block",
                hint="The machine runs on here; see to its disks before the next attempt",
            )

    def progress(self, out: OutStream) -> None:
        """How much of the first copy is through, when that has changed."""
        total = sum(d.chunks.count for d in self.disks)
        fresh = sum(d.chunks.left().fresh for d in self.disks)
        percent = min(99, 100 * (total - fresh) // total)
        if percent != self._percent:
            self._percent = percent
            out.write(encode_progress(percent))

    def _read_ahead(self) -> None:
        """Ask for chunks of each disk in turn, as many as there is room for."""
        more = True
        while more and self._reader.room:
            more = False
            for disk in self.disks:
                if not self._reader.room:
                    break
                taken = disk.chunks.take()
                if taken is not None:
                    chunk, fresh = taken
                    self._reader.request(Read(disk, chunk, disk.base if fresh else None))
                    more = True

    def _send_read(self, read: Read, out: OutStream, *, standstill: bool) -> None:
        disk, device = read.disk, read.disk.device
        if read.error is not None:
            raise LocalError(
                f"disk '{device.name}' ({device.image.name}) cannot be read at byte {read.offset}:"
                f" {getattr(read.error, 'strerror', None) or read.error}",
                section="block",
                hint="The machine runs on here; see to the disk before the next attempt",
            ) from read.error
        again = disk.chunks.give_back(read.chunk)
        # Of a machine that stands still, what was read before its last write need not go out: it is read again.
        stale = standstill and again and read.chunk < device.chunks - 1
        if not read.same and not stale:
            short = read.zero and self._short_zeros
            buffers: list[Any] = [encode_chunk(device.wire_name, read.offset, zero=short)]
            if not short:
                buffers.append(self._reader.data(read))
            self._write(disk, out, buffers)
        self._reader.release(read)

    def _send_holes(self, out: OutStream) -> bool:
        """A run of chunks in which nothing is stored; False when there is none."""
        for disk in self.disks:
            chunks = disk.chunks.take_holes(_HOLES if self._short_zeros else 1)
            if chunks:
                name = disk.device.wire_name
                # The last chunk is never among them.
                if self._short_zeros:
                    self._write(disk, out, [encode_zeros(name, (c * CHUNK for c in chunks))])
                else:
                    self._write(disk, out, [encode_chunk(name, chunks[0] * CHUNK), _ZEROS])
                return True
        return False

    @staticmethod
    def _write(disk: Disk, out: OutStream, buffers: list[Any]) -> None:
        before = out.position
        if len(buffers) == 1:
            out.write(buffers[0])
        else:
            out.write_all(buffers)
        disk.transferred += out.position - before

    # ---- the app's writes

    def _flush_early(self) -> None:
        """Once, when the first copy is through: what the app has written need not all be flushed at the end."""
        if not self._flushed:
            self._flushed = True
            for disk in self.disks:
                if disk.device.unflushed:
                    self._reader.flush(disk.device)

    def flush(self) -> None:
        """The machine stands still."""
        for disk in self.disks:
            if disk.device.unflushed:
                try:
                    disk.device.flush()
                except Exception as error:  # the destination has it all: better there than here
                    log.warning("disk '%s' could not be flushed: %s", disk.device.name, error)

    def close(self) -> None:
        ended = self._reader.close(_LAST_PATIENCE)
        if not ended:
            log.warning("a disk does not answer; its reader is left behind")
        for disk in self.disks:
            disk.device.stop_tracking()
            if disk.base is not None and ended:
                disk.base.close()


def _look_for_holes(disk: Disk) -> None:
    """At most one look for each chunk."""
    image, chunk = disk.device.image, 0
    while chunk < disk.chunks.count:
        try:
            data = image.next_data(chunk * CHUNK)
        except OSError:
            return  # reading it will say why
        end = data // CHUNK if data < image.size else disk.chunks.count
        disk.chunks.found_holes(chunk, end)
        chunk = end + 1


def _base(device: BlockDevice) -> Base:
    if device.base is None:
        raise LocalError(
            f"disk '{device.name}' has no base that the destination has too",
            section="block",
            hint="Name it: BlockDevice(..., base=PATH), or copy in full",
        )
    try:
        return Base(device.base)
    except (OSError, ValueError) as error:
        raise LocalError(
            f"the base of disk '{device.name}' cannot be used: {error}", section="block"
        ) from error
