"""Chunks read ahead of the stream, by a thread of their own: a bounded number, in the order in which they were asked for."""

from __future__ import annotations

import contextlib
import mmap
import queue
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import numpy as np

from whimbrel_block.codec import CHUNK
from whimbrel_block.device import BlockDevice
from whimbrel_block.image import RawImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from whimbrel_block.sending import Disk

#: Chunks that are being read or wait for the stream.
DEPTH = 8


@attrs.define
class Read:
    """One chunk, asked for and then read."""

    disk: Disk
    chunk: int
    #: Look whether it is what the base has there.
    base: Base | None = None
    #: Which piece of the memory it is read into.
    slot: int = -1
    zero: bool = False
    same: bool = False
    error: Exception | None = None

    @property
    def offset(self) -> int:
        """The last chunk is the last megabyte, with a part of the one before it: QEMU 7.2 takes none that goes beyond the
        end of its disk, and the offset tells the size.
        """
        return max(0, min(self.chunk * CHUNK, self.disk.device.size - CHUNK))

    @property
    def length(self) -> int:
        return min(CHUNK, self.disk.device.size - self.offset)


class Base:
    """The image that both sides had before; zero behind its end. Raises OSError, ValueError when it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.image = RawImage(path, read_only=True)

    def is_hole(self, offset: int, length: int) -> bool:
        return offset >= self.image.size or self.image.next_data(offset) >= min(
            offset + length, self.image.size
        )

    def read_into(self, view: memoryview, offset: int) -> None:
        have = max(0, min(len(view), self.image.size - offset))
        self.image.read_into(view[:have], offset, bulk=True)
        view[have:] = bytes(len(view) - have)

    def close(self) -> None:
        self.image.close()


class ReadAhead:
    """One thread. request() and take() belong to the migration's; whoever took a chunk gives its memory back."""

    def __init__(self) -> None:
        # One slot more than chunks, for what the base holds. Anonymous memory begins on a page boundary.
        self._memory = memoryview(mmap.mmap(-1, (DEPTH + 1) * CHUNK))
        self._words = np.frombuffer(self._memory, np.uint64).reshape(DEPTH + 1, -1)
        self._free = list(range(DEPTH))
        self._asked: queue.SimpleQueue[Read | BlockDevice | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Read] = queue.SimpleQueue()
        #: Asked for and not taken.
        self.pending = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="whimbrel-disk-reader", daemon=True)
        self._thread.start()

    @property
    def room(self) -> bool:
        """One more can be asked for."""
        return bool(self._free)

    def request(self, read: Read) -> None:
        read.slot = self._free.pop()
        self.pending += 1
        self._asked.put(read)

    def flush(self, device: BlockDevice) -> None:
        """Behind what was asked for, bring the app's writes to stable storage, so that the last flush is short."""
        self._asked.put(device)

    def take(self, timeout: float) -> Read | None:
        """The next one that was asked for; None if it has not been read after so many seconds."""
        try:
            read = self._done.get_nowait() if timeout == 0 else self._done.get(timeout=timeout)
        except queue.Empty:
            return None
        self.pending -= 1
        return read

    def data(self, read: Read) -> memoryview:
        """CHUNK bytes, those behind the end of the device zero; valid until release()."""
        return self._memory[read.slot * CHUNK : (read.slot + 1) * CHUNK]

    def release(self, read: Read) -> None:
        self._free.append(read.slot)

    def close(self, patience: float) -> bool:
        """Stop; whether the thread has ended. A read that hangs keeps only its own thread and memory."""
        self._closed = True
        self._asked.put(None)
        self._thread.join(patience)
        return not self._thread.is_alive()

    # ---- the thread

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            if self._closed:
                continue
            if isinstance(asked, BlockDevice):
                self._flush(asked)
                continue
            try:
                self._read(asked)
            except (
                Exception
            ) as error:  # whatever an Image raises: nobody is to wait for a thread that has gone
                asked.error = error
            self._done.put(asked)

    @staticmethod
    def _flush(device: BlockDevice) -> None:
        with contextlib.suppress(Exception):  # told by the last one
            device.flush()

    def _read(self, read: Read) -> None:
        image, length = read.disk.device.image, read.length
        data = self.data(read)
        hole = image.next_data(read.offset) >= read.offset + length
        if read.base is not None and hole and read.base.is_hole(read.offset, length):
            read.same = True
            return
        if hole:
            read.zero = True
            self._words[read.slot] = 0
        else:
            image.read_into(data[:length], read.offset, bulk=True)
            data[length:] = bytes(CHUNK - length)
            read.zero = is_zero(self._words[read.slot])
        if read.base is not None:
            read.base.read_into(self._memory[DEPTH * CHUNK :][:length], read.offset)
            self._memory[DEPTH * CHUNK + length :] = bytes(CHUNK - length)
            read.same = bool(np.array_equal(self._words[read.slot], self._words[DEPTH]))


def is_zero(words: NDArray[np.uint64]) -> bool:
    """Settled by three words where it is not, mostly."""
    last = len(words) - 1
    return not (words[0] or words[last] or words[last * 2 // 5]) and not words.any()
