"""Mixtures: exact proportions, no item of a source left out, the same for everyone who asks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.datamodules.mixture import (
    MixtureOrder,
    block_counts,
    mixture_positions,
    mixture_source,
    temperature_weights,
)

weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@settings(max_examples=20, deadline=None)
@given(weights, st.integers(0, 2**32), st.integers(0, 10**9))
def test_every_block_holds_each_source_in_exact_proportion(values, seed, block):
    order = MixtureOrder(values, seed)
    items = np.arange(order.block_size) + block * order.block_size
    found = np.bincount(order(items)[0], minlength=len(values))
    assert found.tolist() == order.counts.tolist()
    shares = np.array(values) / sum(values)
    assert np.abs(found - shares * order.block_size).max() <= 1 or order.block_size >= 10**6
    assert found.min() >= 1


@settings(max_examples=20, deadline=None)
@given(weights, st.integers(0, 2**32), st.integers(1, 5000))
def test_items_of_a_source_run_on_without_a_gap(values, seed, length):
    sources, positions = MixtureOrder(values, seed)(np.arange(length))
    for source in range(len(values)):
        mine = positions[sources == source]
        assert mine.tolist() == list(range(len(mine)))


@settings(max_examples=20, deadline=None)
@given(weights, st.integers(0, 2**32), st.lists(st.integers(0, 10**12), min_size=1, max_size=50))
def test_an_item_is_the_same_whoever_asks_and_with_whatever_else(values, seed, items):
    together = MixtureOrder(values, seed)(items)
    alone = [MixtureOrder(values, seed)(item) for item in items]
    assert together[0].tolist() == [int(source) for source, _ in alone]
    assert together[1].tolist() == [int(position) for _, position in alone]
    assert mixture_source(items, values, seed).tolist() == together[0].tolist()
    assert mixture_positions(items, values, seed).tolist() == together[1].tolist()
    assert together[0].dtype == together[1].dtype == np.int64


def test_proportions_hold_within_a_block_too_and_seeds_differ():
    """Control for the shuffle: a block in the order of its sources would fail."""
    order = MixtureOrder([0.5, 0.3, 0.2], seed=3)
    first = order(np.arange(100))[0]
    assert np.abs(np.bincount(first) / 100 - [0.5, 0.3, 0.2]).max() < 0.15
    assert first.tolist() != MixtureOrder([0.5, 0.3, 0.2], seed=4)(np.arange(100))[0].tolist()
    assert first.tolist() != MixtureOrder([0.5, 0.3, 0.2], 3, 1)(np.arange(100))[0].tolist()


def test_a_rare_source_makes_the_block_longer():
    assert block_counts([0.999, 0.001]).tolist() == [99900, 100]
    assert block_counts([1.0, 1e-9]).min() == 1
    assert block_counts([1, 1, 1]).tolist() == [334, 333, 333]


def test_temperature_flattens_the_weights():
    sizes = [1000, 10]
    assert temperature_weights(sizes, 1)[1] == pytest.approx(10 / 1010)
    assert temperature_weights(sizes, 2)[1] == pytest.approx(10**0.5 / (10**0.5 + 1000**0.5))
    assert temperature_weights(sizes, np.inf).tolist() == [0.5, 0.5]
    assert temperature_weights([1e300, 1e299], 0.5).sum() == pytest.approx(1)


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match=r"weights must be above 0 and finite, but got \[1.0, 0.0\]. Leave out"):
        MixtureOrder([1, 0])
    with pytest.raises(ValueError, match="weights must be above 0"):
        MixtureOrder([])
    with pytest.raises(ValueError, match="`temperature` must be above 0, but got 0"):
        temperature_weights([1, 2], 0)
    with pytest.raises(ValueError, match="sizes of all sources must be above 0"):
        temperature_weights([1, 0])
