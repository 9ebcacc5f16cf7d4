"""The order of an epoch is a bijection that seed and epoch decide."""

import numpy as np
import pytest

from lightning_llm.datamodules.order import selected, shuffled


@pytest.mark.parametrize("size", [*range(1, 40), 64, 65, 255, 256, 257, 1000, 4097, 65537])
def test_shuffled_is_a_bijection(size):
    assert np.array_equal(np.sort(shuffled(np.arange(size), size, 3, 1)), np.arange(size))


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    index = np.arange(1000)
    order = shuffled(index, 1000, 0, 0)
    assert np.array_equal(order, shuffled(index, 1000, 0, 0))
    assert not np.array_equal(order, shuffled(index, 1000, 0, 1))
    assert not np.array_equal(order, shuffled(index, 1000, 1, 0))
    parts = [shuffled(part, 1000, 0, 0) for part in np.array_split(index, 7)]
    assert np.array_equal(order, np.concatenate(parts))
    assert shuffled(5, 1000, 0, 0) == order[5]


def test_shuffled_looks_random():
    order = shuffled(np.arange(10_000), 10_000, 0, 0)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    neighbours = np.abs(np.diff(order)).mean()
    assert neighbours == pytest.approx(10_000 / 3, rel=0.05)


def test_selected_takes_about_the_share_and_each_item_by_itself():
    chosen = selected(np.arange(20_000), 0.05, seed=0)
    assert 0.04 < chosen.mean() < 0.06
    assert [bool(selected(i, 0.05, seed=0)) for i in range(200)] == chosen[:200].tolist()
    assert not np.array_equal(chosen, selected(np.arange(20_000), 0.05, seed=1))
    assert not selected(np.arange(100), 0.0, seed=0).any()
