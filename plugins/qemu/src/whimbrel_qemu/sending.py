"""Put a machine that was kept as a file into a destination: QEMU started with -incoming, or an app of ours."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from whimbrel.channel import Role
from whimbrel.descriptors import DescriptorChannel
from whimbrel.errors import (
    ChannelError,
    EndOfStream,
    LocalError,
    MigrationError,
    OutcomeUnknown,
    PeerError,
    StateError,
    StreamError,
)
from whimbrel.handle import Result
from whimbrel.kernel import Kernel
from whimbrel.outgoing import Outgoing
from whimbrel.plugins import Plugins
from whimbrel.stream import InStream
from whimbrel.way_back import check_precopy
from whimbrel.wire import dialects
from whimbrel.wire.format import Dialect, GlobalStateForm
from whimbrel_qemu.comparing import Comparison, compare
from whimbrel_qemu.guest import STANDS_STILL, Guest, explain, read_guest
from whimbrel_qemu.milestones import RAM, Milestones
from whimbrel_qemu.options import SENDING, set_those
from whimbrel_qemu.progress import Progress
from whimbrel_qemu.refusal import Evidence, refused
from whimbrel_qemu.rest import FileRest
from whimbrel_qemu.witness import Witness

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
    #: With the guest that it was compared with before, if it was.
    comparison: Comparison | None = None


def load(
    path: str | os.PathLike[str],
    *,
    dialect: Dialect | None = None,
    progress: Progress | None = None,
) -> Guest:
    """The machine in the file. dialect: the form that the stream must have; None: it shows.

    Raises LocalError (no such file), StreamError and EndOfStream with the offset.
    """
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
        try:
            return read_guest(
                inp,
                on_command=check_precopy,
                dialect=dialect,
                take_rest=lambda head, _, footers: FileRest(
                    fd, items_at=len(head), footers=footers
                ),
            )
        except (StreamError, EndOfStream) as error:
            explain(error, dialect)
            error.message = f"{source}: {error.message}"
            error.hint = error.hint or "Name a file that migctl receive has written, as a whole"
            raise


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


def sample(
    uri: str, *, settings: Mapping[str, Any] | None = None, plugins: Plugins | None = None
) -> Guest:
    """A machine to compare with, from a source that sends it to uri (`exec:cat other.mig`, `unix:PATH`); none is kept.

    The source gets no answers, so that it must not ask for any. settings: as for send(). Raises as receive() does.
    """
    kernel = Kernel(plugins=plugins)
    set_those(kernel, settings, SENDING)
    context = kernel.context(Role.DESTINATION)
    with kernel.route(uri).listen(context) as listener, listener.accept() as channel:
        return read_guest(InStream(channel), on_command=check_precopy)


class Incompatible(LocalError):
    """A comparison found what the destination would refuse: nothing was sent. All of it is in `comparison`."""

    def __init__(self, comparison: Comparison) -> None:
        worst, *others = comparison.refused
        more = f" (and {len(others)} more)" if others else ""
        place = f", {worst.field}" if worst.field else ""
        super().__init__(
            f"the destination would refuse the guest{place}: {worst.what}{more}",
            section=worst.section,
            hint=f"{worst.hint or 'Make them the same'}. Nothing was sent; without --against it is tried",
        )
        self.comparison = comparison


def send(
    path: str | os.PathLike[str],
    uri: str,
    *,
    return_path: bool = True,
    max_bandwidth: int = 0,
    dialect: Dialect | None = None,
    against: Guest | None = None,
    monitor: str | None = None,
    log_file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    plugins: Plugins | None = None,
    named_fds: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Sent:
    """Read the file and migrate what is in it to uri. The file is never changed.

    return_path: ask the destination for an answer, where the transport has a way back: then it says as well up to which
    section it got. max_bandwidth in bytes per second, 0 is unlimited. dialect: the form of the stream in the file; None:
    it shows. against: a guest of a QEMU like the destination; what that would refuse is not sent. monitor, log_file:
    where the destination can be heard, QMP (PATH or HOST:PORT) and its standard error output. settings: of transports and
    filters, commit-timeout, and multifd with its own, as the destination has them. named_fds: descriptors
    for fd:NAME.

    Raises as load() and Kernel.migrate(), Incompatible, Refused with the reason, and what else the migration ended with
    (ChannelError, OutcomeUnknown); KeyboardInterrupt cancels it.
    """
    progress = progress if progress is not None else Progress()
    guest = load(path, dialect=dialect, progress=progress)
    size = progress.total  # of the file, and so of the stream, but for a few bytes
    comparison = compare(guest, against) if against is not None else None
    if comparison is not None and comparison.refused:
        raise Incompatible(comparison)
    milestones = Milestones(guest.rest.section if guest.rest is not None else RAM)
    kernel = Kernel(guest.machine(milestones), dialect=_dialect(guest), plugins=plugins)
    kernel.named_fds.update(named_fds or {})
    set_those(kernel, settings, SENDING)
    if guest.rest is not None and kernel.settings.get("multifd"):
        raise LocalError(
            "the stream was kept as it came, RAM included: it goes over one channel",
            hint="Send it without multifd",
        )
    kernel.settings.update(
        {
            "return-path": return_path,
            "max-bandwidth": max_bandwidth,
            "dirty-tracker": STANDS_STILL,
        }
    )
    with Witness(monitor=monitor, log=log_file) as witness:
        if witness.monitor is not None:
            witness.monitor.check(guest.machine_type)
            witness.monitor.listen(uri)
        began = time.monotonic()
        run = kernel.migrate(uri)
        figures = kernel.state.figures
        progress.begin("sending", lambda: figures.transferred, size)
        try:
            result = _wait(run)
        except (PeerError, ChannelError, OutcomeUnknown) as error:
            reason = refused(
                Evidence(
                    guest=guest,
                    error=error,
                    said=witness.said(error),
                    asked=run.has_return_path and _gave_up(error),
                    at=milestones.reached(run.last_pong),
                    milestones=milestones,
                    comparison=comparison,
                )
            )
            if reason is None:
                raise
            raise reason from error
    return Sent(
        path=Path(path),
        uri=uri,
        machine_type=guest.machine_type,
        ram_bytes=guest.ram_bytes,
        run_state=guest.run_state,
        stream_bytes=figures.transferred,
        seconds=time.monotonic() - began,
        acknowledged=result.acknowledged,
        comparison=comparison,
    )


def _gave_up(error: MigrationError) -> bool:
    """The destination, not the way to it."""
    cause = error.__cause__
    return isinstance(error, PeerError | EndOfStream) or (
        isinstance(cause, OSError) and cause.errno in (errno.EPIPE, errno.ECONNRESET)
    )


def _dialect(guest: Guest) -> Dialect:
    """What the destination expects. The kept machine brings its own globalstate; a stream that was not taken apart brings
    its commands, too. What a stream does not show is that of its machine type.
    """
    unseen = dialects.for_machine(guest.machine_type or "")
    return attrs.evolve(
        guest.dialect,
        globalstate=GlobalStateForm.NEVER,
        switchover_start=unseen.switchover_start and guest.rest is None,
        multifd_flush=unseen.multifd_flush,
    )
