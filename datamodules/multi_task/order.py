"""Which row of which task stands where in an epoch: shares that each stretch of the order keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_llm.datamodules.mixture import block_counts, temperature_weights
from lightning_llm.datamodules.order import RowOrder
from lightning_llm.datamodules.windows import Int64Array

_LARGEST_BLOCK = 1_000_000

Sampling = str | Mapping[str, float]


def rows_in_block(sizes: Mapping[str, int], sampling: Sampling) -> dict[str, int]:
    """How many rows of each task stand in a block of the order.

    Args:
        sizes: Rows of each task.
        sampling: ``size``: in proportion to the sizes, so that an epoch has each row once. ``{"temperature": T}``: to
            sizes^(1/T). ``{"topic": 0.3, ...}``: the share of each task, of any sum.

    Raises:
        ValueError: For another sampling, tasks that are not there or left out, shares that are not above 0.

    Example:
        >>> rows_in_block({"topic": 30, "lm": 90}, "size")
        {'topic': 1, 'lm': 3}
        >>> rows_in_block({"topic": 10, "lm": 90}, {"temperature": 2})
        {'topic': 250, 'lm': 750}
        >>> rows_in_block({"topic": 10, "lm": 90}, {"topic": 1, "lm": 1})
        {'topic': 500, 'lm': 500}
    """
    values = list(sizes.values())
    if isinstance(sampling, Mapping) and set(sampling) == {"temperature"} != set(sizes):
        counts = block_counts(temperature_weights(values, float(sampling["temperature"])))
    elif isinstance(sampling, Mapping):
        if set(sampling) != set(sizes):
            raise ValueError(
                f"`sampling` must have a share for each task, {', '.join(sizes)}, but has {', '.join(sampling)}. "
                f"'size' and {{'temperature': 2}} are shares by the tasks' numbers of rows."
            )
        counts = block_counts([sampling[name] for name in sizes])
    elif sampling == "size":
        counts = np.array(values) // np.gcd.reduce(values)
        counts = counts if counts.sum() <= _LARGEST_BLOCK else block_counts(values)
    else:
        raise ValueError(
            f"`sampling` must be 'size', {{'temperature': T}} or a share for each task, but got {sampling!r}."
        )
    return dict(zip(sizes, counts.tolist(), strict=True))


class EvenOrder:
    """Items of several kinds, each spread evenly: any stretch of them has its share of each kind, give or take one.

    Item i of a kind that has n in a block stands at (i + 1/2) / n of it.

    Args:
        counts: (num_kinds,) items of each kind in a block.

    Example:
        >>> kinds, numbers = EvenOrder([3, 1])(np.arange(8))
        >>> kinds.tolist(), numbers.tolist()
        ([0, 0, 1, 0, 0, 0, 1, 0], [0, 1, 0, 2, 3, 4, 1, 5])
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.block_size = int(self.counts.sum())
        kind = np.repeat(np.arange(len(self.counts)), self.counts)
        number = np.arange(self.block_size) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        order = np.argsort((number + 0.5) / self.counts[kind], kind="stable")
        self._kind, self._number = kind[order].astype(np.int32), number[order].astype(np.int32)

    def __call__(self, index: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The kind of each item, and its number within that kind."""
        block, place = np.divmod(index, self.block_size)
        kind = self._kind[place].astype(np.int64)
        return kind, block * self.counts[kind] + self._number[place]


class TaskOrder:
    """The order of several tasks: an epoch has as many rows as all tasks together.

    Each task is gone through in its own order, from end to end, before any of its rows comes again. Tasks with a large
    share come round more often than once an epoch, others less, and go on there in the next epoch.

    Args:
        orders: Of each task; its own epochs are its rounds.
        counts: Rows of each task in a block.
    """

    def __init__(self, orders: Sequence[RowOrder], counts: Sequence[int]) -> None:
        self.orders = list(orders)
        self.sizes = np.array([order.num_rows for order in orders], dtype=np.int64)
        self.num_rows = int(self.sizes.sum())
        self._even = EvenOrder(counts)
        self._first = np.cumsum(self.sizes) - self.sizes

    def rows(self, positions: Int64Array, epoch: int) -> Int64Array:
        """Rows of the tasks laid end to end; a position in an epoch is one in the whole run."""
        task, place = self._even(np.asarray(positions, dtype=np.int64) + epoch * self.num_rows)
        rows = np.empty(len(task), np.int64)
        for number in np.unique(task).tolist():
            mine = np.flatnonzero(task == number)
            rounds, inside = np.divmod(place[mine], self.sizes[number])
            for time in np.unique(rounds).tolist():
                now = rounds == time
                inside[now] = self.orders[number].rows(inside[now], time)
            rows[mine] = self._first[number] + inside
        return rows


def identity_of(sampling: Sampling) -> Any:
    """The sampling in simple values, for a checkpoint."""
    return dict(sampling) if isinstance(sampling, Mapping) else sampling
