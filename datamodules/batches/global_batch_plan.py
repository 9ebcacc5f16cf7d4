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
        label_tokens: Of all rows; with them, ``global_batch`` counts label tokens, and a step takes the rows that hold
            so many on average.
        lengths: (num_rows,) tokens in each row, to balance micro-batches by; None: by rows.
        padded: Whether a micro-batch is padded to its longest row, if lengths are given.
        drop_last: Leave out the epoch's last step if it is short.
    """

    def __init__(
        self,
        order: RowOrder,
        global_batch: float | Schedule,
        label_tokens: int | None = None,
        lengths: Int64Array | None = None,
        padded: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.order = order
        self.global_batch = global_batch if isinstance(global_batch, Schedule) else Schedule(global_batch)
        self.lengths = lengths
        self.padded = padded
        self.drop_last = drop_last
        self._tokens_per_row = (label_tokens or 0) / max(order.num_rows, 1)
        self._counts_tokens = label_tokens is not None
        self.step_rows(Cursor())  # a schedule in a unit that nobody counts is refused now

    def step_rows(self, cursor: Cursor) -> int:
        """Rows of the optimizer step that begins at the cursor, were the epoch endless."""
        if cursor.global_batch is not None:
            return cursor.global_batch
        return self.rows_for(self.global_batch(self._progress(cursor)))

    def rows_for(self, size: float) -> int:
        """Rows that come nearest to a global batch, in the plan's unit; one at least."""
        return max(1, round(size / self._tokens_per_row if self._counts_tokens else size))

    def batches(self, cursor: Cursor, layout: Layout) -> Iterator[Planned]:
        """Step by step: the rows from the cursor on, cut into as many micro-batches as there are."""
        while (num_rows := self._take(cursor)) > 0:
            positions = np.arange(cursor.rows, cursor.rows + num_rows)
            rows = self.order.rows(positions, cursor.epoch)
            slots = self._cut(rows, layout.micro_batches * layout.num_ranks)
            done = replace(cursor, rows=cursor.rows + num_rows, steps=cursor.steps + 1)
            for micro_batch in range(layout.micro_batches):
                is_last = micro_batch == layout.micro_batches - 1  # before it, nothing of the step is trained
                yield Planned(slots[micro_batch * layout.num_ranks + layout.rank], done if is_last else cursor)
            cursor = done

    def num_batches(self, cursor: Cursor, layout: Layout) -> int:
        """Steps left, each of ``layout.micro_batches``."""
        return (self._at_end(cursor).steps - cursor.steps) * layout.micro_batches

    def batches_before(self, cursor: Cursor, layout: Layout) -> int:
        """Steps taken, each of ``layout.micro_batches``."""
        return cursor.steps * layout.micro_batches

    def most_rows(self, lengths: Int64Array, layout: Layout) -> int:
        """A micro-batch's even share of the schedule's largest step."""
        return in_parts(self.rows_for(max(self.global_batch.values)), layout.micro_batches * layout.num_ranks)

    def end_of_epoch(self, cursor: Cursor) -> Cursor:
        """All steps taken."""
        return self._at_end(cursor).next_epoch(cursor.epoch + 1)

    def _at_end(self, cursor: Cursor) -> Cursor:
        """Step by step while the schedule moves, at once when it has come to rest."""
        while (num_rows := self._take(cursor)) > 0:
            steps = 1
            if cursor.global_batch is not None or self.global_batch.is_final(self._progress(cursor)):
                left = self.order.num_rows - cursor.rows
                steps = in_parts(left, self.step_rows(cursor), self.drop_last)
                num_rows = min(left, steps * self.step_rows(cursor))
            cursor = replace(cursor, rows=cursor.rows + num_rows, steps=cursor.steps + steps)
        return cursor

    def _take(self, cursor: Cursor) -> int:
        size = self.step_rows(cursor)
        left = self.order.num_rows - cursor.rows
        return 0 if self.drop_last and left < size else min(size, left)

    def _cut(self, rows: Int64Array, num_slots: int) -> Sequence[Int64Array]:
        if self.lengths is None:
            return np.array_split(rows, num_slots)
        return [rows[slot] for slot in balanced_slots(self.lengths[rows], num_slots, padded=self.padded)]

    def _progress(self, cursor: Cursor) -> Progress:
        samples = cursor.earlier_rows + cursor.rows
        return Progress(
            steps=cursor.earlier_steps + cursor.steps,
            tokens=samples * self._tokens_per_row,
            epochs=cursor.epoch + cursor.rows / max(self.order.num_rows, 1),
            samples=samples,
        )
