"""The process that opens a channel for a machine, and stays where something must be pumped.

It is started by client.py in a session of its own, with one end of a SOCK_SEQPACKET socketpair: JSON objects, with
descriptors beside them. Until it is told that the migration has begun, the end of that socket ends it; from then on it
goes on by itself.
"""

from __future__ import annotations

import array
import contextlib
import json
import logging
import os
import queue
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import attrs

from whimbrel.channel import Channel, Role
from whimbrel.errors import Cancelled, DeadlineExceeded, MigrationError, StateError
from whimbrel.kernel import Kernel
from whimbrel.plugins import Plugins
from whimbrel.waiting import wait_fd
from whimbrel.wire.format import MAGIC
from whimbrel_cli.bridging.pump import DestinationPump, Pump, SourcePump
from whimbrel_cli.bridging.record import Record
from whimbrel_cli.bridging.words import CHANNEL, KEPT, MESSAGE_MAX, Job, Result, Standing, State
from whimbrel_cli.monitor import Gone, Monitor, Refused

#: Seconds that a new connection has to begin a migration.
_FIRST_BYTES = 10.0
_POLL = 0.2

log = logging.getLogger("whimbrel.cli.bridge")


class Control:
    """The end of the socket to migctl. tell() and ask() from one thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._begun = False
        self._begun_fd = os.eventfd(0, os.EFD_CLOEXEC)  # readable once it has begun
        self._cancelled = False
        self.gone = False
        #: Readable once migctl is gone, or has given up, before the migration began.
        self.cancel_fd = os.eventfd(0, os.EFD_CLOEXEC)

    def start(self) -> Job:
        job = Job(**json.loads(self._sock.recv(MESSAGE_MAX)))
        self._reader = threading.Thread(target=self._read, name="control", daemon=True)
        self._reader.start()
        return job

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._sock.recv(MESSAGE_MAX):
                message = json.loads(data)
                if "begun" in message:
                    self.begin()
                else:
                    self._replies.put(message)
        self.gone = True
        self._replies.put(None)
        with self._lock:
            if not self._begun:
                self.cancel()

    def begin(self) -> None:
        """From here on we do without migctl."""
        with self._lock:
            self._begun = True
            os.eventfd_write(self._begun_fd, 1)

    def cancel(self) -> None:
        """Also for the handler of a signal: it takes no lock."""
        self._cancelled = True
        os.eventfd_write(self.cancel_fd, 1)

    def check(self) -> None:
        """Raises Cancelled."""
        if self._cancelled:
            raise Cancelled("given up before the migration began")

    def wait_begun(self) -> None:
        """Raises Cancelled."""
        wait_fd(self._begun_fd, select.POLLIN, cancel_fd=self.cancel_fd, what="the migration")

    def tell(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Nobody need be there."""
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(OSError):
            self._sock.sendmsg([json.dumps(message).encode()], beside)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._reader.join(1)
        self._sock.close()

    def ask(self) -> dict[str, Any] | None:
        """What migctl answers; None when it is gone."""
        if self.gone:
            return None
        self.tell({"event": "ask"})
        return self._replies.get()


