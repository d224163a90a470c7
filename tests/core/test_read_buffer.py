"""InStream's buffer: what it shows is the stream, whatever the pieces, and a full buffer can always be asked for."""

import ctypes
import random

import pytest

from whimbrel import EndOfStream
from whimbrel.channel import MemoryChannel
from whimbrel.stream import ALIGNMENT, SHORT_REST, InStream


class Pieces(MemoryChannel):
    """Gives pieces of random length, and notes the addresses that they were received to."""

    def __init__(self, data, rng, longest):
        super().__init__(data)
        self._rng = rng
        self._longest = longest
        self.addresses = []

    def recv_into(self, view):
        assert len(view) > 0
        self.addresses.append(ctypes.addressof(ctypes.c_char.from_buffer(view)))
        return super().recv_into(view[: self._rng.randint(1, self._longest)])


@pytest.mark.parametrize("longest", [1, 100, 5000, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_of_reads_gives_the_stream(longest, seed):
    rng = random.Random(seed)
    data = rng.randbytes(20_000 if longest == 1 else 400_000)
    inp = InStream(Pieces(data, rng, longest), buffer_size=64 << 10)
    got = bytearray()
    while len(got) < len(data):
        left = len(data) - len(got)
        assert inp.position == len(got)
        what = rng.randrange(4)
        n = min(left, rng.choice([1, 7, 4104, 30_000, inp.capacity]))
        if what == 0:
            got += inp.read(n)
        elif what == 1:
            view = bytearray(n)
            inp.read_into(memoryview(view))
            got += view
        else:
            shown = inp.buffered(n if what == 2 else 0)
            assert len(shown) >= (n if what == 2 else 0)
            taken = rng.randint(0, len(shown))
            got += shown[:taken]
            inp.consume(taken)
    assert bytes(got) == data
    assert inp.at_end()
    with pytest.raises(EndOfStream):
        inp.read(1)


def test_it_receives_to_aligned_addresses_behind_a_short_rest():
    channel = Pieces(bytes(24 << 20), random.Random(1), 1 << 20)
    inp = InStream(channel)
    rest = random.Random(2)
    for _ in range(20):
        shown = inp.buffered(inp.capacity // 4)
        inp.consume(max(0, len(shown) - rest.randrange(SHORT_REST)))
        channel.addresses.clear()
        inp.buffered(SHORT_REST + 1)
        assert channel.addresses[0] % ALIGNMENT == 0


def test_more_than_the_buffer_cannot_be_asked_for():
    inp = InStream(MemoryChannel(bytes(1 << 20)), buffer_size=4096)
    assert len(inp.buffered(4096)) >= 4096
    with pytest.raises(ValueError, match="do not fit"):
        inp.buffered(inp.capacity + 4096)
