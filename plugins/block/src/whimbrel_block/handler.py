"""BlockHandler: the block section, live on the source and loaded on the destination."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from whimbrel.errors import LocalError, MachineError, StreamError
from whimbrel.savevm import Budget, LiveSaveVMHandler, Mode, Pending
from whimbrel.state import Outcome
from whimbrel.wire.format import ItemType
from whimbrel_block.codec import (
    CHUNK,
    EOS_RECORD,
    Chunk,
    Progress,
    encode_progress,
    read_record,
    zeros_behind,
)
from whimbrel_block.device import BlockDevice
from whimbrel_block.loading import Syncer, Target
from whimbrel_block.sending import Sender

if TYPE_CHECKING:
    from whimbrel.savevm import LoadContext
    from whimbrel.state import RunParams
    from whimbrel.stream import InStream, OutStream
    from whimbrel.wire.items import SectionHeader

log = logging.getLogger("whimbrel.block")

#: Seconds that the other sections wait for a disk before they get their turn.
PATIENCE = 0.005
#: Disks that a source may announce at the start.
_MAX_ANNOUNCED = 4096


class BlockHandler(LiveSaveVMHandler):
    """The block section of one machine.

    devices      those of the machine; the read-only ones do not move
    active       whether it takes part in every migration (capability block), or in those with blk or inc only
    incremental  only what differs from the base
    zero_blocks  zeros as a word
    patience     seconds that iterate() waits for a disk
    """

    idstr = "block"
    copies_disks = True

    def __init__(
        self,
        devices: Iterable[BlockDevice],
        *,
        active: Callable[[], bool] = lambda: True,
        incremental: Callable[[], bool] = lambda: False,
        zero_blocks: Callable[[], bool] = lambda: True,
        patience: float = PATIENCE,
    ) -> None:
        devices = list(devices)
        self._devices = {d.name: d for d in devices}
        if len(self._devices) != len(devices):
            names = [d.name for d in devices]
            double = next(n for n in names if names.count(n) > 1)
            raise MachineError(f"the machine has two disks named '{double}'")
        self._active = active
        self._incremental = incremental
        self._zero_blocks = zero_blocks
        self._patience = patience
        self._sender: Sender | None = None
        self._figures: dict[str, Any] = {}
        # destination
        self._targets: dict[str, Target] = {}
        self._syncer = Syncer()
        self._staging: memoryview | None = None

    @property
    def devices(self) -> tuple[BlockDevice, ...]:
        return tuple(self._devices.values())

    def is_active(self, params: RunParams) -> bool:
        return params.blk or params.inc or self._active()

    # ---- source

    def setup(self, out: OutStream, params: RunParams) -> None:
        devices = [d for d in self.devices if not d.read_only]
        if not devices:
            raise LocalError(
                "the machine has no disk that could be copied",
                section="block",
                hint="Add a BlockDevice to it, or migrate without blk, inc and the capability block",
            )
        for device in devices:
            device.pread(0, 0)  # one that is half-written says so
        self._sender = Sender(
            devices,
            incremental=params.inc or self._incremental(),
            zero_blocks=self._zero_blocks(),
        )
        self._sender.announce(out)
        out.write(EOS_RECORD)

    def pending(self, exact: bool) -> Pending:
        sender = self._sender
        if sender is None:
            return Pending()
        rate = sender.dirty_rate(exact=exact)
        return Pending(precopy=sender.left(), dirty_bytes_per_s=rate)

    def iterate(self, out: OutStream, budget: Budget) -> bool:
        sender = self._sender
        assert sender is not None
        done = sender.send(out, budget, self._patience)
        self.waiting = sender.waiting
        sender.progress(out)
        out.write(EOS_RECORD)
        return done

    def complete(self, out: OutStream, mode: Mode) -> None:
        assert self._sender is not None
        self._sender.send_rest(out)
        self._sender.flush()
        out.write(encode_progress(100) + EOS_RECORD)

    def cleanup(self, outcome: Outcome) -> None:
        sender = self._sender
        if sender is not None:
            self._figures = sender.figures()
            self._sender = None
            sender.close()

    def query(self) -> dict[str, Any]:
        sender = self._sender
        return self._figures if sender is None else sender.figures()

    # ---- destination

    def load_setup(self, ctx: LoadContext) -> None:
        self._targets = {name: Target(device) for name, device in self._devices.items()}
        self._syncer = Syncer()
        if self._staging is None:
            self._staging = memoryview(mmap.mmap(-1, CHUNK))  # begins on a page boundary

    def load(self, inp: InStream, header: SectionHeader) -> None:
        assert self._staging is not None
        announced: list[tuple[Target, int]] = []  # written when all of them were checked
        while True:
            at = inp.position
            record = read_record(inp)
            if record is None:
                break
            if isinstance(record, Progress):
                continue
            target = self._target(record, at)
            if record.zero and header.type is ItemType.SECTION_START:
                if len(announced) == _MAX_ANNOUNCED:
                    raise StreamError("too many records at the start", section="block", offset=at)
                target.announce(record.offset, at)
                announced.append((target, record.offset))
                continue
            target.check(record.offset, at)
            if record.zero:
                self._zero(target, record.offset, inp)
                continue
            target.begin()
            inp.read_into(self._staging)
            self._syncer.wrote(target.device, target.put(record.offset, self._staging))
        for target, offset in announced:
            target.zero(offset, CHUNK)
        if header.type is ItemType.SECTION_END:
            self._finish_load()

    def _target(self, record: Chunk, at: int) -> Target:
        target = self._targets.get(record.device)
        if target is None:
            raise StreamError(
                f"the source has a disk '{record.device}', and there is none of that name here",
                section="block",
                offset=at,
                expected=f"one of {', '.join(self._devices) or 'none'}"[:500],
                found=repr(record.device),
                hint="Give the destination's machine the same disks, or migrate without them",
            )
        return target

    @staticmethod
    def _zero(target: Target, offset: int, inp: InStream) -> None:
        """A chunk of zeros, and what has arrived of a run of them."""
        at, name = inp.position, target.device.wire_name
        more = 0 if offset % CHUNK else zeros_behind(inp.buffered(), name, offset)
        if more:
            target.check(offset + more * CHUNK, at)
            inp.consume(more * (8 + len(name)))
        target.zero(offset, (1 + more) * CHUNK)

    def _finish_load(self) -> None:
        """END: all of it is on stable storage before the source is told anything."""
        for target in self._targets.values():
            if not target.device.read_only:
                target.check_whole()
        self._syncer.finish([t.device for t in self._targets.values() if t.begun])

    def load_activate(self) -> None:
        for target in self._targets.values():
            if target.begun:
                target.activate()

    def load_cleanup(self, outcome: Outcome) -> None:
        self._syncer.close()
        targets, self._targets = self._targets, {}
        for target in targets.values():
            if target.begun:
                try:
                    target.device.end_load(whole=outcome is Outcome.COMPLETED)
                except OSError as error:
                    log.error("disk '%s': its mark cannot be set: %s", target.device.name, error)
