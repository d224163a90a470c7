"""The globalstate section: whether the machine ran when it was stopped for switchover.

Format: u32 size (length of the text with its NUL), then 100 bytes: NUL-padded RunState up to QEMU 8.2. Since 9.0 only
32 of them are, and behind those come two flags: that the second one counts, and that the machine was suspended.
"""

from __future__ import annotations

from typing import Any

from whimbrel.errors import StreamError
from whimbrel.machine import Machine, RunState
from whimbrel.savevm import Priority, SaveVMHandler
from whimbrel.state import RunParams
from whimbrel.stream import InStream, OutStream
from whimbrel.wire.format import GlobalStateForm
from whimbrel.wire.items import SectionHeader, shown

_TEXT = 100
_SPLIT_TEXT = 32
_SPLIT_REST = 66
#: Those of an embedder, and what else a QEMU may say.
_STATES = frozenset(RunState) | {
    "colo",
    "debug",
    "preconfig",
    "restore-vm",
    "save-vm",
    "watchdog",
}


class GlobalState(SaveVMHandler):
    """Sent last; a stream without it comes from a machine that ran."""

    idstr = "globalstate"
    optional = True
    priority = Priority.LOW

    def __init__(self, machine: Machine, form: GlobalStateForm = GlobalStateForm.ALWAYS) -> None:
        self._machine = machine
        self._form = form
        #: RunState before the stop, which the migration notes here (source).
        self.state = str(machine.run_state)

    def is_active(self, params: RunParams) -> bool:
        odd = self.state not in (RunState.RUNNING, RunState.PAUSED)
        return odd or self._form is not GlobalStateForm.ODD

    def save(self, out: OutStream) -> None:
        text = self.state.encode()
        out.u32(len(text) + 1)
        if self._form is GlobalStateForm.SPLIT:
            out.write(text.ljust(_SPLIT_TEXT, b"\0"))
            out.write(bytes((True, self.state == RunState.SUSPENDED)) + bytes(_SPLIT_REST))
        else:
            out.write(text.ljust(_TEXT, b"\0"))

    def load(self, inp: InStream, header: SectionHeader) -> None:
        inp.u32()
        offset = inp.position
        text = inp.read(_TEXT).split(b"\0")[0]
        state = shown(text)
        if state not in _STATES:
            raise StreamError(
                "the section has no run state that is known",
                offset=offset,
                expected=f"one of {', '.join(sorted(_STATES))}",
                found=repr(state),
            )
        self._machine.received_run_state = state

    def describe(self) -> dict[str, Any]:
        rest = [("runstate", "buffer", _TEXT)]
        if self._form is GlobalStateForm.SPLIT:
            rest = [
                ("runstate", "buffer", _SPLIT_TEXT),
                ("has_vm_was_suspended", "uint8", 1),
                ("vm_was_suspended", "uint8", 1),
                ("unused", "buffer", _SPLIT_REST),
            ]
        fields = [("size", "uint32", 4), *rest]
        return {
            "vmsd_name": "globalstate",
            "version": 1,
            "fields": [{"name": n, "type": t, "size": s} for n, t, s in fields],
        }
