"""A machine that stands still, read from a stream and written as one: RAM in blocks, all else as it came."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from whimbrel.errors import StreamError
from whimbrel.machine import Machine, RunState
from whimbrel.savevm import Budget, LoadDriver, Mode, SaveDriver, SaveVMHandler
from whimbrel.state import Outcome, RunParams
from whimbrel.stream import InStream, OutStream
from whimbrel.wire.format import Command, Dialect, ItemType
from whimbrel.wire.items import Configuration, SectionHeader
from whimbrel_qemu.tail import ForeignTail, Tail

if TYPE_CHECKING:
    from whimbrel_ram import RAMBlock

#: The dirty tracker for memory that nobody writes to.
STANDS_STILL = "explicit"
#: Bytes of RAM that are accepted from a source. Pages that are zero take none here.
MAX_RAM = 1 << 40

#: Who could make sense of a live section that is not RAM, and how to do without it.
_LIVE = {
    "block": "Migrate without blk/inc and the capability block: copy or share the disk instead",
    "dirty-bitmap": "Switch the capability dirty-bitmaps off on the source",
}

#: Offset of what follows magic number and version.
_CONFIGURATION_AT = 8

OnCommand = Callable[[Command, bytes, InStream], None]


@attrs.frozen(kw_only=True)
class Guest:
    """What a stream said of a machine. The run state is that before it was stopped, None if the stream has none."""

    configuration: Configuration
    blocks: tuple[RAMBlock, ...]
    tail: Tail | None
    #: The form of the stream that it came in; a destination of the same machine type expects the same.
    dialect: Dialect = attrs.field(factory=Dialect)

    @property
    def ram_bytes(self) -> int:
        return sum(block.size for block in self.blocks)

    @property
    def run_state(self) -> str | None:
        return self.tail.run_state if self.tail is not None else None

    @property
    def sections(self) -> int:
        """Device sections, RAM not counted."""
        return len(self.tail.description.devices) if self.tail is not None else 0

    def machine(self) -> Machine:
        """As a machine that whimbrel can migrate: parts and section handlers, no callbacks; it never runs here."""
        bits = self.configuration.target_page_bits
        machine = Machine(
            self.configuration.machine_type,
            target_page_bits=12 if bits is None else bits,
            uuid=self.configuration.uuid,
            run_state=RunState.PAUSED,
        )
        for block in self.blocks:
            machine.add(block)
        if self.tail is not None:
            machine.register(ForeignTail(self.tail))
        return machine


class _Foreign:
    """Meets the sections that nobody here knows."""

    def __init__(self, answer_ping: Callable[[int], None] | None) -> None:
        self.tail: ForeignTail | None = None
        self._answer_ping = answer_ping
        self.driver: LoadDriver | None = None

    def __call__(self, header: SectionHeader, inp: InStream) -> SaveVMHandler:
        if header.type is ItemType.SECTION_START:
            raise StreamError(
                f"the live section '{header.idstr}' needs a plugin of kind savevm that handles it; this side has none",
                section=header.idstr,
                offset=inp.position,
                hint=_LIVE.get(
                    header.idstr, "Remove that device from the source, or install such a plugin"
                ),
            )
        assert self.driver is not None
        if ("ram", 0) not in self.driver.status.loaded:
            raise StreamError(
                f"section '{header.idstr}' comes before RAM and needs a plugin of kind savevm that handles it",
                section=header.idstr,
                offset=inp.position,
                hint="Remove that device (virtio-mem and its like) from the source",
            )
        self.tail = ForeignTail(answer_ping=self._answer_ping)
        return self.tail


def read_guest(
    inp: InStream,
    *,
    on_command: OnCommand | None = None,
    answer_ping: Callable[[int], None] | None = None,
    on_ram_start: Callable[[], None] = lambda: None,
    max_ram: int = MAX_RAM,
) -> Guest:
    """A whole stream, up to and including its vmdescription.

    on_command takes the source's commands, answer_ping the PING before the end. on_ram_start is called when RAM is
    about to come, and may raise. max_ram: bytes of RAM that are accepted.

    Raises StreamError and EndOfStream with section and offset.
    """
    from whimbrel_qemu.ram import AdoptingRam

    machine = Machine("any")
    ram = AdoptingRam(max_ram, on_ram_start)
    foreign = _Foreign(answer_ping)
    foreign.driver = driver = LoadDriver(
        machine,
        [ram],
        None,
        on_command=on_command,
        unknown_section=foreign,
        check_machine=False,
    )
    outcome = Outcome.FAILED
    try:
        status = driver.load(inp)
        tail = foreign.tail.tail if foreign.tail is not None else None
        if tail is None:
            driver.vmdescription(inp)
        if ("ram", 0) not in status.loaded:
            raise StreamError("the stream has no section ram", offset=inp.position)
        outcome = Outcome.COMPLETED
    except StreamError as error:
        if driver.status.configuration is None and error.offset == _CONFIGURATION_AT:
            error.hint = (
                "Only the stream of QEMU 2.4 and newer can be kept, with configuration, footers and vmdescription:"
                " use a machine type of 2.4 or newer"
            )
        raise
    finally:
        driver.cleanup(outcome)
    assert status.configuration is not None
    return Guest(configuration=status.configuration, blocks=ram.blocks, tail=tail)


def write_guest(guest: Guest, out: OutStream) -> None:
    """One pass: each page once, then everything as it came. Raises ChannelError."""
    from whimbrel_ram import RamHandler

    machine = guest.machine()
    ram = RamHandler(guest.blocks, page_size=1 << machine.target_page_bits, tracker=STANDS_STILL)
    driver = SaveDriver(out, machine, [ram, *machine.handlers], guest.dialect)
    outcome = Outcome.FAILED
    try:
        driver.header(guest.configuration)
        driver.setup(RunParams())
        while not driver.iterate(Budget()):
            pass
        driver.complete(Mode.PRECOPY)
        out.write(driver.tail())
        out.flush()
        outcome = Outcome.COMPLETED
    finally:
        driver.cleanup(outcome)
