"""Whether a UNIX socket gets the buffer that is asked for, for `migctl doctor`."""

from __future__ import annotations

import socket

from whimbrel import Check, Health
from whimbrel_unix.transport import SEND_BUFFER


def checks() -> list[Check]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        # socket(7): twice what was granted, the kernel's own share included.
        granted = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
    found = f"{granted >> 10} KiB of the {SEND_BUFFER >> 10} KiB that are asked for"
    if granted >= SEND_BUFFER:
        return [Check("UNIX socket buffer", Health.OK, found)]
    remedy = f"sudo sysctl net.core.wmem_max={SEND_BUFFER}"
    return [Check("UNIX socket buffer", Health.WARNING, found, remedy)]
