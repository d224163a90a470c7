"""The server: one thread with an event loop for all clients, and a thread for each command while it runs.

What a client does is its own affair: one that sends nothing, garbage or too much costs some memory (bounded by
reader.Limits) and its own time; one that does not read is dropped; a command that blocks keeps only its client waiting. The
threads of the migration never wait for any of them.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from whimbrel import ChannelError, Listener, MigrationError, Notification, Role, UriError
from whimbrel_monitor import events
from whimbrel_monitor.client import Client
from whimbrel_monitor.command import Command
from whimbrel_monitor.session import encode

if TYPE_CHECKING:
    from whimbrel import Kernel

log = logging.getLogger("whimbrel.monitor")

#: When there are more, the one that has waited longest without negotiating makes way, or the newest is turned away.
MAX_CLIENTS = 64
_REMOTE = ",remote=on"
_PAUSE = 0.1  # seconds, after accept() failed: descriptors may be free again


def serve(kernel: Kernel, address: str) -> Server:
    """Listen at unix:PATH or tcp:HOST:PORT and serve from now on. Raises UriError, ChannelError, PluginError."""
    uri = address.removesuffix(_REMOTE)
    route = kernel.route(uri)
    if route.uri.scheme == "tcp" and uri == address:
        _check_loopback(uri, route.address.host)
    return Server(kernel, route.listen(kernel.context(Role.DESTINATION)), collect(kernel))


def _check_loopback(uri: str, host: str) -> None:
    """Raises UriError unless only this host can connect."""
    hint = f"Write tcp:127.0.0.1:PORT and come by ssh -L, or {uri}{_REMOTE} where the network is trusted"
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except OSError:
        found = []
    numbers = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not numbers or not all(ipaddress.ip_address(n).is_loopback for n in numbers):
        raise UriError(
            f"a monitor at {uri} could be reached from other hosts, and it asks nobody for a password: who reaches it"
            " can stop the machine and send its memory anywhere",
            hint=hint,
        )


def collect(kernel: Kernel) -> dict[str, Command]:
    """The commands of all plugins, by name. A name that two claim is nobody's; those of this plugin are not to be had."""
    from whimbrel_monitor import plugin

    claims: dict[str, list[tuple[Any, Command]]] = {}
    for info, commands in kernel.plugins.collect("monitor_commands"):
        for command in commands or ():
            claims.setdefault(command.name, []).append((info, command))
    chosen = {}
    for name, who in sorted(claims.items()):
        own = [claim for claim in who if claim[0].plugin is plugin]
        if len(who) > 1:
            log.warning("command %s is claimed by %s", name, " and ".join(i.source for i, _ in who))
        if own or len(who) == 1:
            chosen[name] = (own or who)[0][1]
    return chosen


class Server:
    """Serves until close(). Made by serve()."""

    def __init__(self, kernel: Kernel, listener: Listener, commands: Mapping[str, Command]) -> None:
        self.kernel = kernel
        self.commands = commands
        self.addresses = listener.addresses
        self.clients: list[Client] = []
        self._listener = listener
        self._loop = asyncio.new_event_loop()
        self._closing = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"whimbrel-monitor {self.addresses[0]}", daemon=True
        )
        self._thread.start()
        self._acceptor = threading.Thread(
            target=self._accept, name=f"whimbrel-accept {self.addresses[0]}", daemon=True
        )
        self._acceptor.start()
        kernel.notifiers.add(self._notified)
        atexit.register(self.close)

    def close(self) -> None:
        """Stop serving, disconnect all clients and release the address. From any thread; again: nothing happens."""
        self._closing.set()
        atexit.unregister(self.close)
        self.kernel.notifiers.remove(self._notified)
        self._listener.close()
        self._acceptor.join()  # first: whom it let in last is let go by the loop
        self._call(self._stop.set)
        self._thread.join()

    def __repr__(self) -> str:
        return f"<monitor at {' '.join(self.addresses)}, {len(self.clients)} clients>"

    # ---- from other threads

    def _call(self, function: Callable[..., object], *args: object) -> None:
        """Run it on the loop, soon; never, once that has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _notified(self, notification: Notification) -> None:
        event = events.of(self.kernel, notification)
        if event is not None:
            self._call(self._tell_all, encode(event))

    def send_event(self, name: str, data: Mapping[str, Any] | None) -> None:
        self._call(self._tell_all, encode(events.make(name, data)))

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                channel = self._listener.accept()
            except MigrationError as error:
                if not self._closing.is_set():
                    log.warning("no client could be accepted: %s", error)
                    self._closing.wait(_PAUSE)
                continue
            try:
                fd = channel.raw_fd("read")
                if fd is None:
                    raise ChannelError(f"{self.addresses[0]} gives no socket")
                sock = socket.socket(fileno=os.dup(fd))
            except (OSError, MigrationError) as error:
                log.warning("no client could be accepted: %s", error)
                continue
            finally:
                channel.close()
            sock.setblocking(False)
            if (
                sock.family != socket.AF_UNIX
            ):  # of a lost host, or else its place would be taken for ever
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._call(self._admit, sock)

    # ---- on the loop

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        await self._stop.wait()
        tasks = [client.task for client in self.clients]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _admit(self, sock: socket.socket) -> None:
        if self._closing.is_set() or not self._make_room():
            sock.close()
            return
        client = Client(self, sock)
        self.clients.append(client)
        client.task.add_done_callback(lambda _: self.clients.remove(client))

    def _make_room(self) -> bool:
        if len(self.clients) < MAX_CLIENTS:
            return True
        silent = next((c for c in self.clients if not (c.session.negotiated or c.dropped)), None)
        if silent is None:
            log.warning("%s turns a client away: there are %d", self, MAX_CLIENTS)
            return False
        silent.drop("it makes way for another: it has not negotiated")
        return True

    def _tell_all(self, line: bytes) -> None:
        for client in tuple(self.clients):
            if client.session.negotiated:
                client.send(line)
