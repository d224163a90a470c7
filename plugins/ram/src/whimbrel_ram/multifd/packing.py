"""How the data of packets is packed: one stream for each channel, flushed at the end of each packet, never ended."""

from __future__ import annotations

import zlib
from typing import Any, Protocol

from whimbrel.errors import LocalError, StreamError

_FLAWED = "the data of a multifd packet cannot be unpacked"


class Packer(Protocol):
    def pack(self, pages: memoryview) -> bytes | memoryview: ...


class Unpacker(Protocol):
    def unpack(self, data: memoryview, into: memoryview) -> None:
        """Exactly len(into) bytes. Raises StreamError."""


def missing(method: str) -> str | None:
    """What a method needs that is not here, and how to get it."""
    if method == "zstd":
        try:
            import zstandard  # noqa: F401
        except ImportError:
            return (
                "multifd-compression=zstd needs the Python package zstandard: pip install zstandard"
            )
    return None


def packer(method: str, level: int) -> Packer | None:
    """None: as they are. Raises LocalError."""
    if method == "none":
        return None
    return _ZlibPacker(level) if method == "zlib" else _ZstdPacker(_zstandard(), level)


def unpacker(method: str) -> Unpacker | None:
    """None: as they are. Raises LocalError."""
    if method == "none":
        return None
    return _ZlibUnpacker() if method == "zlib" else _ZstdUnpacker(_zstandard())


def _zstandard() -> Any:
    reason = missing("zstd")
    if reason is not None:
        raise LocalError(reason, section="ram")
    import zstandard

    return zstandard


class _ZlibPacker:
    def __init__(self, level: int) -> None:
        self._stream = zlib.compressobj(level)

    def pack(self, pages: memoryview) -> bytes:
        return self._stream.compress(pages) + self._stream.flush(zlib.Z_SYNC_FLUSH)


class _ZlibUnpacker:
    def __init__(self) -> None:
        self._stream = zlib.decompressobj()

    def unpack(self, data: memoryview, into: memoryview) -> None:
        try:
            pages = self._stream.decompress(data, len(into) + 1)  # no more memory than that
        except zlib.error as error:
            raise StreamError(_FLAWED, section="ram", found=str(error)) from error
        if len(pages) != len(into) or self._stream.unconsumed_tail:
            raise StreamError(_FLAWED, section="ram", expected=f"{len(into)} bytes", found="others")
        into[:] = pages


class _ZstdPacker:
    def __init__(self, zstandard: Any, level: int) -> None:
        self._stream = zstandard.ZstdCompressor(level=level).compressobj()
        self._flush = zstandard.COMPRESSOBJ_FLUSH_BLOCK

    def pack(self, pages: memoryview) -> bytes:
        packed: bytes = self._stream.compress(pages) + self._stream.flush(self._flush)
        return packed


class _Given:
    """What the reader of a stream reads: the packet at hand."""

    def __init__(self) -> None:
        self.data = memoryview(b"")

    def read(self, n: int) -> memoryview:
        some, self.data = self.data[:n], self.data[n:]
        return some


class _ZstdUnpacker:
    _MOST_WINDOW = 128 << 20  # what zstd itself takes without being asked to

    def __init__(self, zstandard: Any) -> None:
        self._given = _Given()
        self._error = zstandard.ZstdError
        decompressor = zstandard.ZstdDecompressor(max_window_size=self._MOST_WINDOW)
        self._stream = decompressor.stream_reader(self._given, read_across_frames=True)

    def unpack(self, data: memoryview, into: memoryview) -> None:
        self._given.data = data
        got = 0
        try:
            while got < len(into) and (n := self._stream.readinto(into[got:])):
                got += n
        except self._error as error:
            raise StreamError(_FLAWED, section="ram", found=str(error)) from error
        if got < len(into) or len(self._given.data):
            raise StreamError(_FLAWED, section="ram", expected=f"{len(into)} bytes", found="others")
