"""How an optimizer step of several tasks is cut: each micro-batch holds one task, the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_llm.datamodules.batches.global_batch_plan import GlobalBatchPlan
from lightning_llm.datamodules.batches.plan import Cursor, Layout, Planned, in_parts
from lightning_llm.datamodules.windows import Int64Array


def share_slots(costs: Sequence[float], num_slots: int) -> list[int]:
    """Give each task one micro-batch, and each further one to the task whose micro-batches cost most.

    Args:
        costs: Of each task's rows in the step.
        num_slots: Micro-batches; as many as tasks at least.

    Example:
        >>> share_slots([10.0, 30.0], 4)
        [1, 3]
    """
    slots = [1] * len(costs)
    for _ in range(num_slots - len(costs)):
        most = max(range(len(costs)), key=lambda task: costs[task] / slots[task])
        slots[most] += 1
    return slots


def empty_row(task: int) -> int:
    """What stands for a row without a target of a task."""
    return -1 - task


class MultiTaskPlan(GlobalBatchPlan):
    """Optimizer steps of a given number of rows of all tasks.

    A step takes consecutive positions of the order; its rows of each task are cut into micro-batches on each rank. So
    the rows of a step depend neither on ranks nor on micro-batches.

    Args:
        sizes: Rows of each task, which the order has end to end.
        costs: (num_rows,) what each row costs, such as its tokens.
        *args: As for :class:`GlobalBatchPlan`.
        **options: Likewise.
    """

    def __init__(self, sizes: Sequence[int], costs: Int64Array, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._task_ends = np.cumsum(sizes)
        self._costs = costs

    def _slots(self, rows: Int64Array, layout: Layout) -> Sequence[Int64Array]:
        task = np.searchsorted(self._task_ends, rows, side="right")
        present = np.unique(task).tolist()
        if len(present) > layout.micro_batches:
            raise ValueError(
                f"An optimizer step has rows of {len(present)} tasks, and a micro-batch holds one task, but the "
                f"Trainer has accumulate_grad_batches={layout.micro_batches}. Set it to {len(self._task_ends)} or more."
            )
        mine = [rows[task == number] for number in present]
        shares = share_slots([float(self._costs[part].sum()) for part in mine], layout.micro_batches)
        slots: list[Int64Array] = []
        for number, part, share in zip(present, mine, shares, strict=True):
            empty = np.array([empty_row(number)])
            slots += [slot if len(slot) else empty for slot in self._cut(part, share * layout.num_ranks)]
        return slots


class TaskByTaskPlan:
    """Each row once, one task after the other, in micro-batches of a fixed number of rows; for evaluation.

    Args:
        sizes: Rows of each task.
        micro_batch_sizes: Rows of a rank in a micro-batch, of each task.
        numbers: Of the tasks, for rows that stand in for none.
    """

    def __init__(self, sizes: Sequence[int], micro_batch_sizes: Sequence[int], numbers: Sequence[int]) -> None:
        self.micro_batch_sizes = list(micro_batch_sizes)
        self.numbers = list(numbers)
        self._ends = np.cumsum(sizes).tolist()

    def batches(self, cursor: Cursor, layout: Layout) -> Iterator[Planned]:
        """Consecutive rows of a task, shared out evenly."""
        for number, begin, end in self._parts(cursor.rows, layout):
            share = np.array_split(np.arange(begin, end), layout.num_ranks)[layout.rank]
            rows = share if len(share) else np.array([empty_row(number)])
            yield Planned(rows, replace(cursor, rows=end))

    def num_batches(self, cursor: Cursor, layout: Layout) -> int:
        """Rows left, in micro-batches."""
        return sum(1 for _ in self._parts(cursor.rows, layout))

    def batches_before(self, cursor: Cursor, layout: Layout) -> int:
        """Rows taken, in micro-batches."""
        return sum(1 for _, _, end in self._parts(0, layout) if end <= cursor.rows)

    def most_rows(self, lengths: Int64Array, layout: Layout) -> int:
        """Of the task that has most."""
        return max(self.micro_batch_sizes)

    def after(self, cursor: Cursor, layout: Layout, num_batches: int) -> Cursor:
        """So many micro-batches further, or at the end."""
        ends = [end for _, _, end in self._parts(cursor.rows, layout)][:num_batches]
        return replace(cursor, rows=ends[-1] if ends else cursor.rows)

    def _parts(self, begin: int, layout: Layout) -> Iterator[tuple[int, int, int]]:
        """Number of the task, and first and last row (excluded), of each micro-batch of all ranks."""
        first = 0
        for number, size, end in zip(self.numbers, self.micro_batch_sizes, self._ends, strict=True):
            many = size * layout.num_ranks
            for part in range(in_parts(end - max(first, begin), many)):
                at = max(first, begin) + part * many
                yield number, at, min(at + many, end)
            first = end
