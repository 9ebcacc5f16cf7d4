"""Mix several sources by weight: which source item i comes from, as a pure function with exact proportions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightning_llm.datamodules.order import shuffled
from lightning_llm.datamodules.windows import Int64Array

_SMALLEST_BLOCK, _LARGEST_BLOCK = 1000, 1_000_000
_SMALLEST_COUNT = 20  # items of the rarest source in a block, so that rounding changes its share by 2.5% at most


def temperature_weights(sizes: npt.ArrayLike, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """Weights of sources by their size, w_s ∝ n_s^(1/T).

    T = 1 draws in proportion to size; a higher T draws small sources more often; T = inf draws all equally often.

    Args:
        sizes: (num_sources,) in any unit, each above 0.
        temperature: T, above 0.

    Returns:
        (num_sources,) float64, summing to 1.

    Raises:
        ValueError: For a size or temperature that is not above 0.

    Example:
        >>> temperature_weights([300, 100]).tolist()
        [0.75, 0.25]
        >>> temperature_weights([900, 100], temperature=2).round(6).tolist()
        [0.75, 0.25]

    References:
        Multilingual sampling: Arivazhagan et al., arXiv 1907.05019, section 3.
    """
    counts = np.asarray(sizes, dtype=np.float64)
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, but got {temperature}.")
    if not (counts > 0).all():
        raise ValueError(f"The sizes of all sources must be above 0, but got {counts.tolist()}.")
    powers = (counts / counts.max()) ** (1 / temperature)
    weights: npt.NDArray[np.float64] = powers / powers.sum()
    return weights


def block_counts(weights: npt.ArrayLike) -> Int64Array:
    """Items of each source in a block: the weights in whole numbers, by largest remainders, at least 1 each.

    A block has 1000 items, or as many more as the smallest weight needs to be met within a few percent.

    Args:
        weights: (num_sources,) above 0, of any sum.

    Returns:
        (num_sources,) int64; their sum is the length of a block.

    Raises:
        ValueError: For a weight that is not above 0, or no weight.

    Example:
        >>> block_counts([0.5, 0.3, 0.2]).tolist()
        [500, 300, 200]
    """
    values = np.asarray(weights, dtype=np.float64)
    if not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(
            f"Mixture weights must be above 0 and finite, but got {values.tolist()}. Leave out a source of weight 0."
        )
    shares = values / values.sum()
    length = _SMALLEST_BLOCK
    while length < _LARGEST_BLOCK and shares.min() * length < _SMALLEST_COUNT:
        length *= 10
    exact = shares * length
    counts = np.floor(exact + 1e-9).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: length - int(counts.sum())]] += 1
    positive: Int64Array = np.maximum(counts, 1)
    return positive


class MixtureOrder:
    """Which source item i of a mixture comes from, and which item of that source it is.

    Every block of ``block_size`` items holds exactly ``counts[s]`` items of source s, in an order that a keyed
    permutation shuffles. Within a source the items run 0, 1, 2, ... without a gap. Both are looked up in a table of
    one block, for any item at once.

    Args:
        weights: (num_sources,) above 0, of any sum.
        seed: Of the order.
        *key: Each has an order of its own.

    Attributes:
        counts: (num_sources,) int64, items of each source in a block.
        block_size: Their sum.

    Raises:
        ValueError: For weights that are not above 0.

    Example:
        >>> order = MixtureOrder([3, 1], seed=0)
        >>> sources, positions = order(range(order.block_size))
        >>> np.bincount(sources).tolist()
        [750, 250]
        >>> positions[sources == 1][:4].tolist()
        [0, 1, 2, 3]
    """

    def __init__(self, weights: npt.ArrayLike, seed: int = 0, *key: int) -> None:
        self.counts = block_counts(weights)
        self.block_size = int(self.counts.sum())
        places = shuffled(np.arange(self.block_size), self.block_size, seed, *key)
        ends = np.cumsum(self.counts)
        self._source = np.searchsorted(ends, places, side="right").astype(np.int32)
        by_source = np.argsort(self._source, kind="stable")
        self._rank = np.empty(self.block_size, np.int32)
        self._rank[by_source] = np.arange(self.block_size) - np.repeat(ends - self.counts, self.counts)

    @property
    def num_sources(self) -> int:
        """Sources in the mixture."""
        return len(self.counts)

    def __call__(self, index: npt.ArrayLike) -> tuple[Int64Array, Int64Array]:
        """Look items up.

        Args:
            index: Numbers of items from 0 on, any shape.

        Returns:
            The source of each item and its number within that source, int64 of the shape of ``index``.
        """
        block, place = np.divmod(np.asarray(index, dtype=np.int64), self.block_size)
        source = self._source[place].astype(np.int64)
        return source, block * self.counts[source] + self._rank[place]


def mixture_source(index: npt.ArrayLike, weights: Sequence[float], seed: int) -> Int64Array:
    """The source of each item of a mixture; see :class:`MixtureOrder`, which remembers its table.

    Example:
        >>> int(mixture_source(range(1000), [0.9, 0.1], seed=0).sum())
        100
    """
    return MixtureOrder(weights, seed)(index)[0]


def mixture_positions(index: npt.ArrayLike, weights: Sequence[float], seed: int) -> Int64Array:
    """The number of each item of a mixture within its source; see :class:`MixtureOrder`."""
    return MixtureOrder(weights, seed)(index)[1]
