"""Pass the migration of a running machine on from one peer to another, and check it on the way.

    source --IN--> relay --OUT--> destination          the stream: one thread reads, checks, sends on
           <------       <-------                      the return path: another passes whole messages on

Nothing is kept. What has not been checked does not go on, so that a wrong stream ends here: the destination starts its
machine after the EOF byte only, and that byte goes on last.

Who may run the machine: as long as EOF has not gone on, the source; whatever fails then, it is told (SHUT 1) or loses
its connection, and runs on. Behind EOF the destination's answer decides, and the relay only passes it on. If the
destination is proved to be gone, the relay answers in its place; if nothing is proved, it keeps the source waiting
until a person has decided.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from whimbrel.channel import Buffer, Channel, Role
from whimbrel.errors import (
    ChannelError,
    EndOfStream,
    MigrationError,
    OutcomeUnknown,
    PeerError,
    StreamError,
)
from whimbrel.kernel import Kernel
from whimbrel.machine import Machine
from whimbrel.plugins import Plugins
from whimbrel.savevm import LoadDriver, SaveVMHandler
from whimbrel.stream import InStream
from whimbrel.way_back import LINGER, check_precopy, linger
from whimbrel.wire.format import Command, Dialect, ItemType
from whimbrel.wire.items import SectionHeader
from whimbrel.wire.return_path import encode_shut
from whimbrel_qemu.answers import Answers
from whimbrel_qemu.guest import explain
from whimbrel_qemu.options import RELAYING, set_those
from whimbrel_qemu.passing import PassingDevices, PassingRam, PassingRest
from whimbrel_qemu.progress import Progress
from whimbrel_qemu.receiving import BROKE_OFF, HEADER, NOT_TOLD, refuse_multifd
from whimbrel_qemu.tail import Section

#: Seconds in which a destination that hung up may still say why.
_LAST_WORDS = 1.0
#: Seconds for the orderly end of the way out.
_FINISH = 30.0
_POLL = 0.2  # seconds between looks at a Ctrl-C
_RUNS_ON = "The source runs on"
_ONE_CHANNEL = "Switch the capability multifd off on the source"
#: Bytes of what passes: nothing is put in place, and what is large is looked at, and sent, in fewer steps.
_BUFFER = 1 << 20
_OWN_LOG = "Its own log says why; the source runs on"
_LOOK = (
    "The source waits for a word: look whether the destination runs the machine. Without a word from here the source"
    " may go on by itself as soon as its connection ends"
)

log = logging.getLogger("whimbrel.qemu")


@attrs.frozen(kw_only=True)
class PassedSection:
    """One section that passed. Bytes are those of its payload; None: they cannot be told from what follows."""

    idstr: str
    instance_id: int
    #: None: not seen.
    version_id: int | None
    #: "live", "device", or "unverified": the first one from which on nothing could be told apart.
    kind: str
    bytes: int | None


@attrs.frozen(kw_only=True)
class Relayed:
    """What passed. Sizes in bytes, times in seconds."""

    source: str
    destination: str
    #: None: an old one, whose stream does not name it.
    machine_type: str | None
    #: RunState of the machine before it was stopped.
    run_state: str | None
    dialect: Dialect
    #: (idstr, bytes) of each RAMBlock.
    blocks: tuple[tuple[str, int], ...]
    #: Pages that came with their bytes, and pages that came as zero; a page counts each time that it passes.
    normal: int
    zero: int
    sections: tuple[PassedSection, ...]
    #: The section from which on nothing could be checked; None: everything was.
    unverified_from: str | None
    stream_bytes: int
    #: From the source's first byte to the end.
    seconds: float
    #: From the first byte that the source sent with its machine stopped to the destination's answer, or to the end
    #: where it gives none; None: not seen.
    downtime: float | None
    #: The destination said that it has taken over; False where the source did not ask.
    acknowledged: bool


#: Called when nobody can tell whether the destination has the machine, with the source still waiting; True: it has, False: it
#: has not, and never will; None: let go without a word.
OnUnknown = Callable[[OutcomeUnknown], bool | None]


def relay(
    source: str,
    destination: str,
    *,
    dialect: Dialect | None = None,
    settings: Mapping[str, Any] | None = None,
    plugins: Plugins | None = None,
    named_fds: Mapping[str, int] | None = None,
    on_listening: Callable[[tuple[str, ...]], None] = lambda _: None,
    on_unknown: OnUnknown = lambda _: None,
    progress: Progress | None = None,
) -> Relayed:
    """Listen at the URI `source`, take one migration, and pass it on to the URI `destination`.

    The destination is connected when the source has. dialect: the form that the stream must have; None: it shows.
    settings: of transports and filters.
    on_listening is told the real addresses, as URIs, once a source can connect.

    Raises LocalError, SettingError, UriError, ChannelError, StreamError, PeerError (the destination refused): the source runs on;
    OutcomeUnknown if on_unknown() does not know either. KeyboardInterrupt leaves the machine with the source; it is held back
    while the destination decides, and a second one raises OutcomeUnknown.
    """
    progress = progress if progress is not None else Progress()
    kernel = Kernel(plugins=plugins)
    kernel.named_fds.update(named_fds or {})
    set_those(kernel, settings, RELAYING)
    cancel_fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        way_out = kernel.route(destination)
        context = kernel.context(Role.DESTINATION, cancel_fd)
        with kernel.route(source).listen(context) as listener:
            progress.begin("waiting for the source")
            on_listening(listener.addresses)
            with listener.accept() as from_source:
                progress.begin("connecting to the destination")
                with way_out.connect(kernel.context(Role.SOURCE, cancel_fd)) as to_destination:
                    passage = Passage(
                        from_source,
                        to_destination,
                        dialect=dialect,
                        check_others=functools.partial(refuse_multifd, listener, _ONE_CHANNEL),
                    )
                    progress.begin("relaying", lambda: passage.position)
                    return passage.run(on_unknown)
    finally:
        os.close(cancel_fd)


class Passage:
    """One migration on its way from one open channel to another."""

    def __init__(
        self,
        source: Channel,
        destination: Channel,
        *,
        dialect: Dialect | None = None,
        check_others: Callable[[], None] = lambda: None,
    ) -> None:
        """check_others is called before RAM comes and before the end goes on: it raises if the source sends over another
        channel as well.
        """
        self._source = source
        self._destination = destination
        self._check_others = check_others
        self._expected = dialect
        self._inp = InStream(source, buffer_size=_BUFFER, tap=self._forward)
        self._ram = PassingRam(on_start=check_others, on_end=self._source_stopped)
        self._driver = LoadDriver(
            Machine("any"),
            [self._ram],
            dialect,
            on_command=self._command,
            unknown_section=self._unknown_section,
            check_machine=False,
        )
        self._taken: PassingDevices | PassingRest | None = None
        self._unverified_from: str | None = None
        self._answers: Answers | None = None
        self._deciding = threading.Lock()
        self._committed = False  # the destination may start its machine
        self._given_up = False  # the source was told that it will not
        self._began = time.monotonic()
        self._stopped: float | None = None

    @property
    def position(self) -> int:
        """Bytes of the stream that were read."""
        return self._inp.position

    def run(self, on_unknown: OnUnknown = lambda _: None) -> Relayed:
        """To the end. Raises as relay() does; the channels stay open."""
        try:
            try:
                self._driver.load(self._inp)
                if self._taken is None:
                    self._end_without_devices()
                acknowledged = self._end()
            except BaseException as error:
                if not self._has_taken_over():
                    reason = self._reason(error)
                    if reason is error:
                        raise
                    raise reason from error
                acknowledged = True
        except OutcomeUnknown as unknown:
            self._resolve(unknown, on_unknown)
            acknowledged = False
        except BaseException:
            self._give_up()
            raise
        finally:
            self._close_answers()
        return self._relayed(acknowledged)

    # ---- the stream

    def _forward(self, data: Buffer) -> None:
        try:
            self._destination.send([data])
        except ChannelError as error:
            raise _DestinationFailed(error.message) from error

    def _commit(self, data: Buffer) -> None:
        """What begins with the EOF byte."""
        self._check_others()
        self._maybe_committed()
        self._forward(data)

    def _maybe_committed(self) -> None:
        """The EOF byte may be in what goes on next. Raises ChannelError if the destination has given up before."""
        with self._deciding:
            if self._given_up:
                raise ChannelError("the destination gave up")
            self._committed = True

    def _source_stopped(self) -> None:
        if self._stopped is None:
            self._stopped = time.monotonic()

    def _command(self, command: Command, data: bytes, inp: InStream) -> None:
        if command is Command.OPEN_RETURN_PATH:
            self._open_way_back()
        elif command is Command.PING and self._answers is None:
            raise StreamError(
                "PING without a return path",
                offset=inp.position,
                expected=f"{Command.OPEN_RETURN_PATH.name} before it",
            )
        else:
            check_precopy(command, data, inp)

    def _open_way_back(self) -> None:
        if self._answers is not None:
            return
        back, out = self._source.return_path(), self._destination.return_path()
        if back is None or out is None:
            blind = self._source if back is None else self._destination
            if back is not None:
                back.send([encode_shut(1)])
                linger(self._source)
            raise StreamError(
                f"the source wants answers, but {blind.name} has no way back",
                offset=self._inp.position,
                hint="Switch the capability return-path off on the source",
            )
        self._answers = Answers(
            out,
            back,
            may_take_over=lambda: self._committed,
            on_end=self._destination_ended,
        )
        self._answers.start()

    def _destination_ended(self) -> None:
        """It will say nothing more. As long as it cannot have started the machine, there is no use in going on."""
        with self._deciding:
            if self._committed:
                return
            self._given_up = True
        if self._answers is not None:
            self._answers.tell(1)
        self._source.abort()

    def _over(self) -> bool:
        return self._answers is not None and self._answers.ended.is_set()

    def _unknown_section(self, header: SectionHeader, inp: InStream) -> SaveVMHandler:
        dialect = self._driver.dialect
        if header.type is ItemType.SECTION_START or not self._ram.went_on:
            self._unverified_from = header.idstr
            self._taken = PassingRest(
                self._maybe_committed, described=dialect.configuration, over=self._over
            )
            log.info("from section '%s' on, the stream passes unverified", header.idstr)
        else:
            self._source_stopped()
            self._taken = PassingDevices(
                self._forward,
                self._commit,
                footers=dialect.footers,
                described=dialect.configuration,
                over=self._over,
            )
        return self._taken

    def _end_without_devices(self) -> None:
        """The EOF byte was read as an item: no device section comes before it, and all is checked."""
        self._check_others()
        self._maybe_committed()
        self._inp.drain_tap()
        self._driver.vmdescription(self._inp)

    # ---- the end

    def _end(self) -> bool:
        """Whether the destination said that it has the machine. Raises PeerError, OutcomeUnknown, ChannelError."""
        self._inp.drain_tap()
        deadline = time.monotonic() + _FINISH
        if self._answers is None:
            self._destination.finish(deadline)
            return False
        source_is_gone = isinstance(self._taken, PassingRest) and not self._over()
        if source_is_gone:
            self._destination.finish(deadline)
        self._await_answer(self._answers.ended)
        self._judge(self._answers)
        if not source_is_gone:
            with contextlib.suppress(MigrationError):
                self._destination.finish(deadline)
        return True

    @staticmethod
    def _await_answer(ended: threading.Event) -> None:
        try:
            while not ended.wait(_POLL):
                pass
        except KeyboardInterrupt:
            log.warning(
                "too late: the destination decides now. Ctrl-C once more leaves it undecided"
            )
            while not ended.wait(_POLL):
                pass

    def _judge(self, answers: Answers) -> None:
        """Behind EOF, with all that the destination will ever say. Raises PeerError, OutcomeUnknown."""
        if answers.status is not None:
            if answers.status:
                raise _refusal(answers.status)
            if not answers.told:
                raise OutcomeUnknown(
                    f"the destination has taken over, but the source could not be told: {answers.error}",
                    hint="Make sure that the source does not run the machine",
                )
            return
        if (
            isinstance(answers.error, EndOfStream)
            and self._destination.eof_means_peer_gone
            and not answers.relayed
        ):
            raise PeerError("the destination went away before it took over", hint=_OWN_LOG)
        raise OutcomeUnknown(
            f"the link to the destination was lost after the end of the stream was sent: {answers.error}",
            hint=_LOOK,
        )

    def _has_taken_over(self) -> bool:
        """Both the destination and the source know that it has."""
        return self._answers is not None and self._answers.told and self._answers.status == 0

    def _reason(self, error: BaseException) -> BaseException:
        """What ended the passage, given what was raised here."""
        if isinstance(error, OutcomeUnknown | PeerError):
            return error
        if self._committed:
            return self._lost_behind_eof(error)
        answers = self._answers
        if answers is not None and isinstance(error, ChannelError):
            answers.ended.wait(_LAST_WORDS if isinstance(error, _DestinationFailed) else 0)
            if answers.ended.is_set():
                if answers.status:
                    return _refusal(answers.status)
                return PeerError(f"the destination gave up: {answers.error}", hint=_OWN_LOG)
        if isinstance(error, _DestinationFailed):
            hint = _OWN_LOG if answers is not None else f"Its own log says why. {NOT_TOLD}"
            return ChannelError(f"the destination hung up: {error.message}", hint=hint)
        explain(error, self._expected)
        if isinstance(error, EndOfStream):
            error.hint = error.hint or BROKE_OFF
        elif isinstance(error, MigrationError) and answers is None and self.position > HEADER:
            error.hint = f"{error.hint}. {NOT_TOLD}" if error.hint else NOT_TOLD
        return error

    def _lost_behind_eof(self, error: BaseException) -> BaseException:
        if self._answers is not None and self._answers.status:
            return _refusal(self._answers.status)
        if self._answers is not None:
            return OutcomeUnknown(f"stopped while the destination decided: {error!s}", hint=_LOOK)
        return OutcomeUnknown(
            f"the link to the destination was lost at the end of the stream: {error}",
            hint="The source did not ask for an answer, and takes its machine for moved. Look whether the destination"
            " runs it; if not, 'cont' lets it run on at the source",
        )

    def _give_up(self) -> None:
        """The machine stays at the source."""
        if self._answers is not None:
            self._answers.tell(1)
            linger(self._source)
        self._destination.abort()

    def _resolve(self, unknown: OutcomeUnknown, on_unknown: OnUnknown) -> None:
        """The source waits until somebody knows. Returns if the destination has the machine; raises otherwise."""
        if self._answers is None or self._answers.told or self._answers.status is not None:
            raise unknown
        taken_over = on_unknown(unknown)
        if self._answers.status is not None:  # it has answered meanwhile
            taken_over = self._answers.status == 0
        if taken_over is None:
            raise unknown
        self._answers.tell(0 if taken_over else 1)
        if not self._answers.told:
            raise unknown
        if not taken_over:
            raise PeerError(
                "the destination has not taken over, as was decided here", hint=_RUNS_ON
            )

    def _close_answers(self) -> None:
        if self._answers is not None:
            self._destination.abort()
            self._answers.join(LINGER)
            if self._answers.is_alive():  # it sends to a source that does not read
                self._source.abort()
                self._answers.join()

    def _relayed(self, acknowledged: bool) -> Relayed:
        status, now = self._driver.status, time.monotonic()
        devices: list[Section] = []
        run_state = None
        if isinstance(self._taken, PassingDevices):
            tail = self._taken.tail
            with contextlib.suppress(
                StreamError
            ):  # of the text, which the destination need not read
                if tail is not None:
                    devices, run_state = tail.split(), tail.run_state
            if not devices:
                self._unverified_from = self._taken.first
        sections = [
            PassedSection(
                idstr="ram",
                instance_id=0,
                version_id=self._ram.version_id,
                kind="live",
                bytes=self._ram.bytes,
            )
        ]
        sections += [
            PassedSection(
                idstr=section.device.name,
                instance_id=section.device.instance_id,
                version_id=section.version_id,
                kind="device",
                bytes=len(section.payload),
            )
            for section in devices
        ]
        if self._unverified_from is not None:
            sections.append(
                PassedSection(
                    idstr=self._unverified_from,
                    instance_id=0,
                    version_id=None,
                    kind="unverified",
                    bytes=None,
                )
            )
        configuration = status.configuration
        return Relayed(
            source=self._source.name,
            destination=self._destination.name,
            machine_type=configuration.machine_type if configuration is not None else None,
            run_state=run_state,
            dialect=self._driver.dialect,
            blocks=tuple((b.idstr, b.size) for b in self._ram.blocks),
            normal=self._ram.normal,
            zero=self._ram.zero,
            sections=tuple(sections),
            unverified_from=self._unverified_from,
            stream_bytes=self._inp.position,
            seconds=now - self._began,
            downtime=None if self._stopped is None else now - self._stopped,
            acknowledged=acknowledged,
        )


class _DestinationFailed(ChannelError):
    """Sending on failed."""


def _refusal(status: int) -> PeerError:
    return PeerError(f"the destination refused the migration (status {status})", hint=_OWN_LOG)
