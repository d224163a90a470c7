"""The ram section of a machine that is not ours: its blocks are made as the source lists them."""

from __future__ import annotations

from whimbrel.errors import StreamError
from whimbrel.savevm import LoadContext
from whimbrel_ram import RamHandler


class AdoptingRam(RamHandler):
    """Takes RAM blocks and page size from the stream. max_ram: the most bytes that it accepts."""

    def __init__(self, max_ram: int) -> None:
        super().__init__((), adopt=max_ram)

    def load_setup(self, ctx: LoadContext) -> None:
        bits = ctx.configuration.target_page_bits if ctx.configuration is not None else None
        if bits is not None:
            if not 10 <= bits <= 24:
                raise StreamError(
                    "bad page size", section="configuration", expected="10 to 24 bits", found=bits
                )
            self.page_size = 1 << bits
        super().load_setup(ctx)
