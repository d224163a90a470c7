"""Pages by the rdma plugin beside a bare pyverbs loop of 1 MiB writes, in turn. Needs an RDMA device:

python tests/rdma_lab/lab.py run --env PYTHONPATH=... -- python benchmarks/rdma.py

The bare loop is pyverbs and nothing of ours: a queue pair of its own, posted to and polled without a pause.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from typing import Any

import numpy as np
from pyverbs import cm_enums as ce, enums as e
from pyverbs.cmid import CMID, AddrInfo, CMEvent, CMEventChannel, ConnParam
from pyverbs.cq import CQ
from pyverbs.mr import MR
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

from whimbrel import Budget, Outcome, OutStream, Role
from whimbrel.channel import TransportContext
from whimbrel_ram import PageFlag, PageTransport, Phase, RAMBlock, SaveBlock
from whimbrel_rdma.transport import RdmaTransport

MIB = 1 << 20
SIZE = 64 * MIB
ROUNDS = 5
#: Writes that the bare loop has on their way at any time.
DEPTH = 64
IP = os.environ.get("RDMALAB_IP0", "127.0.0.1")


# ---- the bare loop


class BareEnd:
    """One end of a connection: 64 MiB of memory that the other may write to."""

    def __init__(self, cmid: CMID) -> None:
        self.cmid = cmid
        self.alive: tuple[Any, ...] = ()  # what must not go before the connection
        self.cq = CQ(cmid.context, DEPTH)
        cap = QPCap(max_send_wr=DEPTH, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
        wanted = QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self.cq, rcq=self.cq, cap=cap)
        self.qp = QP(cmid.pd, wanted, QPAttr())
        self.memory = np.random.default_rng(1).integers(256, size=SIZE, dtype=np.uint8)
        access = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE
        self.mr = MR(cmid.pd, SIZE, access, address=self.memory.ctypes.data)

    def to(self, *states: int) -> None:
        for state in states:
            self.qp.modify(*self.cmid.init_qp_attr(state))

    @property
    def parameters(self) -> ConnParam:
        return ConnParam(qp_num=self.qp.qp_num, resources=1, depth=1, retry=5, rnr_retry=7)


def expect(channel: CMEventChannel, kind: int) -> CMEvent:
    """The next event, waited for: whatever it waits for is the kernel's to do."""
    event = CMEvent(channel)
    assert event.event_type == kind, event.event_str()
    return event


def bare_pair(port: int) -> tuple[BareEnd, BareEnd]:
    """Two ends in one thread, step by step."""
    passive, active = CMEventChannel(), CMEventChannel()
    listening = CMID(creator=passive, port_space=ce.RDMA_PS_TCP)
    listening.bind_addr(
        AddrInfo(src=IP, src_service=str(port), port_space=ce.RDMA_PS_TCP, flags=ce.RAI_PASSIVE)
    )
    listening.listen(1)
    cmid = CMID(creator=active, port_space=ce.RDMA_PS_TCP)
    cmid.resolve_addr(AddrInfo(dst=IP, dst_service=str(port), port_space=ce.RDMA_PS_TCP))
    expect(active, ce.RDMA_CM_EVENT_ADDR_RESOLVED).close()
    cmid.resolve_route()
    expect(active, ce.RDMA_CM_EVENT_ROUTE_RESOLVED).close()
    one = BareEnd(cmid)
    one.to(e.IBV_QPS_INIT)
    cmid.connect(one.parameters)
    request = expect(passive, ce.RDMA_CM_EVENT_CONNECT_REQUEST)
    other = BareEnd(CMID(creator=request, listen_id=listening))
    request.close()
    other.to(e.IBV_QPS_INIT, e.IBV_QPS_RTR, e.IBV_QPS_RTS)
    other.cmid.accept(other.parameters)
    expect(active, ce.RDMA_CM_EVENT_CONNECT_RESPONSE).close()
    one.to(e.IBV_QPS_RTR, e.IBV_QPS_RTS)
    cmid.establish()
    expect(passive, ce.RDMA_CM_EVENT_ESTABLISHED).close()
    one.alive, other.alive = (active,), (listening, passive)
    return one, other


