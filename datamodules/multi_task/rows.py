"""Rows of several tasks by their numbers: a batch holds rows of one task, and its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_llm.datamodules.rows import EMPTY_ROW, RowIds
from lightning_llm.datamodules.windows import Int64Array


class MultiTaskTable:
    """What a loader asks of the rows.

    Attributes:
        row_lengths: (num_rows,) int64, tokens in each row.
        num_label_tokens: Targets in an epoch, which draws tasks by their shares: an expectation.
    """

    def __init__(self, tables: Sequence[Any], shares: Sequence[float] | None) -> None:
        self.row_lengths: Int64Array = np.concatenate([table.row_lengths for table in tables])
        sizes = np.array([len(table.row_lengths) for table in tables])
        tokens = np.array([table.num_label_tokens for table in tables], dtype=np.float64)
        drawn = sizes if shares is None else np.asarray(shares) / np.sum(shares) * sizes.sum()
        self.num_label_tokens = round(float((tokens / sizes) @ drawn))


class MultiTaskRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Batches of rows of one of several tasks: row ids count through the tasks one after the other.

    Args:
        parts: The rows of each task, by name.
        numbers: Of the tasks, by which empty rows name them; None counts them.
        shares: Of the tasks in an epoch; None: each row once.
    """

    def __init__(
        self, parts: Mapping[str, Any], numbers: Sequence[int] | None = None, shares: Sequence[float] | None = None
    ) -> None:
        self.names = list(parts)
        self.parts = list(parts.values())
        self.numbers = list(range(len(self.parts))) if numbers is None else list(numbers)
        self.sizes = [len(part) for part in self.parts]
        self.table = MultiTaskTable([part.table for part in self.parts], shares)
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row_ids: Sequence[int]) -> dict[str, Any]:
        """Make a batch.

        Args:
            row_ids: Rows of one task, counted through all; -1 - t stands for an empty row of the task numbered t.

        Returns:
            The task's own batch, with its name as ``task``; ``row_ids`` are the task's own.

        Raises:
            ValueError: If rows are of several tasks.
        """
        index = [self.index_of(row) for row in row_ids]
        first = index[0]
        if any(other != first for other in index):
            raise ValueError(f"A batch holds rows of one task, but got {sorted({self.names[i] for i in index})}.")
        begin = int(self._ends[first]) - self.sizes[first]
        local = [row - begin if row >= 0 else EMPTY_ROW for row in row_ids]
        batch = self.parts[first][RowIds(local, getattr(row_ids, "epoch", 0))]
        return {**batch, "task": self.names[first]}

    def index_of(self, row: int) -> int:
        """Which of the tasks a row is of."""
        return int(np.searchsorted(self._ends, row, side="right")) if row >= 0 else self.numbers.index(-1 - row)

    def longest(self) -> int:
        """The longest row."""
        return int(np.argmax(self.table.row_lengths))

    def rows_of(self, index: int) -> Int64Array:
        """All rows of a task."""
        return np.arange(int(self._ends[index]) - self.sizes[index], int(self._ends[index]))
