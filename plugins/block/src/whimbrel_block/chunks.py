"""What is left to send of a disk: one state for each chunk, changed by the app's writes and by the migration. No numpy."""

from __future__ import annotations

import threading

import attrs

CLEAN = 0
#: Not looked at yet: goes out, unless it is what a base has there.
FRESH = 1
#: FRESH, and nothing is stored there.
HOLE = 2
#: Written since the migration began: goes out.
DIRTY = 3

_FOUND_HOLE = bytes((CLEAN, HOLE, HOLE, DIRTY)) + bytes(range(4, 256))


@attrs.frozen(kw_only=True)
class Left:
    """Chunks that were not sent yet, by what they cost; fresh counts those of the first two that were never sent."""

    full: int
    holes: int
    fresh: int


class Chunks:
    """The states of one disk. Thread-safe; in C for any number of chunks.

    A chunk is CLEAN before it is read, and a write is marked after it has been made: so none is missed.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._states = bytearray((FRESH,)) * count
        self._lock = threading.Lock()
        self._at = 0
        #: Taken, and still waiting for the stream.
        self._out: set[int] = set()

    def mark(self, first: int, last: int) -> None:
        """Written, from the first chunk to the last one."""
        with self._lock:
            self._states[first : last + 1] = bytes((DIRTY,)) * (last + 1 - first)

    def found_holes(self, first: int, end: int) -> None:
        """Nothing was stored there; what was written since is DIRTY by now, or will be."""
        with self._lock:
            self._states[first:end] = self._states[first:end].translate(_FOUND_HOLE)

    def start_at(self, chunk: int) -> None:
        """Where to look for the next one."""
        self._at = chunk

    def take(self) -> tuple[int, bool] | None:
        """The next chunk to read, and whether it was never written since the beginning; None when there is none, or it is
        taken already and was written again meanwhile: until it is given back. Belongs to one thread.
        """
        with self._lock:
            for start in (self._at, 0):
                found = [
                    i for state in (FRESH, DIRTY) if (i := self._states.find(state, start)) >= 0
                ]
                if found:
                    chunk = min(found)
                    if chunk in self._out:
                        self._at = chunk
                        return None
                    self._out.add(chunk)
                    fresh = self._states[chunk] == FRESH
                    self._states[chunk] = CLEAN
                    self._at = chunk + 1
                    return chunk, fresh
        return None

    def give_back(self, chunk: int) -> bool:
        """Its turn in the stream has come: whether it was written since it was taken. Called by the thread that takes."""
        self._out.discard(chunk)
        return self._states[chunk] == DIRTY

    @property
    def again(self) -> int:
        """How many of those that are taken were written since."""
        return sum(self._states[chunk] == DIRTY for chunk in self._out)

    def take_holes(self, most: int) -> range:
        """The next run of holes, that need not be read; empty when there is none."""
        with self._lock:
            states = self._states
            first = states.find(HOLE)
            if first < 0:
                return range(0)
            run = states[first : first + most]
            end = first + len(run) - len(run.lstrip(bytes((HOLE,))))
            states[first:end] = bytes(end - first)
            return range(first, end)

    def left(self) -> Left:
        states = self._states
        clean, fresh, holes = states.count(CLEAN), states.count(FRESH), states.count(HOLE)
        return Left(full=self.count - clean - holes, holes=holes, fresh=fresh + holes)
