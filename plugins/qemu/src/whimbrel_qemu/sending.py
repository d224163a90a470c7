"""Put a machine that was kept as a file into a destination: QEMU started with -incoming, or an app of ours."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

import attrs

from whimbrel.descriptors import DescriptorChannel
from whimbrel.errors import LocalError, MigrationError, OutcomeUnknown, StateError
from whimbrel.handle import Result
from whimbrel.kernel import Kernel
from whimbrel.outgoing import Outgoing
from whimbrel.plugins import Plugins
from whimbrel.stream import InStream
from whimbrel.wire.format import GlobalStateForm
from whimbrel_qemu.guest import STANDS_STILL, Guest, read_guest
from whimbrel_qemu.progress import Progress
from whimbrel_qemu.rest import FileRest

_POLL = 0.2  # seconds between looks at a Ctrl-C while waiting
_CANCEL_PATIENCE = 5.0  # seconds for an orderly end after Ctrl-C

log = logging.getLogger("whimbrel.qemu")


@attrs.frozen(kw_only=True)
class Sent:
    """What was sent. Sizes in bytes, seconds from connecting to the end."""

    path: Path
    uri: str
    machine_type: str | None
    ram_bytes: int
    run_state: str | None
    stream_bytes: int
    seconds: float
    #: The destination said that it has the machine; False where it had no way to say so.
    acknowledged: bool


def load(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Guest:
    """The machine in the file. Raises LocalError (no such file), StreamError and EndOfStream with the offset."""
    progress = progress if progress is not None else Progress()
    source = Path(path)
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LocalError(
            f"{source}: {error.strerror}", hint="Name a file that migctl receive has written"
        ) from error
    with DescriptorChannel(read_fd=fd, name=str(source)) as channel:
        inp = InStream(channel)
        progress.begin("reading", lambda: inp.position, os.fstat(fd).st_size)
        return read_guest(
            inp,
            take_rest=lambda head, _, footers: FileRest(fd, items_at=len(head), footers=footers),
        )


def _wait(run: Outgoing) -> Result:
    """The end of it; Ctrl-C cancels, as long as that is possible."""
    try:
        while not run.done:
            with contextlib.suppress(TimeoutError):
                run.wait(_POLL)
        return run.wait()
    except OutcomeUnknown as error:
        error.hint = "Look whether the destination runs the machine before you send the file again"
        raise
    except KeyboardInterrupt:
        try:
            run.cancel()
        except StateError as error:
            log.warning("%s", error)
            return run.wait()
        with contextlib.suppress(MigrationError, TimeoutError):
            run.wait(_CANCEL_PATIENCE)
        raise


def send(
    path: str | os.PathLike[str],
    uri: str,
    *,
    return_path: bool = True,
    max_bandwidth: int = 0,
    plugins: Plugins | None = None,
    named_fds: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Sent:
    """Read the file and migrate what is in it to uri. The file is never changed.

    return_path: ask the destination for an answer, where the transport has a way back. max_bandwidth in bytes per
    second, 0 is unlimited. named_fds: descriptors for fd:NAME. Raises as load() and Kernel.migrate(), and what the migration ended with (PeerError,
    ChannelError, OutcomeUnknown); KeyboardInterrupt cancels it.
    """
    progress = progress if progress is not None else Progress()
    guest = load(path, progress=progress)
    size = progress.total  # of the file, and so of the stream, but for a few bytes
    # The kept machine brings its own globalstate.
    dialect = attrs.evolve(guest.dialect, globalstate=GlobalStateForm.NEVER)
    kernel = Kernel(guest.machine(), dialect=dialect, plugins=plugins)
    kernel.named_fds.update(named_fds or {})
    kernel.settings.update(
        {
            "return-path": return_path,
            "max-bandwidth": max_bandwidth,
            "dirty-tracker": STANDS_STILL,
        }
    )
    began = time.monotonic()
    run = kernel.migrate(uri)
    figures = kernel.state.figures
    progress.begin("sending", lambda: figures.transferred, size)
    result = _wait(run)
    return Sent(
        path=Path(path),
        uri=uri,
        machine_type=guest.machine_type,
        ram_bytes=guest.ram_bytes,
        run_state=guest.run_state,
        stream_bytes=figures.transferred,
        seconds=time.monotonic() - began,
        acknowledged=result.acknowledged,
    )
