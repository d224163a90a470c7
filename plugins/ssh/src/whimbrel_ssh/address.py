"""`ssh://[USER@]HOST[:PORT]/END`, taken apart without I/O.

In front of the first slash behind HOST it is a URI: %XX stands for a byte in USER, IPv6 addresses stand in brackets.
Everything behind that slash is END, as it is written: nothing in it is decoded, no quotes are taken off. It is the text
that the schemes unix, tcp and exec have on their own, and what it means is up to the far host.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

import attrs

from whimbrel import UriError

SYNTAX = "Write ssh://[USER@]HOST[:PORT]/unix:PATH, …/tcp:HOST:PORT or …/exec:COMMAND"
#: sun_path, which holds 108 bytes with the final NUL, also bounds the far host's.
_PATH_MAX = 107
_NO_ANSWERS = ",answers=off"
_AUTHORITY = re.compile(r"(?:([^@]*)@)?(\[[^\]]*\]|[^:@]*)(?::(.*))?", re.DOTALL)
# Both end up in the shell command of a ProxyCommand: nothing that a shell or ssh could take for something else.
_HOST = re.compile(r"[A-Za-z0-9._+%:][A-Za-z0-9._+%:-]*")
_USER = re.compile(
    r"[^\s'\"`$\\;&<>|(){}*?!#%,\x00-\x1f\x7f-][^\s'\"`$\\;&<>|(){}*?!#%,\x00-\x1f\x7f]*"
)


@attrs.frozen
class Unix:
    """A UNIX socket on the far host."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@attrs.frozen
class Tcp:
    """A TCP port as the far host sees it."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:{_bracketed(self.host)}:{self.port}"


@attrs.frozen
class Command:
    """A command for the login shell of the user on the far host."""

    command: str
    #: Its standard output holds the destination's answers; otherwise its exit status alone is the result.
    answers: bool = True

    def __str__(self) -> str:
        return f"exec{'' if self.answers else _NO_ANSWERS}:{self.command}"


End = Unix | Tcp | Command


@attrs.frozen
class SshAddress:
    """`user` and `port` are None where ~/.ssh/config and the defaults decide."""

    user: str | None
    host: str
    port: int | None
    end: End

    @property
    def place(self) -> str:
        """The part in front of END: ssh://USER@HOST:PORT."""
        user = "" if self.user is None else f"{quote(self.user, safe='+=~')}@"
        port = "" if self.port is None else f":{self.port}"
        return f"ssh://{user}{_bracketed(self.host)}{port}"

    def __str__(self) -> str:
        return f"{self.place.removeprefix('ssh:')}/{self.end}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def parse(rest: str) -> SshAddress:
    """The text behind `ssh:`. Raises UriError."""
    if not rest.startswith("//"):
        raise UriError("the scheme is spelled ssh://", hint=SYNTAX)
    authority, slash, end = rest[2:].partition("/")
    userinfo = authority.rpartition("@")[0]
    if ":" in userinfo:
        raise UriError(
            "a password does not belong into a URI: it would stand in lists of processes, in histories and in logs",
            hint="Use a key: ssh-keygen, ssh-copy-id, ssh-add. Then write ssh://USER@HOST/...",
        )
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise UriError(f"'{authority}' names no host", hint=SYNTAX)
    user, host, port = match.groups()
    if not slash or not end:
        raise UriError(f"'ssh:{rest}' does not say what happens on the far host", hint=SYNTAX)
    return SshAddress(_user(user), _host(host), _port(port), _end(end))


def _user(text: str | None) -> str | None:
    if text is None:
        return None
    user = unquote(text)
    if not _USER.fullmatch(user):
        raise UriError(f"'{text}' is not the name of a user", hint=SYNTAX)
    return user


def _host(text: str) -> str:
    bracketed = text.startswith("[") and text.endswith("]")
    host = text[1:-1] if bracketed else text
    if not _HOST.fullmatch(host) or bracketed is not (":" in host):
        raise UriError(
            f"'{text}' is not the name of a host",
            hint=f"{SYNTAX}; IPv6 addresses stand in brackets",
        )
    return host


def _port(text: str | None, least: int = 1) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and least <= int(text[:6]) <= 65535):
        raise UriError(f"'{text}' is not a port", hint=SYNTAX)
    return int(text)


def _end(text: str) -> End:
    kind, colon, rest = text.partition(":")
    if colon and "\0" in rest:
        raise UriError("NUL has no place in a URI", hint=SYNTAX)
    if colon and kind == "unix":
        return _unix(rest)
    if colon and kind == "tcp":
        return _tcp(rest)
    if colon and kind in ("exec", f"exec{_NO_ANSWERS}"):
        if not rest.strip():
            raise UriError("'exec:' has no command", hint="Write …/exec:COMMAND")
        return Command(rest, answers=kind == "exec")
    hint = SYNTAX
    if kind == "ssh":
        hint = "To go through another host, name it as ProxyJump in ~/.ssh/config"
    elif rest.startswith(":"):
        hint = f"A filter stands in front of everything: {kind}::ssh://..."
    raise UriError(f"'{text}' is nothing that ssh:// can reach on the far host", hint=hint)


def _unix(path: str) -> Unix:
    if not path.startswith("/"):
        raise UriError(
            f"'unix:{path}' is no absolute path: sshd has no current directory",
            hint="Write …/unix:/run/NAME.sock",
        )
    if len(path.encode(errors="surrogateescape")) > _PATH_MAX:
        raise UriError(
            f"the path of a UNIX socket can have {_PATH_MAX} bytes: {path}",
            hint="Use a shorter one",
        )
    return Unix(path)


def _tcp(text: str) -> Tcp:
    """An empty host is the far host itself."""
    host, colon, digits = text.rpartition(":")
    port = _port(digits, least=0)
    if not colon or port is None:
        raise UriError(f"'tcp:{text}' is not HOST:PORT", hint=SYNTAX)
    return Tcp(_host(host) if host else "localhost", port)
