"""The ram section against the suite that every section must pass."""

import numpy as np

from whimbrel_ram import RAMBlock, RamHandler
from whimbrel_testing.savevm_suite import LiveSaveVMHandlerSuite


class TestRam(LiveSaveVMHandlerSuite):
    PAGES = 12

    def make_source(self):
        block = RAMBlock("ram", self.PAGES * 4096)
        block.rows[1:5] = np.arange(4096) % 251
        block.rows[7] = 9
        return RamHandler([block, RAMBlock("rom", 4096)])

    def make_destination(self):
        return RamHandler([RAMBlock("ram", self.PAGES * 4096), RAMBlock("rom", 4096)])

    def state(self, handler):
        return {b.idstr: bytes(b.buffer) for b in handler.blocks}

    def change(self, handler):
        """The machine writes to a page that was sent, and to one that had never been touched."""
        block = handler.blocks[0]
        block.view[3 * 4096] ^= 0xFF
        block.view[9 * 4096 + 5] ^= 0xFF
