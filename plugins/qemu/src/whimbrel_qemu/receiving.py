"""Take the migration of a running QEMU (or of any source) and keep the machine as a file.

The file is a stream in one pass, each page once: `migctl send` puts it into a destination, and so does QEMU itself
with -incoming 'exec:cat FILE'.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from whimbrel.arrivals import Arrivals
from whimbrel.channel import Channel, Listener, Role
from whimbrel.descriptors import DescriptorChannel, ReadyListener
from whimbrel.errors import (
    ChannelError,
    DeadlineExceeded,
    EndOfStream,
    LocalError,
    MigrationError,
    StreamError,
)
from whimbrel.kernel import Kernel
from whimbrel.plugins import Plugins
from whimbrel.savevm import Accept, no_channel
from whimbrel.settings import Settings
from whimbrel.stream import InStream, OutStream
from whimbrel.way_back import WayBack
from whimbrel.wire.format import Dialect
from whimbrel_qemu.guest import MAX_RAM, Guest, explain, read_guest, write_guest
from whimbrel_qemu.options import RECEIVING, set_those
from whimbrel_qemu.progress import Progress
from whimbrel_qemu.rest import RestKeeper

#: What a multifd channel of QEMU begins with, as soon as it is connected.
_MULTIFD = bytes.fromhex("11223344")
_PATIENCE = 1.0  # seconds to wait for it

BROKE_OFF = "The source broke off: its own log says why, and it still has its machine"
#: Bytes of magic and version: what ends within them is no migration.
HEADER = 8
NOT_TOLD = (
    "The source asks for no answer (capability return-path) and may believe that its machine has moved:"
    " 'cont' there lets it run on"
)

log = logging.getLogger("whimbrel.qemu")


@attrs.frozen(kw_only=True)
class Received:
    """What was received and kept. Sizes in bytes, seconds from the first byte to the synced file."""

    path: Path
    #: None: an old one, whose stream does not name it.
    machine_type: str | None
    ram_bytes: int
    #: Device sections; None: the stream describes none, so that they could not be checked.
    sections: int | None
    #: The live section from which on the stream was kept as it came, RAM included: nobody here can read it.
    verbatim_from: str | None
    #: RunState of the machine before it was stopped; a destination starts it if that was 'running'.
    run_state: str | None
    stream_bytes: int
    file_bytes: int
    seconds: float
    #: The source was told that the machine is safe here; False where it left no way to tell.
    acknowledged: bool


class _WayBack(WayBack):
    """The answers to a source that asks for some, whatever section it is about to be refused for."""

    def tell(self, status: int) -> bool:
        """Tell the source how it ended, if that is possible; whether it was."""
        try:
            return self.refuse() if status else self.shut(status)
        except MigrationError as error:
            level = logging.INFO if status else logging.WARNING
            log.log(
                level, "the source could not be told how it ended (status %d): %s", status, error
            )
            return False


def receive(
    uri: str,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    max_ram: int = MAX_RAM,
    dialect: Dialect | None = None,
    settings: Mapping[str, Any] | None = None,
    plugins: Plugins | None = None,
    named_fds: Mapping[str, int] | None = None,
    on_listening: Callable[[tuple[str, ...]], None] = lambda _: None,
    progress: Progress | None = None,
) -> Received:
    """Listen at uri, take one migration, and keep it in the file. The uri '-' is standard input, standard output being the
    way back where it is a pipe or a socket.

    force: replace a file that exists. max_ram: bytes of RAM that are accepted. dialect: the form that the
    stream must have; None: it shows. settings: of transports and filters, and multifd with its channels and compression,
    as the source has them. named_fds: descriptors for fd:NAME.
    on_listening is told the real addresses, as URIs, once a source can connect.

    The source gets its acknowledgement after the file has been synced to disk; whatever fails before makes it run on.
    Until then there is no file of that name, only, while it is being written, one with `.partial` behind the name.

    Raises LocalError, SettingError, UriError, ChannelError, StreamError, EndOfStream; KeyboardInterrupt leaves nothing behind.
    """
    target = Path(path)
    _check_target(target, force)
    progress = progress if progress is not None else Progress()
    kernel = Kernel(plugins=plugins)
    kernel.named_fds.update(named_fds or {})
    set_those(kernel, settings, RECEIVING)
    cancel_fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        context = kernel.context(Role.DESTINATION, cancel_fd)
        with (
            _standard() if uri == "-" else kernel.route(uri).listen(context) as listener,
            contextlib.ExitStack() as stack,
        ):
            progress.begin("waiting for the source")
            on_listening(listener.addresses)
            multifd = kernel.settings if kernel.settings.get("multifd") else None
            arrivals = Arrivals(listener, several=multifd is not None, opened=lambda _: None)
            stack.callback(arrivals.close)
            with arrivals.main() if multifd is not None else listener.accept() as channel:
                return receive_from(
                    channel,
                    target,
                    force=force,
                    max_ram=max_ram,
                    dialect=dialect,
                    progress=progress,
                    check_others=functools.partial(refuse_multifd, listener),
                    multifd=multifd,
                    accept=arrivals.accept,
                )
    finally:
        os.close(cancel_fd)


class _StandardChannel(DescriptorChannel):
    def return_path(self) -> Channel | None:
        fd = self.raw_fd("write")
        mode = 0 if fd is None else os.fstat(fd).st_mode
        return self if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else None


def _standard() -> Listener:
    """Has the one channel that the process was given."""
    channel = _StandardChannel(read_fd=os.dup(0), write_fd=os.dup(1), name="standard input")
    return ReadyListener(channel, "-")


def receive_from(
    channel: Channel,
    target: Path,
    *,
    force: bool = False,
    max_ram: int = MAX_RAM,
    dialect: Dialect | None = None,
    progress: Progress | None = None,
    check_others: Callable[[], None] = lambda: None,
    multifd: Settings | None = None,
    accept: Accept = no_channel,
) -> Received:
    """As receive(), from a channel that is open already.

    check_others is called before RAM comes and after all has come: it raises if the source sends over another channel
    as well. With multifd it does, and accept() gives those channels: nobody has to look then.
    """
    if multifd is not None:
        check_others = _nobody_else
    progress = progress if progress is not None else Progress()
    way_back = _WayBack(channel)
    inp = InStream(channel)
    began = time.monotonic()
    progress.begin("receiving", lambda: inp.position)
    try:
        with _partial(target) as (fd, partial):
            guest = read_guest(
                inp,
                on_command=way_back.command,
                answer_ping=way_back.pong,
                on_ram_start=check_others,
                max_ram=max_ram,
                take_rest=lambda head, start, footers: RestKeeper(
                    fd, head + start, items_at=len(head), footers=footers
                ),
                dialect=dialect,
                multifd=multifd,
                accept=accept,
            )
            check_others()
            if guest.rest is None:
                _write(guest, fd, partial, progress)
            progress.begin("syncing")
            _publish(fd, partial, target, force)
            file_bytes = os.fstat(fd).st_size
    except BaseException as error:
        told = way_back.tell(1)
        explain(error, dialect)
        if isinstance(error, EndOfStream):
            error.hint = error.hint or BROKE_OFF
        elif isinstance(error, MigrationError) and not told and inp.position > HEADER:
            error.hint = f"{error.hint}. {NOT_TOLD}" if error.hint else NOT_TOLD
        raise
    return Received(
        path=target,
        machine_type=guest.machine_type,
        verbatim_from=guest.rest.section if guest.rest is not None else None,
        ram_bytes=guest.ram_bytes,
        sections=guest.sections,
        run_state=guest.run_state,
        stream_bytes=inp.position,
        file_bytes=file_bytes,
        seconds=time.monotonic() - began,
        acknowledged=way_back.tell(0),
    )


def _nobody_else() -> None:
    """There is nothing to look for."""


def refuse_multifd(
    listener: Listener,
    hint: str = "Switch the capability multifd off on the source, or receive with --set multifd=on",
) -> None:
    """Pages that travel over further connections would be missing, and nothing in the stream says that they do."""
    with contextlib.suppress(DeadlineExceeded):
        while True:
            with _next_connection(listener) as other:
                if other.peek(len(_MULTIFD), time.monotonic() + _PATIENCE) == _MULTIFD:
                    raise StreamError(
                        "the source sends its pages over further connections",
                        section="ram",
                        hint=hint,
                    )
            log.warning("a second connection came in the meantime, and was closed")


def _next_connection(listener: Listener) -> Channel:
    """One that waits already. Raises DeadlineExceeded when there is none."""
    try:
        return listener.accept(time.monotonic())
    except DeadlineExceeded:
        raise
    except ChannelError as error:  # a transport that has only one channel
        raise DeadlineExceeded("no further connection is possible") from error


# ---- the file


def _check_target(target: Path, force: bool) -> None:
    """What would fail in the end is said before a source hands over its machine."""
    if target.is_dir() or not target.name:
        raise LocalError(f"{target} is a directory", hint="Name a file to write")
    if target.exists() and not force:
        raise _exists(target)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        reason = "is not writable" if target.parent.is_dir() else "does not exist"
        raise LocalError(f"the directory {target.parent} {reason}", hint="Name another place")


def _exists(target: Path) -> LocalError:
    return LocalError(f"{target} exists", hint="Name another file, or use --force to replace it")


def _write(guest: Guest, fd: int, partial: Path, progress: Progress) -> None:
    # The channel closes what it is given; the descriptor for fsync and lock stays here.
    with DescriptorChannel(write_fd=os.dup(fd), name=str(partial)) as channel:
        out = OutStream(channel)
        progress.begin("writing", lambda: out.position)
        write_guest(guest, out)


def _publish(fd: int, partial: Path, target: Path, force: bool) -> None:
    """Sync, give it its name, sync that."""
    with _naming(target):
        os.fsync(fd)
        _rename(partial, target, force)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[tuple[int, Path]]:
    """A descriptor of FILE.partial, empty and locked; gone at the end unless it has got another name."""
    partial = target.with_name(target.name + ".partial")
    with _naming(partial):
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalError(
                f"another program is writing {partial}", hint="Name another file"
            ) from None
        try:
            os.ftruncate(fd, 0)  # what a killed program left
            yield fd, partial
        finally:
            partial.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _rename(partial: Path, target: Path, force: bool) -> None:
    if not force:
        try:
            os.link(partial, target)  # unlike rename, it replaces nothing
        except FileExistsError:
            raise _exists(target) from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
        else:
            return
    partial.replace(target)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ChannelError(f"{path}: {error.strerror}", hint="Nothing was kept") from error
