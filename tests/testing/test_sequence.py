"""The arithmetic of the stress machine: what makes a fault visible, and tells where it is."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from whimbrel_testing.sequence import BATCH, WORDS, Chain, Region, Sequence, check_sums


@pytest.fixture
def sequence() -> Sequence:
    return Sequence(7, (Region(0, 1024, 512), Region(1024, 128, 128)), 256)


@given(st.integers(0, (1 << 48) - 1), st.integers(0, WORDS - 1))
def test_any_word_of_a_page_tells_its_write(number, word):
    sequence = Sequence(7, (Region(0, 64, 64),), 0)
    page = sequence.contents(np.array([number], np.uint64), np.empty((1, WORDS), np.uint64))[0]
    assert int(sequence.writers(page)[word]) == number


def test_every_word_depends_on_the_number(sequence):
    pages = sequence.contents(np.arange(1000, dtype=np.uint64), np.empty((1000, WORDS), np.uint64))
    assert all(len(np.unique(pages[:, word])) == 1000 for word in range(0, WORDS, 37))


def test_the_boot_fills_pages_in_order_and_later_writes_stay_in_the_hot_part(sequence):
    boot = np.concatenate([sequence.pages_of(batch) for batch in range(256 // BATCH)])
    assert boot.tolist() == list(range(256))
    later = [(sequence.region_of(b), sequence.pages_of(b)) for b in range(4, 400)]
    assert {region for region, _ in later} == {0, 1}
    assert max(pages.max() for region, pages in later if region == 0) == 511
    assert max(pages.max() for region, pages in later if region == 1) == 127


def test_page_of_agrees_with_pages_of(sequence):
    for batch in (0, 3, 5, 15, 31, 100):
        start = sequence.regions[sequence.region_of(batch)].start
        expected = (sequence.pages_of(batch) + start).tolist()
        assert [sequence.page_of(batch * BATCH + i) for i in range(BATCH)] == expected


def test_sums_are_those_of_the_contents(sequence):
    numbers = np.array([0, 1, 99, 1 << 40], np.uint64)
    pages = sequence.contents(numbers, np.empty((4, WORDS), np.uint64))
    assert (sequence.sums(numbers) == check_sums(pages)).all()
    assert check_sums(np.zeros((1, WORDS), np.uint64)) == 0


def test_seeds_make_different_machines():
    one, two = (Sequence(seed, (Region(0, 4096, 4096),), 0) for seed in (1, 2))
    numbers = np.arange(10, dtype=np.uint64)
    assert not (one.bases(numbers) == two.bases(numbers)).any()
    assert (one.pages_of(3) != two.pages_of(3)).any()


def test_the_chain_depends_on_each_of_its_inputs():
    pages, sums = np.arange(BATCH), np.arange(BATCH, dtype=np.uint64)
    digests = {
        Chain().add(0, pages, sums),
        Chain().add(1, pages, sums),
        Chain().add(0, pages[::-1], sums),
        Chain().add(0, pages, sums + np.uint64(1)),
        Chain(b"x" * Chain.SIZE).add(0, pages, sums),
    }
    assert len(digests) == 5


def test_a_fill_that_is_no_number_of_batches_is_refused():
    with pytest.raises(ValueError, match="not a number of batches"):
        Sequence(1, (Region(0, 1024, 1024),), 100)
