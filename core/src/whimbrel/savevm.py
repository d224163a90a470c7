"""The savevm contract, and the drivers that frame sections around what the handlers write and read."""

from __future__ import annotations

import abc
import contextlib
import enum
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from whimbrel.channel import Channel
from whimbrel.errors import ChannelError, MigrationError, StreamError
from whimbrel.state import Outcome, RunParams
from whimbrel.stream import InStream, OutStream
from whimbrel.wire import items
from whimbrel.wire.format import Command, Dialect, ItemType
from whimbrel.wire.items import Configuration, SectionHeader

if TYPE_CHECKING:
    from whimbrel.machine import Machine

log = logging.getLogger("whimbrel.savevm")


class Priority(enum.IntEnum):
    """FULL sections go by descending priority, then in the order of registration."""

    LOW = -10
    DEFAULT = 0
    IOMMU = 10
    PCI_BUS = 20
    VIRTIO_MEM = 30


@attrs.frozen
class Pending:
    """What a live section still has to send, in bytes, and how fast that grows.

    precopy must go before the machine may stop; postcopy may go after it. dirty_bytes_per_s is None while unknown.
    """

    precopy: int = 0
    postcopy: int = 0
    dirty_bytes_per_s: float | None = None


@attrs.frozen(kw_only=True)
class Budget:
    """How much one iterate() may do: stop at whichever comes first."""

    bytes: int | None = None  # None: no limit
    deadline: float | None = None  # time.monotonic() seconds
    cancelled: Callable[[], bool] = lambda: False

    def spent(self, used: int) -> bool:
        """Time to return, after `used` bytes? For a check once a batch (about 1 MiB), not once a page."""
        return (
            (self.bytes is not None and used >= self.bytes)
            or (self.deadline is not None and time.monotonic() >= self.deadline)
            or self.cancelled()
        )


class Mode(enum.Enum):
    """Why complete() is called."""

    PRECOPY = "precopy"  # the machine stands still: send all that is left


Accept = Callable[[float | None], Channel]


def no_channel(deadline: float | None) -> Channel:
    """Where nobody opens further ones. Raises ChannelError."""
    raise ChannelError("there are no further channels here")


@attrs.frozen(kw_only=True)
class LoadContext:
    """What a handler may want to know before it loads."""

    machine: Machine
    configuration: Configuration | None = None
    #: The next further channel of the source, where a capability says that it opens some; given a deadline. From any
    #: thread. Raises ChannelError, DeadlineExceeded, Cancelled. Who accepts a channel closes it.
    accept: Accept = no_channel


class SaveVMHandler(abc.ABC):
    """One section of the stream. A plain device implements save and load only; see LiveSaveVMHandler for the rest.

    Threads: save-side methods run on the migration thread, load-side ones on the incoming thread. After an error or a
    cancel no method but cleanup (or load_cleanup) is called again in that run.
    """

    idstr: str
    instance_id: int = 0
    version_id: int = 1
    #: The oldest version that load() still understands.
    minimum_version_id: int = 1
    priority: int = Priority.DEFAULT
    #: A reason why the machine cannot be migrated while this section is part of it, or None.
    unmigratable: str | None = None
    #: Sent as FULL before the live sections start.
    early_setup: bool = False
    #: Takes part when blk or inc is asked for: a machine needs one such for that.
    copies_disks: bool = False
    #: A stream without this section still makes a whole machine.
    optional: bool = False
    #: save() writes whole sections, headers and footers included; nothing is framed or described for it.
    verbatim: bool = False

    def is_active(self, params: RunParams) -> bool:
        """Whether this section takes part in a run with these parameters."""
        return True

    @abc.abstractmethod
    def save(self, out: OutStream) -> None:
        """Write the payload; the machine stands still."""

    @abc.abstractmethod
    def load(self, inp: InStream, header: SectionHeader) -> None:
        """Read the payload to its last byte. Raises StreamError (the driver adds section and offset)."""

    def describe(self) -> dict[str, Any] | None:
        """The members of this device in the vmdescription (vmsd_name, version, fields, subsections) for what save()
        wrote last, or None: opaque bytes. Duplicate keys are not needed by any type that we write.
        """
        return None

    def cleanup(self, outcome: Outcome) -> None:
        """The run is over on the source; called once for every handler whose setup or save was reached."""

    def load_prepare(self) -> None:
        """The destination listens, and nobody has connected: what takes a while may begin. On the incoming thread; returns at
        once. load_cleanup() follows, also where nobody ever connects.
        """

    def load_setup(self, ctx: LoadContext) -> None:
        """Before the first section is read."""

    def load_complete(self) -> None:
        """Everything was read and nothing is missing; the machine starts after this. May raise to refuse."""

    def load_activate(self) -> None:
        """The source has handed over, and the fence agrees: let the app have what only one side may hold (a disk). Before
        activate() of the machine; may raise, and the machine stays with the source.
        """

    @property
    def load_failure(self) -> BaseException | None:
        """What has gone wrong aside of the stream, on a channel of its own: the reason where the source breaks off."""
        return None

    def load_cleanup(self, outcome: Outcome) -> None:
        """The run is over on the destination."""

    def query(self) -> dict[str, Any]:
        """Own members of query-migrate, such as {'ram': {...}}. Called from any thread, at any time."""
        return {}


