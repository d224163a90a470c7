"""A machine that stands still, read from a stream and written as one: RAM in blocks, all else as it came."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from whimbrel.errors import StreamError
from whimbrel.machine import Machine, RunState
from whimbrel.savevm import Accept, Budget, LoadDriver, Mode, SaveDriver, SaveVMHandler, no_channel
from whimbrel.settings import Settings
from whimbrel.state import Outcome, RunParams
from whimbrel.stream import InStream, OutStream
from whimbrel.wire import dialects, items
from whimbrel.wire.format import Command, Dialect, ItemType
from whimbrel.wire.items import Configuration, SectionHeader
from whimbrel_qemu.milestones import Milestones
from whimbrel_qemu.rest import Rest, RestSender, RestTaker
from whimbrel_qemu.tail import ForeignTail, Tail

if TYPE_CHECKING:
    from whimbrel_qemu.ram import AdoptingRam
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

OnCommand = Callable[[Command, bytes, InStream], None]


#: Called with header and configuration, with the START of RAM if that came, and with whether sections have footers.
TakeRest = Callable[[bytes, bytes, bool], RestTaker]


def explain(error: BaseException, dialect: Dialect | None) -> None:
    """Of a stream that is wrong, where somebody said which form it has."""
    if dialect is not None and isinstance(error, StreamError) and error.hint is None:
        error.hint = "It was read in the form that was asked for: without --dialect, it shows"


@attrs.frozen(kw_only=True)
class Guest:
    """What a stream said of a machine. The run state is that before it was stopped, None if the stream has none."""

    #: None: an old machine type, whose stream does not name it.
    configuration: Configuration | None
    blocks: tuple[RAMBlock, ...]
    tail: Tail | None
    #: The form of the stream that it came in; a destination of the same machine type expects the same.
    dialect: Dialect = attrs.field(factory=Dialect)
    #: Holds RAM as well, in no order that is known here, if it is there.
    rest: Rest | None = None

    @property
    def machine_type(self) -> str | None:
        return self.configuration.machine_type if self.configuration is not None else None

    @property
    def ram_bytes(self) -> int:
        return sum(block.size for block in self.blocks)

    @property
    def run_state(self) -> str | None:
        return self.tail.run_state if self.tail is not None else None

    @property
    def sections(self) -> int | None:
        """Device sections, RAM not counted; None: they cannot be told apart."""
        if self.tail is None:
            return 0
        return None if self.tail.description is None else len(self.tail.description.devices)

    def machine(self, milestones: Milestones | None = None) -> Machine:
        """As a machine that whimbrel can migrate: parts and section handlers, no callbacks; it never runs here.

        milestones: tell how far a destination gets.
        """
        known = self.configuration
        bits = known.target_page_bits if known is not None else None
        unsaid = dialects.unsaid_page_bits(self.machine_type)
        machine = Machine(
            self.machine_type or "unknown",
            target_page_bits=unsaid if bits is None else bits,
            legacy_page_bits=unsaid if bits is None else 0,  # said again if it was said
            uuid=known.uuid if known is not None else None,
            run_state=RunState.PAUSED,
        )
        if milestones is not None:
            machine.register(milestones)
        if self.rest is not None:
            assert self.tail is not None
            machine.register(RestSender(self.rest.data, self.tail, milestones))
            return machine
        for block in self.blocks:
            machine.add(block)
        if self.tail is not None:
            machine.register(ForeignTail(self.tail, milestones=milestones))
        return machine


class _Foreign:
    """Meets the sections that nobody here knows."""

    def __init__(
        self,
        ram: AdoptingRam,
        answer_ping: Callable[[int], None] | None,
        take_rest: TakeRest | None,
    ) -> None:
        self.taken: ForeignTail | RestTaker | None = None
        self.section = ""
        self.driver: LoadDriver | None = None
        self._ram = ram
        self._answer_ping = answer_ping
        self._take_rest = take_rest

    def __call__(self, header: SectionHeader, inp: InStream) -> SaveVMHandler:
        assert self.driver is not None
        self.section = header.idstr
        live = header.type is ItemType.SECTION_START
        if live or not self._ram.went_on:  # or a device that comes early, such as virtio-mem
            if self._take_rest is None or self._ram.pages_came:  # they are not in what is kept
                raise self._refusal(header, inp, live=live)
            start = self._ram.encode_start(footers=self._footers)
            self.taken = self._take_rest(self._head(), start, self._footers)
        else:
            self.taken = ForeignTail(answer_ping=self._answer_ping, footers=self._footers)
        return self.taken

    @property
    def _footers(self) -> bool:
        """Known once a section has been read; before, the configuration says whether the machine type is an old one."""
        assert self.driver is not None
        if self._ram.start is None:
            return self.driver.status.configuration is not None
        return self.driver.dialect.footers

    def _head(self) -> bytes:
        """Header and configuration, as they came."""
        assert self.driver is not None
        head = items.encode_header()
        if self.driver.status.configuration is not None:
            head += items.encode_configuration(self.driver.status.configuration)
        return head

    @staticmethod
    def _refusal(header: SectionHeader, inp: InStream, *, live: bool) -> StreamError:
        what = (
            f"the live section '{header.idstr}'" if live else f"section '{header.idstr}' before RAM"
        )
        return StreamError(
            f"{what} needs a plugin of kind savevm that handles it; this side has none",
            section=header.idstr,
            offset=inp.position,
            hint=_LIVE.get(
                header.idstr, "Remove that device from the source, or install such a plugin"
            ),
        )


def read_guest(
    inp: InStream,
    *,
    on_command: OnCommand | None = None,
    answer_ping: Callable[[int], None] | None = None,
    on_ram_start: Callable[[], None] = lambda: None,
    max_ram: int = MAX_RAM,
    take_rest: TakeRest | None = None,
    dialect: Dialect | None = None,
    multifd: Settings | None = None,
    accept: Accept = no_channel,
) -> Guest:
    """A whole stream, up to and including its vmdescription.

    on_command takes the source's commands, answer_ping the PING before the end. on_ram_start is called when RAM is
    about to come, and may raise. max_ram: bytes of RAM that are accepted. take_rest: takes streams with live sections
    that nobody here knows; None refuses them. dialect: what the stream must look like; None: it shows. multifd: settings of
    a kernel, where pages come over the channels that accept() gives.

    Raises StreamError and EndOfStream with section and offset.
    """
    from whimbrel_qemu.ram import AdoptingRam

    ram = AdoptingRam(max_ram, on_ram_start, multifd=multifd, dialect=dialect)
    # Pages of further channels would not be in what is taken.
    foreign = _Foreign(ram, answer_ping, take_rest if multifd is None else None)
    foreign.driver = driver = LoadDriver(
        Machine("any"),
        [ram],
        dialect,
        on_command=on_command,
        unknown_section=foreign,
        check_machine=False,
        accept=accept,
    )
    outcome = Outcome.FAILED
    try:
        status = driver.load(inp)
        taken = foreign.taken
        if taken is None:
            described = driver.vmdescription(inp) is not None
        else:
            described = taken.tail is not None and taken.tail.vmdescription is not None
        if ram.start is None and not isinstance(taken, RestTaker):
            raise StreamError("the stream has no section ram", offset=inp.position)
        outcome = Outcome.COMPLETED
    finally:
        driver.cleanup(outcome)
    return Guest(
        configuration=status.configuration,
        blocks=ram.blocks,
        tail=taken.tail if taken is not None else None,
        dialect=attrs.evolve(driver.dialect, vmdescription=described),
        rest=taken.rest(foreign.section) if isinstance(taken, RestTaker) else None,
    )


def write_guest(guest: Guest, out: OutStream) -> None:
    """One pass: each page once, then everything as it came. Raises ChannelError."""
    from whimbrel_ram import RamHandler

    machine = guest.machine()
    handlers: list[SaveVMHandler] = list(machine.handlers)
    if guest.rest is None:  # else RAM is in that
        size = 1 << machine.target_page_bits
        handlers = [RamHandler(guest.blocks, page_size=size, tracker=STANDS_STILL), *handlers]
    driver = SaveDriver(out, machine, handlers, guest.dialect)
    outcome = Outcome.FAILED
    try:
        driver.header(guest.configuration or Configuration(machine_type=machine.machine_type))
        driver.setup(RunParams())
        while not driver.iterate(Budget()):
            pass
        driver.complete(Mode.PRECOPY)
        out.write(driver.tail())
        out.flush()
        outcome = Outcome.COMPLETED
    finally:
        driver.cleanup(outcome)
