"""zstd frames, without I/O: bytes to frames, and frames to bytes. The format is RFC 8878's.

What is sent is any number of frames, one behind the other, and nothing else, so that zstd's own tools read it.
"""

from __future__ import annotations

from collections.abc import Iterable

import zstandard

from whimbrel import StreamError

MAGIC = b"\x28\xb5\x2f\xfd"
#: What of the input a receiver may have to remember: the most that RFC 8878 3.1.1.1.2 asks every decoder for.
MAX_WINDOW = 8 << 20
#: RFC 8878 3.1.1.2.3: no block is larger, neither packed nor unpacked.
MAX_BLOCK = 128 << 10
#: The longest piece of a frame that is taken at once: a block with its header, and a checksum.
MAX_PIECE = 3 + MAX_BLOCK + 4
_MAX_HEADER, _LEAST_HEADER = 18, 6
_RLE, _RESERVED = 1, 3
#: A frame ends after so many bytes: its checksum is compared then, and a new level begins.
FRAME = 16 << 20


class Packer:
    """One direction. All that was packed so far can be unpacked, whether its frame has ended or not."""

    def __init__(self, *, checksum: bool = True) -> None:
        self._checksum = checksum
        self._level: int | None = None
        self._frame: zstandard.ZstdCompressionObj | None = None
        self._size = 0

    def pack(self, pieces: Iterable[memoryview], level: int, *, end: bool = False) -> list[bytes]:
        """The pieces as a part of the open frame or a new one. end: it ends behind them. So it does for another level,
        which is that of the next frame.
        """
        if self._frame is None:
            if level != self._level:
                self._compressor = zstandard.ZstdCompressor(
                    level=level, write_checksum=self._checksum
                )
                self._level = level
            self._frame = self._compressor.compressobj()
            self._size = 0
        packed = []
        for piece in pieces:
            packed.append(self._frame.compress(piece))
            self._size += len(piece)
        if end or level != self._level or self._size >= FRAME:
            packed.append(self.finish())
        else:
            packed.append(self._frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        return [data for data in packed if data]

    def finish(self) -> bytes:
        """The end of the open frame, with its checksum; nothing where none is open."""
        frame, self._frame = self._frame, None
        return b"" if frame is None else frame.flush()


class Unpacker:
    """The other direction, of input that may be anything: memory and output are bounded by MAX_WINDOW and MAX_BLOCK."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._has_checksum = False
        #: Bytes of the frames that were taken.
        self.offset = 0

    @property
    def in_frame(self) -> bool:
        """A frame has begun and not ended."""
        return self._frame is not None

    def take(self, data: memoryview) -> tuple[int, bytes] | None:
        """The next piece at the front of data: its length, and what it unpacks to (at most MAX_BLOCK bytes, possibly
        none). None if it is not complete yet; it is with MAX_PIECE bytes. Raises StreamError.
        """
        size = self._header(data) if self._frame is None else self._block(data)
        if size is None:
            return None
        assert self._frame is not None
        try:
            unpacked = self._frame.decompress(data[:size])
        except zstandard.ZstdError as error:
            raise StreamError(
                f"the data is not what was compressed: {_reason(error)}", offset=self.offset
            ) from error
        self.offset += size
        if self._frame.eof:
            self._frame = None
        return size, unpacked

    def _header(self, data: memoryview) -> int | None:
        """RFC 8878 3.1.1.1. Begins the frame, and returns the length of its header."""
        begins = bytes(data[: len(MAGIC)])
        if not MAGIC.startswith(begins):
            raise self._no_frame(begins)
        if len(data) < _LEAST_HEADER:
            return None
        head = bytes(data[:_MAX_HEADER])
        try:
            size = zstandard.frame_header_size(head)
            if len(data) < size:
                return None
            frame = zstandard.get_frame_parameters(head)
        except zstandard.ZstdError as error:
            raise StreamError(
                f"the header of a zstd frame is wrong: {_reason(error)}", offset=self.offset
            ) from error
        if frame.window_size > MAX_WINDOW:
            raise StreamError(
                "a zstd frame wants too much memory to be unpacked",
                offset=self.offset,
                expected=f"a window of at most {MAX_WINDOW} bytes",
                found=frame.window_size,
                hint="Compress without --long or --ultra",
            )
        if frame.dict_id:
            raise StreamError(
                f"a zstd frame needs dictionary {frame.dict_id}",
                offset=self.offset,
                expected="none",
            )
        self._frame = self._decompressor.decompressobj()
        self._has_checksum = frame.has_checksum
        return size

    def _no_frame(self, begins: bytes) -> StreamError:
        is_first = self.offset == 0
        return StreamError(
            "the stream is not compressed with zstd" if is_first else "no zstd frame follows",
            offset=self.offset,
            expected=MAGIC.hex(" "),
            found=begins.hex(" ") + (" ('QEVM', as it is)" if b"QEVM".startswith(begins) else ""),
            hint="Both sides write zstd:: in front of their URI, or neither does"
            if is_first
            else None,
        )

    def _block(self, data: memoryview) -> int | None:
        """RFC 8878 3.1.1.2. The length of the next block, with the checksum behind the last one."""
        if len(data) < 3:
            return None
        head = int.from_bytes(data[:3], "little")
        is_last, kind, size = head & 1, head >> 1 & 3, head >> 3
        if kind == _RESERVED or size > MAX_BLOCK:
            raise StreamError(
                "a block of a zstd frame is wrong",
                offset=self.offset,
                expected=f"a known type, and at most {MAX_BLOCK} bytes",
                found=f"type {kind}, {size} bytes",
            )
        whole = 3 + (1 if kind == _RLE else size) + (4 if is_last and self._has_checksum else 0)
        return whole if len(data) >= whole else None


def _reason(error: zstandard.ZstdError) -> str:
    """What the library says, without its own name for where it was."""
    return str(error).rpartition(": ")[2]