def load_cleanup(handlers: Iterable[SaveVMHandler], outcome: Outcome) -> None:
    """Tell all of them; what one raises is logged."""
    for handler in handlers:
        try:
            handler.load_cleanup(outcome)
        except Exception:
            log.exception("load_cleanup of section %s failed", handler.idstr)


class LiveSaveVMHandler(SaveVMHandler):
    """A section that is sent while the machine runs: START, any number of PARTs, END."""

    #: The last iterate() left off early because what it sends is not there yet (a disk is being read): the sections
    #: behind it are not to wait for that.
    waiting: bool = False

    @abc.abstractmethod
    def setup(self, out: OutStream, params: RunParams) -> None:
        """Payload of START; from now on changes are tracked."""

    @abc.abstractmethod
    def pending(self, exact: bool) -> Pending:
        """What is left. exact: look at what the machine has dirtied since the last look."""

    @abc.abstractmethod
    def iterate(self, out: OutStream, budget: Budget) -> bool:
        """Payload of one PART; True when nothing was left at the last look."""

    @abc.abstractmethod
    def complete(self, out: OutStream, mode: Mode) -> None:
        """Payload of END: all that is left; the machine stands still."""

    def save(self, out: OutStream) -> None:
        raise NotImplementedError(f"{self.idstr} is a live section")


class TailTaken(Exception):
    """Raised by load() of a handler that consumed the stream to its very end, footers and EOF included."""


UnknownSection = Callable[[SectionHeader, InStream], SaveVMHandler | None]


def _key(handler: SaveVMHandler) -> tuple[str, int]:
    return handler.idstr, handler.instance_id


