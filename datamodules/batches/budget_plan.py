"""Batches of which each holds as many rows as a budget of tokens allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np

from lightning_llm.datamodules.batches.budget import micro_batches_within
from lightning_llm.datamodules.batches.plan import Cursor, Layout, Planned, in_parts
from lightning_llm.datamodules.order import shuffled
from lightning_llm.datamodules.windows import Int64Array

_MEMBERS = 2**32 - 1  # in place of an epoch: which rows a pool holds, in every epoch


class BudgetPlan:
    """Micro-batches of a fixed number of tokens: as many rows in each as fit.

    Rows are drawn into pools, the same in every epoch; a pool's rows are sorted by length and cut by the budget
    (:func:`~lightning_llm.datamodules.batches.budget.micro_batches_within`). ``group`` micro-batches of like rows
    follow each other, one optimizer step, so that ranks wait little for each other; the order of groups and pools is
    another in each epoch, their number the same. Micro-batch i of the epoch goes to rank i mod W.

    Args:
        lengths: (num_rows,) tokens in each row.
        budget: Positions of a micro-batch, padding included.
        padded: Whether a micro-batch is padded to its longest row.
        group: Micro-batches of an optimizer step over all ranks.
        seed: Of pools and order; None keeps the table's order from pool to pool.
        pool_size: Rows in a pool: more fill better, and are less random.

    Raises:
        ValueError: If a row is longer than the budget.
    """

    def __init__(
        self,
        lengths: Int64Array,
        budget: int,
        *,
        padded: bool,
        group: int = 1,
        seed: int | None = None,
        pool_size: int = 8192,
    ) -> None:
        micro_batches_within(lengths.max(initial=0, keepdims=True), budget, padded=padded)
        self.lengths = lengths
        self.budget = budget
        self.padded = padded
        self.group = group
        self.seed = seed
        self.pool_size = pool_size
        self._counts: Int64Array | None = None  # micro-batches of each pool
        self._total: int | None = None  # of all pools, counted or told

    @property
    def num_pools(self) -> int:
        """Pools in an epoch; the last one may be small."""
        return -(-len(self.lengths) // self.pool_size)

    def batches(self, cursor: Cursor, layout: Layout) -> Iterator[Planned]:
        """Pool by pool: micro-batches in their order, each W of them to W ranks."""
        stream = self._from(cursor)
        while following := list(islice(stream, layout.num_ranks)):
            mine = following[layout.rank].rows if layout.rank < len(following) else np.empty(0, np.int64)
            yield Planned(mine, following[-1].after)

    @property
    def total(self) -> int:
        """Micro-batches of an epoch over all ranks; the first call cuts all pools, unless it was told."""
        if self._total is None:
            self._total = int(self._count_pools().sum())
        return self._total

    def tell_total(self, total: int) -> None:
        """Spare the plan the counting: a run that is resumed knows it."""
        self._total = total

    def num_batches(self, cursor: Cursor, layout: Layout) -> int:
        """Micro-batches left over all ranks, by the number of ranks."""
        if not cursor.batches or cursor.cut_by == (self.budget, self.group):
            return in_parts(self.total - cursor.batches, layout.num_ranks)
        left = 0
        if cursor.pool < self.num_pools:
            later = self._pool_order(np.arange(cursor.pool + 1, self.num_pools), cursor.epoch)
            left = len(self._pool(cursor)) + int(self._count_pools()[later].sum())
        return in_parts(left, layout.num_ranks)

    def batches_before(self, cursor: Cursor, layout: Layout) -> int:
        """Micro-batches taken over all ranks, by the number of ranks."""
        return in_parts(cursor.batches, layout.num_ranks)

    def most_rows(self, lengths: Int64Array, layout: Layout) -> int:
        """As many as the budget holds."""
        taken = np.arange(1, len(lengths) + 1) * lengths.max(initial=0) if self.padded else np.cumsum(lengths)
        return int(np.searchsorted(taken, self.budget, side="right"))

    def after(self, cursor: Cursor, layout: Layout, num_batches: int) -> Cursor:
        """No schedule depends on it: only the count moves."""
        return replace(cursor, batches=cursor.batches + num_batches * layout.num_ranks)

    def _from(self, cursor: Cursor) -> Iterator[Planned]:
        """Every rank's micro-batches."""
        while cursor.pool < self.num_pools:
            before = [cut for cut in cursor.cuts if cut[2]]
            taken = 0
            if before and before[-1][:2] == (self.budget, self.group):
                taken = before.pop()[2]
            pool = self._pool(cursor)
            same = not cursor.batches or cursor.cut_by == (self.budget, self.group)
            for index, rows in enumerate(pool):
                is_last = index == len(pool) - 1
                cuts = () if is_last else (*before, (self.budget, self.group, taken + index + 1))
                cursor = replace(
                    cursor,
                    rows=cursor.rows + len(rows),
                    batches=cursor.batches + 1,
                    pool=cursor.pool + is_last,
                    cuts=cuts,
                    cut_by=(self.budget, self.group) if same else None,
                )
                yield Planned(rows, cursor)
            if not pool:
                cursor = replace(cursor, pool=cursor.pool + 1, cuts=())

    def _pool(self, cursor: Cursor) -> list[Int64Array]:
        """Micro-batches of the cursor's pool that are still to come, cut by today's budget."""
        number = int(self._pool_order(np.array([cursor.pool]), cursor.epoch)[0])
        rows = self._members(number)
        for index, (budget, group, taken) in enumerate(cursor.cuts):
            batches = self._cut(rows, budget, group, cursor.epoch, number)[taken:]
            if index == len(cursor.cuts) - 1 and (budget, group) == (self.budget, self.group):
                return batches
            rows = np.concatenate([rows[:0], *batches])
        return self._cut(rows, self.budget, self.group, cursor.epoch, number)

    def _cut(self, rows: Int64Array, budget: int, group: int, epoch: int, pool: int) -> list[Int64Array]:
        """Cut a pool, in groups that follow each other in an order of the epoch's own."""
        if self.seed is not None:  # rows of equal length change places
            rows = rows[shuffled(np.arange(len(rows)), len(rows), self.seed, epoch, pool)]
        batches = micro_batches_within(self.lengths[rows], budget, padded=self.padded, multiple_of=group)
        groups = np.arange(len(batches) // group)
        if self.seed is not None:
            groups = shuffled(groups, len(groups), self.seed, epoch, pool, 1)
        return [rows[batches[g * group + i]] for g in groups.tolist() for i in range(group)]

    def _members(self, pool: int) -> Int64Array:
        positions = np.arange(pool * self.pool_size, min((pool + 1) * self.pool_size, len(self.lengths)))
        return positions if self.seed is None else shuffled(positions, len(self.lengths), self.seed, _MEMBERS)

    def _pool_order(self, index: Int64Array, epoch: int) -> Int64Array:
        return index if self.seed is None else shuffled(index, self.num_pools, self.seed, epoch, _MEMBERS)

    def _count_pools(self) -> Int64Array:
        if self._counts is None:
            pools = (self.lengths[self._members(pool)] for pool in range(self.num_pools))
            cut = partial(micro_batches_within, budget=self.budget, padded=self.padded, multiple_of=self.group)
            self._counts = np.array([len(cut(pool)) for pool in pools], dtype=np.int64)
        return self._counts
