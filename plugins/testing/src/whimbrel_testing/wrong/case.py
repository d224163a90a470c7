"""What a wrong stream is, and who takes it all the same."""

from __future__ import annotations

import enum

import attrs

from whimbrel_testing.wrong.pieces import Bad


class Side(enum.StrEnum):
    """Destinations that are compared."""

    APP = "app"  # a machine of whimbrel's with the same parts: LoadDriver
    KEEP = "keep"  # `migctl receive`, which has no machine of its own
    QEMU_7_2 = "7.2"
    QEMU_10_0 = "10.0"


@attrs.frozen
class Refusal:
    """What the error says. Without `exact`, its offset is not that of the wrong bytes: they show only later."""

    says: str
    section: str | None = None
    exact: bool = True


@attrs.frozen(kw_only=True)
class Case:
    """One stream. `data()` is the bytes."""

    #: kebab-case; the first word is the class.
    name: str
    pieces: tuple[bytes | Bad, ...]
    #: Whimbrel's error; None: it takes the stream.
    app: Refusal | None
    keep: Refusal | None
    #: The QEMUs that take it.
    qemu: frozenset[Side]
    #: Why the sides differ, where they do.
    why: str = ""

    def data(self) -> bytes:
        return b"".join(p.data if isinstance(p, Bad) else p for p in self.pieces)

    @property
    def bad(self) -> range:
        """Offsets from the first wrong byte to the one behind the last."""
        position = 0
        for piece in self.pieces:
            if isinstance(piece, Bad):
                return range(position, position + len(piece.data) + 1)
            position += len(piece)
        return range(position + 1)

    @property
    def taken_by(self) -> frozenset[Side]:
        own = {Side.APP} if self.app is None else set()
        if self.keep is None:
            own.add(Side.KEEP)
        return frozenset(own) | self.qemu
