"""The user's world: what ~/.ssh/config says of a host, and the files that it names."""

from __future__ import annotations

import functools
import getpass
import glob
import re
import shlex
from pathlib import Path

import attrs
import paramiko

from whimbrel import LocalError

_SYSTEM = Path("/etc/ssh/ssh_config")
_DEEPEST = 16  # levels of Include, as OpenSSH has it
_IDENTITIES = ("id_ed25519", "id_ecdsa", "id_rsa")
_JUMP = re.compile(r"(?:ssh://)?(?:([^@]+)@)?(\[[^\]]+\]|[^:@\[\]]+)(?::(\d{1,5}))?/?")
_CONNECT_TIMEOUT = 30.0
_KEEPALIVE, _KEEPALIVES = 15.0, 3


@attrs.frozen(kw_only=True)
class Host:
    """One host as ssh would see it. Times in seconds."""

    #: What the user calls it; the name under which known_hosts has it, unless hostkeyalias says otherwise.
    alias: str
    hostname: str
    port: int
    user: str
    #: In this order; explicit: the configuration names them, so that a missing one is worth a word.
    identities: tuple[Path, ...]
    explicit: bool
    identities_only: bool
    use_agent: bool
    #: Hosts to go through, as [user@]host[:port].
    jumps: tuple[str, ...]
    proxy_command: str | None
    #: The first is where a new key is noted.
    known_hosts: tuple[Path, ...]
    host_key_name: str
    accept_new: bool
    connect_timeout: float
    #: Seconds between two signs of life, and how many may stay unanswered; 0: none are asked for.
    keepalive: float
    keepalives: int

    def __str__(self) -> str:
        where = self.hostname if self.hostname == self.alias else f"{self.alias} ({self.hostname})"
        return where if self.port == 22 else f"{where} port {self.port}"


class Config:
    """Configuration files, read once. file: this one alone; None: the user's, then the system's."""

    def __init__(self, file: str | None = None) -> None:
        self._home = Path("~").expanduser()
        if file:
            self._text = self._read(Path(file).expanduser(), must_exist=True)
        else:
            user = self._read(self._home / ".ssh" / "config")
            self._text = f"{user}\nHost *\n{self._read(_SYSTEM)}"

    def _read(self, path: Path, depth: int = 0, *, must_exist: bool = False) -> str:
        """The text with its Includes put in, which paramiko does not do. A block goes on behind an Include in it."""
        try:
            lines = path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            if must_exist:
                raise LocalError(
                    f"there is no {path}", hint="Check the parameter ssh-config"
                ) from None
            return ""
        except OSError as error:
            raise LocalError(
                f"cannot read {path}: {error.strerror}", hint="Check its rights"
            ) from error
        block, found = "Host *", []
        for line in lines:
            keyword, _, rest = line.strip().replace("=", " ", 1).partition(" ")
            if keyword.lower() in ("host", "match"):
                block = line
            if keyword.lower() != "include" or depth >= _DEEPEST:
                found.append(line)
                continue
            base = _SYSTEM.parent if path.is_relative_to(_SYSTEM.parent) else self._home / ".ssh"
            for pattern in shlex.split(rest, comments=True):
                files = sorted(glob.glob(str(base / Path(pattern).expanduser())))
                found += [self._read(Path(file), depth + 1) for file in files]
            found.append(block)
        return "\n".join(found)

    def host(self, alias: str, user: str | None = None, port: int | None = None) -> Host:
        """What holds for a host; what is given here comes first. Raises LocalError."""
        # The first value of an option wins, and %p and %r then mean these.
        given = [f"  User {user}"] * (user is not None) + [f"  Port {port}"] * (port is not None)
        try:
            parsed = paramiko.SSHConfig.from_text("\n".join(["Host *", *given, self._text]))
            found = parsed.lookup(alias)
            return self._host(alias, found)
        except (paramiko.SSHException, ValueError, OSError) as error:
            raise LocalError(
                f"the ssh configuration for {alias} is wrong: {error}", hint=f"Try ssh -G {alias}"
            ) from error

    def jump(self, text: str) -> Host:
        """A host that ProxyJump names: [USER@]HOST[:PORT], or ssh://..."""
        match = _JUMP.fullmatch(text)
        if match is None:
            raise LocalError(f"ProxyJump {text} names no host", hint="Write [USER@]HOST[:PORT]")
        user, host, port = match.groups()
        return self.host(host.strip("[]"), user, None if port is None else int(port))

    def _host(self, alias: str, found: paramiko.SSHConfigDict) -> Host:
        hostname = found.get("hostname", alias)
        port = int(found.get("port", 22))
        expand = functools.partial(self._expand, host=hostname, port=port, alias=alias)
        name = found.get("hostkeyalias", hostname).lower()
        named = [str(f) for f in found.get("identityfile", ()) if f != "none"]
        jump, command = found.get("proxyjump", "none"), found.get("proxycommand") or "none"
        user_files = shlex.split(found.get("userknownhostsfile", "~/.ssh/known_hosts"))
        more = shlex.split(found.get("globalknownhostsfile", "/etc/ssh/ssh_known_hosts"))
        return Host(
            alias=alias,
            hostname=hostname,
            port=port,
            user=found.get("user") or getpass.getuser(),
            identities=tuple(expand(f) for f in named)
            or tuple(self._home / ".ssh" / name for name in _IDENTITIES),
            explicit=bool(named),
            identities_only=_yes(found.get("identitiesonly", "no")),
            use_agent=found.get("identityagent", "") != "none",
            jumps=() if jump.lower() == "none" else tuple(j.strip() for j in jump.split(",")),
            proxy_command=None if command.lower() == "none" else command,
            known_hosts=tuple(expand(f) for f in [*user_files, *more] if f != "none"),
            host_key_name=name if port == 22 or "hostkeyalias" in found else f"[{name}]:{port}",
            accept_new=found.get("stricthostkeychecking", "").lower() == "accept-new",
            connect_timeout=float(found.get("connecttimeout", _CONNECT_TIMEOUT)),
            keepalive=float(found.get("serveraliveinterval", _KEEPALIVE)),
            keepalives=int(found.get("serveralivecountmax", _KEEPALIVES)),
        )

    def _expand(self, text: str, *, host: str, port: int, alias: str) -> Path:
        for token, value in {
            "%d": str(self._home),
            "%h": host,
            "%p": str(port),
            "%n": alias,
        }.items():
            text = text.replace(token, value)
        return Path(text).expanduser()


def _yes(value: str) -> bool:
    return value.lower() in ("yes", "true")
