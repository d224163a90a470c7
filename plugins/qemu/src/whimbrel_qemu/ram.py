"""The ram section of a machine that is not ours: its blocks are made as the source lists them."""

from __future__ import annotations

from collections.abc import Callable

from whimbrel.savevm import LoadContext
from whimbrel.stream import InStream
from whimbrel.wire.format import ItemType
from whimbrel.wire.items import SectionHeader
from whimbrel_ram import RamHandler


class AdoptingRam(RamHandler):
    """Takes RAM blocks and page size from the stream.

    max_ram: the most bytes that it accepts. on_start is called when the blocks are known and no page has come; it may
    raise.
    """

    def __init__(self, max_ram: int, on_start: Callable[[], None]) -> None:
        super().__init__((), adopt=max_ram)
        self._on_start = on_start

    def load_setup(self, ctx: LoadContext) -> None:
        self.adopt_page_size(ctx)
        super().load_setup(ctx)

    def load(self, inp: InStream, header: SectionHeader) -> None:
        super().load(inp, header)
        if header.type is ItemType.SECTION_START:
            self._on_start()
