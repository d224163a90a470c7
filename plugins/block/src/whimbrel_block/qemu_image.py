"""Images of other formats (qcow2, vmdk, ...): qemu-storage-daemon shows one as a raw file, by FUSE. No root needed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from whimbrel_block.image import RawImage

_TOOL = "qemu-storage-daemon"
#: Seconds that it may take to open an image, and to close it.
_PATIENCE = 15.0
_POLL = 0.01


class QemuImage(RawImage):
    """An image file in one of QEMU's formats. It must exist: `qemu-img create -f qcow2 disk.qcow2 20G` makes one.

    A process of the tool runs until close(), and holds QEMU's lock on the file. It outlives an app that is killed: the
    next one to open the image is told so.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, form: str = "qcow2", read_only: bool = False
    ) -> None:
        """Raises OSError with what the tool said: it is not installed, FUSE is missing, the image is locked, ..."""
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._fd = self._direct = -1
        image = Path(path).absolute()
        try:
            super().__init__(self._export(image, form, read_only=read_only), read_only=read_only)
        except BaseException:
            self.close()
            raise
        self.name = str(path)
        self.marker = image.with_name(image.name + ".incoming")

    def _export(self, image: Path, form: str, *, read_only: bool) -> Path:
        tool = shutil.which(_TOOL)
        if tool is None:
            raise FileNotFoundError(f"{_TOOL} is not installed (Debian: qemu-system-common)")
        if not image.exists():
            raise FileNotFoundError(f"{image} does not exist")
        self._folder = Path(tempfile.mkdtemp(prefix="whimbrel-disk-"))
        point = self._folder / "disk"
        point.touch()
        file, writable = _escaped(image), "off" if read_only else "on"
        node = f"driver={form},node-name=disk,file.driver=file,file.filename={file},discard=unmap"
        node += f",read-only={'on' if read_only else 'off'}"
        export = (
            f"type=fuse,id=disk,node-name=disk,mountpoint={_escaped(point)},writable={writable}"
        )
        self._process = subprocess.Popen(
            [tool, "--blockdev", node, "--export", export],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is the app's
        )
        before, deadline, tick = (
            point.stat().st_dev,
            time.monotonic() + _PATIENCE,
            threading.Event(),
        )
        while point.stat().st_dev == before:
            if self._process.poll() is not None:
                assert self._process.stderr is not None
                said = self._process.stderr.read(4096).decode("utf-8", "replace").strip()
                raise OSError(f"{image} cannot be opened: {said or f'{_TOOL} ended'}")
            if time.monotonic() > deadline:
                raise OSError(f"{image} was not opened within {_PATIENCE:.0f} s by {_TOOL}")
            tick.wait(_POLL)
        return point

    def close(self) -> None:
        super().close()
        process, self._process = self._process, None
        if process is not None:
            process.terminate()  # it writes what it holds, and unmounts
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stderr is not None:
                process.stderr.close()
        folder, self._folder = self._folder, None
        if folder is not None:
            with contextlib.suppress(OSError):
                (folder / "disk").unlink(missing_ok=True)
                folder.rmdir()


def _escaped(path: Path) -> str:
    """As a value among QEMU's options."""
    return str(path).replace(",", ",,")
