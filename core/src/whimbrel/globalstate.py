"""The globalstate section: whether the machine ran when it was stopped for switchover.

Format: QEMU 2.4 to 8.2: u32 size (length of the text with its NUL), then 100 bytes of NUL-padded RunState. Newer ones
read the same bytes (they use 34 of the 100 otherwise, zero for us).
"""

from __future__ import annotations

from typing import Any

from whimbrel.errors import StreamError
from whimbrel.machine import Machine
from whimbrel.savevm import Priority, SaveVMHandler
from whimbrel.stream import InStream, OutStream
from whimbrel.wire.items import SectionHeader

_TEXT = 100


class GlobalState(SaveVMHandler):
    """Sent last; a stream without it comes from a machine that ran."""

    idstr = "globalstate"
    optional = True
    priority = Priority.LOW

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        #: RunState before the stop, which the migration notes here (source).
        self.state = str(machine.run_state)

    def save(self, out: OutStream) -> None:
        text = self.state.encode()
        out.u32(len(text) + 1)
        out.write(text.ljust(_TEXT, b"\0"))

    def load(self, inp: InStream, header: SectionHeader) -> None:
        inp.u32()
        text = inp.read(_TEXT).split(b"\0")[0]
        if not text.isascii() or not text:
            raise StreamError(
                "the run state is not a word", expected="a RunState", found=repr(text)
            )
        self._machine.received_run_state = text.decode()

    def describe(self) -> dict[str, Any]:
        return {
            "vmsd_name": "globalstate",
            "version": 1,
            "fields": [
                {"name": "size", "type": "uint32", "size": 4},
                {"name": "runstate", "type": "buffer", "size": _TEXT},
            ],
        }
