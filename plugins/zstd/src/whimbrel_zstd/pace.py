"""How hard to compress: as hard as the link leaves time for.

Of the time that a sender spends in compressing and in sending, the part in sending is that in which the link held it up:
the system takes the bytes at once as long as the link keeps up. Once in a window that part is looked at. More than half:
the processor idles, so the next harder level. Less than a fifth: the processor is what the stream waits for, so the next
easier level. In between the level stays. A level that was tried and is too slow is not tried again for some windows; that
the first bytes meet empty buffers says nothing of the link, and costs nothing but a few windows. What hardly gets smaller at all is not compressed harder. That is judged from level 1 on: below it zstd only looks for
repetitions.
"""

from __future__ import annotations

#: From fast to small. The levels below 1 differ little from their neighbours.
STEPS: tuple[int, ...] = (-7, -5, -3, -1, *range(1, 13))
START = 1
#: Seconds of work that a decision is taken on.
WINDOW = 0.1
#: The part of the time in sending above which the level goes up, and below which it goes down.
HELD_UP, NOT_HELD_UP = 1 / 2, 1 / 5
#: Plain over compressed bytes below which a harder level is no use.
WORTH_IT = 1.1
#: Windows until a level that was too slow is tried again.
PATIENCE = 20


class Pace:
    """The level to use, by what is accounted. Asks no clock."""

    def __init__(self) -> None:
        self._step = STEPS.index(START)
        self._tried = False  # the last change was to this level, from an easier one
        self._too_slow = len(STEPS)  # not to be tried for the next windows
        self._patience = 0
        self._reset()

    @property
    def level(self) -> int:
        return STEPS[self._step]

    def _reset(self) -> None:
        self._compressing = self._sending = 0.0
        self._plain = self._compressed = 0

    def account(self, compressing: float, sending: float, plain: int, compressed: int) -> None:
        """Seconds spent in both, and the bytes before and after."""
        self._compressing += compressing
        self._sending += sending
        self._plain += plain
        self._compressed += compressed
        total = self._compressing + self._sending
        if total >= WINDOW:
            self._decide(self._sending / total, self._plain / max(1, self._compressed))
            self._reset()

    def _decide(self, held_up: float, ratio: float) -> None:
        self._patience -= 1
        if self._patience <= 0:
            self._too_slow = len(STEPS)
        if held_up < NOT_HELD_UP and self._step > 0:
            if self._tried:
                self._too_slow, self._patience = self._step, PATIENCE
            self._step, self._tried = self._step - 1, False
        elif (
            held_up > HELD_UP
            and (self.level < 1 or ratio >= WORTH_IT)
            and self._step + 1 < self._too_slow
        ):
            self._step, self._tried = self._step + 1, True
