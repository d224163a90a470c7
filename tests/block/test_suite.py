"""The block section against the suite that every section must pass."""

import os
from pathlib import Path

import pytest

from whimbrel_block import CHUNK, BlockDevice, BlockHandler
from whimbrel_testing.savevm_suite import LiveSaveVMHandlerSuite

#: Three chunks, the last one of three sectors: data, a hole, data.
SIZE = 2 * CHUNK + 3 * 512


class TestBlock(LiveSaveVMHandlerSuite):
    cuts = 60
    flips = 60

    @pytest.fixture(autouse=True)
    def folder(self, shm):
        self.where = shm
        self.made = 0

    def device(self, **options):
        self.made += 1
        return BlockDevice("drv0", self.where / f"disk{self.made}", create=SIZE, **options)

    def make_source(self):
        device = self.device()
        device.pwrite(os.urandom(4096), 8192)
        device.pwrite(b"end", SIZE - 3)
        return BlockHandler([device], patience=30)

    def make_destination(self):
        return BlockHandler([self.device()], patience=30)

    def state(self, handler):
        (device,) = handler.devices
        return Path(device.image.name).read_bytes()

    def change(self, handler):
        """The machine writes to a chunk that was sent, and into the hole."""
        (device,) = handler.devices
        device.pwrite(b"new", 100)
        device.pwrite(b"new", CHUNK + 100)