class SaveDriver:
    """Writes one stream. The caller decides when; the handlers write the payloads."""

    def __init__(
        self, out: OutStream, machine: Machine, handlers: Iterable[SaveVMHandler], dialect: Dialect
    ) -> None:
        self.out = out
        self.machine = machine
        self.dialect = dialect
        # Ids count from 1: a receiver takes PART id 0 for its first handler.
        self.handlers = list(enumerate(handlers, start=1))
        self._params = RunParams()
        self._configuration: Configuration | None = None
        self._active: list[tuple[int, SaveVMHandler]] = []
        self._described: list[dict[str, Any]] = []
        self._reached: list[SaveVMHandler] = []

    # ---- framing

    def _section(
        self, item: ItemType, section_id: int, handler: SaveVMHandler, write: Callable[[], object]
    ) -> Any:
        header = SectionHeader(
            item, section_id, handler.idstr, handler.instance_id, handler.version_id
        )
        if handler not in self._reached:
            self._reached.append(handler)
        try:
            if handler.verbatim:
                return write()
            self.out.write(items.encode_section_header(header))
            result = write()
            if self.dialect.footers:
                self.out.write(items.encode_footer(section_id))
        except MigrationError as error:
            error.at(section=handler.idstr, offset=self.out.position)
            raise
        return result

    def _full(self, section_id: int, handler: SaveVMHandler) -> None:
        start = self.out.position
        self._section(ItemType.SECTION_FULL, section_id, handler, lambda: handler.save(self.out))
        if handler.verbatim:
            return
        entry: dict[str, Any] = {"name": handler.idstr, "instance_id": handler.instance_id}
        members = handler.describe()
        if members is None:
            head = SectionHeader(ItemType.SECTION_FULL, section_id, handler.idstr)
            framing = len(items.encode_section_header(head)) + 5 * self.dialect.footers
            size = self.out.position - start - framing
            members = {"size": size, "fields": [{"name": "data", "size": size, "type": "buffer"}]}
        self._described.append(entry | members)

    # ---- the phases of a stream

    def header(self, configuration: Configuration) -> None:
        self.out.write(items.encode_header())
        if self.dialect.configuration:
            self._configuration = configuration
            self.out.write(items.encode_configuration(configuration))

    def command(self, command: Command, data: bytes = b"") -> None:
        self.out.write(items.encode_command(command, data))

    def setup(self, params: RunParams) -> None:
        """Early devices, then START of every live section."""
        self._params = params
        self._active = [(i, h) for i, h in self.handlers if h.is_active(params)]
        for section_id, handler in self._active:
            if handler.early_setup:
                self._full(section_id, handler)
        for section_id, live in self._live():
            self._section(
                ItemType.SECTION_START,
                section_id,
                live,
                lambda live=live: live.setup(self.out, params),  # type: ignore[misc]
            )
        self.out.flush()

    def _live(self) -> list[tuple[int, LiveSaveVMHandler]]:
        return [(i, h) for i, h in self._active if isinstance(h, LiveSaveVMHandler)]

    def pending(self, *, exact: bool) -> Pending:
        """The sum over the live sections; the dirty rate is known when one of them knows its own."""
        all_pending = [h.pending(exact) for _, h in self._live()]
        rates = [p.dirty_bytes_per_s for p in all_pending if p.dirty_bytes_per_s is not None]
        return Pending(
            sum(p.precopy for p in all_pending),
            sum(p.postcopy for p in all_pending),
            sum(rates) if rates else None,
        )

    def iterate(self, budget: Budget) -> bool:
        """One PART of each live section in turn, up to the first that has more to send (QEMU's order before 9.0)."""
        all_done = True
        for section_id, live in self._live():
            done = self._section(
                ItemType.SECTION_PART,
                section_id,
                live,
                lambda live=live: live.iterate(self.out, budget),  # type: ignore[misc]
            )
            all_done = all_done and done
            if not done and not live.waiting:
                break
        return all_done

    def complete(self, mode: Mode) -> None:
        """END of every live section, then every other device that is active now. The machine stands still."""
        if self.dialect.switchover_start:
            self.command(Command.SWITCHOVER_START)
        for section_id, live in self._live():
            self._section(
                ItemType.SECTION_END,
                section_id,
                live,
                lambda live=live: live.complete(self.out, mode),  # type: ignore[misc]
            )
        rest = [
            (i, h)
            for i, h in self.handlers
            if not isinstance(h, LiveSaveVMHandler) and h.is_active(self._params)
        ]
        for section_id, handler in sorted(rest, key=lambda e: -e[1].priority):
            if not handler.early_setup:
                self._full(section_id, handler)
        self.out.flush()

    def tail(self) -> bytes:
        """The byte that commits, and the vmdescription behind it: for the caller to write when the time has come."""
        eof = bytes((ItemType.EOF,))
        if self.dialect.vmdescription:
            return eof + items.encode_vmdescription(self.vmdescription())
        return eof

    def vmdescription(self) -> bytes:
        for _, handler in self._active:
            own = getattr(handler, "vmdescription", None)  # a verbatim handler brings its own
            if own is not None:
                return bytes(own)
        text: dict[str, Any] = {}
        if self.dialect.described_configuration and self._configuration is not None:
            text["configuration"] = items.describe_configuration(self._configuration)
        text |= {"page_size": 1 << self.machine.target_page_bits, "devices": self._described}
        return json.dumps(text).encode("ascii")

    def cleanup(self, outcome: Outcome) -> None:
        for handler in self._reached:
            try:
                handler.cleanup(outcome)
            except Exception:
                log.exception("cleanup of section %s failed", handler.idstr)
        self._reached.clear()


@attrs.define
class LoadStatus:
    """What load() came to."""

    eof: bool = False
    tail_taken: bool = False
    vmdescription: bytes | None = None
    configuration: Configuration | None = None
    loaded: set[tuple[str, int]] = attrs.field(factory=set)


