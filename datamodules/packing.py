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
    order = np.argsort(-sizes, kind="stable")
    distinct, run_starts = np.unique(-sizes[order], return_index=True)
    run_ends = np.append(run_starts, len(sizes))[1:]
    bin_of = np.empty(len(sizes), np.int64)  # in sorted order
    bins_with_space: dict[int, list[Int64Array]] = {}
    spaces = 0  # bit r is set where some bin has r free: `(spaces >> size)` lowest bit is the best fit
    num_bins = 0

    def put(space: int, bins: Int64Array) -> None:
        nonlocal spaces
        if space and len(bins):
            bins_with_space.setdefault(space, []).append(bins)
            spaces |= 1 << space

    for size, begin, end in zip((-distinct).tolist(), run_starts.tolist(), run_ends.tolist(), strict=True):
        while begin < end:
            fitting = spaces >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                bins = bins_with_space[space].pop()
                if not bins_with_space[space]:
                    spaces &= ~(1 << space)
            else:
                space = capacity
                num_new = -(-(end - begin) // (capacity // size))
                bins = np.arange(num_bins, num_bins + num_new)
                num_bins += num_new
            per_bin = space // size
            placed = min(end - begin, per_bin * len(bins))
            bin_of[begin : begin + placed] = np.repeat(bins[: -(-placed // per_bin)], per_bin)[:placed]
            begin += placed
            num_full, rest = divmod(placed, per_bin)
            put(space - per_bin * size, bins[:num_full])
            if rest:
                put(space - rest * size, bins[num_full : num_full + 1])
            put(space, bins[num_full + (rest > 0) :])
    result = np.empty_like(bin_of)
    result[order] = bin_of
    return result, num_bins
