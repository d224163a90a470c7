"""A ram section that passes by: every record is checked as on loading, and no page is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import numpy as np

from whimbrel_ram import xbzrle
from whimbrel_ram.decoder import Decoder
from whimbrel_ram.handler import RamHandler
from whimbrel_ram.setup import MAX_TOTAL, BlockEntry
from whimbrel_ram.target import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from whimbrel.savevm import LoadContext
    from whimbrel.stream import InStream
    from whimbrel.wire.items import SectionHeader


@attrs.frozen
class CheckedBlock:
    """A RAM block of the passing stream."""

    idstr: str
    size: int  # bytes


class _Nowhere:
    """What is assigned to its items is gone."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __setitem__(self, where: Any, value: Any) -> None:
        pass


class _Passing(Target):
    """A block whose pages are not kept."""

    def __init__(self, block: CheckedBlock, page_size: int) -> None:
        self.idstr = block.idstr
        self.size = block.size
        self._scratch = np.empty(page_size, np.uint8)
        nowhere: Any = _Nowhere(block.size // page_size)
        self.memory = self.rows = self.words = self.fresh = self.fresh_map = nowhere

    def put_zero(self, *_: object) -> None:
        pass

    def put_zeros(self, *_: object) -> None:
        pass

    def patch(
        self,
        data: NDArray[np.uint8],
        start: NDArray[np.int64],
        length: NDArray[np.int64],
        where: NDArray[np.int64],
    ) -> None:
        """They are taken apart all the same; what they say goes to one page, over and over."""
        page = self._scratch
        xbzrle.patch(data, start, length, np.zeros(len(where), np.int64), len(page), page)


class _CheckingDecoder(Decoder):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._direct = False  # a page is looked at in the buffer, and not put anywhere
        self._native = None


class RamChecker(RamHandler):
    """Takes RAM blocks and page size from the stream, and checks each record against them.

    Raises StreamError with the byte offset, as RamHandler does, before the wrong record has been consumed.
    """

    decoder_type: ClassVar[type[Decoder]] = _CheckingDecoder

    def __init__(self, max_ram: int = MAX_TOTAL) -> None:
        super().__init__((), adopt=max_ram)
        #: Pages that came with their bytes, and pages that came as zero.
        self.normal = self.zero = 0

    def load_setup(self, ctx: LoadContext) -> None:
        self.adopt_page_size(ctx)
        super().load_setup(ctx)

    def load(self, inp: InStream, header: SectionHeader) -> None:
        super().load(inp, header)
        assert self._decoder is not None
        self.normal, self.zero = self._decoder.normal, self._decoder.duplicate

    def _find(self, idstr: str) -> Target | None:
        block: Any = self._blocks.get(idstr)
        return None if block is None else _Passing(block, self.page_size)

    def _new_block(self, entry: BlockEntry) -> Any:
        return CheckedBlock(entry.idstr, entry.length)
