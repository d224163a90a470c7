"""One reliable connection over real verbs: sends and receives of messages, writes, and their completions.

The asynchronous CM (see cm) with a queue pair of our own. The completion channel is polled here, beside the CM's events
and the descriptor by which abort() wakes us.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import select
import threading
import time
from collections.abc import Callable
from typing import Any

import attrs
from pyverbs.cmid import CMID, ConnParam
from pyverbs.cq import CQ, CompChannel
from pyverbs.mr import MR
from pyverbs.pyverbs_error import PyverbsError, PyverbsRDMAError
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

from whimbrel.errors import ChannelError, DeadlineExceeded, EndOfStream, MigrationError
from whimbrel.waiting import Gate, wait_any
from whimbrel_rdma.cm import Events, ce, translated, with_fd
from whimbrel_rdma.protocol import HEADER, MAX_DATA

try:
    from pyverbs import enums as e
except ImportError:  # renamed after rdma-core 44
    from pyverbs import libibverbs_enums as e

#: Receives that are posted at any time; the protocol needs two (a reply, and the READY behind it).
RECEIVES = 4
_SLOT = HEADER + MAX_DATA
#: Writes that are on their way at any time.
WINDOW = 64
_SEND, _WRITE, _PROBE = 1 << 20, 1 << 21, 1 << 22  # wr_id; below: the slot of a receive
#: Seconds in which nothing comes, after which the peer's device is asked whether it is there.
_QUIET = 10.0
#: Retries of what the peer has no receive for: until it has.
_FOR_EVER = 7
#: Seconds after a flushed completion in which the CM says that the peer has left.
_REASON = 1.0
#: Seconds that an orderly end waits for what was sent last.
_LAST_WORDS = 2.0


def address_of(buffer: Any) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@attrs.define
class Counters:
    """Of one connection."""

    writes: int = 0
    bytes: int = 0
    messages: int = 0
    registrations: int = 0


class Connection:
    """A queue pair that is connected or about to be.

    received    called with each message as it comes, on the thread that waits
    requested   called when the listener that this connection came from has another request
    """

    def __init__(self, name: str, events: Events, cmid: CMID) -> None:
        self.name = name
        self.gate = Gate(name)
        self.received: Callable[[bytes], None] = lambda _: None
        self.requested: Callable[[], None] = lambda: None
        self.counters = Counters()
        self.outstanding = 0
        self.failed = False
        self._events, self._id = events, cmid
        self._sending = 0
        self._active = self._probing = False
        self._lock = threading.RLock()
        self._closing: list[Any] = []
        try:
            with translated("make an RDMA queue pair"):
                self._make()
        except BaseException:  # cmid and events are still the caller's
            self.gate.close()
            self._release()
            raise

    def _make(self) -> None:
        cmid = self._id
        self._pd, context = cmid.pd, cmid.context
        self._comp, self._comp_fd = with_fd(lambda: CompChannel(context), "infinibandevent")
        self._closing.append(self._comp)
        self._cq = CQ(context, 2 * (WINDOW + RECEIVES) + 8, None, self._comp, 0)
        self._closing.append(self._cq)
        self._cq.req_notify(0)
        most = QPCap(max_send_wr=WINDOW + 4, max_recv_wr=RECEIVES, max_send_sge=1, max_recv_sge=1)
        wanted = QPInitAttr(
            qp_type=e.IBV_QPT_RC, scq=self._cq, rcq=self._cq, sq_sig_all=0, cap=most
        )
        self._qp = QP(self._pd, wanted, QPAttr())
        self._closing.append(self._qp)
        # Messages come into the slots in turn; what is sent leaves from the one behind them.
        self._messages = mmap.mmap(-1, (RECEIVES + 1) * _SLOT)
        self._view = memoryview(self._messages)
        self._base = address_of(self._messages)
        self._mr = MR(self._pd, len(self._messages), e.IBV_ACCESS_LOCAL_WRITE, address=self._base)
        self._closing.append(self._mr)
        self._to(e.IBV_QPS_INIT)
        for slot in range(RECEIVES):
            self._post_receive(slot)

    def _to(self, *states: int) -> None:
        for state in states:
            attributes, mask = self._id.init_qp_attr(state)
            if state == e.IBV_QPS_RTS:
                attributes.rnr_retry = (
                    _FOR_EVER  # a QEMU that accepts says 0, and posts its first receive later
                )
            self._qp.modify(attributes, mask)

    # ---- connecting

    def _parameters(self, private: bytes) -> ConnParam:
        parameters = ConnParam(
            qp_num=self._qp.qp_num,
            resources=1,
            depth=1,
            retry=5,
            rnr_retry=_FOR_EVER,
            data_len=len(private),
        )
        parameters.set_private_data(private)
        return parameters

    def connect(self, private: bytes, deadline: float | None, cancel_fd: int | None) -> bytes:
        """On the active side, with the route resolved: the private data of the answer."""
        self._active = True
        with translated("connect by RDMA"):
            self._id.connect(self._parameters(private))
        event = self._events.expect(
            ce.RDMA_CM_EVENT_CONNECT_RESPONSE,
            deadline=deadline,
            cancel_fd=cancel_fd,
            what="connecting",
        )
        answer = bytes(event.private_data)
        with translated("connect by RDMA"):
            self._to(e.IBV_QPS_RTR, e.IBV_QPS_RTS)
            self._id.establish()
            event.close()
        return answer

    def accept(self, private: bytes) -> None:
        """On the passive side. The event ESTABLISHED follows."""
        with translated("accept an RDMA connection"):
            self._to(e.IBV_QPS_RTR, e.IBV_QPS_RTS)
            self._id.accept(self._parameters(private))

    # ---- memory

    def register(self, address: int, length: int, *, remote: bool) -> MR:
        """Memory of this process for writes: from it, or into it by the peer. Raises ChannelError.

        Memory that is only read is registered for reading: registering it for writing would count as a write to it.
        """
        access = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE if remote else 0
        with translated(
            f"register {length} bytes of memory for RDMA",
            "Raise RLIMIT_MEMLOCK (ulimit -l unlimited; LimitMEMLOCK=infinity for a systemd unit)",
        ):
            region = MR(self._pd, length, access, address=address)
        self.counters.registrations += 1
        return region

    # ---- messages and writes

    def _post_receive(self, slot: int) -> None:
        where = SGE(self._base + slot * _SLOT, _SLOT, self._mr.lkey)
        self._qp.post_recv(RecvWR(slot, 1, [where]))

    def send(self, message: bytes, deadline: float | None = None) -> None:
        """Post a message, once the one before it has left."""
        with self._lock:
            self.wait(lambda: not self._sending, deadline, "the peer to take a message")
            self._post_send(message)

    def _post_send(self, message: bytes) -> None:
        start = RECEIVES * _SLOT
        self._view[start : start + len(message)] = message
        request = SendWR(
            wr_id=_SEND,
            opcode=e.IBV_WR_SEND,
            num_sge=1,
            sg=[SGE(self._base + start, len(message), self._mr.lkey)],
            send_flags=e.IBV_SEND_SIGNALED,
        )
        with translated("send by RDMA"):
            self._qp.post_send(request)
        self._sending += 1
        self.counters.messages += 1

    def write(self, address: int, lkey: int, length: int, to: int, rkey: int) -> None:
        """Post a write of `length` bytes into the peer's memory, once there is room in the window."""
        if self.outstanding >= WINDOW:
            self.wait(lambda: self.outstanding < WINDOW, None, "writes to complete")
        request = SendWR(
            wr_id=_WRITE,
            opcode=e.IBV_WR_RDMA_WRITE,
            num_sge=1,
            sg=[SGE(address, length, lkey)],
            send_flags=e.IBV_SEND_SIGNALED,
        )
        request.set_wr_rdma(rkey, to)
        with translated("write by RDMA"):
            self._qp.post_send(request)
        self.outstanding += 1
        self.counters.writes += 1
        self.counters.bytes += length

    def drain(self) -> None:
        """Wait until every write has arrived."""
        self.wait(lambda: not self.outstanding, None, "writes to complete")

    def drain_sends(self, deadline: float | None) -> None:
        self.wait(lambda: not self._sending, deadline, "the peer to take the last message")

    def wait(self, done: Callable[[], bool], deadline: float | None, what: str) -> None:
        """Take what comes, until done(). Raises EndOfStream once the peer has left, DeadlineExceeded, and on the active
        side ChannelError where the host of the peer, its device or the way to it has gone.
        """
        with self._lock, self.gate.inside():
            while not done():
                if self._take_completions():
                    continue
                with translated("wait for RDMA"):
                    self._cq.req_notify(0)
                if self._take_completions():
                    continue
                if self._events.disconnected:
                    raise EndOfStream(f"{self.name}: the other side has left")
                quiet = time.monotonic() + _QUIET
                try:
                    ready = wait_any(
                        (self._comp_fd, self._events.fd, self.gate.fd),
                        select.POLLIN,
                        deadline=quiet if deadline is None else min(quiet, deadline),
                        what=what,
                    )
                except DeadlineExceeded:
                    if deadline is not None and deadline <= quiet:
                        raise
                    self._probe()
                    continue
                self.gate.check()
                if self._comp_fd in ready:
                    self._take_notice()
                if self._events.fd in ready:
                    self._take_event()

    def _probe(self) -> None:
        """Write nothing to nowhere: the peer's device acknowledges that, and the peer itself never hears of it.

        Not from the passive side: the CM makes the queue pair of an active one without access for writes.
        """
        if not self._active or self._sending or self.outstanding or self._probing:
            return  # what is on its way tells as well
        nothing = SendWR(
            wr_id=_PROBE,
            opcode=e.IBV_WR_RDMA_WRITE,
            num_sge=1,
            sg=[SGE(self._base, 0, self._mr.lkey)],
            send_flags=e.IBV_SEND_SIGNALED,
        )
        with translated("write by RDMA"):
            self._qp.post_send(nothing)
        self._probing = True

    def _take_notice(self) -> None:
        try:
            self._comp.get_cq_event(self._cq)
        except PyverbsRDMAError as error:
            if error.error_code not in (errno.EAGAIN, None):
                raise ChannelError(f"{self.name}: {error}") from error

    def _take_event(self) -> None:
        event = self._events.take()
        if event is not None:
            kind, said = event.event_type, event.event_str()
            event.close()
            if kind != ce.RDMA_CM_EVENT_ESTABLISHED:
                raise ChannelError(f"{self.name}: {said}")
        if self._events.requests:
            self.requested()

    def _take_completions(self) -> int:
        with translated("read RDMA completions"):
            count, found = self._cq.poll(32)
        for completion in found or ():
            if completion.status != e.IBV_WC_SUCCESS:
                self._fail(completion)
            number = completion.wr_id
            if number == _WRITE:
                self.outstanding -= 1
            elif number == _SEND:
                self._sending -= 1
            elif number == _PROBE:
                self._probing = False
            else:
                start = number * _SLOT
                data = bytes(self._view[start : start + completion.byte_len])
                with translated("receive by RDMA"):
                    self._post_receive(number)
                self.received(data)
        return int(count)

    def _fail(self, completion: Any) -> None:
        """Raises what a failed completion means."""
        self.failed = True
        what = {_SEND: "a message", _WRITE: "a write", _PROBE: "a sign of life"}.get(
            completion.wr_id, "a receive"
        )
        if completion.status != e.IBV_WC_REM_ACCESS_ERR:
            deadline = time.monotonic() + _REASON
            with contextlib.suppress(MigrationError):
                while not self._events.disconnected:
                    wait_any((self._events.fd, self.gate.fd), select.POLLIN, deadline=deadline)
                    self.gate.check()
                    self._take_event()
        if self._events.disconnected:
            raise EndOfStream(f"{self.name}: the other side has left")
        names = {
            e.IBV_WC_REM_ACCESS_ERR: "the other side does not let that memory be written",
            e.IBV_WC_RETRY_EXC_ERR: "the other side does not answer",
            e.IBV_WC_RNR_RETRY_EXC_ERR: "the other side takes no messages",
            e.IBV_WC_LOC_LEN_ERR: "it was longer than a message may be",
        }
        why = names.get(completion.status, f"completion status {completion.status}")
        raise ChannelError(f"{self.name}: {what} failed: {why}")

    # ---- the end

    def last_word(self, message: bytes) -> None:
        """Say that all is lost, if that can still be said. Never raises."""
        with contextlib.suppress(MigrationError, PyverbsError), self._lock:
            if self.failed or self._events.disconnected or self.gate.closed:
                return
            deadline = time.monotonic() + _LAST_WORDS
            if self._until_sent(deadline):
                self._post_send(message)
                self._until_sent(deadline)

    def _until_sent(self, deadline: float) -> bool:
        """Wait for the last message to leave, aborted or not."""
        self.received = lambda _: None
        while self._sending and not self._events.disconnected:
            if not self._take_completions():
                self._cq.req_notify(0)
                if self._take_completions():
                    continue
                fds = (self._comp_fd, self._events.fd)
                ready = wait_any(fds, select.POLLIN, deadline=deadline)
                if self._comp_fd in ready:
                    self._take_notice()
                if self._events.fd in ready:
                    event = self._events.take()
                    if event is not None:
                        event.close()
        return not self._sending

    def stop(self) -> None:
        """No more access to memory from here on, by either side. Idempotent; never raises."""
        self.failed = True
        with contextlib.suppress(PyverbsError, AttributeError):
            self._qp.modify(QPAttr(qp_state=e.IBV_QPS_ERR), e.IBV_QP_STATE)
        with contextlib.suppress(PyverbsError):
            self._id.disconnect()

    def close(self) -> None:
        """Idempotent; never raises."""
        if not self.gate.close():
            return
        if not self.failed:
            with contextlib.suppress(MigrationError, PyverbsError, AttributeError):
                self._until_sent(time.monotonic() + _LAST_WORDS)
        self.stop()
        self._release()
        with contextlib.suppress(PyverbsError):
            self._id.close()
        self._events.close()

    def _release(self) -> None:
        for thing in reversed(self._closing):
            with contextlib.suppress(PyverbsError):
                thing.close()
        self._closing.clear()
