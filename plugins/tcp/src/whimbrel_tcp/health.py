"""How much of a TCP connection may be on its way, for `migctl doctor`."""

from __future__ import annotations

from pathlib import Path

from whimbrel import Check, Health

_IPV4 = Path("/proc/sys/net/ipv4")
#: The defaults of Linux. With less, a link over some distance is not filled.
_SEND, _RECEIVE = 4 << 20, 6 << 20
_ROUND_TRIP = 0.01  # seconds


def checks() -> list[Check]:
    """The kernel sizes the buffers by itself, up to these limits: the transport asks for none."""
    try:
        send = int((_IPV4 / "tcp_wmem").read_text().split()[2])
        receive = int((_IPV4 / "tcp_rmem").read_text().split()[2])
    except (OSError, ValueError, IndexError):
        return []
    found = (
        f"send {send >> 10} KiB, receive {receive >> 10} KiB: at most"
        f" {min(send, receive) / _ROUND_TRIP / (1 << 20):.0f} MiB/s over a round trip of 10 ms"
    )
    if send >= _SEND and receive >= _RECEIVE:
        return [Check("TCP buffers", Health.OK, found)]
    return [
        Check(
            "TCP buffers",
            Health.WARNING,
            found,
            f"sudo sysctl net.ipv4.tcp_wmem='4096 16384 {max(send, _SEND)}'"
            f" net.ipv4.tcp_rmem='4096 131072 {max(receive, _RECEIVE)}'",
        )
    ]
