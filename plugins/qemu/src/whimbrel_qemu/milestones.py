"""How far a destination got: a PING before each section that it takes or refuses.

QEMU (2.5 and newer) takes commands between sections, and answers a PING when everything before it has been loaded. So
the last PONG tells which section comes next: the one that it is at, or that it gave up at. A PING is 9 bytes of the
stream, a PONG 8 of the way back.

A device section goes when the one before has been answered. Sent at once, they would all be on their way when QEMU gives
up and ends; TCP then throws away the answers that it has not delivered yet, since there is something unread.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import attrs

from whimbrel.savevm import Budget, LiveSaveVMHandler, Mode, Pending
from whimbrel.state import RunParams
from whimbrel.stream import InStream, OutStream
from whimbrel.wire import items
from whimbrel.wire.format import PING_OPEN, Command
from whimbrel.wire.items import SectionHeader

#: Our PINGs have this value, with 7 bits of their number in each of the two low bytes. None of its bytes can be taken for
#: the end of the stream (00), or for what follows that: who passes a stream on holds such a byte back.
_VALUE = 0x4D53_8080
_MOST = 1 << 14
#: Seconds to wait for an answer. Who does not give one by then is not waited for again.
_PATIENCE = 10.0

#: How the stream begins: both of it before the first PING.
CONFIGURATION = "configuration"
RAM = "ram"


def is_milestone(ping: int) -> bool:
    """Whether a PING of that value is one of ours, whose sender waits for the answer."""
    return ping & ~0x7F7F == _VALUE


def _value(number: int) -> int:
    return _VALUE | (number >> 7) << 8 | (number & 0x7F)


def _number(value: int) -> int:
    return (value >> 8 & 0x7F) << 7 | (value & 0x7F)


@attrs.frozen(kw_only=True)
class Piece:
    """What is taken or refused as one. The offset is that of its first byte in the stream as sent."""

    section: str
    #: None: it is no section of a device, and has none.
    instance_id: int | None = 0
    version_id: int | None = None
    offset: int
    #: What of the section it is, where that is not all of it.
    part: str | None = None


class Milestones(LiveSaveVMHandler):
    """Writes the PINGs, where the destination can answer, and remembers what each stands before.

    The first of its own comes when the list of RAM blocks has gone; whoever writes device sections asks for the others.
    """

    idstr = "(milestones)"
    verbatim = True

    def __init__(self, first: str = RAM) -> None:
        """first: the live section that the stream begins with."""
        self._first = first
        self._pieces: list[Piece] = []
        self._wait: Callable[[int, float], bool] | None = None
        self._setup_at = 0
        #: Every answer that was waited for has come.
        self.exact = True

    def is_active(self, params: RunParams) -> bool:
        return params.wait_for_pong is not None

    def setup(self, out: OutStream, params: RunParams) -> None:
        self._wait = params.wait_for_pong
        self._setup_at = out.position
        self._pieces.clear()
        self.exact = True

    def pending(self, exact: bool) -> Pending:
        return Pending()

    def iterate(self, out: OutStream, budget: Budget) -> bool:
        self._before_pages(out)
        return True

    def complete(self, out: OutStream, mode: Mode) -> None:
        self._before_pages(out)

    def _before_pages(self, out: OutStream) -> None:
        if self._first == RAM and not self._pieces:
            self.mark(out, RAM, part="pages", wait=False)

    def mark(
        self,
        out: OutStream,
        section: str,
        instance_id: int = 0,
        version_id: int | None = None,
        *,
        part: str | None = None,
        wait: bool = True,
    ) -> None:
        """Ask whether everything so far has been loaded, and wait for the answer. That section, or part of it, comes
        next. Nothing where nobody answers.
        """
        if self._wait is None:
            return
        value = _value(min(len(self._pieces), _MOST - 1))
        out.write(items.encode_command(Command.PING, struct.pack(">I", value)))
        self._pieces.append(
            Piece(
                section=section,
                instance_id=instance_id,
                version_id=version_id,
                offset=out.position,
                part=part,
            )
        )
        if wait and self.exact:
            self.exact = self._wait(value, _PATIENCE)

    def reached(self, pong: int | None) -> Piece | None:
        """What the destination had before it after its last answer; None: it had loaded everything, or cannot be told.

        pong: the value of that answer, None if there was none.
        """
        if pong is None:
            return Piece(section=CONFIGURATION, instance_id=None, offset=0)
        if pong == PING_OPEN:
            part = "list of RAM blocks" if self._first == RAM else None
            return Piece(section=self._first, offset=self._setup_at, part=part)
        if not is_milestone(pong) or _number(pong) >= len(self._pieces):
            return None
        return self._pieces[_number(pong)]

    def offset_of(self, section: str, instance_id: int | None) -> int | None:
        """Where that section begins, if it has been written."""
        for piece in self._pieces:
            if piece.section == section and instance_id in (None, piece.instance_id):
                return piece.offset
        return None

    def load(self, inp: InStream, header: SectionHeader) -> None:
        raise NotImplementedError("milestones are written only")