def bare(one: BareEnd, other: BareEnd) -> float:
    """Seconds for all of the memory."""
    began = time.monotonic()
    posted = done = 0
    here, there = one.memory.ctypes.data, other.memory.ctypes.data
    while done < SIZE // MIB:
        while posted < SIZE // MIB and posted - done < DEPTH:
            offset = posted * MIB
            write = SendWR(
                opcode=e.IBV_WR_RDMA_WRITE,
                num_sge=1,
                sg=[SGE(here + offset, MIB, one.mr.lkey)],
                send_flags=e.IBV_SEND_SIGNALED,
            )
            write.set_wr_rdma(other.mr.rkey, there + offset)
            one.qp.post_send(write)
            posted += 1
        count, completions = one.cq.poll(DEPTH)
        for each in completions or ():
            assert each.status == e.IBV_WC_SUCCESS, each.status
        done += count
    return time.monotonic() - began


# ---- the plugin


class PluginPair:
    """A source and a destination of the plugin, with 64 MiB of RAM each."""

    def __init__(self, port: int, pin_all: bool) -> None:
        transport = RdmaTransport()
        address = transport.parse(f"{IP}:{port}")
        deadline = time.monotonic() + 30
        self.listener = transport.listen(address, TransportContext(role=Role.DESTINATION))
        context: Any = TransportContext(
            role=Role.SOURCE,
            deadline=deadline,
            settings={"rdma-pin-all": pin_all},  # type: ignore[arg-type]
        )
        accepted: list[Any] = []
        thread = threading.Thread(target=lambda: accepted.append(self.listener.accept(deadline)))
        thread.start()
        self.source: Any = transport.connect(address, context)
        thread.join()
        (self.destination,) = accepted
        ours, self.theirs = (RAMBlock("ram", SIZE) for _ in range(2))
        ours.view[:] = np.random.default_rng(1).integers(256, size=SIZE, dtype=np.uint8)
        self.sending, self.receiving = (
            c.extension(PageTransport) for c in (self.source, self.destination)
        )
        self.receiving.on_blocks([self.theirs])
        self.serving = threading.Thread(target=self.serve)
        self.serving.start()
        self.out = OutStream(self.source)
        self.saved = SaveBlock(ours, 0, ours.rows.view(np.uint64))
        self.pages = np.arange(ours.pages)
        self.sending.begin([self.saved], self.out)

    def serve(self) -> None:
        view = memoryview(bytearray(8))
        for _ in range(ROUNDS + 2):
            self.destination.recv_into(view)
            self.receiving.on_record(PageFlag.HOOK, None)

    def run(self) -> float:
        """Seconds for all of RAM, as one round of a migration."""
        began = time.monotonic()
        self.sending.round_begin(self.out, Phase.ITERATE)
        self.sending.send(self.saved, self.pages, self.out, Budget())
        self.sending.round_end(self.out, Phase.ITERATE)
        return time.monotonic() - began

    def close(self) -> None:
        self.serving.join()
        assert self.saved.block.view.tobytes() == self.theirs.view.tobytes()
        for each, channel in ((self.sending, self.source), (self.receiving, self.destination)):
            each.close(Outcome.COMPLETED)
            channel.close()
        self.listener.close()


def main(*, pin_all: bool) -> None:
    ends = bare_pair(4602 + pin_all)
    pair = PluginPair(4600 + pin_all, pin_all)
    plain, plugin = [], []
    for n in range(ROUNDS + 1):
        one, two = bare(*ends), pair.run()
        first = "  (with registration)" if n == 0 and not pin_all else ""
        print(f"  bare {SIZE / MIB / one:6.0f} MiB/s   plugin {SIZE / MIB / two:6.0f} MiB/s{first}")
        if n:
            plain.append(one)
            plugin.append(two)
    ratio = statistics.median(plain) / statistics.median(plugin)
    print(
        f"pin-all {'on' if pin_all else 'off'}: {ratio:.2f} of the bare loop (median of {ROUNDS})"
    )
    pair.close()


if __name__ == "__main__":
    for pinned in (True, False):
        main(pin_all=pinned)