class LoadDriver:
    """Reads one stream, up to and including EOF. Re-entrant: a packaged stream is loaded by items() of the same driver
    on another InStream.

    dialect: what the stream must look like; None: as it comes. Whether it has a configuration section and footers shows
    at the first place where one can be, since no item begins with a footer's byte; `dialect` tells it from then on.
    """

    def __init__(
        self,
        machine: Machine,
        handlers: Sequence[SaveVMHandler],
        dialect: Dialect | None,
        *,
        on_command: Callable[[Command, bytes, InStream], None] | None = None,
        unknown_section: UnknownSection | None = None,
        check_machine: bool = True,
        capabilities: Iterable[str] = (),
        accept: Accept = no_channel,
    ) -> None:
        """capabilities: those that are on here, of the ones that a stream names: each may change its form.
        accept: see LoadContext.
        """
        self._accept = accept
        self.machine = machine
        self.dialect = Dialect() if dialect is None else dialect
        self._find_configuration = self._find_footers = dialect is None
        self.status = LoadStatus()
        self._handlers = {_key(h): h for h in handlers}
        self._on_command = on_command
        self._unknown = unknown_section
        self._check_machine = check_machine
        self._capabilities = frozenset(capabilities)
        self._live: dict[int, tuple[SectionHeader, SaveVMHandler]] = {}

    def load(self, inp: InStream) -> LoadStatus:
        """Header, configuration and all items. Raises StreamError and EndOfStream with section and offset."""
        items.read_header(inp)
        pushed_back: int | None = None
        if self._find_configuration:
            found = inp.buffered(1)[0] == ItemType.CONFIGURATION
            self.dialect = attrs.evolve(self.dialect, configuration=found)
        if self.dialect.configuration:
            offset = inp.position
            configuration, pushed_back = items.read_configuration(inp, inp.u8())
            self.status.configuration = configuration
            if self._check_machine:
                self._check(configuration, offset)
            self._check_capabilities(configuration, offset)
        ctx = LoadContext(
            machine=self.machine, configuration=self.status.configuration, accept=self._accept
        )
        with self._at(inp):
            for handler in self._handlers.values():
                handler.load_setup(ctx)
        try:
            self.items(inp, pushed_back)
        except ChannelError as error:
            for handler in self._handlers.values():
                reason = handler.load_failure
                if reason is not None and reason is not error:
                    raise reason from error  # the source gave up because of it
            raise
        if not self.status.tail_taken:
            self._check_complete(inp)
        with self._at(inp):
            for handler in self._handlers.values():
                handler.load_complete()
        return self.status

    @contextlib.contextmanager
    def _at(self, inp: InStream) -> Iterator[None]:
        try:
            yield
        except StreamError as error:
            error.at(offset=inp.position)
            raise

    def items(self, inp: InStream, first: int | None = None) -> None:
        """Items up to EOF, the type byte of the first having been read perhaps."""
        while True:
            offset = inp.position - (first is not None)
            byte = inp.u8() if first is None else first
            first = None
            if byte == ItemType.EOF:
                self.status.eof = True
                return
            if byte in (ItemType.SECTION_START, ItemType.SECTION_FULL):
                if self._named(inp, ItemType(byte)):
                    return
            elif byte in (ItemType.SECTION_PART, ItemType.SECTION_END):
                self._part(inp, ItemType(byte))
            elif byte == ItemType.COMMAND:
                command, data = items.read_command(inp)
                if self._on_command is None:
                    raise StreamError(f"command {command.name} is not possible here", offset=offset)
                self._on_command(command, data, inp)
            else:
                raise StreamError(
                    "unknown item type",
                    offset=offset,
                    expected="00 to 04 or 08",
                    found=f"{byte:02x}",
                )

    def vmdescription(self, inp: InStream) -> bytes | None:
        """What may follow EOF: the JSON text, or None if the stream ends there or goes on with something else."""
        if inp.at_end() or inp.u8() != ItemType.VMDESCRIPTION:
            return None
        self.status.vmdescription = items.read_vmdescription(inp)
        return self.status.vmdescription

    # ---- sections

    def _named(self, inp: InStream, item: ItemType) -> bool:
        """A START or FULL; True if its handler took the rest of the stream."""
        offset = inp.position - 1
        header = items.read_section_header(inp, item)
        handler = self._handlers.get((header.idstr, header.instance_id))
        if handler is None and self._unknown is not None:
            handler = self._unknown(header, inp)
        if handler is None:
            raise self._unknown_section(header, offset)
        if not handler.minimum_version_id <= header.version_id <= handler.version_id:
            raise StreamError(
                "unsupported version of the section",
                section=header.idstr,
                offset=offset,
                expected=f"{handler.minimum_version_id} to {handler.version_id}",
                found=header.version_id,
            )
        if item is ItemType.SECTION_START:
            self._live[header.section_id] = (header, handler)
        taken = self._payload(inp, header, handler)
        self.status.loaded.add((header.idstr, header.instance_id))
        return taken

    def _part(self, inp: InStream, item: ItemType) -> None:
        offset = inp.position - 1
        header = items.read_section_header(inp, item)
        known = self._live.get(header.section_id)
        if known is None:
            raise StreamError(
                f"{item.name} of a section that was never started",
                offset=offset,
                expected=f"an id of {sorted(self._live)}",
                found=header.section_id,
            )
        start, handler = known
        header = attrs.evolve(start, type=item)
        self._payload(inp, header, handler)

    def _payload(self, inp: InStream, header: SectionHeader, handler: SaveVMHandler) -> bool:
        try:
            handler.load(inp, header)
            self._look_for_footer(inp)
            if self.dialect.footers:
                items.read_footer(inp, header)
        except TailTaken:
            self.status.tail_taken = self.status.eof = True
            return True
        except MigrationError as error:
            error.at(section=header.idstr, offset=inp.position)
            raise
        except (ValueError, ArithmeticError, LookupError, TypeError) as error:
            raise StreamError(
                f"the section could not be loaded: {error}",
                section=header.idstr,
                offset=inp.position,
            ) from error
        return False

    def _look_for_footer(self, inp: InStream) -> None:
        """After the first payload: does a footer follow?"""
        if self._find_footers:
            found = inp.buffered(1)[0] == ItemType.FOOTER
            self.dialect = attrs.evolve(self.dialect, footers=found)
            self._find_footers = False

    # ---- checks

    def _check(self, configuration: Configuration, offset: int) -> None:
        bits = configuration.target_page_bits
        pairs = [("machine type", self.machine.machine_type, configuration.machine_type)]
        if bits is not None:
            pairs.append(("target page bits", str(self.machine.target_page_bits), str(bits)))
        if self.machine.uuid is not None and configuration.uuid is not None:
            pairs.append(("uuid", self.machine.uuid.hex(), configuration.uuid.hex()))
        for what, expected, found in pairs:
            if expected != found:
                raise StreamError(
                    f"the {what} of the source is another",
                    section="configuration",
                    offset=offset,
                    expected=repr(expected),
                    found=repr(found),
                    hint="Start the destination with the same machine",
                )

    def _check_capabilities(self, configuration: Configuration, offset: int) -> None:
        sent = frozenset(configuration.capabilities or ())
        for name in sorted(sent ^ self._capabilities):
            theirs, ours = ("on", "off") if name in sent else ("off", "on")
            raise StreamError(
                f"the source has capability {name} {theirs}, and it is {ours} here",
                section="configuration",
                offset=offset,
                expected=", ".join(sorted(self._capabilities)) or "no capability",
                found=", ".join(sorted(sent)) or "no capability",
                hint="Switch it alike on both sides",
            )

    def _unknown_section(self, header: SectionHeader, offset: int) -> StreamError:
        names = [f"{i} (instance {n})" for i, n in self._handlers if i == header.idstr]
        names = names or sorted({i for i, _ in self._handlers})
        return StreamError(
            f"unknown section '{header.idstr}' instance {header.instance_id}",
            section=header.idstr,
            offset=offset,
            expected=f"one of {', '.join(names[:20])}",
            hint="Add that part to the destination's machine, or install the plugin that handles the section",
        )

    def _check_complete(self, inp: InStream) -> None:
        missing = [
            f"{i} (instance {n})"
            for (i, n), h in self._handlers.items()
            if (i, n) not in self.status.loaded and not h.optional and h.is_active(RunParams())
        ]
        if missing:
            raise StreamError(
                f"the stream ended without {', '.join(missing)}",
                section=missing[0].split(" ")[0],
                offset=inp.position,
                hint="The source's machine lacks a part that this one has: start the destination with the same parts",
            )

    def cleanup(self, outcome: Outcome) -> None:
        load_cleanup(self._handlers.values(), outcome)