class Bridge:
    """One channel for one machine."""

    def __init__(self, control: Control, job: Job) -> None:
        self._control, self._job = control, job
        self._record = Record(job.monitor, uri=job.uri, role=job.role)
        os.ftruncate(sys.stderr.fileno(), 0)  # the log of the one before
        self._role = Role(job.role)
        self._pump: Pump | None = None
        plugins = Plugins.load(disabled=job.disabled, prefer=job.prefer)
        kernel = Kernel(plugins=plugins)
        self._route = kernel.route(job.uri)
        deadline = None if job.timeout is None else time.monotonic() + job.timeout
        self._context = attrs.evolve(
            kernel.context(self._role, control.cancel_fd), deadline=deadline
        )

    def terminate(self) -> None:
        """For the handler of a signal."""
        if self._pump is not None:
            self._pump.terminate()
        else:
            self._control.cancel()

    def run(self) -> None:
        began = time.monotonic()
        try:
            result = self._source() if self._role is Role.SOURCE else self._destination()
        except MigrationError as error:
            log.info("%s", error, exc_info=True)
            result = Result(State.FAILED, str(error))
            kind = "cancelled" if isinstance(error, Cancelled) else "failed"
        else:
            kind = "ended"
        if kind == "cancelled":
            self._record.remove()
        else:
            self._note(result.state, error=result.error)
        sent = self._pump.sent if self._pump is not None else 0
        received = self._pump.received if self._pump is not None else 0
        seconds = time.monotonic() - began
        self._forget_kept()
        self._control.tell(
            {
                "event": kind,
                "state": result.state,
                "error": result.error,
                "sent": sent,
                "received": received,
                "seconds": seconds,
            }
        )
        self._record.close()
        self._control.close()

    def _forget_kept(self) -> None:
        """Where migctl is not there to do it, the machine's copy of our end is closed here, if the monitor is free."""
        if self._role is Role.SOURCE and self._pump is not None and self._control.gone:
            with contextlib.suppress(MigrationError), Monitor(self._job.monitor) as monitor:
                monitor.execute("closefd", {"fdname": KEPT})

    def _note(self, state: State, **members: Any) -> None:
        if self._pump is not None:
            members |= {"sent": self._pump.sent, "received": self._pump.received}
        self._record.write(state=state, **members)

    # ---- the source: migctl hands over what we open, and begins the migration

    def _source(self) -> Result:
        self._note(State.CONNECTING)
        channel = self._route.connect(self._context)
        back = channel.return_path() is not None
        sock = self._socket_of(channel)
        if sock is not None:
            self._control.tell({"event": "open", "form": "descriptor", "return-path": back}, [sock])
            self._await_begin(channel)
            self._leave(channel)
        ours, theirs = socket.socketpair()
        with theirs:
            self._control.tell(
                {"event": "open", "form": "pump", "return-path": back},
                [theirs.fileno(), ours.fileno()],
            )
        self._await_begin(channel)
        pump = SourcePump(ours, channel, ask=self._ask, on_unknown=self._tell_unknown)
        return self._run_pump(pump)

    def _await_begin(self, channel: Channel) -> None:
        try:
            self._control.wait_begun()
        except Cancelled:
            channel.abort()
            channel.close()
            raise

    def _ask(self) -> Standing | None:
        """By migctl, which holds the monitor as long as it is there; else at the monitor."""
        if (reply := self._control.ask()) is not None:
            return Standing(**reply)
        try:
            with Monitor(self._job.monitor) as monitor:
                return Standing(
                    run_state=monitor.run_state(),
                    status=monitor.migration().get("status", "none"),
                )
        except (Gone, Refused) as error:
            log.info("%s", error)
            return None

    def _tell_unknown(self, why: str) -> None:
        self._note(State.UNKNOWN, error=why)
        self._control.tell({"event": "unknown", "error": why})

    # ---- the destination: we hand it over when somebody has connected

    def _destination(self) -> Result:
        with self._route.listen(self._context) as listener:
            self._note(State.LISTENING, addresses=listener.addresses)
            self._control.tell({"event": "listening", "addresses": listener.addresses})
            channel = self._accept(listener)
        self._control.begin()
        self._control.tell({"event": "accepted"})
        sock = self._socket_of(channel)
        if sock is not None:
            self._hand_over(channel, sock)
            self._control.tell({"event": "open", "form": "descriptor"})
            self._leave(channel)
        ours, theirs = socket.socketpair()
        with theirs:
            self._hand_over(channel, theirs.fileno())
        self._control.tell({"event": "open", "form": "pump"})
        return self._run_pump(DestinationPump(ours, channel))

    def _accept(self, listener: Any) -> Channel:
        """The first connection over which a migration begins: another must not use up the destination."""
        while True:
            channel: Channel = listener.accept()
            try:
                if self._begins(channel):
                    return channel
            except Cancelled:
                channel.close()
                raise
            except MigrationError as error:
                log.info("%s: %s", channel.name, error)
            channel.close()
            log.warning("%s: a connection over which no migration came", channel.name)

    def _begins(self, channel: Channel) -> bool:
        until = time.monotonic() + _FIRST_BYTES
        magic = MAGIC.to_bytes(4, "big")
        while time.monotonic() < until:
            self._control.check()
            try:
                first = channel.peek(4, time.monotonic() + _POLL)
            except DeadlineExceeded:
                continue
            if len(first) >= 4 or not magic.startswith(first) or not first:
                return first == magic
            time.sleep(_POLL / 10)
        return False

    def _hand_over(self, channel: Channel, fd: int) -> None:
        """Raises MigrationError: the source sees the end of its connection, and the destination is as it was."""
        try:
            with Monitor(self._job.monitor) as monitor:
                if (run_state := monitor.run_state()) != "inmigrate":
                    raise StateError(f"{monitor.address} waits for no migration: it is {run_state}")
                monitor.hand_over(CHANNEL, fd)
                arguments: dict[str, Any] = {"uri": f"fd:{CHANNEL}"}
                if self._job.survive:
                    arguments["exit-on-error"] = False
                try:
                    monitor.execute("migrate-incoming", arguments)
                except Refused:
                    with contextlib.suppress(Refused):
                        monitor.execute("closefd", {"fdname": CHANNEL})
                    raise
        except BaseException:
            channel.abort()
            channel.close()
            raise

    # ---- both

    def _socket_of(self, channel: Channel) -> int | None:
        """The one descriptor that is all of the channel, if the machine can have it.

        A source gets none whose end proves nothing: it would take that for a failure, and run on.
        """
        fd = channel.raw_fd("write")
        if fd is None or fd != channel.raw_fd("read") or not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return None
        if self._job.pump or (self._role is Role.SOURCE and not channel.eof_means_peer_gone):
            return None
        return fd

    def _leave(self, channel: Channel) -> NoReturn:
        """The machine has the connection. Closing the channel could end it for the machine as well: just go."""
        log.info("%s was handed over", channel.name)
        self._record.remove()
        os._exit(0)

    def _run_pump(self, pump: Pump) -> Result:
        self._pump = pump
        self._note(State.PUMPING)
        result = pump.run()
        pump.close()  # only now: what is raised by mistake must not end a connection
        return result


def main() -> None:
    """argv: the number of the control socket, and how much to log (0 to 2)."""
    control = Control(socket.socket(fileno=int(sys.argv[1])))
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", level="INFO"
    )
    job = control.start()
    try:
        bridge = Bridge(control, job)
    except MigrationError as error:
        control.tell({"event": "failed", "state": State.FAILED, "error": str(error)})
        return
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: bridge.terminate())
    bridge.run()


if __name__ == "__main__":
    main()
