"""Pages by the rdma plugin beside a bare loop of 1 MiB writes on the same connection, in turn. Needs an RDMA device:

python tests/rdma_lab/lab.py run --env PYTHONPATH=... -- python benchmarks/rdma.py
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from typing import Any

import numpy as np

from whimbrel import Budget, Outcome, OutStream, Role
from whimbrel.channel import TransportContext
from whimbrel_ram import PageFlag, PageTransport, Phase, RAMBlock, SaveBlock
from whimbrel_rdma.transport import RdmaTransport

MIB = 1 << 20
SIZE = 64 * MIB
ROUNDS = 5


def bare(connection: Any, here: Any, start: int, there: int, rkey: int) -> float:
    began = time.monotonic()
    for offset in range(0, SIZE, MIB):
        connection.write(start + offset, here.lkey, MIB, there + offset, rkey)
    connection.drain()
    return time.monotonic() - began


def main(*, pin_all: bool) -> None:
    transport = RdmaTransport()
    address = transport.parse(os.environ.get("RDMALAB_IP0", "127.0.0.1") + f":{4600 + pin_all}")
    deadline = time.monotonic() + 30
    listener = transport.listen(address, TransportContext(role=Role.DESTINATION))
    context: Any = TransportContext(
        role=Role.SOURCE,
        deadline=deadline,
        settings={"rdma-pin-all": pin_all},  # type: ignore[arg-type]
    )
    accepted: list[Any] = []
    thread = threading.Thread(target=lambda: accepted.append(listener.accept(deadline)))
    thread.start()
    source: Any = transport.connect(address, context)
    thread.join()
    destination = accepted[0]
    ours, theirs = (RAMBlock("ram", SIZE) for _ in range(2))
    ours.view[:] = np.random.default_rng(1).integers(256, size=SIZE, dtype=np.uint8)
    sending, receiving = (c.extension(PageTransport) for c in (source, destination))
    receiving.on_blocks([theirs])

    def serve() -> None:
        view = memoryview(bytearray(8))
        for _ in range(ROUNDS + 2):
            destination.recv_into(view)
            receiving.on_record(PageFlag.HOOK, None)

    serving = threading.Thread(target=serve)
    serving.start()
    out = OutStream(source)
    saved = SaveBlock(ours, 0, ours.rows.view(np.uint64))
    pages = np.arange(ours.pages)
    sending.begin([saved], out)
    here = source.connection.register(ours.address, SIZE, remote=False)
    there = destination.connection.register(theirs.address, SIZE, remote=True)
    plain, plugin = [], []
    for n in range(ROUNDS + 1):
        one = bare(source.connection, here, ours.address, theirs.address, there.rkey)
        began = time.monotonic()
        sending.round_begin(out, Phase.ITERATE)
        sending.send(saved, pages, out, Budget())
        sending.round_end(out, Phase.ITERATE)
        two = time.monotonic() - began
        first = "  (with registration)" if n == 0 and not pin_all else ""
        print(f"  bare {SIZE / MIB / one:6.0f} MiB/s   plugin {SIZE / MIB / two:6.0f} MiB/s{first}")
        if n:
            plain.append(one)
            plugin.append(two)
    ratio = statistics.median(plain) / statistics.median(plugin)
    print(
        f"pin-all {'on' if pin_all else 'off'}: {ratio:.2f} of the bare loop (median of {ROUNDS})"
    )
    serving.join()
    for region in (here, there):
        region.close()
    for each, channel in ((sending, source), (receiving, destination)):
        each.close(Outcome.COMPLETED)
        channel.close()
    listener.close()


if __name__ == "__main__":
    for pinned in (True, False):
        main(pin_all=pinned)
