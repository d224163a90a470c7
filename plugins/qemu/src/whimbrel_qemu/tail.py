"""The device sections of somebody else's machine, kept as they came, and where they end.

A device section has no length. Only the vmdescription behind the end of the stream tells how long each one is, and the
source of a live stream waits for an answer instead of closing the connection. So the end is found while bytes arrive:
every `00 06 length {` may be the EOF byte and a vmdescription; it is if the text is one and the devices that it lists
fill the bytes before it exactly, section header and footer of each included.

Nothing is looked at twice: a text contains no NUL, and each candidate begins with one, so that the texts that must be
looked through are disjoint but for a few bytes.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from whimbrel.channel import Buffer
from whimbrel.errors import DeadlineExceeded, EndOfStream, StreamError
from whimbrel.savevm import SaveVMHandler, TailTaken
from whimbrel.stream import InStream, OutStream
from whimbrel.wire import items
from whimbrel.wire.format import MAX_VMDESCRIPTION, PING_COMMIT, Command, ItemType
from whimbrel.wire.items import SectionHeader
from whimbrel_device import vmdesc
from whimbrel_qemu.milestones import Milestones, is_milestone

#: Bytes of device sections that are accepted. QEMU's own are below 1 MiB, large ones (a GPU's) some tens of MiB.
MAX_TAIL = 256 << 20
#: Seconds of silence within the device sections: the source has stopped its machine and has only to send.
PATIENCE = 30.0
#: Seconds without a further byte after which a PING behind a footer is taken for the end of what comes.
_SILENCE = 0.02
_CHUNK = 64 << 10

_U32 = struct.Struct(">I")
_END = bytes((ItemType.EOF, ItemType.VMDESCRIPTION))
_FOOTER = 5
_LONGEST_NAME = 255
#: How often the device sections are gone through from another start: a hostile stream has many that look like one.
_MAX_WALKS = 8
#: Devices that may have come before RAM (virtio-mem has one each).
_MAX_EARLY = 16
_PING = bytes((ItemType.COMMAND,)) + struct.pack(">HH", Command.PING, 4)


@attrs.frozen(kw_only=True)
class Section:
    """One device section: what describes it, the version in its header, its payload, and all of it with its frame."""

    device: vmdesc.Device
    version_id: int
    payload: memoryview
    data: memoryview


@attrs.frozen(kw_only=True)
class Tail:
    """FULL sections as they are on the wire, without commands, and the text that describes them.

    Without a description (old machine types send none) the sections cannot be told apart.
    """

    sections: bytes
    vmdescription: bytes | None
    footers: bool = True
    #: So many of the sections that are described came before RAM, and are not among these.
    early: int = 0

    @functools.cached_property
    def description(self) -> vmdesc.Description | None:
        """What the text says; it is read when somebody asks. Raises StreamError."""
        return None if self.vmdescription is None else vmdesc.parse(self.vmdescription)

    def payloads(self) -> list[tuple[vmdesc.Device, memoryview]]:
        """Each device with the bytes of its payload, in the order of the stream."""
        return [(section.device, section.payload) for section in self.split()]

    def split(self) -> list[Section]:
        """The sections one by one, in the order of the stream; none if nothing describes them."""
        if self.description is None:
            return []
        whole = memoryview(self.sections)
        walk, found = _Walk(whole, self.footers), []
        for device in self.description.devices[self.early :]:
            start = walk.position
            payload = walk.device(device)
            found.append(
                Section(
                    device=device,
                    version_id=walk.version_id,
                    payload=payload,
                    data=whole[start : walk.position],
                )
            )
        return found

    @property
    def run_state(self) -> str | None:
        """What the section `globalstate` says the machine did before it was stopped; None without that section."""
        for device, payload in self.payloads():
            if device.name == "globalstate":  # u32 length, then NUL-padded text
                return items.shown(bytes(payload[4:]).split(b"\0")[0])
        return None


class _Walk:
    """Goes through FULL sections by what the description says of them. Raises StreamError where they differ."""

    def __init__(self, data: memoryview, footers: bool = True) -> None:
        self._data = data
        self._footers = footers
        self.position = 0
        self.version_id = 0  # of the device that came last
        self.commands: list[tuple[int, int]] = []  # (from, to)

    def read(self, n: int) -> bytes:
        """As whimbrel.wire.items.Reader."""
        found = bytes(self._data[self.position : self.position + n])
        if len(found) < n:
            raise StreamError("the sections are shorter than described", offset=self.position)
        self.position += n
        return found

    def device(self, device: vmdesc.Device | vmdesc.Extent) -> memoryview:
        """The payload of the next section, which must be this device's."""
        self.skip_commands()
        offset = self.position
        if self.read(1)[0] != ItemType.SECTION_FULL:
            raise StreamError("no section begins here", section=device.name, offset=offset)
        header = items.read_section_header(self, ItemType.SECTION_FULL)
        if (header.idstr, header.instance_id) != (device.name, device.instance_id):
            raise StreamError(
                "another section was described",
                section=header.idstr,
                offset=offset,
                expected=f"{device.name} instance {device.instance_id}",
                found=f"{header.idstr} instance {header.instance_id}",
            )
        self.version_id = header.version_id
        start = self.position
        self.position += device.payload_size(self._data[start:])
        payload = self._data[start : self.position]
        if self._footers:
            items.read_footer(self, header)
        return payload

    def skip_commands(self) -> None:
        while self._data[self.position : self.position + 1] == bytes((ItemType.COMMAND,)):
            start = self.position
            self.position += 1
            command, _ = items.read_command(self)
            if command is not Command.PING:
                raise StreamError(f"{command.name} among the device sections", offset=start)
            self.commands.append((start, self.position))


