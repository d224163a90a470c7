"""Streams with random damage, through the loaders: each is taken or refused, in little time and memory.

    python -m whimbrel_testing.wrong.mutate [--count N] [--first N] [--keep FOLDER] FILE...

The same files and numbers give the same damage. Prints one JSON object; a stream that did something else than to be
taken or refused is written to FOLDER, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import json
import os
import random
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from whimbrel.channel import MemoryChannel
from whimbrel.errors import MigrationError
from whimbrel.stream import InStream, OutStream
from whimbrel_qemu.guest import Guest, read_guest, write_guest
from whimbrel_qemu.rest import RestKeeper
from whimbrel_testing.wrong.loaders import App, ClosedSource

#: Seconds of CPU for one stream; a good one takes some milliseconds.
TIME = 10.0
#: Bytes of address space beyond what there is at the start; one stream has at most MAX_RAM of RAM, three times.
MEMORY = 768 << 20
MAX_RAM = 32 << 20

_LENGTHS = (
    0,
    1,
    2,
    4,
    8,
    0x10,
    0x7E,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0xFFF,
    0x1000,
    0x7FFF,
    0xFFFF,
    1 << 20,
)
_HUGE = (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
#: Where something begins: a section, its footer, the EOF with the vmdescription, a number in that.
_SPOTS = re.compile(
    rb"[\1-\4]\0\0\0.|\x7e\0\0\0|\0\x06\0|\x08\0.\0|QEVM|\"size\": \d|\": \d|[\[{]\"", re.DOTALL
)


class TooLong(BaseException):
    """Not an Exception: nothing may catch it on the way."""


class Mutator:
    """Damages streams. The damage depends on nothing but the streams, in their order, and a number."""

    def __init__(self, streams: Sequence[bytes]) -> None:
        self.streams = streams
        self._spots = [[m.start() for m in _SPOTS.finditer(s)] or [0] for s in streams]

    def __call__(self, number: int) -> tuple[bytes, str]:
        """A damaged stream, and what was done to it."""
        rng = random.Random(number)
        index = number % len(self.streams)
        data = bytearray(self.streams[index])
        done = [f"stream {index}"]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            step = rng.choice(_STEPS)
            at = self._place(rng, index, len(data))
            done.append(f"{step.__name__.strip('_')} at {at}")
            step(rng, data, at, self.streams)
        return bytes(data), ", ".join(done)

    def _place(self, rng: random.Random, index: int, size: int) -> int:
        """Mostly where a header is: pages and texts are the larger part of the bytes, and the lesser of what is read."""
        if rng.random() < 0.7:
            at = rng.choice(self._spots[index]) + rng.randrange(24)
        else:
            at = rng.randrange(max(1, size))
        return min(at, max(0, size - 1))


def _flip(rng: random.Random, data: bytearray, at: int, _: object) -> None:
    if data:
        data[at] ^= 1 << rng.randrange(8)


def _byte(rng: random.Random, data: bytearray, at: int, _: object) -> None:
    data[at : at + 1] = bytes(
        (rng.choice((0, 1, 4, 7, 8, 0x10, 0x20, 0x7E, 0xFF, rng.randrange(256))),)
    )


def _cut(rng: random.Random, data: bytearray, at: int, _: object) -> None:
    del data[at:]


def _remove(rng: random.Random, data: bytearray, at: int, _: object) -> None:
    del data[at : at + rng.choice((1, 2, 4, 8, 9, 64, 4096))]


def _insert(rng: random.Random, data: bytearray, at: int, _: object) -> None:
    data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 64, 5000)))


def _length(rng: random.Random, data: bytearray, at: int, _: object) -> None:
    width = rng.choice((1, 2, 4, 4, 8))
    value = rng.choice((*_LENGTHS, *_HUGE, len(data), len(data) - at))
    data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "big")


def _digits(rng: random.Random, data: bytearray, at: int, _: object) -> None:
    """A number in the text of the vmdescription."""
    found = re.compile(rb"\d+").search(data, data.find(b"{", at))
    if found is not None:
        data[found.start() : found.end()] = str(rng.choice((*_LENGTHS, *_HUGE, -1))).encode()


def _repeat(rng: random.Random, data: bytearray, at: int, _: object) -> None:
    piece = bytes(data[at : at + rng.choice((1, 5, 9, 32, 200))])
    data[at:at] = piece * rng.choice((1, 2, 50, 500))


def _splice(rng: random.Random, data: bytearray, at: int, streams: Sequence[bytes]) -> None:
    other = rng.choice(streams)
    start = rng.randrange(max(1, len(other)))
    data[at : at + rng.choice((0, 0, 16, 4096, len(data)))] = other[
        start : start + rng.choice((8, 64, 5000, len(other)))
    ]


_STEPS = (
    _flip,
    _flip,
    _byte,
    _byte,
    _cut,
    _remove,
    _insert,
    _length,
    _length,
    _digits,
    _repeat,
    _splice,
)


# ---- what becomes of them


def _taken_again(guest: Guest, written: bytes) -> None:
    """What was kept must come back from its own file as the same."""
    again = _read(written)
    assert again.machine_type == guest.machine_type
    assert [(b.idstr, bytes(b.buffer)) for b in again.blocks] == [
        (b.idstr, bytes(b.buffer)) for b in guest.blocks
    ]
    assert (again.tail is None) == (guest.tail is None)
    if guest.tail is not None and again.tail is not None:
        assert again.tail.sections == guest.tail.sections
        assert again.tail.vmdescription == guest.tail.vmdescription
    assert (again.rest is None) == (guest.rest is None)
    if guest.rest is not None and again.rest is not None:
        assert again.rest.data == guest.rest.data


def _read(data: bytes) -> Guest:
    fd = os.memfd_create("rest")
    try:
        return read_guest(
            InStream(ClosedSource(data), buffer_size=64 << 10),
            on_command=lambda *_: None,
            answer_ping=lambda _: None,
            max_ram=MAX_RAM,
            take_rest=lambda head, start, footers: RestKeeper(
                fd, head + start, items_at=len(head), footers=footers
            ),
        )
    finally:
        os.close(fd)


def keep_and_take_again(data: bytes) -> None:
    """Read, write, read what was written. Raises MigrationError where the stream is refused, else the two are equal."""
    guest = _read(data)
    channel = MemoryChannel()
    write_guest(guest, OutStream(channel))
    try:
        _taken_again(guest, bytes(channel.data))
    except MigrationError as error:
        raise AssertionError(f"what was kept is refused: {error}") from error


def load_app(data: bytes) -> None:
    """Into an app's machine. Raises MigrationError."""
    App().load(ClosedSource(data, answers=MemoryChannel()), dialect=None)


