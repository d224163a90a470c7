"""PageTransport: the way by which pages leave and arrive. The RAM handler does not know which one it has.

Records in the stream are the first; several channels, a mapped file, remote DMA or a helper process are others. One is
found by `channel.extension(PageTransport)`, else by the hook page_transports(), else it is StreamPages. What goes into
the stream in any case (section framing, the setup record, EOS) stays with the handler.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from whimbrel_ram import native
from whimbrel_ram.block import RAMBlock
from whimbrel_ram.decoder import Decoder
from whimbrel_ram.encoder import Encoder
from whimbrel_ram.records import PageFlag
from whimbrel_ram.zero import zero_map, zero_map_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from whimbrel.savevm import Budget, LoadContext
    from whimbrel.state import Outcome
    from whimbrel.stream import InStream, OutStream
    from whimbrel_ram.target import Target


class Phase(enum.Enum):
    """Which section item is being written."""

    SETUP = "setup"  # START
    ITERATE = "iterate"  # PART: the machine runs
    COMPLETE = "complete"  # END: it stands still


@attrs.define(eq=False)
class SaveBlock:
    """A block as it is sent."""

    block: RAMBlock
    #: Position in the setup record, from 0.
    index: int
    #: What to send: the block as rows of 8-byte words (a copy of it, with a tracker that compares).
    words: NDArray[np.uint64]
    #: Pages known to be zero without looking at them (looking would take memory of the host), or None.
    untouched: NDArray[np.bool_] | None = None

    @property
    def idstr(self) -> str:
        return self.block.idstr


@attrs.frozen
class Sent:
    """What send() did: pages from the front of its list, how many of those were zero, and how many were sent neither as
    zero nor whole.
    """

    pages: int
    zero: int = 0
    partly: int = 0


class PageTransport:
    """All methods but send() may be left as they are. Errors are raised as MigrationErrors.

    Source, on the migration's thread: begin, then for each PART and for END round_begin, send..., round_end; sync each
    time that all blocks have been gone through; close once, also after a failure.
    Destination, on the incoming thread: begin_load, on_blocks for each setup record, on_record for what the records in the
    stream do not cover, load_complete, close once.
    """

    def begin(self, blocks: Sequence[SaveBlock], out: OutStream) -> None:
        """The setup record was written, its EOS was not."""

    def round_begin(self, out: OutStream, phase: Phase) -> None:
        """A section item begins; its header was written."""

    def round_end(self, out: OutStream, phase: Phase) -> None:
        """It ends: what was sent must be on its way when this returns. The handler writes EOS after it."""

    def send(
        self, block: SaveBlock, pages: NDArray[np.intp], out: OutStream, budget: Budget
    ) -> Sent:
        """Send pages (ascending, at least one) from the front of the list until the budget is spent; at least one.

        The budget counts from this call. Pages may change while they are read: they are sent again then.
        """
        raise NotImplementedError

    def sync(self, out: OutStream) -> None:
        """Every page that was sent before must arrive before any that is sent after (it may be the same page)."""

    def begin_load(self, ctx: LoadContext, find: Callable[[str], Target | None]) -> None:
        """The ram section has begun to come. find: the block of that idstr, as a target of pages."""

    def on_blocks(self, blocks: Sequence[RAMBlock]) -> None:
        """The blocks of a setup record, in its order."""

    def on_record(self, flag: PageFlag, inp: InStream) -> None:
        """EOS, HOOK or MULTIFD_FLUSH was read from the stream. Raises StreamError for those that it does not know."""
        if flag is not PageFlag.EOS:
            raise Decoder.refuse(flag, inp.position - 8)

    def load_complete(self) -> None:
        """Everything was read; the machine starts after this. May raise to refuse."""

    @property
    def failure(self) -> BaseException | None:
        """What has gone wrong aside of the stream, as the reason of an error in the stream."""
        return None

    def query(self) -> dict[str, Any]:
        """Members of query-migrate beside `ram`, and further ones of `ram`; from any thread, at any time."""
        return {}

    def close(self, outcome: Outcome) -> None:
        """The run is over. Never raises."""


def zero_pages(block: SaveBlock, pages: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Which of the pages (ascending) are zero. Those that were never touched are not looked at."""
    words, absent = block.words, block.untouched
    low, high = int(pages[0]), int(pages[-1])
    whole = high - low == len(pages) - 1
    if absent is not None:
        known = absent[low : high + 1] if whole else absent[pages]
        if known.all():
            return known
        if known.any():
            zero = known.copy()
            look = np.flatnonzero(~known)
            zero[look] = zero_map_at(words, pages[look])
            return zero
    if whole and native.records is None:
        return zero_map(words[low : high + 1])
    return zero_map_at(words, pages)


#: Batches that the loop in C sends in one call.
AT_ONCE = 4


def _in_place(out: OutStream) -> bool:
    """Whether the loop in C may send pages from where they are: a limit wants them in pieces."""
    return native.records is not None and (out.pace is None or not out.pace.rate)


class StreamPages(PageTransport):
    """Records in the stream, in batches: zero pages of a batch first, then the others."""

    def __init__(self, page_size: int) -> None:
        self._encoder = Encoder(page_size)

    def begin(self, blocks: Sequence[SaveBlock], out: OutStream) -> None:
        self._encoder.restart()

    def send(
        self, block: SaveBlock, pages: NDArray[np.intp], out: OutStream, budget: Budget
    ) -> Sent:
        encoder, idstr = self._encoder, block.block.wire_idstr
        start = out.position
        done = zero = 0
        look = most = encoder.batch * (AT_ONCE if _in_place(out) else 1)
        while done < len(pages):
            used = out.position - start
            if done and budget.spent(used):
                break
            some = pages[done : done + look]
            if budget.bytes is not None:  # close to the end of a small budget, small steps
                some = some[: max(1, (budget.bytes - used) // encoder.record + 1)]
            is_zero = zero_pages(block, some)
            empty = some[is_zero]
            if len(empty) == len(some):  # only records of 9 bytes: look further at once
                normal = empty[:0]
                look = min(2 * look, 4 * encoder.batch)
            else:
                normal = some[~is_zero] if len(empty) else some
                if len(normal) > most:  # no more than one send
                    last = normal[most - 1]
                    some = some[some <= last]
                    normal, empty = normal[:most], empty[empty < last]
                look = most
            for buffer in encoder.zeros(idstr, empty) if len(empty) else ():
                out.write(buffer)
            if len(normal):
                self._send_pages(block, normal, out)
            done += len(some)
            zero += len(empty)
        return Sent(done, zero)

    def _send_pages(self, block: SaveBlock, pages: NDArray[np.intp], out: OutStream) -> None:
        """From where they are, where the loop in C can."""
        encoder, idstr = self._encoder, block.block.wire_idstr
        if native.records is not None and _in_place(out):
            if not encoder.continues(idstr):
                out.write_all(encoder.pages(idstr, block.words, pages[:1]))
                pages = pages[1:]
            with out.lend() as fd:
                if fd is not None:
                    sent = native.records.send(fd, block.words, pages, encoder.page_size)
                    out.account(sent, paid=sent)  # a limit that came meanwhile is for what follows
                    return
        for i in range(0, len(pages), encoder.batch):
            out.write_all(encoder.pages(idstr, block.words, pages[i : i + encoder.batch]))