class TailReader:
    """Takes bytes as they arrive, the header of the first FULL section in front, until `tail` is there. Sans-I/O."""

    def __init__(self, base: int = 0, *, footers: bool = True, early: int = 0) -> None:
        """base: the offset in the stream of the first byte, for messages. footers: each section ends with one. early: so
        many of the sections that will be described came before.
        """
        self._early = early
        self._footers = footers
        self.tail: Tail | None = None
        #: Bytes that came behind the vmdescription.
        self.surplus = 0
        #: Where the EOF byte is, counted from the first byte taken; None until it was found.
        self.eof: int | None = None
        #: Why the last vmdescription that was found is not the end, or None.
        self.rejected: StreamError | None = None
        self._rejected_at: int | None = None  # where the first of those is
        self._base = base
        self._data = bytearray()
        self._scanned = 0  # no candidate begins before this
        self._text_scanned = 0  # no NUL in the text of the present candidate before this
        self._answered = 0  # where the last PING that was answered ends

    @property
    def position(self) -> int:
        """The offset in the stream behind the last byte taken."""
        return self._base + len(self._data)

    def feed(self, chunk: bytes | memoryview) -> None:
        """Take what arrived. Raises StreamError when it becomes too much."""
        if len(self._data) + len(chunk) > MAX_TAIL + MAX_VMDESCRIPTION:
            raise StreamError(
                "the device sections are too long",
                offset=self._base,
                expected=f"at most {MAX_TAIL} bytes",
            )
        self._data += chunk
        while self.tail is None and self._next_candidate():
            pass

    def _next_candidate(self) -> bool:
        """Look at the candidate at or behind `_scanned`; False when more bytes must come first."""
        data = self._data
        at = data.find(_END, self._scanned)
        if at < 0:
            self._scanned = max(self._scanned, len(data) - 1)
            return False
        self._scanned = at
        text_at = at + len(_END) + _U32.size
        if len(data) <= text_at:
            return False
        (length,) = _U32.unpack_from(data, at + len(_END))
        end = text_at + length
        if not 0 < length <= MAX_VMDESCRIPTION or data[text_at] != ord("{"):
            return self._dismiss()
        if data.find(0, max(text_at, self._text_scanned), end) >= 0:
            return self._dismiss()
        self._text_scanned = min(end, len(data))
        if len(data) < end:
            return False
        try:
            self._accept(at, bytes(data[text_at:end]))
        except StreamError as error:
            if error.offset is not None:  # counted from the first byte taken
                error.offset += self._base
            # Without the frames that it came through: they hold views of the data, which must be able to grow.
            self.rejected = error.with_traceback(None)
            self._rejected_at = at if self._rejected_at is None else self._rejected_at
            return self._dismiss()
        self.surplus = len(data) - end
        self.eof = at
        return False

    def _dismiss(self) -> bool:
        self._scanned += 1
        self._text_scanned = 0
        return True

    def _accept(self, at: int, text: bytes) -> None:
        devices = vmdesc.extents(text)[self._early :]
        with memoryview(self._data) as whole, whole[:at] as before:
            walk = _Walk(before, self._footers)
            for device in devices:
                walk.device(device).release()
            walk.skip_commands()
            if walk.position != at:
                raise StreamError("there are more sections than described", offset=walk.position)
            kept, start = bytearray(), 0
            for command, behind in walk.commands:
                kept += before[start:command]
                start = behind
            kept += before[start:]
        self.tail = Tail(
            sections=bytes(kept),
            vmdescription=text,
            footers=self._footers,
            early=self._early,
        )

    def end_without_description(self) -> bool:
        """The stream has ended: take what came if it can have ended there, with the EOF byte; whether it was so."""
        data, end = self._data, len(self._data) - 1
        if self.rejected is not None or end < _FOOTER or data[end] != ItemType.EOF:
            return False
        behind_ping = data[end - len(_PING) - _U32.size :].startswith(_PING)
        if self._footers and data[end - _FOOTER] != ItemType.FOOTER and not behind_ping:
            return False
        self.tail = Tail(sections=bytes(data[:end]), vmdescription=None, footers=self._footers)
        return True

    @property
    def settled(self) -> int:
        """How many of the bytes taken come before any that may be the EOF byte, with what has arrived; all, once the
        end was found.
        """
        data = self._data
        if self.tail is not None:
            return len(data)
        if self._rejected_at is not None:
            return self._rejected_at  # by chance, or the end of a stream that is wrong
        behind_ping = data[-len(_PING) - _U32.size :].startswith(_PING)  # its value may end so
        maybe_eof = len(data) - (data[-1:] == _END[:1] and not behind_ping)
        return min(maybe_eof, self._scanned) if self._scanned < len(data) - 1 else maybe_eof

    def ping(self) -> int | None:
        """The value of a PING that asks whether everything so far has been loaded, if what has arrived ends with one."""
        start = len(self._data) - len(_PING) - _U32.size
        footer = start - _FOOTER
        if footer < self._answered or self._data[start : start + len(_PING)] != _PING:
            return None
        (value,) = _U32.unpack_from(self._data, start + len(_PING))
        if self._footers and self._data[footer] != ItemType.FOOTER:
            return None
        if not value & PING_COMMIT and not is_milestone(value):
            return None
        return int(value)

    def ping_answered(self) -> None:
        """The same PING is not to be answered twice."""
        self._answered = len(self._data)

    def no_end(self, what: str) -> StreamError:
        """The error that the stream was over, or still, before its end."""
        facts: dict[str, Any] = {}
        if self.rejected is not None:
            facts["found"] = f"one that does not fit: {self.rejected}"
        return StreamError(
            f"{what} before a vmdescription that fits the device sections",
            offset=self.position,
            hint="The source broke off, or its machine sends no vmdescription (suppress-vmdesc=on, or older than"
            " pc-i440fx-2.3): such device sections cannot be told apart",
            **facts,
        )


