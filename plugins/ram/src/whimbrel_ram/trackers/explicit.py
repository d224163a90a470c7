"""The tracker `explicit`: the app says what it wrote, by RAMBlock.mark_dirty()."""

from __future__ import annotations

from collections.abc import Sequence

from whimbrel_ram.block import RAMBlock
from whimbrel_ram.trackers import DirtyTracker


def probe(blocks: Sequence[RAMBlock]) -> str | None:
    return None


class ExplicitTracker(DirtyTracker):
    """Has nothing of its own: marks are added to the pages of any tracker."""

    def start(self, blocks: Sequence[RAMBlock]) -> None:
        pass

    def sync(self, block: RAMBlock) -> None:
        return None

    def stop(self) -> None:
        pass
