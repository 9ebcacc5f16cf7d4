"""Packing is best-fit-decreasing to the letter."""

import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.datamodules.packing import best_fit_decreasing
from lightning_llm.datamodules.windows import window_table


def textbook(lengths, capacity):
    """Longest first, each into the fullest bin that still holds it, one item at a time; the free space of each bin."""
    free = []  # ascending
    for length in sorted(lengths, reverse=True):
        fitting = bisect.bisect_left(free, length)
        bisect.insort(free, (free.pop(fitting) if fitting < len(free) else capacity) - length)
    return free


def first_fit(lengths, capacity):
    """Each into the first bin that holds it, in the order they come: what best fit must not be taken for."""
    free = []
    for length in lengths:
        place = next((place for place, space in enumerate(free) if space >= length), len(free))
        free[place:] = [(free[place] if place < len(free) else capacity) - length, *free[place + 1 :]]
    return sorted(free)


def free_space(lengths, capacity):
    bins, num_bins = best_fit_decreasing(lengths, capacity)
    assert len(bins) == len(lengths)
    fills = np.bincount(bins, weights=lengths, minlength=num_bins) if len(lengths) else np.zeros(0)
    assert len(fills) == num_bins
    assert (fills <= capacity).all()
    return sorted((capacity - fills).astype(int).tolist())


@settings(deadline=None, max_examples=200)
@given(capacity=st.integers(1, 60), data=st.data())
def test_fills_equal_those_of_textbook_best_fit_decreasing(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    assert free_space(lengths, capacity) == textbook(lengths, capacity)


@pytest.mark.parametrize("capacity", [255, 256, 2048, 65_535, 65_536, 100_003])
def test_fills_of_many_items_equal_the_textbook_on_both_sides_of_a_small_integer_type(capacity):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(capacity / 5), 1.0, 5000).astype(int), 1, capacity)
    lengths[:3] = capacity, 1, capacity
    assert free_space(lengths, capacity) == textbook(lengths.tolist(), capacity)


def test_the_comparison_tells_best_fit_from_first_fit():
    lengths = [5, 6, 4, 3, 2]
    assert textbook(lengths, 10) == free_space(lengths, 10) == [0, 0]
    assert first_fit(lengths, 10) == [1, 1, 8]


def test_long_documents_and_lognormal_lengths_fill_rows():
    rng = np.random.default_rng(0)
    documents = np.minimum(rng.lognormal(np.log(1900), 1.3, 20_000), 60_000).astype(int) + 2
    pieces = window_table(documents, 2048, right_align=False).length
    lognormal = np.clip(rng.lognormal(np.log(400), 1.0, 50_000).astype(int), 1, 2048)
    for lengths in (pieces, lognormal):
        _, num_bins = best_fit_decreasing(lengths, 2048)
        assert lengths.sum() / (num_bins * 2048) > 0.995


def test_many_equal_items_fill_whole_bins():
    bins, num_bins = best_fit_decreasing([3] * 10_000, 10)
    assert num_bins == -(-10_000 // 3)
    assert np.bincount(bins).max() == 3


def test_nothing_to_pack_gives_no_bin():
    bins, num_bins = best_fit_decreasing([], 8)
    assert (len(bins), num_bins) == (0, 0)


@pytest.mark.parametrize("lengths", [[9], [0, 3], [-1]])
def test_items_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match=r"must lie in 1..8, but got"):
        best_fit_decreasing(lengths, 8)