@attrs.frozen(kw_only=True)
class Found:
    """Where the device sections and the end are in a piece of a stream that was not read item by item."""

    tail: Tail
    #: Offsets in the piece: of the first device section, and of the EOF byte.
    start: int
    eof: int


def find_tail(data: Buffer, *, footers: bool = True) -> Found | None:
    """The end of a stream whose last byte is the last of `data`, if a vmdescription is there that fits what is before.

    For streams with live sections that nobody here can read: where those end, shows only from behind.
    """
    with memoryview(data) as view:
        raw = bytes(view)
    at = len(raw)
    while (at := raw.rfind(_END, max(0, len(raw) - MAX_VMDESCRIPTION - _FOOTER - 1), at)) >= 0:
        text_at = at + len(_END) + _U32.size
        if raw[text_at : text_at + 1] != b"{":
            continue
        if _U32.unpack_from(raw, at + len(_END))[0] == len(raw) - text_at:
            break
    if at < 0:
        return None
    text = raw[text_at:]
    try:
        devices = vmdesc.extents(text)
    except StreamError:
        return None
    if any(len(d.name.encode()) > _LONGEST_NAME for d in devices):
        return None
    for early in range(min(len(devices), _MAX_EARLY + 1)):
        found = _find_start(raw, devices[early:], at, early=early, footers=footers)
        if found is not None:
            return found
    return None


