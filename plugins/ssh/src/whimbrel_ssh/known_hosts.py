"""known_hosts: what a host's key was, as sshd(8) describes the files. Names may be patterns, negated, or hashed."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import paramiko
from paramiko.hostkeys import HostKeyEntry

from whimbrel_ssh.errors import HostKeyRefused

_REVOKED, _AUTHORITY = "@revoked", "@cert-authority"


@attrs.frozen
class _Entry:
    path: Path
    line: int
    key: paramiko.PKey
    revoked: bool

    def __str__(self) -> str:
        return f"{self.path} line {self.line}"


class KnownHosts:
    """What the files say of one host: its name, or [NAME]:PORT where that is not 22."""

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self._files = files
        self._name = name
        self._entries = [entry for path in files for entry in self._read(path)]

    def _read(self, path: Path) -> Iterator[_Entry]:
        try:
            lines = path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            raise HostKeyRefused(
                f"host key: cannot read {path}: {error.strerror}", hint="Check its rights"
            ) from error
        for number, line in enumerate(lines, 1):
            marker, _, rest = line.strip().partition(" ")
            if marker.startswith("#") or marker == _AUTHORITY:
                continue  # no certificates of hosts: such a host is one without a key here
            text = rest.strip() if marker == _REVOKED else line.strip()
            names, _, _ = text.partition(" ")
            if names and _names(names, self._name):
                # A line that is damaged says nothing, as in ssh.
                with contextlib.suppress(paramiko.SSHException, ValueError):
                    entry = HostKeyEntry.from_line(text, number)
                    if entry is not None and entry.key is not None:
                        yield _Entry(path, number, entry.key, marker == _REVOKED)

    @property
    def types(self) -> tuple[str, ...]:
        """Types of the keys that are known, in their order."""
        return tuple(dict.fromkeys(e.key.get_name() for e in self._entries if not e.revoked))

    def check(self, key: paramiko.PKey, *, accept_new: bool) -> bool:
        """Whether the key is new, and was noted. Raises HostKeyRefused for one that is not the host's, or not known to
        be.
        """
        shown = f"{key.get_name()} key {key.fingerprint}"
        for entry in self._entries:
            if entry.key == key and entry.revoked:
                raise HostKeyRefused(
                    f"host key: {self._name} shows the {shown}, which {entry} revokes",
                    hint="Do not connect: that key was stolen or given up",
                )
        known = [entry for entry in self._entries if not entry.revoked]
        if any(entry.key == key for entry in known):
            return False
        if known:
            raise HostKeyRefused(
                f"host key: {self._name} has changed its key, or somebody else answers in its place: it shows the {shown};"
                f" {known[0]} says {known[0].key.get_name()} {known[0].key.fingerprint}",
                hint=f"Ask who runs that host. If the new key is right: ssh-keygen -R '{self._name}' -f {known[0].path},"
                " then connect once with ssh",
            )
        if not accept_new:
            raise HostKeyRefused(
                f"host key: {self._name} is unknown; it shows the {shown}",
                hint="Compare that with ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub on the host, then connect once with ssh;"
                " or let new keys be noted: StrictHostKeyChecking accept-new in ~/.ssh/config, ssh-host-key=accept-new in apps",
            )
        self._note(key)
        return True

    def _note(self, key: paramiko.PKey) -> None:
        if not self._files:
            return
        path = self._files[0]
        line = f"{self._name} {key.get_name()} {key.get_base64()}\n".encode()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(fd).st_size
                if size and os.pread(fd, 1, size - 1) != b"\n":
                    line = b"\n" + line
                os.write(fd, line)
            finally:
                os.close(fd)
        except OSError as error:
            raise HostKeyRefused(
                f"host key: cannot note the new key in {path}: {error.strerror}",
                hint="Check its rights, or name another UserKnownHostsFile",
            ) from error


def _names(patterns: str, name: str) -> bool:
    """Does the first field of a line stand for the host?"""
    if patterns.startswith("|1|"):
        salt = "|".join(patterns.split("|")[:3])
        try:
            return paramiko.HostKeys.hash_host(name, salt) == patterns
        except Exception:  # damaged
            return False
    found = False
    for pattern in patterns.lower().split(","):
        text = pattern.removeprefix("!").replace("[", "[[]")
        if fnmatch.fnmatchcase(name, text):
            if pattern.startswith("!"):
                return False
            found = True
    return found
