"""One client of the server: its socket, its requests one after the other, and what it has not read yet."""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from whimbrel import BlockedError, LocalError, MigrationError
from whimbrel_monitor.reader import Reader, SyntaxFault
from whimbrel_monitor.session import NOT_FOUND, QmpError, Request, Session, greeting

if TYPE_CHECKING:
    from whimbrel import Kernel
    from whimbrel_monitor.command import Command
    from whimbrel_monitor.server import Server

T = TypeVar("T")
log = logging.getLogger("whimbrel.monitor")

_CHUNK = 8192  # bytes taken from a client at a time; between two, others have their turn
#: Descriptors taken with one message; the system closes what else comes.
MAX_FDS = 16
#: Bytes that a client may leave unread, before it is dropped; and how many of them keep its next request waiting.
MAX_UNREAD, SOME_UNREAD = 1 << 20, 64 << 10
#: Seconds that a client waits after a mistake, and for each second of work that it has cost: so a flood of them takes
#: little of others' time.
_PENANCE, _PENANCE_FACTOR = 0.005, 4
#: Seconds that a client is given to read the reply before what was to come after it.
_FAREWELL = 1.0


class Client:
    """Lives on the server's loop, as long as its task."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.session = Session()
        self.dropped = False
        self._server = server
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._unread = bytearray()
        self._was_read = asyncio.Event()
        self.fds: list[int] = []  # sent with the last message that had any, and taken by no command
        self.task = self._loop.create_task(self._serve())
        self.task.add_done_callback(self._clean_up)

    # ---- its requests

    async def _serve(self) -> None:
        reader = Reader()
        cost = 0.0  # of what is no request yet
        try:
            self.send(greeting())
            while data := await self._receive():
                reader.feed(data)
                began = time.thread_time()
                for value in reader:
                    cost += time.thread_time() - began
                    await self._handle(value, cost)
                    cost, began = 0.0, time.thread_time()
                cost += time.thread_time() - began
                await asyncio.sleep(0)
        except OSError as error:
            log.debug("a client is gone: %s", error)
        except Exception:
            log.exception("a client of %s is dropped", self._server)

    def _clean_up(self, _: object) -> None:
        """Also of a task that was cancelled before it began."""
        self.dropped = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self.keep_fds(())

    async def _handle(self, value: Any, cost: float) -> None:
        """`cost`: seconds that reading it has taken."""
        answer = self.session.receive(value)
        if isinstance(answer, Request):
            await self._execute(answer)
            return
        self.send(answer)
        if isinstance(value, SyntaxFault) and self._is_stranger():
            raise ConnectionAbortedError("it does not speak QMP")
        await asyncio.sleep(_PENANCE + _PENANCE_FACTOR * cost)
        await self._until_unread(SOME_UNREAD)

    def _is_stranger(self) -> bool:
        """A browser can be made to send a request of HTTP to a port of this host, with commands in it."""
        return self._sock.family != socket.AF_UNIX and not self.session.negotiated

    async def _execute(self, request: Request) -> None:
        context = _Context(self, self._server)
        command = self._server.commands.get(request.execute)
        reply = await self._in_thread(lambda: _answer(request, command, context), request.execute)
        self.send(reply)
        await self._until_unread(SOME_UNREAD)
        for function in context.afterwards:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._until_unread(0), _FAREWELL)
            await self._in_thread(function, f"after {request.execute}")

    async def _in_thread(self, function: Callable[[], T], name: str) -> T | None:
        """Daemon threads: a command that hangs must not keep the program from ending, as those of an executor would."""
        done: asyncio.Future[T | None] = self._loop.create_future()

        def finish(result: T | None) -> None:
            if not done.done():  # the client may have gone
                done.set_result(result)

        def run() -> None:
            result = None
            try:
                result = function()
            except BaseException:
                log.exception("%s failed", name)
            with contextlib.suppress(RuntimeError):  # the monitor was closed
                self._loop.call_soon_threadsafe(finish, result)

        threading.Thread(target=run, name=f"whimbrel-monitor {name}", daemon=True).start()
        return await done

    # ---- its socket

    async def _receive(self) -> bytes:
        """What has come; b'' at the end. Descriptors that came with it replace those that nobody took."""
        while True:
            try:
                data, ancillary, _, _ = self._sock.recvmsg(
                    _CHUNK, socket.CMSG_SPACE(4 * MAX_FDS), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await self._readable()
                continue
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    numbers = array.array("i")
                    numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                    self.keep_fds(numbers)
            return data

    async def _readable(self) -> None:
        ready = asyncio.Event()
        self._loop.add_reader(self._sock, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_reader(self._sock)

    def keep_fds(self, fds: Any) -> None:
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.fds = list(fds)

    def send(self, line: bytes | None) -> None:
        """Never blocks. A client with too much unread is dropped: it would miss some of it anyway."""
        if self.dropped or line is None:
            return
        self._unread += line
        self._write()
        if len(self._unread) > MAX_UNREAD:
            self.drop(f"it has left {len(self._unread)} bytes unread")

    def _write(self) -> None:
        try:
            sent = self._sock.send(self._unread) if self._unread else 0
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.drop(str(error))
            return
        del self._unread[:sent]
        if sent:
            self._was_read.set()
        if self._unread:
            self._loop.add_writer(self._sock, self._write)
        else:
            self._loop.remove_writer(self._sock)

    async def _until_unread(self, most: int) -> None:
        while len(self._unread) > most:
            self._was_read.clear()
            await self._was_read.wait()

    def drop(self, reason: str) -> None:
        if not self.dropped:
            self.dropped = True
            log.info("a client of %s is dropped: %s", self._server, reason)
            self.task.cancel()


class _Context:
    """See whimbrel_monitor.command.Context. On the thread of the command."""

    def __init__(self, client: Client, server: Server) -> None:
        self._client, self._server = client, server
        self.kernel: Kernel = server.kernel
        self.commands = server.commands
        self.afterwards: list[Callable[[], object]] = []

    def take_fd(self) -> int:
        # No other command of this client runs, and its socket is not read meanwhile.
        if not self._client.fds:
            raise LocalError("No file descriptor supplied via SCM_RIGHTS")
        fd = self._client.fds.pop(0)
        self._client.keep_fds(())
        return fd

    def after_reply(self, function: Callable[[], object]) -> None:
        self.afterwards.append(function)

    def send_event(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        self._server.send_event(name, data)


def _answer(request: Request, command: Command | None, context: _Context) -> bytes:
    """The reply, whatever the command does."""
    try:
        if command is None:
            raise QmpError(NOT_FOUND, f"The command {request.execute} has not been found")
        return request.reply(command(context, request.arguments))
    except BlockedError as error:
        return request.refusal(LocalError("; ".join(error.reasons)))
    except MigrationError as error:
        return request.refusal(error)
    except BaseException as error:  # SystemExit as well: it would end this thread only
        log.exception("the command %s failed", request.execute)
        return request.refusal(
            LocalError(f"{request.execute} failed: {type(error).__name__}: {error}")
        )
