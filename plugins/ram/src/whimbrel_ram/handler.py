"""RamHandler: the ram section, live on the source and loaded on the destination."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from whimbrel.errors import LocalError, MachineError, StreamError
from whimbrel.savevm import Budget, LiveSaveVMHandler, Mode, Pending
from whimbrel.state import Outcome
from whimbrel.wire import dialects
from whimbrel_ram.block import RAMBlock
from whimbrel_ram.converge import AutoConverge
from whimbrel_ram.decoder import Decoder, Event
from whimbrel_ram.memory import untouched
from whimbrel_ram.prefault import Prefault
from whimbrel_ram.records import EOS_RECORD, PageFlag
from whimbrel_ram.setup import BlockEntry, encode_setup, read_setup
from whimbrel_ram.stats import RamStats
from whimbrel_ram.target import Target
from whimbrel_ram.trackers import AUTO, BUILT_IN, DirtyTracker, TrackerSpec, choose
from whimbrel_ram.transport import PageTransport, Phase, SaveBlock, Sent, StreamPages
from whimbrel_ram.zero import as_words

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from whimbrel.channel import Channel
    from whimbrel.savevm import LoadContext
    from whimbrel.state import RunParams
    from whimbrel.stream import InStream, OutStream
    from whimbrel.wire.items import SectionHeader

log = logging.getLogger("whimbrel.ram")

#: Pages looked for in the dirty map in one step.
_WINDOW = 8192
#: Capabilities that add fields to the setup record, which nothing in it announces.
_FOREIGN_CAPABILITIES = ("x-ignore-shared", "mapped-ram")


class RamHandler(LiveSaveVMHandler):
    """The ram section of one machine.

    blocks      those of the machine, in the order of the setup record
    tracker     the parameter `dirty-tracker`, or a function that gives its value when the migration starts
    trackers    what there is to choose from
    mbps        throughput of the stream, 10^6 bit per second (for the figures)
    running     whether the machine runs (for the figures: what is sent of one that stands still counts as downtime-bytes)
    find_pages  given the channel, another PageTransport than records in the stream, or None
    converge    slows the machine down where it writes faster than can be sent
    prefault    whether a destination takes the host's memory for all of its RAM while it waits
    adopt       the most bytes of RAM that a destination without blocks of its own creates from the setup record
                (0: it must have them all, with the same lengths)
    """

    idstr = "ram"
    version_id = 4
    minimum_version_id = 4
    decoder_type: ClassVar[type[Decoder]] = Decoder

    def __init__(
        self,
        blocks: Iterable[RAMBlock],
        *,
        page_size: int = 4096,
        tracker: str | Callable[[], str] = AUTO,
        trackers: Sequence[TrackerSpec] = BUILT_IN,
        running: Callable[[], bool] = lambda: True,
        mbps: Callable[[], float] = lambda: 0.0,
        find_pages: Callable[[Channel], PageTransport | None] | None = None,
        converge: AutoConverge | None = None,
        prefault: bool = False,
        adopt: int = 0,
    ) -> None:
        blocks = list(blocks)
        self._blocks = {b.idstr: b for b in blocks}
        self.page_size = page_size
        if len(self._blocks) != len(blocks):
            names = [b.idstr for b in blocks]
            double = next(n for n in names if names.count(n) > 1)
            raise MachineError(f"the machine has two RAM blocks named '{double}'")
        for block in blocks:
            if block.page_size != page_size:
                raise MachineError(
                    f"RAM block '{block.idstr}' has pages of {block.page_size} bytes, the machine of {page_size}",
                    hint="Give both the same page size (target_page_bits of the machine)",
                )
        self._wanted = tracker
        self._specs = trackers
        self._running = running
        self._mbps = mbps
        self._find_pages = find_pages
        self._converge = converge
        self._wants_prefault = prefault
        self._adopt = adopt
        self._pages: PageTransport | None = None
        self._stats: RamStats | None = None
        self._pages_said: dict[str, Any] = {}  # the last answer of the page transport
        # source
        self._tracker: DirtyTracker | None = None
        self.tracker_name: str | None = None
        self._saved: list[SaveBlock] = []
        self._dirty: list[NDArray[np.bool_]] = []
        self._at = (0, 0)  # block and page that come next
        # destination
        self._context: LoadContext | None = None
        self._decoder: Decoder | None = None
        self._targets: dict[str, Target] = {}
        self._listed: set[str] = set()
        self._prefault: Prefault | None = None

    @property
    def blocks(self) -> tuple[RAMBlock, ...]:
        """Those of the machine, the adopted ones included."""
        return tuple(self._blocks.values())

    # ---- source

    def setup(self, out: OutStream, params: RunParams) -> None:
        wanted = self._wanted if isinstance(self._wanted, str) else self._wanted()
        blocks = self.blocks
        spec = choose(wanted, self._specs, blocks)
        if wanted == AUTO and spec.name == "shadow":
            log.warning("tracking writes by comparing with a copy: RAM is needed twice")
        self.tracker_name = spec.name
        for block in blocks:
            block.start_marks()
        self._tracker = tracker = spec.create()
        try:
            tracker.start(blocks)
        except OSError as error:
            raise LocalError(
                f"dirty tracker '{spec.name}' cannot start: {error}",
                section="ram",
                hint="Choose another one by the parameter dirty-tracker",
            ) from error
        self._saved = [
            SaveBlock(b, i, as_words(tracker.source(b)), tracker.untouched(b))
            for i, b in enumerate(blocks)
        ]
        self._dirty = [np.ones(b.pages, np.bool_) for b in blocks]
        self._at = (0, 0)
        self._stats = RamStats(page_size=self.page_size, total=sum(b.size for b in blocks))
        everything = sum(b.pages for b in blocks)
        self._stats.synced(everything, everything)
        out.write(encode_setup(BlockEntry(b.idstr, b.size) for b in blocks))
        self._pages = self._page_transport(out.channel)
        self._pages.begin(self._saved, out)
        out.write(EOS_RECORD)

    def _page_transport(self, channel: Channel) -> PageTransport:
        found = channel.extension(PageTransport)
        if found is None and self._find_pages is not None:
            found = self._find_pages(channel)
        return StreamPages(self.page_size) if found is None else found

    def pending(self, exact: bool) -> Pending:
        stats = self._stats
        if stats is None:
            return Pending()
        if exact:
            self._sync()
        rate = stats.dirty_pages_rate
        return Pending(
            precopy=stats.remaining_pages * self.page_size,
            dirty_bytes_per_s=None if rate is None else rate * self.page_size,
        )

    def _sync(self) -> None:
        """Ask the tracker, and add what the app marked."""
        assert self._tracker is not None
        assert self._stats is not None
        found = 0
        for saved, dirty in zip(self._saved, self._dirty, strict=True):
            block = saved.block
            new = page_map(self._tracker.sync(block), block)
            marks = block.take_marks()
            if marks is not None:
                marked = np.frombuffer(marks, np.bool_)
                new = marked if new is None else new | marked
            if new is None:
                continue
            found += int(np.count_nonzero(new))
            dirty |= new  # noqa: PLW2901
            if saved.untouched is not None:
                saved.untouched &= ~new
        self._stats.synced(found, sum(int(np.count_nonzero(d)) for d in self._dirty))
        if self._converge is not None and self._running():
            self._converge.synced(found * self.page_size, self._stats.transferred)

    def iterate(self, out: OutStream, budget: Budget) -> bool:
        return self._round(out, budget, Phase.ITERATE)

    def complete(self, out: OutStream, mode: Mode) -> None:
        self._lift_throttle()
        self._sync()
        self._round(out, Budget(), Phase.COMPLETE)

    def _round(self, out: OutStream, budget: Budget, phase: Phase) -> bool:
        """One section item: dirty pages, until none is left (True) or the budget is spent."""
        assert self._pages is not None
        self._pages.round_begin(out, phase)
        done = self._send_dirty(out, budget, phase)
        before = out.position
        self._pages.round_end(out, phase)
        assert self._stats is not None
        stopped = phase is Phase.COMPLETE or not self._running()
        self._stats.sent(Sent(0), out.position - before, stopped=stopped)
        out.write(EOS_RECORD)
        return done

    def _send_dirty(self, out: OutStream, budget: Budget, phase: Phase) -> bool:
        pages, stats = self._pages, self._stats
        assert pages is not None
        assert stats is not None
        stopped = phase is Phase.COMPLETE or not self._running()
        start = out.position
        while stats.remaining_pages > 0:
            used = out.position - start
            if budget.spent(used):
                return False
            index, first = self._at
            dirty = self._dirty[index]
            window = np.flatnonzero(dirty[first : first + _WINDOW])
            if not len(window):
                self._advance(min(first + _WINDOW, len(dirty)), out)
                continue
            window += first
            left = Budget(
                bytes=None if budget.bytes is None else budget.bytes - used,
                deadline=budget.deadline,
                cancelled=budget.cancelled,
            )
            before = out.position
            sent = pages.send(self._saved[index], window, out, left)
            if not 0 < sent.pages <= len(window):
                raise LocalError(
                    "the page transport sent nothing",
                    section="ram",
                    expected=len(window),
                    found=sent.pages,
                )
            dirty[window[: sent.pages]] = False
            size = out.position - before
            stats.sent(sent, size, stopped=stopped)
            self._advance(int(window[sent.pages - 1]) + 1, out)
        return True

    def _advance(self, page: int, out: OutStream) -> None:
        """Go on at that page of the current block, or with the next block, or from the start."""
        index = self._at[0]
        if page < len(self._dirty[index]):
            self._at = (index, page)
            return
        self._at = ((index + 1) % len(self._dirty), 0)
        if self._at[0] == 0:
            assert self._pages is not None
            self._pages.sync(out)

    def _lift_throttle(self) -> None:
        if self._converge is not None:
            self._converge.lift()

    def cleanup(self, outcome: Outcome) -> None:
        self._lift_throttle()
        if self._tracker is not None:
            try:
                self._tracker.stop()
            except Exception:
                log.exception("dirty tracker '%s' failed to stop", self.tracker_name)
            self._tracker = None
        for block in self.blocks:
            block.stop_marks()
        self._close_pages(outcome)
        self._saved, self._dirty = [], []

    def _close_pages(self, outcome: Outcome) -> None:
        pages, self._pages = self._pages, None
        if pages is not None:
            self._pages_said = pages.query()
            try:
                pages.close(outcome)
            except Exception:
                log.exception("the page transport failed to close")

    def query(self) -> dict[str, Any]:
        if self._stats is None:
            return {}
        pages = self._pages
        more = dict(self._pages_said if pages is None else pages.query())
        throttled = {} if self._converge is None else self._converge.query()
        ram = self._stats.query(self._mbps()) | more.pop("ram", {})
        return {"ram": ram, **more, **throttled}

    # ---- destination

    def load_prepare(self) -> None:
        if self._wants_prefault:
            self._prefault = Prefault(self.blocks)
            self._prefault.start()

    def load_setup(self, ctx: LoadContext) -> None:
        known = ctx.configuration.capabilities if ctx.configuration is not None else None
        for capability in _FOREIGN_CAPABILITIES:
            if capability in (known or ()):
                raise StreamError(
                    f"the source has capability {capability} on, which changes the setup record of RAM",
                    section="ram",
                    hint="Switch it off on the source",
                )
        self._context = ctx
        self._decoder = self.decoder_type(self.page_size, self._find)
        self._targets.clear()
        self._listed.clear()

    def adopt_page_size(self, ctx: LoadContext) -> None:
        """Take the page size of the stream's configuration, said or not, in load_setup() of a destination that has none of its own.

        Raises StreamError for a size that no machine has.
        """
        said = ctx.configuration
        bits = said.target_page_bits if said is not None else None
        if bits is None:
            bits = dialects.unsaid_page_bits(said.machine_type if said is not None else None)
        if not 10 <= bits <= 24:
            raise StreamError(
                "bad page size", section="configuration", expected="10 to 24 bits", found=bits
            )
        self.page_size = 1 << bits

    def _find(self, idstr: str) -> Target | None:
        """The block as a target of pages, made at first use: then its memory is looked at."""
        target = self._targets.get(idstr)
        block = self._blocks.get(idstr)
        if target is None and block is not None:
            target = Target(idstr, block.buffer, self.page_size, untouched(block))
            self._targets[idstr] = target
        return target

    def load(self, inp: InStream, header: SectionHeader) -> None:
        decoder, ctx = self._decoder, self._context
        if decoder is None or ctx is None:
            raise LocalError("load() before load_setup()", section="ram")
        if self._pages is None:
            self._pages = self._page_transport(inp.channel)
            self._pages.begin_load(ctx, self._find)
        pages = self._pages
        need = 8
        while True:
            if need > inp.capacity:
                raise StreamError(
                    "a page record larger than the read buffer", section="ram", offset=inp.position
                )
            buffer = inp.buffered(need)
            taken, event = decoder.feed(buffer, inp.position)
            inp.consume(taken)
            need = 8
            if event is Event.MORE:
                need = 8 if decoder.receive(inp) else decoder.need
            elif event is Event.EOS:
                pages.on_record(PageFlag.EOS, inp)
                return
            elif event is Event.SETUP:
                self._read_blocks(inp, decoder)
            elif event is Event.FILL:
                inp.read_into(decoder.fill)
            else:
                pages.on_record(decoder.flag, inp)

    def _read_blocks(self, inp: InStream, decoder: Decoder) -> None:
        """A setup record: the blocks must be those of the machine; in adopt mode they are created."""
        assert self._pages is not None
        start = inp.position - 8
        if decoder.total % self.page_size:
            raise StreamError(
                "the RAM size is not a multiple of the page size", offset=start, section="ram"
            )
        limit = {"max_total": self._adopt} if self._adopt else {}
        entries = read_setup(inp, decoder.total, self.page_size, **limit)
        for entry in entries:
            block = self._blocks.get(entry.idstr)
            if block is None and self._adopt:
                block = self._create(entry, start)
            if block is None:
                raise StreamError(
                    f"unknown RAM block '{entry.idstr}'",
                    section="ram",
                    offset=start,
                    expected=f"one of {', '.join(self._blocks)}"[:500],
                    found=repr(entry.idstr),
                    hint="Give the destination's machine the same RAM blocks",
                )
            if block.size != entry.length:
                raise StreamError(
                    f"RAM block '{entry.idstr}' has another length on the source",
                    section="ram",
                    offset=start,
                    expected=f"{block.size} bytes",
                    found=entry.length,
                    hint="Start the destination with the same RAM size",
                )
            self._listed.add(entry.idstr)
        decoder.restart()
        self._pages.on_blocks([self._blocks[e.idstr] for e in entries])

    def _create(self, entry: BlockEntry, offset: int) -> RAMBlock:
        have = sum(b.size for b in self._blocks.values())
        if have + entry.length > self._adopt:
            raise StreamError(
                "the RAM of the source is larger than this side accepts",
                section="ram",
                offset=offset,
                expected=f"at most {self._adopt} bytes",
                found=have + entry.length,
            )
        try:
            block = self._new_block(entry)
        except OSError as error:
            raise LocalError(
                f"no memory for RAM block '{entry.idstr}' of {entry.length} bytes: {error}",
                section="ram",
            ) from error
        self._blocks[entry.idstr] = block
        return block

    def _new_block(self, entry: BlockEntry) -> RAMBlock:
        return RAMBlock(entry.idstr, entry.length, page_size=self.page_size)

    def load_complete(self) -> None:
        missing = [name for name in self._blocks if name not in self._listed]
        if missing:
            raise StreamError(
                f"the stream left out RAM block {', '.join(repr(n) for n in missing)}",
                section="ram",
                expected=f"all of {', '.join(self._blocks)}"[:500],
                found=", ".join(sorted(self._listed)) or "none",
                hint="The source's machine must have the same RAM blocks",
            )
        if self._prefault is not None:
            self._prefault.stop()  # what is needed is there
        if self._pages is not None:
            self._pages.load_complete()

    @property
    def load_failure(self) -> BaseException | None:
        return None if self._pages is None else self._pages.failure

    def load_cleanup(self, outcome: Outcome) -> None:
        self._decoder = self._context = None
        self._targets.clear()
        if self._prefault is not None:
            self._prefault.close()
            self._prefault = None
        self._close_pages(outcome)


def page_map(found: Any, block: RAMBlock) -> NDArray[np.bool_] | None:
    """What a tracker returned, as a bool a page. Raises LocalError for what is not one of the allowed forms."""
    if found is None:
        return None
    found = np.asarray(found)
    if found.dtype == np.bool_ and found.shape == (block.pages,):
        return np.asarray(found, np.bool_)
    if found.dtype == np.uint8 and found.shape == (-(-block.pages // 8),):
        bits: NDArray[np.bool_] = np.unpackbits(found, bitorder="little", count=block.pages).view(
            np.bool_
        )
        return bits
    if found.dtype.kind in "iu" and found.dtype != np.uint8 and found.ndim == 1:
        if len(found) and not (found.min() >= 0 and found.max() < block.pages):
            raise LocalError(
                f"the dirty tracker named a page outside RAM block '{block.idstr}'", section="ram"
            )
        pages = np.zeros(block.pages, np.bool_)
        pages[found] = True
        return pages
    raise LocalError(
        f"the dirty tracker returned {found.dtype}{list(found.shape)} for RAM block '{block.idstr}'",
        section="ram",
        expected=f"bool[{block.pages}], page numbers, or a bitmap uint8[{-(-block.pages // 8)}]",
    )