LOADERS: dict[str, Callable[[bytes], None]] = {"keep": keep_and_take_again, "app": load_app}


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    def over(*_: object) -> None:
        raise TooLong(f"more than {seconds} s")

    signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    faulthandler.dump_traceback_later(6 * seconds, exit=True)  # for what no signal gets out of
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        faulthandler.cancel_dump_traceback_later()


def outcome(load: Callable[[bytes], None], data: bytes, seconds: float = TIME) -> tuple[str, str]:
    """'taken', 'refused' or 'wrong', and what was said."""
    try:
        with _within(seconds):
            load(data)
    except MigrationError as error:
        if not str(error):
            return "wrong", f"an error without words: {error!r}"
        return "refused", str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "wrong", "".join(traceback.format_exception(error))
    return "taken", ""


def limit_memory() -> None:
    """From here on, what takes more than MEMORY fails with a MemoryError."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    streams = [path.read_bytes() for path in options.files]
    mutator = Mutator(streams)
    for load in LOADERS.values():  # imports, once, and proof that there is something to damage
        with contextlib.suppress(MigrationError):
            load(streams[0])
    limit_memory()
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    for number in range(options.first, options.first + options.count):
        data, what = mutator(number)
        for name, load in LOADERS.items():
            verdict, said = outcome(load, data)
            counts[f"{name} {verdict}"] += 1
            if verdict == "wrong":
                wrong.append({"number": number, "loader": name, "what": what, "said": said})
                if options.keep is not None:
                    (options.keep / f"{number}-{name}").write_bytes(data)
    print(json.dumps({"counts": counts, "wrong": wrong}))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
