"""Batches of which the loader knows the optimizer step: its rows first, then how they are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lightning_llm.datamodules.batches.budget import balanced_slots
from lightning_llm.datamodules.batches.plan import Cursor, Layout, Planned, in_parts
from lightning_llm.datamodules.order import RowOrder
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.schedule import Progress, Schedule


class GlobalBatchPlan:
    """Optimizer steps of a given number of rows, which may follow a schedule or be set while the run goes on.

    A step takes consecutive positions of the epoch; they are cut into K micro-batches on each of W ranks, whatever K
    and W are. By rows: in order, evenly. By tokens: rows of like length together (padded) or so that all have like
    numbers of tokens (padding-free).

    Args:
        order: Which rows stand where in an epoch.
        global_batch: Rows in an optimizer step over all ranks: a number or a :class:`~lightning_llm.Schedule` of
            samples, tokens, steps or epochs.
        tokens_per_row: Label tokens of a row on average.
        counts_tokens: Whether ``global_batch`` counts label tokens: a step takes the rows that hold so many on average.
        lengths: (num_rows,) tokens in each row, to balance micro-batches by; None: by rows.
        padded: Whether a micro-batch is padded to its longest row, if lengths are given.
        drop_last: Leave out the epoch's last step if it is short.
    """

    def __init__(
        self,
        order: RowOrder,
        global_batch: float | Schedule,
        tokens_per_row: float = 0.0,
        counts_tokens: bool = False,
        lengths: Int64Array | None = None,
        padded: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.order = order
        self.global_batch = global_batch if isinstance(global_batch, Schedule) else Schedule(global_batch)
        self.lengths = lengths
        self.padded = padded
        self.drop_last = drop_last
        self._ends: dict[Cursor, int] = {}
        self.tokens_per_row = tokens_per_row
        self.counts_tokens = counts_tokens
        self.step_rows(Cursor())  # a schedule in a unit that nobody counts is refused now

    def step_rows(self, cursor: Cursor) -> int:
        """Rows of the optimizer step that begins at the cursor, were the epoch endless."""
        if cursor.global_batch is not None:
            return cursor.global_batch
        return self.rows_for(self.global_batch(self._progress(cursor)))

    def rows_for(self, size: float) -> int:
        """Rows that come nearest to a global batch, in the plan's unit; one at least."""
        return max(1, round(size / self.tokens_per_row if self.counts_tokens else size))

    def batches(self, cursor: Cursor, layout: Layout) -> Iterator[Planned]:
        """Step by step: the rows from the cursor on, cut into as many micro-batches as there are."""
        while (num_rows := self._take(cursor)) > 0:
            positions = np.arange(cursor.rows, cursor.rows + num_rows)
            rows = self.order.rows(positions, cursor.epoch)
            slots = self._slots(rows, layout)
            done = replace(cursor, rows=cursor.rows + num_rows, steps=cursor.steps + 1)
            for micro_batch in range(layout.micro_batches):
                is_last = micro_batch == layout.micro_batches - 1  # before it, nothing of the step is trained
                yield Planned(slots[micro_batch * layout.num_ranks + layout.rank], done if is_last else cursor)
            cursor = done

    def num_batches(self, cursor: Cursor, layout: Layout) -> int:
        """Steps left, each of ``layout.micro_batches``."""
        if cursor not in self._ends:
            self._ends = {cursor: self._walk(cursor).steps}  # of the last one that was asked for
        return (self._ends[cursor] - cursor.steps) * layout.micro_batches

    def batches_before(self, cursor: Cursor, layout: Layout) -> int:
        """Steps taken, each of ``layout.micro_batches``."""
        return cursor.steps * layout.micro_batches

    def most_rows(self, lengths: Int64Array, layout: Layout) -> int:
        """A micro-batch's even share of the schedule's largest step."""
        return in_parts(self.rows_for(max(self.global_batch.values)), layout.micro_batches * layout.num_ranks)

    def after(self, cursor: Cursor, layout: Layout, num_batches: int) -> Cursor:
        """So many steps further, or at the epoch's end."""
        return self._walk(cursor, in_parts(num_batches, layout.micro_batches))

    def _walk(self, cursor: Cursor, max_steps: int | None = None) -> Cursor:
        """From step to step to the epoch's end, or ``max_steps`` further; many at once while the size stays."""
        last = None if max_steps is None else cursor.steps + max_steps
        while (num_rows := self._take(cursor)) > 0 and cursor.steps != last:
            size = self.step_rows(cursor)
            steps = in_parts(self.order.num_rows - cursor.rows, size, self.drop_last)
            steps = min(steps, self._unchanged_steps(cursor, size))
            if last is not None:
                steps = min(steps, last - cursor.steps)
            num_rows = min(self.order.num_rows - cursor.rows, steps * size)
            cursor = replace(cursor, rows=cursor.rows + num_rows, steps=cursor.steps + steps)
        return cursor

    def _unchanged_steps(self, cursor: Cursor, size: int) -> int:
        """For how many steps of this size, one at least, the schedule certainly asks for no other."""
        progress = self._progress(cursor)
        if cursor.global_batch is not None or self.global_batch.is_final(progress):
            return self.order.num_rows
        if self.global_batch.interpolation != "step":
            return 1
        per_step = {
            "steps": 1.0,
            "samples": size,
            "tokens": size * self.tokens_per_row,
            "epochs": size / self.order.num_rows,
        }
        ahead = (
            (at.value - progress.of(at.unit)) / per_step[at.unit]
            for at, _ in self.global_batch.milestones
            if at.value > progress.of(at.unit)
        )
        return max(int(min(ahead)) - 1, 1)

    def _take(self, cursor: Cursor) -> int:
        size = self.step_rows(cursor)
        left = self.order.num_rows - cursor.rows
        return 0 if self.drop_last and left < size else min(size, left)

    def _slots(self, rows: Int64Array, layout: Layout) -> Sequence[Int64Array]:
        """The rows of each micro-batch of each rank: all ranks of the first, then of the second, ..."""
        return self._cut(rows, layout.micro_batches * layout.num_ranks)

    def _cut(self, rows: Int64Array, num_slots: int) -> Sequence[Int64Array]:
        if self.lengths is None:
            return np.array_split(rows, num_slots)
        return [rows[slot] for slot in balanced_slots(self.lengths[rows], num_slots, padded=self.padded)]

    def _progress(self, cursor: Cursor) -> Progress:
        samples = cursor.earlier_rows + cursor.rows
        return Progress(
            steps=cursor.earlier_steps + cursor.steps,
            tokens=samples * self.tokens_per_row,
            epochs=cursor.epoch + cursor.rows / max(self.order.num_rows, 1),
            samples=samples,
        )
