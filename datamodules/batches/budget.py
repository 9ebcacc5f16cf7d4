"""Cut rows into micro-batches that cost no more than a budget of tokens; pure index mathematics."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from lightning_llm.datamodules.packing import best_fit_decreasing
from lightning_llm.datamodules.windows import Int64Array


def cost(lengths: npt.ArrayLike, *, padded: bool) -> int:
    """Positions that a micro-batch of rows takes: every row as long as the longest, or no padding at all."""
    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(sizes):
        return 0
    return int(sizes.max()) * len(sizes) if padded else int(sizes.sum())


def micro_batches_within(
    lengths: npt.ArrayLike, budget: int, *, padded: bool, multiple_of: int = 1
) -> list[Int64Array]:
    """Cut rows into micro-batches whose cost is ``budget`` at most, with rows of like length together.

    Padded: rows sorted by length are cut whenever the budget is full. Padding-free: rows are packed best-fit. Then the
    micro-batches with the most rows are halved until their number is a multiple of ``multiple_of``; no row is dropped.
    Where there are fewer rows than that, some micro-batches are empty.

    Args:
        lengths: (num_rows,) tokens in each row, each in 1..budget.
        budget: Positions in a micro-batch, padding included.
        padded: Whether a micro-batch is padded to its longest row.
        multiple_of: For instance the micro-batches of an optimizer step over all ranks.

    Returns:
        For each micro-batch the rows in it, as indices into ``lengths``; those with the longest rows first.

    Raises:
        ValueError: If a row is longer than the budget.

    Example:
        >>> [batch.tolist() for batch in micro_batches_within([3, 8, 4, 2], budget=8, padded=True)]
        [[1], [2, 0], [3]]
        >>> [batch.tolist() for batch in micro_batches_within([3, 8, 4, 2], budget=8, padded=False)]
        [[1], [2, 0], [3]]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and sizes.max() > budget:
        raise ValueError(
            f"A micro-batch holds {budget} tokens at most (`micro_batch_tokens`), but one row alone has "
            f"{sizes.max()}. Raise `micro_batch_tokens` to max_length at least."
        )
    order = np.argsort(-sizes, kind="stable")
    if padded:
        batches, begin = [], 0
        while begin < len(order):
            end = begin + budget // max(int(sizes[order[begin]]), 1)
            batches.append(order[begin:end])
            begin = end
    else:
        bins, num_bins = best_fit_decreasing(sizes[order], budget)
        by_bin = np.argsort(bins, kind="stable")
        batches = np.split(order[by_bin], np.searchsorted(bins[by_bin], np.arange(1, num_bins))) if num_bins else []
    return _halve_largest(batches, -len(batches) % multiple_of)


def _halve_largest(batches: list[Int64Array], times: int) -> list[Int64Array]:
    """Halve the micro-batch with the most rows, ``times`` times; the halves stay beside each other."""
    pieces = {index: [batch] for index, batch in enumerate(batches)}
    heap = [(-len(batch), index, 0) for index, batch in enumerate(batches)]
    heapq.heapify(heap)
    empty: list[Int64Array] = []
    for _ in range(times):
        if not heap or heap[0][0] > -2:
            empty.append(np.empty(0, np.int64))
            continue
        _, index, part = heapq.heappop(heap)
        batch = pieces[index][part]
        middle = len(batch) // 2
        pieces[index][part] = batch[:middle]
        pieces[index].append(batch[middle:])
        for at in (part, len(pieces[index]) - 1):
            heapq.heappush(heap, (-len(pieces[index][at]), index, at))
    return [piece for index in range(len(batches)) for piece in pieces[index]] + empty


def balanced_slots(lengths: npt.ArrayLike, num_slots: int, *, padded: bool) -> list[Int64Array]:
    """Share rows out over a fixed number of micro-batches so that the most expensive one costs little.

    Padded: rows sorted by length, cut into runs, with the smallest largest cost that runs can have. Padding-free:
    the longest row first, each to the micro-batch with the fewest tokens so far; the largest is then at most one row
    above the mean.

    Args:
        lengths: (num_rows,) tokens in each row.
        num_slots: Micro-batches; where there are fewer rows, some are empty.
        padded: Whether a micro-batch is padded to its longest row.

    Returns:
        For each micro-batch the rows in it, as indices into ``lengths``.

    Example:
        >>> [slot.tolist() for slot in balanced_slots([5, 1, 4, 2], 2, padded=False)]
        [[0, 1], [2, 3]]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    if padded:
        return _balanced_runs(sizes, order, num_slots)
    slots: list[list[int]] = [[] for _ in range(num_slots)]
    heap = [(0, slot) for slot in range(num_slots)]
    for row in order.tolist():
        load, slot = heapq.heappop(heap)
        slots[slot].append(row)
        heapq.heappush(heap, (load + int(sizes[row]), slot))
    return [np.array(slot, dtype=np.int64) for slot in slots]


def _balanced_runs(sizes: Int64Array, order: Int64Array, num_slots: int) -> list[Int64Array]:
    sorted_sizes = sizes[order].clip(min=1).tolist()

    def cut(budget: int) -> list[int]:
        ends: list[int] = []
        begin = 0
        while begin < len(sorted_sizes) and len(ends) <= num_slots:
            begin += max(budget // sorted_sizes[begin], 1)
            ends.append(min(begin, len(sorted_sizes)))
        return ends

    low = sorted_sizes[0] if sorted_sizes else 1
    high = low * max(len(sorted_sizes), 1)
    while low < high:  # the smallest budget that needs no more runs than there are slots
        middle = (low + high) // 2
        if len(cut(middle)) <= num_slots:
            high = middle
        else:
            low = middle + 1
    ends = cut(low)
    runs = np.split(order, ends[:-1]) if ends else []
    return _halve_largest(runs, num_slots - len(runs))
