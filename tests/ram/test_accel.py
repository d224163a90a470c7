"""whimbrel-accel beside numpy: the same bytes, the same refusals, and nothing outside of what it was given."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from whimbrel_ram import xbzrle
from whimbrel_testing.peers import missing_peer

PAGE = 256
NUMPY = {"encode": xbzrle._encode, "patch": xbzrle._patch}


@pytest.fixture(autouse=True)
def accel():
    if xbzrle.accel is None:
        missing_peer("whimbrel-accel was built without a compiler: install gcc and python3-dev")
    return xbzrle.accel


def applied(patch, deltas, memory):
    """Memory behind one call, or the index and the words of what was refused."""
    data = np.frombuffer(b"".join(deltas) or b"\0", np.uint8)
    length = np.array([len(d) for d in deltas], np.int64)
    after = np.frombuffer(memory, np.uint8).copy()
    where = np.arange(len(deltas), dtype=np.int64) * PAGE
    try:
        patch(data, np.cumsum(length) - length, length, where, PAGE, after)
    except xbzrle.BadDelta as error:
        assert after.tobytes() == memory, "nothing is written of what is refused"
        return error.index, str(error)
    return after.tobytes()


runs = st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))


def delta_of(runs):
    """Runs as they should be written, or nearly: their bytes may be too many or too few."""
    out = b""
    for gap, run, have in runs:
        for n in (gap, run):
            out += bytes((n,)) if n < 128 else bytes((n & 127 | 128, n >> 7))
        out += b"\xaa" * (run if have > 30 else have)
    return out


@given(st.one_of(st.binary(max_size=40), st.lists(runs, max_size=4).map(delta_of)))
@settings(max_examples=1500, deadline=None)
def test_any_delta_is_applied_or_refused_alike(delta):
    memory = bytes(range(256))
    one, other = (applied(p, [delta], memory) for p in (xbzrle.patch, NUMPY["patch"]))
    if isinstance(one, bytes) or isinstance(other, bytes):
        assert one == other
    else:  # numpy looks at the byte behind a length that is cut off, so that the words may differ
        assert one[0] == other[0] == 0
        assert one[1] == other[1] or delta[-1] > 127


@given(st.lists(st.lists(runs, max_size=3).map(delta_of), min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_one_bad_delta_among_others_leaves_all_as_it_was(deltas):
    memory = bytes(range(256)) * len(deltas)
    one, other = (applied(p, deltas, memory) for p in (xbzrle.patch, NUMPY["patch"]))
    assert type(one) is type(other)
    if isinstance(one, bytes):
        assert one == other


@given(st.integers(0, 1 << 30), st.integers(1, 6), st.sampled_from([8, 64, 4096, 16384]))
@settings(max_examples=200, deadline=None)
def test_the_same_bytes(seed, pages, page_size):
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 256, (pages, page_size), np.uint8)
    new = old.copy()
    for row in new:
        n = int(rng.integers(0, page_size + 1))
        row[rng.integers(0, page_size, n)] ^= rng.integers(0, 3, n, dtype=np.uint8)
    words = old.view(np.uint64), new.view(np.uint64)
    (mine, length), (its, its_length) = xbzrle.encode(*words), NUMPY["encode"](*words)
    assert length.tolist() == its_length.tolist()
    assert mine.tobytes() == its.tobytes()


def numbers(*values):
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("start", "length", "where"),
    [
        *((-1, 3, 0), (0, -1, 0), (0, 4, 0), (3, 1, 0), (4, 0, 0), (0, 3, -1), (0, 3, PAGE + 1)),
        *((1 << 62, 1, 0), (0, 1 << 62, 0), (0, 3, 1 << 62), (-(1 << 63), -(1 << 63), 0)),
    ],
)
def test_what_lies_outside_is_refused(accel, start, length, where):
    memory = bytearray(2 * PAGE)
    with pytest.raises(ValueError, match="do not fit"):
        accel.patch(b"\0\1\7", numbers(start), numbers(length), numbers(where), PAGE, memory)
    assert not any(memory)


def test_buffers_that_do_not_fit_are_refused(accel):
    pages, lengths = bytes(2 * PAGE), numbers(0, 0)
    for old, new, size, out, told in (
        (pages, pages[:-1], PAGE, 2 * PAGE, lengths),
        (pages[:-1], pages[:-1], PAGE, 2 * PAGE, lengths),
        (pages, pages, PAGE, 2 * PAGE - 1, lengths),
        (pages, pages, PAGE, 2 * PAGE, lengths[:1]),
        (pages, pages, 0, 2 * PAGE, lengths),
        (pages, pages, -PAGE, 2 * PAGE, lengths),
        (bytes(1 << 15), bytes(1 << 15), 1 << 15, 1 << 15, lengths),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            accel.encode(old, new, size, bytearray(out), told)
    with pytest.raises(ValueError, match="do not fit"):
        accel.patch(b"", numbers(0), numbers(), numbers(0), PAGE, bytearray(PAGE))
    with pytest.raises((TypeError, BufferError)):
        accel.encode(pages, pages, PAGE, pages, lengths)
