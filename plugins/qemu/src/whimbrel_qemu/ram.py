"""The ram section of a machine that is not ours: its blocks are made as the source lists them."""

from __future__ import annotations

from collections.abc import Callable

from whimbrel.channel import Channel
from whimbrel.savevm import LoadContext
from whimbrel.settings import Settings
from whimbrel.stream import InStream
from whimbrel.wire import dialects, items
from whimbrel.wire.format import Dialect, ItemType
from whimbrel.wire.items import SectionHeader
from whimbrel_ram import RamHandler
from whimbrel_ram.multifd.pages import MultifdPages, Options
from whimbrel_ram.multifd.wire import ANY_UUID
from whimbrel_ram.records import EOS_RECORD
from whimbrel_ram.setup import BlockEntry, encode_setup
from whimbrel_ram.transport import PageTransport


class AdoptingRam(RamHandler):
    """Takes RAM blocks and page size from the stream.

    max_ram: the most bytes that it accepts. on_start is called when the blocks are known and no page has come; it may
    raise. multifd: settings of a kernel, where pages come over further channels. dialect: the form of the stream; None: that
    of its machine type.
    """

    def __init__(
        self,
        max_ram: int,
        on_start: Callable[[], None],
        *,
        multifd: Settings | None = None,
        dialect: Dialect | None = None,
    ) -> None:
        super().__init__((), adopt=max_ram, find_pages=self._several if multifd else None)
        self._on_start = on_start
        self._multifd = multifd
        self._dialect = dialect
        #: The header of its START (or of a FULL, which QEMU would take as well), when that has come.
        self.start: SectionHeader | None = None
        #: More than that has come: device sections from here on are those behind RAM.
        self.went_on = False

    def load_setup(self, ctx: LoadContext) -> None:
        self.adopt_page_size(ctx)
        super().load_setup(ctx)

    def _several(self, channel: Channel) -> PageTransport:
        assert self._multifd is not None
        assert self._context is not None
        said = self._context.configuration
        dialect = self._dialect
        if dialect is None:
            dialect = dialects.for_machine(said.machine_type if said is not None else "")
        options = Options.of(
            self._multifd,
            page_size=self.page_size,
            flush_records=dialect.multifd_flush,
            uuid=ANY_UUID,
        )
        return MultifdPages(options, lambda: False, channel.abort)

    def load(self, inp: InStream, header: SectionHeader) -> None:
        super().load(inp, header)
        self.went_on = self.start is not None or header.type is ItemType.SECTION_FULL
        if header.type in (ItemType.SECTION_START, ItemType.SECTION_FULL):
            self.start = header
            self._on_start()

    @property
    def pages_came(self) -> bool:
        decoder = self._decoder
        return decoder is not None and decoder.normal + decoder.duplicate > 0

    def encode_start(self, *, footers: bool) -> bytes:
        """The START section as it came, without pages; nothing if it has not come."""
        if self.start is None:
            return b""
        setup = encode_setup(BlockEntry(b.idstr, b.size) for b in self.blocks)
        footer = items.encode_footer(self.start.section_id) if footers else b""
        return items.encode_section_header(self.start) + setup + EOS_RECORD + footer
