"""Packing is best-fit-decreasing to the letter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.datamodules.packing import best_fit_decreasing


def textbook(lengths, capacity):
    """Longest first, each into the fullest bin that still holds it, one item at a time."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free[free.index(min(fitting))] -= length
        else:
            free.append(capacity - length)
    return sorted(free)


@given(capacity=st.integers(1, 60), data=st.data())
def test_packing_equals_textbook_best_fit_decreasing(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    bins, num_bins = best_fit_decreasing(lengths, capacity)
    fill = np.bincount(bins, weights=lengths, minlength=num_bins) if lengths else np.zeros(num_bins)
    assert len(bins) == len(lengths)
    assert (fill <= capacity).all()
    assert sorted((capacity - fill).astype(int).tolist()) == textbook(lengths, capacity)


def test_many_equal_items_fill_whole_bins():
    bins, num_bins = best_fit_decreasing([3] * 10_000, 10)
    assert num_bins == -(-10_000 // 3)
    assert np.bincount(bins).max() == 3


def test_nothing_to_pack_gives_no_bin():
    bins, num_bins = best_fit_decreasing([], 8)
    assert (len(bins), num_bins) == (0, 0)


@pytest.mark.parametrize("lengths", [[9], [0, 3]])
def test_items_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match=r"must lie in 1..8, but got"):
        best_fit_decreasing(lengths, 8)
