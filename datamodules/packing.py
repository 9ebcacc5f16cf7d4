"""Pack items into bins of one capacity; pure index mathematics."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_llm.datamodules.windows import Int64Array


def best_fit_decreasing(lengths: npt.ArrayLike, capacity: int) -> tuple[Int64Array, int]:
    """Pack items, longest first, each into the fullest bin that still holds it.

    Items of equal length are placed together: all bins with the same free space take the same number of them, so
    the work is proportional to the number of *distinct* lengths and free spaces, not to the number of items.

    Args:
        lengths: (num_items,) each in 1..capacity.
        capacity: Size of a bin.

    Returns:
        The bin of each item, (num_items,) int64, and the number of bins.

    Raises:
        ValueError: If an item is empty or longer than a bin.

    Example:
        >>> bins, num_bins = best_fit_decreasing([3, 7, 2, 5, 1], capacity=8)
        >>> bins.tolist(), num_bins  # 7+1, 5+3, 2
        ([1, 0, 2, 1, 0], 3)

    References:
        Best-fit packing of documents: Ding et al., arXiv 2404.10830.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not (sizes.min() >= 1 and sizes.max() <= capacity):
        raise ValueError(f"Item lengths must lie in 1..{capacity}, but got {sizes.min()}..{sizes.max()}.")
    # Equal lengths side by side, longest first; numpy sorts integers of 16 bits by their digits, in linear time.
    order = np.argsort((capacity - sizes).astype(np.min_scalar_type(capacity)), kind="stable")
    num_of_size = np.bincount(sizes)
    bin_of = np.empty(len(sizes), np.int64)  # in sorted order
    bins = _Bins(capacity)
    begin = 0
    for size in np.flatnonzero(num_of_size)[::-1].tolist():
        end = begin + int(num_of_size[size])
        while begin < end:
            begin += bins.place(size, bin_of[begin:end])
    result = np.empty_like(bin_of)
    result[order] = bin_of
    return result, bins.num_bins


class _Bins:
    """Bins by their free space; those with equal space are together in arrays of bin numbers."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_bins = 0
        self._with_space: dict[int, list[Int64Array]] = {}
        self._spaces = 0  # bit r is set where some bin has r free

    def place(self, size: int, bin_of: Int64Array) -> int:
        """Put items of one size into bins of one space; write their bins into ``bin_of`` and return how many."""
        space, bins = self._take(size, len(bin_of))
        per_bin = space // size
        placed = min(len(bin_of), per_bin * len(bins))
        num_full, rest = divmod(placed, per_bin)
        used = num_full + (rest > 0)
        bin_of[:placed] = bins[:used] if per_bin == 1 else np.repeat(bins[:used], per_bin)[:placed]
        self._put(space - per_bin * size, bins[:num_full])
        self._put(space - rest * size, bins[num_full:used])
        self._put(space, bins[used:])
        return placed

    def _take(self, size: int, num_items: int) -> tuple[int, Int64Array]:
        """The least space that holds an item, and bins with it; new bins where there is none."""
        fitting = self._spaces >> size
        if not fitting:
            first, per_bin = self.num_bins, self.capacity // size
            self.num_bins += -(-num_items // per_bin)
            return self.capacity, np.arange(first, self.num_bins)
        space = size + (fitting & -fitting).bit_length() - 1
        bins = self._with_space[space].pop()
        if not self._with_space[space]:
            self._spaces &= ~(1 << space)
        return space, bins

    def _put(self, space: int, bins: Int64Array) -> None:
        if space and len(bins):
            self._with_space.setdefault(space, []).append(bins)
            self._spaces |= 1 << space
