"""paramiko's Transport with what it lacks: channels to and from UNIX sockets, and a log that is none of the user's."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

import paramiko
from paramiko.common import MSG_CHANNEL_OPEN, cMSG_CHANNEL_REQUEST

#: Whatever paramiko's calls raise when something is wrong with the connection.
FAILURES = (paramiko.SSHException, EOFError, OSError)

#: OpenSSH's PROTOCOL, section 2.4.
_STREAMLOCAL = "direct-streamlocal@openssh.com"
_LOG = "whimbrel.ssh.protocol"

#: Measured: GCM is three times as fast as CTR with a MAC of its own. CBC and 3DES are not offered.
_CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
)


def _only_when_asked(record: logging.LogRecord) -> bool:
    """What paramiko logs as an error, with a traceback, it raises as well."""
    return logging.getLogger(_LOG).isEnabledFor(logging.DEBUG)


logging.getLogger(_LOG).addFilter(_only_when_asked)


class Protocol(paramiko.Transport):
    """One SSH connection over a socket that is connected. Nothing has been said yet."""

    def __init__(self, sock: Any, *, window: int, host_key_types: tuple[str, ...]) -> None:
        """window: bytes that the peer may send ahead on each channel. host_key_types: those that are known, in front."""
        super().__init__(sock, default_window_size=window)
        self.set_log_channel(_LOG)
        self._streamlocal: str | None = None
        self._asking = threading.Lock()
        self._deferring = threading.Lock()
        self._deferred: list[paramiko.Message] = []
        options = self.get_security_options()
        options.ciphers = [c for c in _CIPHERS if c in options.ciphers]
        known = [
            name
            for kind in host_key_types
            for name in (("rsa-sha2-512", "rsa-sha2-256") if kind == "ssh-rsa" else (kind,))
            if name in options.key_types
        ]
        options.key_types = known + [name for name in options.key_types if name not in known]

    def open_streamlocal(self, path: str) -> paramiko.Channel:
        """A channel to a UNIX socket of the far host. One at a time. Raises SSHException."""
        self._streamlocal = path
        try:
            return self.open_channel(_STREAMLOCAL)
        finally:
            self._streamlocal = None

    def global_request(self, kind: str, data: Any = None, wait: bool = True) -> Any:
        """One after the other: answers carry nothing that says what they answer."""
        with self._asking:
            return super().global_request(kind, data, wait)

    def signal(self, channel: paramiko.Channel, name: str) -> None:
        """Send a signal to the command behind a channel (RFC 4254, 6.9); OpenSSH does so from 7.9 on."""
        message = paramiko.Message()
        message.add_byte(cMSG_CHANNEL_REQUEST)
        message.add_int(channel.remote_chanid)
        message.add_string("signal")
        message.add_boolean(False)
        message.add_string(name)
        self._send_user_message(message)

    def has(self, channel: paramiko.Channel) -> bool:
        """False once the far host has closed its side too, which it does after all that was sent has gone on."""
        channels: Any = self._channels  # type: ignore[attr-defined]
        return channels.get(channel.get_id()) is not None

    def _send_user_message(self, data: paramiko.Message) -> None:
        if self._streamlocal is not None and data.asbytes()[0] == MSG_CHANNEL_OPEN:
            data.add_string(self._streamlocal)
            data.add_string("")  # two fields that are reserved
            data.add_int(0)
        if threading.current_thread() is self and not self._may_send():
            self._defer(data)
        else:
            super()._send_user_message(data)  # type: ignore[misc]

    # While keys are exchanged anew, paramiko lets whoever sends wait until that has ended. Its own thread, which has to
    # bring it to an end, must not: it sends when the far host closes a channel in between.

    def _may_send(self) -> bool:
        with self._deferring:
            return not self._deferred and self.clear_to_send.is_set()

    def _defer(self, data: paramiko.Message) -> None:
        with self._deferring:
            self._deferred.append(data)
            if len(self._deferred) == 1:
                threading.Thread(target=self._send_deferred, name="ssh rekey", daemon=True).start()

    def _send_deferred(self) -> None:
        while True:
            with contextlib.suppress(*FAILURES):
                super()._send_user_message(self._deferred[0])  # type: ignore[misc]
            with self._deferring:
                self._deferred.pop(0)
                if not self._deferred:
                    return
