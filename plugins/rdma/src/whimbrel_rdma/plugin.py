"""What this distribution declares. Light: neither pyverbs nor numpy is imported before a migration uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whimbrel import TransportSpec, hookimpl
from whimbrel.settings import Capability
from whimbrel_rdma.needs import needs

if TYPE_CHECKING:
    from whimbrel.kernel import Kernel
    from whimbrel.settings import Setting

whimbrel_api = (1, 0)

SCHEMES = ("rdma", "x-rdma")


@hookimpl
def transports() -> list[TransportSpec]:
    return [
        TransportSpec(
            schemes=SCHEMES,
            factory="whimbrel_rdma.transport:RdmaTransport",
            syntax="rdma:HOST:PORT, rdma:[IPV6]:PORT",
            summary="RAM goes by RDMA WRITE into the destination's memory, as QEMU does it",
            needs=needs,
        )
    ]


@hookimpl
def settings() -> list[Setting]:
    return [
        Capability(
            name="rdma-pin-all",
            aliases=("x-rdma-pin-all",),
            conflicts=("xbzrle", "multifd", "postcopy-ram"),
            help="With rdma:, register all of RAM on both sides at the start, instead of 1 MiB at its first write:"
            " faster, and all of it stays in memory, zero pages too",
        )
    ]


@hookimpl
def preflight(kernel: Kernel, uri: str) -> list[str]:
    from whimbrel.uri import parse_uri
    from whimbrel_rdma.limits import refusals

    if parse_uri(uri, kernel.plugins.filter_names).scheme not in SCHEMES:
        return []
    return refusals(kernel.settings, kernel.machine)
