"""Micro-batches by tokens: within the budget, nothing dropped, slots of like cost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.datamodules.batches.budget import balanced_slots, cost, micro_batches_within

LENGTHS = st.lists(st.integers(1, 64), max_size=60).map(lambda x: np.array(x, dtype=np.int64))


@given(LENGTHS, st.integers(64, 300), st.booleans(), st.integers(1, 9))
@settings(deadline=None, max_examples=200)
def test_micro_batches_keep_to_the_budget_and_hold_each_row_once(lengths, budget, padded, multiple_of):
    batches = micro_batches_within(lengths, budget, padded=padded, multiple_of=multiple_of)
    assert sorted(np.concatenate([np.empty(0, int), *batches]).tolist()) == list(range(len(lengths)))
    assert all(cost(lengths[batch], padded=padded) <= budget for batch in batches)
    assert len(batches) % multiple_of == 0
    if len(lengths) >= multiple_of * 2:
        sizes = [len(batch) for batch in batches]
        assert min(sizes) > 0 or max(sizes) <= 1  # rows are halved before a micro-batch is left empty


@given(LENGTHS, st.integers(64, 300))
@settings(deadline=None, max_examples=100)
def test_no_micro_batch_could_take_the_next_one_in(lengths, budget):
    batches = micro_batches_within(lengths, budget, padded=True)
    for batch, following in zip(batches, batches[1:], strict=False):
        assert cost(lengths[np.append(batch, following[0])], padded=True) > budget


def test_a_row_above_the_budget_is_refused():
    with pytest.raises(ValueError, match=r"holds 8 tokens at most .*one row alone has 9. Raise `micro_batch_tokens`"):
        micro_batches_within([3, 9], 8, padded=True)


@given(LENGTHS, st.integers(1, 12), st.booleans())
@settings(deadline=None, max_examples=200)
def test_slots_hold_each_row_once_and_cost_alike(lengths, num_slots, padded):
    slots = balanced_slots(lengths, num_slots, padded=padded)
    assert len(slots) == num_slots
    assert sorted(np.concatenate([np.empty(0, int), *slots]).tolist()) == list(range(len(lengths)))
    if not padded and len(lengths):
        assert max(cost(lengths[slot], padded=False) for slot in slots) <= lengths.sum() / num_slots + lengths.max()


def test_padded_slots_have_the_smallest_largest_cost():
    from itertools import combinations

    rng = np.random.default_rng(0)
    for _ in range(30):
        lengths = np.sort(rng.integers(1, 30, rng.integers(4, 9)))[::-1]
        best = min(
            max(cost(run, padded=True) for run in np.split(lengths, cuts))
            for cuts in combinations(range(1, len(lengths)), 2)
        )
        slots = balanced_slots(lengths, 3, padded=True)
        assert max(cost(lengths[slot], padded=True) for slot in slots) == best


def test_ragged_lengths_leave_little_padding():
    """data-facts' setting: log-normal lengths, a budget of 32,768, pools of 8192 rows."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1, 8192), 1, 8192).astype(np.int64)
    for padded, wanted in ((True, 0.97), (False, 0.99)):
        batches = micro_batches_within(lengths, 32_768, padded=padded)
        positions = sum(cost(lengths[batch], padded=padded) for batch in batches)
        share = lengths.sum() / (positions if padded else 32_768 * len(batches))
        assert share > wanted
    at_random = np.array_split(rng.permutation(8192), 8192 // 30)
    assert lengths.sum() / sum(cost(lengths[batch], padded=True) for batch in at_random) < 0.4