def _find_start(
    raw: bytes, devices: Sequence[vmdesc.Extent], at: int, *, early: int, footers: bool
) -> Found | None:
    """The device sections that end at the EOF byte, which is at `at`."""
    name = items.counted(devices[0].name) + _U32.pack(devices[0].instance_id)
    length = sum(_framed_size(d, footers=footers) for d in devices)
    walks = 0
    for pings in range(len(devices) + 2):  # one may stand before and behind each section
        start = at - length - pings * (len(_PING) + _U32.size)
        if start < 0 or walks == _MAX_WALKS:
            return None
        behind = start + 1 + _U32.size  # type, section id, name
        if raw[start] != ItemType.SECTION_FULL or not raw.startswith(name, behind):
            continue
        walks += 1
        reader = TailReader(start, footers=footers, early=early)
        reader.feed(raw[start:])
        if reader.tail is not None and reader.eof == at - start:
            return Found(tail=reader.tail, start=start, eof=at)
    return None


def _framed_size(device: vmdesc.Extent, *, footers: bool) -> int:
    """Bytes of the section: type, id, name, instance, version, payload, footer."""
    head = 1 + _U32.size + 1 + len(device.name.encode()) + 2 * _U32.size
    return head + device.size + footers * _FOOTER


def write_sections(tail: Tail, out: OutStream, milestones: Milestones | None = None) -> None:
    """The device sections as they came, with a question before each; before the first where they cannot be told apart."""
    sections = tail.split()
    if milestones is None or not tail.sections:
        out.write(tail.sections)
    elif not sections:
        reader = _Walk(memoryview(tail.sections))
        header = items.read_section_header(reader, ItemType(reader.read(1)[0]))
        milestones.mark(out, header.idstr, header.instance_id, part="first device, or behind it")
        out.write(tail.sections)
    else:
        for section in sections:
            device = section.device
            milestones.mark(out, device.name, device.instance_id, section.version_id)
            out.write(section.data)


class ForeignTail(SaveVMHandler):
    """Everything from the first FULL section to the end of the stream, of a machine that this side does not know.

    Loading takes it and raises TailTaken; saving writes it back unchanged, and brings its own vmdescription.
    """

    idstr = "(foreign devices)"
    version_id = 0xFFFFFFFF
    minimum_version_id = 0
    verbatim = True

    def __init__(
        self,
        tail: Tail | None = None,
        *,
        answer_ping: Callable[[int], None] | None = None,
        footers: bool = True,
        milestones: Milestones | None = None,
    ) -> None:
        """answer_ping: called with the value of a PING that the source waits for; it sends the PONG. footers: the
        sections that come have some. milestones: ask before each section that is saved.
        """
        self.tail = tail
        self._milestones = milestones
        self._footers = footers
        self._answer_ping = answer_ping

    @property
    def vmdescription(self) -> bytes | None:
        return self.tail.vmdescription if self.tail is not None else None

    def save(self, out: OutStream) -> None:
        if self.tail is not None:
            write_sections(self.tail, out, self._milestones)

    def load(self, inp: InStream, header: SectionHeader) -> None:
        first = items.encode_section_header(header)
        reader = TailReader(inp.position - len(first), footers=self._footers)
        reader.feed(first)
        try:
            while reader.tail is None:
                if not inp.buffered():
                    inp.channel.peek(_CHUNK, time.monotonic() + PATIENCE)
                chunk = inp.buffered(1)
                n = len(chunk)
                reader.feed(chunk)
                inp.consume(n)
                self._look_for_ping(reader, inp)
        except EndOfStream as error:
            if not reader.end_without_description():
                raise reader.no_end("the stream ended") from error
        except DeadlineExceeded as error:
            raise reader.no_end(f"nothing came for {PATIENCE:.0f} s") from error
        self.tail = reader.tail
        assert self.tail is not None
        _ = self.tail.description  # read here, where a mistake in it is one of the stream
        raise TailTaken

    def _look_for_ping(self, reader: TailReader, inp: InStream) -> None:
        value = reader.ping()
        if value is None or self._answer_ping is None:
            return
        if not is_milestone(value):  # an answer to one of those that is none does no harm
            with contextlib.suppress(DeadlineExceeded):
                inp.channel.peek(_CHUNK, time.monotonic() + _SILENCE)
                return  # the source does not wait for us: it was chance
        self._answer_ping(value)
        reader.ping_answered()
