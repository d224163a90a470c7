"""What this distribution declares."""

from __future__ import annotations

import importlib.util

from whimbrel import TransportSpec, hookimpl
from whimbrel.settings import Parameter, Setting, Side, Type

whimbrel_api = (1, 0)


def _needs() -> str | None:
    if importlib.util.find_spec("paramiko") is None:
        return "the Python package paramiko is missing: pip install paramiko"
    return None


@hookimpl
def transports() -> list[TransportSpec]:
    return [
        TransportSpec(
            schemes=("ssh",),
            factory="whimbrel_ssh.transport:SshTransport",
            syntax="ssh://[USER@]HOST[:PORT]/unix:PATH, ssh://HOST/tcp:HOST:PORT, ssh://HOST/exec:COMMAND",
            summary="through sshd to a socket or a command on the far host",
            needs=_needs,
        )
    ]


@hookimpl
def settings() -> list[Setting]:
    return [
        Parameter(
            name="ssh-host-key",
            type=Type.CHOICE,
            default="strict",
            choices=("strict", "accept-new"),
            side=Side.SOURCE,
            help="What ssh:// does with the key of a host that known_hosts does not name: refuse it, or note it and go on."
            " A key other than the noted one is always refused.",
        ),
        Parameter(
            name="ssh-config",
            type=Type.STR,
            default="",
            side=Side.SOURCE,
            help="The configuration file that ssh:// reads, as with ssh -F; none: ~/.ssh/config and /etc/ssh/ssh_config.",
        ),
    ]
