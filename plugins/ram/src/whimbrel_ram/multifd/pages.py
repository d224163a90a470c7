"""MultifdPages: pages over several channels, as the capability multifd of both sides wants it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from whimbrel.errors import ChannelError, LocalError
from whimbrel.state import Outcome
from whimbrel_ram.multifd import wire
from whimbrel_ram.multifd.receiving import Receivers
from whimbrel_ram.multifd.sending import PACKETS, Job, Senders
from whimbrel_ram.records import MULTIFD_FLUSH_RECORD, PageFlag
from whimbrel_ram.transport import Phase, SaveBlock, Sent, StreamPages, zero_pages

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from whimbrel.channel import Channel
    from whimbrel.savevm import Budget, LoadContext
    from whimbrel.stream import InStream, OutStream
    from whimbrel_ram.block import RAMBlock
    from whimbrel_ram.target import Target


#: Pages of a job in any case, where there are so many: the head of a packet alone is as long as a third of a page.
_FEWEST = 32


@attrs.frozen(kw_only=True)
class Options:
    """What both sides must agree on, and what the source chooses."""

    page_size: int
    channels: int
    method: str = "none"
    level: int = 1
    #: Where zero pages go: 'legacy', records of the main channel; 'multifd', packets (9.0 and newer); 'none', nobody looks.
    zero_pages: str = "legacy"
    #: Markers of their own in the main channel (machine types since 8.1); else each EOS is one.
    flush_records: bool = False
    #: Of the machine; wire.ANY_UUID on a side that takes whatever comes.
    uuid: bytes | None = None

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Any] | Any,
        *,
        page_size: int,
        flush_records: bool,
        uuid: bytes | None,
    ) -> Options:
        """With what a kernel's settings say of multifd."""
        method = str(settings["multifd-compression"])
        return cls(
            page_size=page_size,
            channels=settings["multifd-channels"],
            method=method,
            level=settings[f"multifd-{method}-level"] if method != "none" else 0,
            zero_pages=settings["zero-page-detection"],
            flush_records=flush_records,
            uuid=uuid,
        )


def _open(main: Channel, index: int) -> Channel:
    try:
        return main.open_extra("multifd", index)
    except ChannelError as error:
        if error.hint is not None:  # what helps where the first connection was not possible either
            error.hint = "Switch multifd on at the destination as well, with multifd-channels alike"
        raise


