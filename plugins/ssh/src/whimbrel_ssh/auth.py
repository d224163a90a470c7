"""Getting in: with the keys of ssh-agent and of files, in ssh's order. Passwords are not for machines."""

from __future__ import annotations

import base64
import contextlib
import getpass
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import paramiko

from whimbrel_ssh.config import Host
from whimbrel_ssh.errors import AuthRefused
from whimbrel_ssh.protocol import FAILURES

log = logging.getLogger("whimbrel.ssh")


@attrs.frozen
class _Key:
    name: str
    key: paramiko.PKey


class Authenticator:
    """Offers one key after the other. tried: what was offered; passed_over: what could not be, and why."""

    def __init__(self, host: Host, on_socket: Callable[[Any], object]) -> None:
        """on_socket: told of the agent's socket, so that waiting for an agent can be ended from outside."""
        self._host = host
        self._on_socket = on_socket
        self.tried: list[str] = []
        self.passed_over: list[str] = []

    def run(self, transport: paramiko.Transport) -> None:
        """Raises AuthRefused, with what was tried and what to do."""
        allowed: list[str] = []
        with _agent_keys(self._host, self._on_socket) as held:
            for each in self._keys(held):
                self.tried.append(each.name)
                try:
                    further = transport.auth_publickey(self._host.user, each.key)
                except paramiko.BadAuthenticationType as error:
                    allowed = error.allowed_types
                    if "publickey" not in allowed:
                        break
                except paramiko.AuthenticationException as error:
                    log.debug("%s: %s", each.name, error)
                    if not transport.is_active():
                        raise self._refused("the host hung up after these") from error
                except FAILURES as error:
                    if not transport.is_active():
                        raise self._refused("the host hung up after these") from error
                    self.passed_over.append(f"{each.name} ({error})")
                else:
                    if not further:
                        log.info("%s: let in as %s with %s", self._host, self._host.user, each.name)
                        return
                    allowed = further
                    break
        if allowed and "publickey" not in allowed:
            raise self._refused(f"the host wants {' or '.join(allowed)}")
        raise self._refused("")

    def _refused(self, why: str) -> AuthRefused:
        facts = [f"tried {', '.join(self.tried)}" if self.tried else "there is no key to try"]
        if why:
            facts.append(why)
        if self.passed_over:
            facts.append(f"passed over {', '.join(self.passed_over)}")
        host = self._host
        hint = f"Try ssh -v {host.user}@{host.alias}; put the key there with ssh-copy-id"
        if any("passphrase" in text for text in self.passed_over):
            hint = "ssh-add gives a key with a passphrase to the agent; a question needs a terminal"
        elif why.startswith("the host hung up") and len(self.tried) > 1:
            hint = "It takes only so many keys: IdentitiesOnly yes and IdentityFile in ~/.ssh/config name the right one"
        elif why.startswith("the host wants"):
            hint = "whimbrel knows keys only: allow publickey alone for this user there"
        return AuthRefused(
            f"authentication: {host} does not let {host.user} in: {'; '.join(facts)}", hint=hint
        )

    def _keys(self, held: list[paramiko.PKey]) -> Iterator[_Key]:
        """Those in the agent that the configuration names, the agent's others, then files."""
        files = [p for p in self._host.identities if p.exists() or self._host.explicit]
        public = {p: _public(p) for p in files}
        wanted = {blob for blob in public.values() if blob is not None}
        offered = [k for k in held if k.asbytes() in wanted]
        if not self._host.identities_only:
            offered += [k for k in held if k.asbytes() not in wanted]
        for key in offered:
            yield _Key(f"{key.get_name()} {key.fingerprint} of the agent", key)
        in_agent = {k.asbytes() for k in held}
        for path in files:
            if public[path] in in_agent:
                continue
            key_of_file = self._load(path)
            if key_of_file is not None:
                yield _Key(str(path), key_of_file)

    def _load(self, path: Path) -> paramiko.PKey | None:
        try:
            return _private(path)
        except (paramiko.PasswordRequiredException, TypeError):
            pass  # it has a passphrase
        except FileNotFoundError:
            self.passed_over.append(f"{path} (there is no such file)")
            return None
        except Exception as error:  # whatever a damaged file, or the library behind, comes up with
            self.passed_over.append(f"{path} ({error})")
            return None
        if sys.stdin is None or not sys.stdin.isatty():
            self.passed_over.append(f"{path} (it has a passphrase)")
            return None
        try:
            return _private(path, getpass.getpass(f"Passphrase for {path}: "))
        except Exception:
            self.passed_over.append(f"{path} (wrong passphrase)")
            return None


class _Agent(paramiko.Agent):
    """ssh-agent, whose socket is told before anybody waits for it."""

    def __init__(self, on_socket: Callable[[Any], object]) -> None:
        self._on_socket = on_socket
        super().__init__()

    def _connect(self, conn: Any) -> None:
        self._on_socket(conn)
        super()._connect(conn)  # type: ignore[misc]


@contextlib.contextmanager
def _agent_keys(host: Host, on_socket: Callable[[Any], object]) -> Iterator[list[paramiko.PKey]]:
    """The keys of ssh-agent, if there is one, usable inside."""
    agent = None
    if host.use_agent:
        try:
            agent = _Agent(on_socket)
        except (paramiko.SSHException, OSError) as error:
            log.warning("ssh-agent does not answer: %s", error)
    try:
        yield list(agent.get_keys()) if agent is not None else []
    finally:
        if agent is not None:
            agent.close()


def _private(path: Path, passphrase: str | None = None) -> paramiko.PKey:
    secret: Any = None if passphrase is None else passphrase.encode()
    return paramiko.PKey.from_path(path, secret)


def _public(path: Path) -> bytes | None:
    """The public half, without asking for a passphrase."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return base64.b64decode(path.with_name(path.name + ".pub").read_text().split()[1])
    with contextlib.suppress(Exception):
        return _private(path).asbytes()
    return None
