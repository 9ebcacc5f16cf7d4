"""Batches of examples by their numbers, and the usual way to make one: padded columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lightning_llm.datamodules.examples.store import Example, ExampleStore
from lightning_llm.datamodules.rows import EMPTY_ROW
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX

Collate = Callable[[Sequence[Example]], dict[str, Any]]

HIDDEN = "_"  # columns whose names begin so are for the data module, and stand in no batch


@dataclass(frozen=True)
class ExampleTable:
    """What a loader asks of the rows of a split.

    Attributes:
        row_lengths: (num_rows,) int64, tokens in each row.
        row_targets: (num_rows,) int64, targets in each row.
    """

    row_lengths: Int64Array
    row_targets: Int64Array

    @property
    def num_label_tokens(self) -> int:
        """Targets in all rows."""
        return int(self.row_targets.sum())


class ExampleDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Batches of a split's examples: ``dataset[[3, 17]]`` is the batch of its rows 3 and 17.

    Args:
        store: The encoded examples.
        rows: (num_rows,) int64, the examples of the split.
        collate: Makes a batch of examples. It must be picklable, for worker processes.
        empty: An example without a target, that stands for the row -1: where a rank has no row left for a batch.
        table: The rows' lengths and targets.
    """

    def __init__(
        self, store: ExampleStore, rows: Int64Array, collate: Collate, empty: Example, table: ExampleTable
    ) -> None:
        self.store = store
        self.rows = rows
        self.collate = collate
        self.empty = empty
        self.table = table

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row_ids: Sequence[int]) -> dict[str, Any]:
        """Collate rows.

        Args:
            row_ids: Rows of the split; -1 stands for an empty row.

        Returns:
            What ``collate`` makes of their examples, with ``row_ids`` (rows,) int64.
        """
        epoch = getattr(row_ids, "epoch", 0)
        examples = [self.example(int(row), epoch) for row in row_ids]
        visible = [
            {name: value for name, value in example.items() if not name.startswith(HIDDEN)} for example in examples
        ]
        return {**self.collate(visible), "row_ids": torch.tensor(row_ids, dtype=torch.int64)}

    def examples_of(self, row_id: int) -> list[int]:
        """The one that a row is."""
        return [int(self.rows[row_id])]

    def example(self, row: int, epoch: int) -> Example:
        """A row of the split, or the empty one."""
        return self.empty if row == EMPTY_ROW else self.store[int(self.rows[row])]


class WindowDataset(ExampleDataset):
    """Batches of windows, each with the number of the record that it is of.

    Args:
        *arguments: Of :class:`ExampleDataset`.
        first_example: The number of the store's first record.
    """

    def __init__(self, *arguments: Any, first_example: int = 0) -> None:
        super().__init__(*arguments)
        self.first_example = first_example

    def __getitem__(self, row_ids: Sequence[int]) -> dict[str, Any]:
        """The windows of these numbers, with ``example_ids`` (rows,) int64; -1 for an empty row."""
        records = self.store.values["_record"]
        numbers = [-1 if row == EMPTY_ROW else self.first_example + int(records[self.rows[row]]) for row in row_ids]
        return {**super().__getitem__(row_ids), "example_ids": torch.tensor(numbers, dtype=torch.int64)}


class LoadedDataset(ExampleDataset):
    """Batches of examples, a part of which is read from elsewhere when it is asked for.

    Args:
        *arguments: Of :class:`ExampleDataset`.
        load: Reads that part, given the number of the record (-1 for the empty row), the row and the epoch. It must be
            picklable, for worker processes.
    """

    def __init__(self, *arguments: Any, load: Callable[[int, int, int], Mapping[str, Any]]) -> None:
        super().__init__(*arguments)
        self.load = load

    def example(self, row: int, epoch: int) -> Example:
        """A row of the split with what is read."""
        record = EMPTY_ROW if row == EMPTY_ROW else int(self.store.values["_record"][self.rows[row]])
        return {**super().example(row, epoch), **self.load(record, row, epoch)}


@dataclass(frozen=True)
class PaddedColumns:
    """Make a batch of examples: lists padded on the right to the longest, numbers and images one after the other.

    For each column ``input_ids``, also one with a prefix (``chosen_input_ids``), the batch has an ``attention_mask``
    with the same prefix, where the examples have none themselves. ``num_input_tokens`` (rows,) counts the tokens of
    all of them.

    Attributes:
        pad_token_id: Fills up ``input_ids``.
        padding: What fills up other columns of lists, -100 for ``labels`` and 0 otherwise.

    Example:
        >>> collate = PaddedColumns(pad_token_id=9)
        >>> batch = collate([{"input_ids": np.array([1, 2]), "labels": 1}, {"input_ids": np.array([3]), "labels": 0}])
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
        ([[1, 2], [3, 9]], [[1, 1], [1, 0]], [1, 0])
    """

    pad_token_id: int
    padding: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A tensor for each column, int64 or float32."""
        batch: dict[str, Any] = {}
        num_tokens = np.zeros(len(examples), np.int64)
        for name in examples[0]:
            values = [np.asarray(example[name]) for example in examples]
            if values[0].ndim != 1:
                batch[name] = _stacked(name, values)
                continue
            lengths = np.array([len(value) for value in values], np.int64)
            batch[name] = _padded(values, int(lengths.max(initial=0)), self._fill(name))
            if name.endswith("input_ids"):
                mask = name.removesuffix("input_ids") + "attention_mask"
                num_tokens += lengths
                if mask not in examples[0]:
                    batch[mask] = np.arange(batch[name].shape[1]) < lengths[:, None]
        if any(name.endswith("input_ids") for name in batch):
            batch["num_input_tokens"] = num_tokens
        return {name: torch.from_numpy(_batch_type(array)) for name, array in batch.items()}

    def _fill(self, name: str) -> int:
        if name in self.padding:
            return self.padding[name]
        if name.endswith("input_ids"):
            return self.pad_token_id
        return IGNORE_INDEX if name.endswith("labels") else 0


def _stacked(name: str, values: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    shapes = {value.shape for value in values}
    if len(shapes) > 1:
        raise ValueError(f"The rows of a batch should have {name!r} of one shape, but got {sorted(shapes)}.")
    return np.stack(values)


def _padded(values: Sequence[np.ndarray[Any, Any]], width: int, fill: int) -> np.ndarray[Any, Any]:
    rows = np.full((len(values), width), fill, values[0].dtype)
    for row, value in zip(rows, values, strict=True):
        row[: len(value)] = value
    return rows


def _batch_type(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
