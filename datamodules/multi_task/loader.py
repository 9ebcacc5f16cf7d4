"""The loader of several tasks: it makes a whole optimizer step's batches first, and counts their targets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from lightning_llm.datamodules.loader import RowLoader
from lightning_llm.datamodules.multi_task.rows import MultiTaskRows
from lightning_llm.datamodules.trainer_position import is_fitting, limited
from lightning_llm.loss import exact_dtype
from lightning_llm.parallel import data_parallel_size


class MultiTaskLoader(RowLoader):
    """Micro-batches of one task each, which say how many targets each task has in the optimizer step.

    ``step_targets``, by task, counts over all micro-batches and ranks, before the first of them is handed over: what a
    task's loss is divided by. The module counts, with ``num_targets(batch)``, as only it knows what a target is; a
    module without this method gets batches without ``step_targets``.

    Args:
        rows: Of all tasks.
        *args: As for :class:`RowLoader`.
        **options: Likewise.
    """

    rows: MultiTaskRows

    def __init__(self, rows: MultiTaskRows, *args: Any, **options: Any) -> None:
        super().__init__(rows, *args, **options)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The epoch's batches, a step at a time."""
        if not is_fitting(self.trainer):
            return super().__iter__()
        return self._counted()

    def longest_batch(self) -> dict[str, Any]:
        """A micro-batch of the longest rows of the task that has the longest, as if it were a step."""
        task = self.rows.index_of(self.rows.longest())
        rows = self.rows.rows_of(task)
        by_length = rows[np.argsort(self.rows.table.row_lengths[rows], kind="stable")[::-1]]
        number = self.plan.most_rows(self.rows.table.row_lengths[by_length], self._layout)
        return self._with_counts([self.rows[by_length[: max(number, 1)].tolist()]])[0]

    def _counted(self) -> Iterator[dict[str, Any]]:
        assert self.trainer is not None
        position, batches = self._beginning()[0], super().__iter__()
        while True:
            # An epoch that the Trainer limits may end within a step, which then is a short one.
            left = limited(self.trainer, len(self)) - position
            size = self._layout.micro_batches
            step = list(islice(batches, min(size, left) if left > 0 else size))
            if not step:
                return
            position += len(step)
            yield from self._with_counts(step)

    def _with_counts(self, step: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batches of a step, with its targets: one small all-reduce."""
        assert self.trainer is not None
        count = getattr(self.trainer.lightning_module, "num_targets", None)
        if count is None:
            return step
        device = self.trainer.strategy.root_device
        mine = dict.fromkeys(self.rows.names, 0)
        for batch in step:
            mine[batch["task"]] += int(count(batch))
        counts = torch.tensor(list(mine.values()), dtype=exact_dtype(device), device=device)
        share = data_parallel_size(self.trainer) / self.trainer.world_size
        numbers = (self.trainer.strategy.reduce(counts, reduce_op="sum") * share).round().long().tolist()
        targets = dict(zip(self.rows.names, numbers, strict=True))
        return [{**batch, "step_targets": dict(targets)} for batch in step]
