"""Objects to bytes and back, without a stream around: for handlers, tools and tests."""

from __future__ import annotations

from typing import Any

from whimbrel.channel import MemoryChannel
from whimbrel.errors import StreamError
from whimbrel.stream import InStream
from whimbrel_device.fields import layout_of
from whimbrel_device.kinds import Entry
from whimbrel_device.layout import settle
from whimbrel_device.runs import LoadRun, SaveRun


def encode(obj: Any, *, section: str | None = None) -> tuple[bytes, Entry]:
    """The payload, and the members of the vmdescription for it (vmsd_name, version, fields, subsections).

    Raises LocalError, naming the field, for a value that does not fit.
    """
    layout = layout_of(type(obj))
    run = SaveRun(section or layout.name)
    described = layout.write(run, obj, version=layout.version_id)
    return bytes(run.out), described


def decode_from(
    obj: Any, inp: InStream, *, version: int | None = None, section: str | None = None
) -> None:
    """Load obj in place from the stream. Raises StreamError or EndOfStream, naming the field; obj is then unchanged.

    version: the one that the section's header gives; by default the class's own.
    """
    layout = layout_of(type(obj))
    run = LoadRun(section or layout.name, inp)
    layout.read(run, obj, version=layout.version_id if version is None else version)
    settle(run)


def decode(obj: Any, payload: bytes, *, version: int | None = None) -> None:
    """Load obj in place from a whole payload. Raises as decode_from, and StreamError where bytes are left."""
    layout = layout_of(type(obj))
    inp = InStream(MemoryChannel(payload), buffer_size=1 << 16)
    run = LoadRun(layout.name, inp)
    layout.read(run, obj, version=layout.version_id if version is None else version)
    if not inp.at_end():
        raise StreamError(
            "bytes are left behind the last field",
            section=layout.name,
            offset=inp.position,
            expected=f"{inp.position} bytes",
            found=len(payload),
        )
    settle(run)