class MultifdPages(StreamPages):
    """Source: packets of pages go to whichever channel has room. Destination: see Receivers.

    What was sent before a marker is in place before what is sent behind it. In between no page is sent twice: markers are
    set each time that all blocks have been gone through.
    """

    def __init__(
        self,
        options: Options,
        is_cancelled: Callable[[], bool],
        abandon: Callable[[], None] = lambda: None,
    ) -> None:
        """abandon: ends the main channel, from any thread."""
        super().__init__(options.page_size)
        self._options = options
        self._is_cancelled = is_cancelled
        self._abandon = abandon
        self._zeros = PACKETS * wire.pages_of(options.page_size)  # of a job
        self._senders: Senders | None = None
        self._receivers: Receivers | None = None
        self._find: Callable[[str], Target | None] = lambda _: None

    # ---- source

    def begin(self, blocks: Sequence[SaveBlock], out: OutStream) -> None:
        super().begin(blocks, out)
        out.flush()  # a QEMU before 8.0 takes the first connection for the main channel, a newer one looks at its bytes
        options = self._options
        with contextlib.ExitStack() as opened:
            channels = [
                opened.enter_context(_open(out.channel, i)) for i in range(options.channels)
            ]
            self._senders = Senders(
                channels,
                page_size=options.page_size,
                uuid=options.uuid,
                method=options.method,
                level=options.level,
                is_cancelled=self._is_cancelled,
            )
            opened.pop_all()
        self._sync(out, marker=options.flush_records)

    def _open(self) -> Senders:
        if self._senders is None:
            raise LocalError("pages before the channels are open", section="ram")
        return self._senders

    def _sync(self, out: OutStream, *, marker: bool) -> None:
        self._open().sync()
        if marker:
            out.write(MULTIFD_FLUSH_RECORD)
            out.flush()

    def _account(self, out: OutStream) -> None:
        sent, owing = self._open().take_sent(0 if out.pace is None else out.pace.rate)
        out.account(sent, paid=sent - owing)

    def round_begin(self, out: OutStream, phase: Phase) -> None:
        out.flush()  # the last marker, without which nobody reads what is sent now

    def sync(self, out: OutStream) -> None:
        if self._options.flush_records:
            self._sync(out, marker=True)

    def round_end(self, out: OutStream, phase: Phase) -> None:
        senders = self._open()
        if not self._options.flush_records:
            senders.sync()  # EOS comes next
        elif phase is Phase.COMPLETE:
            self._sync(out, marker=True)
        senders.drain()
        self._account(out)

    def send(
        self, block: SaveBlock, pages: NDArray[np.intp], out: OutStream, budget: Budget
    ) -> Sent:
        senders, legacy = self._open(), self._options.zero_pages == "legacy"
        idstr = block.block.wire_idstr
        start = out.position
        done = zero = 0
        look = senders.most
        while done < len(pages):
            used = out.position - start + senders.waiting
            if done and budget.spent(used):
                senders.drain()  # or the next call would not know of what waits
                break
            some = pages[done : done + look]
            if budget.bytes is not None:  # close to the end of a budget, small jobs
                some = some[: max(1, (budget.bytes - used) // self._options.page_size + 1)]
            is_zero = self._zero_pages(block, some)
            empty = some[is_zero]
            normal = some[~is_zero] if len(empty) else some
            # Zero pages are cheap to look at: more of them at once.
            look = min(2 * look, 8 * self._zeros) if len(empty) == len(some) else senders.most
            if len(empty) and legacy:
                for buffer in self._encoder.zeros(idstr, empty):
                    out.write(buffer)
            else:
                for i in range(0, len(empty), self._zeros):
                    senders.put(Job(idstr=idstr, zero=empty[i : i + self._zeros]))
            while len(normal):  # few, where many were zero
                self._account(out)
                out.wait_for_turn()
                step = self._step(out)
                senders.put(Job(idstr=idstr, words=block.words, normal=normal[:step]))
                normal = normal[step:]
            self._account(out)
            done += len(some)
            zero += len(empty)
        self._account(out)
        return Sent(done, zero)

    def _step(self, out: OutStream) -> int:
        """Pages of a job: fewer where the pace is slow."""
        most = self._open().most
        piece = None if out.pace is None else out.pace.piece
        if piece is None:
            return most
        return min(most, max(_FEWEST, piece // self._options.page_size))

    def _zero_pages(self, block: SaveBlock, pages: NDArray[np.intp]) -> NDArray[np.bool_]:
        if self._options.zero_pages == "none":
            return np.zeros(len(pages), np.bool_)
        return zero_pages(block, pages)

    # ---- destination

    def begin_load(self, ctx: LoadContext, find: Callable[[str], Target | None]) -> None:
        options = self._options
        self._find = find
        self._receivers = Receivers(
            options.channels,
            page_size=options.page_size,
            uuid=options.uuid,
            method=options.method,
            accept=ctx.accept,
            is_cancelled=self._is_cancelled,
            abandon=self._abandon,
        )

    def on_blocks(self, blocks: Sequence[RAMBlock]) -> None:
        targets = {block.wire_idstr: self._find(block.idstr) for block in blocks}
        self._arrived().set_targets({name: t for name, t in targets.items() if t is not None})

    def _arrived(self) -> Receivers:
        if self._receivers is None:
            raise LocalError("a block list before the channels are awaited", section="ram")
        return self._receivers

    def on_record(self, flag: PageFlag, inp: InStream) -> None:
        if flag is PageFlag.MULTIFD_FLUSH or (
            flag is PageFlag.EOS and not self._options.flush_records
        ):
            self._arrived().marker()
        elif flag is not PageFlag.EOS:
            super().on_record(flag, inp)

    def load_complete(self) -> None:
        self._arrived().seal()

    @property
    def failure(self) -> BaseException | None:
        return None if self._receivers is None else self._receivers.failure

    # ---- both

    def query(self) -> dict[str, Any]:
        senders = self._senders
        return {} if senders is None else {"ram": {"multifd-bytes": senders.sent}}

    def close(self, outcome: Outcome) -> None:
        if self._senders is not None:
            self._senders.close(orderly=outcome is Outcome.COMPLETED)
        if self._receivers is not None:
            self._receivers.close()
