"""Which rows each micro-batch of an epoch holds, as a pure function of where the run stands.

A plan says what the next micro-batches are, given a :class:`Cursor`, which is what was trained so far over all ranks,
and a :class:`Layout`, which is how an optimizer step is spread. The rows of an optimizer step follow from the cursor
alone; the layout only shares them out. So a run goes on with the same steps on another number of ranks, workers or
micro-batches, and nothing has to be skipped or remembered to get there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from lightning_llm.datamodules.order import RowOrder
from lightning_llm.datamodules.windows import Int64Array

_BLOCK = 1024  # positions


class Layout(NamedTuple):
    """How an optimizer step is spread.

    Attributes:
        rank: This rank among the data-parallel ranks.
        num_ranks: How many there are.
        micro_batches: Loader batches of one rank in an optimizer step, ``Trainer(accumulate_grad_batches=)``.
    """

    rank: int = 0
    num_ranks: int = 1
    micro_batches: int = 1


@dataclass(frozen=True)
class Cursor:
    """Where a run stands: what was trained on, over all ranks, and the same on all of them.

    Attributes:
        epoch: The current epoch.
        rows: Rows of this epoch.
        steps: Optimizer steps of this epoch, where the plan knows them (a global batch).
        batches: Micro-batches of this epoch, where the plan fixes them (a budget).
        earlier_rows: Rows of earlier epochs.
        earlier_steps: Optimizer steps of earlier epochs.
        global_batch: Rows of an optimizer step that :meth:`set_global_batch` asked for; None: as planned.
        pool: The current pool of a budget plan.
        cuts: How that pool was cut so far: ``(budget, group, micro-batches taken)`` each.
        cut_by: ``(budget, group)`` if all of this epoch was cut by them so far; None if by several.
    """

    epoch: int = 0
    rows: int = 0
    steps: int = 0
    batches: int = 0
    earlier_rows: int = 0
    earlier_steps: int = 0
    global_batch: int | None = None
    pool: int = 0
    cuts: tuple[tuple[int, int, int], ...] = ()
    cut_by: tuple[int, int] | None = None

    def next_epoch(self, epoch: int) -> Cursor:
        """The start of an epoch after this point."""
        return Cursor(
            epoch=epoch,
            earlier_rows=self.earlier_rows + self.rows,
            earlier_steps=self.earlier_steps + self.steps,
            global_batch=self.global_batch,
        )

    def to_state(self) -> dict[str, Any]:
        """Numbers and lists, for a checkpoint."""
        cut_by = None if self.cut_by is None else list(self.cut_by)
        return {**asdict(self), "cuts": [list(cut) for cut in self.cuts], "cut_by": cut_by}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Cursor:
        """What :meth:`to_state` gave."""
        cuts = tuple((int(budget), int(group), int(taken)) for budget, group, taken in state["cuts"])
        cut_by = None if state["cut_by"] is None else (int(state["cut_by"][0]), int(state["cut_by"][1]))
        return cls(**{**state, "cuts": cuts, "cut_by": cut_by})


class Planned(NamedTuple):
    """A micro-batch of one rank, and where the run stands once it is trained.

    Attributes:
        rows: (num_rows,) int64; empty where rows run out and other ranks have some left.
        after: The cursor behind it, and behind the micro-batches that other ranks train at the same time.
    """

    rows: Int64Array
    after: Cursor


class BatchPlan(Protocol):
    """What a loader asks a plan for."""

    def batches(self, cursor: Cursor, layout: Layout) -> Iterator[Planned]:
        """This rank's micro-batches from the cursor to the epoch's end."""

    def num_batches(self, cursor: Cursor, layout: Layout) -> int:
        """How many those are; the same on every rank."""

    def batches_before(self, cursor: Cursor, layout: Layout) -> int:
        """How many of this epoch came before the cursor, had the layout always been this one."""

    def most_rows(self, lengths: Int64Array, layout: Layout) -> int:
        """How many rows a micro-batch may hold, were they the first of ``lengths``."""

    def after(self, cursor: Cursor, layout: Layout, num_batches: int) -> Cursor:
        """Where the run stands in its schedule once so many more micro-batches of the epoch are trained."""


class RowPlan:
    """Micro-batches of a fixed number of rows.

    Micro-batch m over all ranks holds the epoch's positions m * B * W to (m + 1) * B * W, for B rows on each of W
    ranks. How many micro-batches an optimizer step has is for the Trainer to say, and may change.

    Args:
        order: Which rows stand where in an epoch.
        micro_batch_size: Rows of a rank in a micro-batch.
        drop_last: Leave out the last micro-batch if it is short.
    """

    def __init__(self, order: RowOrder, micro_batch_size: int, drop_last: bool = False) -> None:
        self.order = order
        self.micro_batch_size = micro_batch_size
        self.drop_last = drop_last

    def batches(self, cursor: Cursor, layout: Layout) -> Iterator[Planned]:
        """Consecutive positions, shared out evenly."""
        size = self.micro_batch_size * layout.num_ranks
        many = max(_BLOCK // size, 1) * size  # the order is looked up for several micro-batches at once
        for begin in range(cursor.rows, self.order.num_rows, many):
            block = np.arange(begin, min(begin + many, self.order.num_rows))
            rows = self.order.rows(block, cursor.epoch)
            for at in range(0, len(rows), size):
                part = rows[at : at + size]
                if self.drop_last and len(part) < size:
                    return
                share = np.array_split(part, layout.num_ranks)[layout.rank]
                yield Planned(share, replace(cursor, rows=begin + at + len(part)))

    def num_batches(self, cursor: Cursor, layout: Layout) -> int:
        """Rows left, in micro-batches."""
        return in_parts(self.order.num_rows - cursor.rows, self.micro_batch_size * layout.num_ranks, self.drop_last)

    def batches_before(self, cursor: Cursor, layout: Layout) -> int:
        """Rows taken, in micro-batches."""
        return in_parts(cursor.rows, self.micro_batch_size * layout.num_ranks)

    def most_rows(self, lengths: Int64Array, layout: Layout) -> int:
        """Always the same."""
        return self.micro_batch_size

    def after(self, cursor: Cursor, layout: Layout, num_batches: int) -> Cursor:
        """So many rows further, or at the epoch's end."""
        taken = num_batches * self.micro_batch_size * layout.num_ranks
        return replace(cursor, rows=min(cursor.rows + taken, self.order.num_rows))


def in_parts(amount: int, size: int, drop_last: bool = False) -> int:
    """Into how many parts of a size an amount is cut, the short last one included unless it is dropped."""
    return max(amount, 0) // size if drop_last else -(-max(amount, 0) // size)
