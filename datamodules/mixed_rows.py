"""Rows of several sources in one order and one batch, in proportions that the user sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_llm.datamodules.collate import Segment
from lightning_llm.datamodules.mixture import MixtureOrder, temperature_weights
from lightning_llm.datamodules.order import shuffled
from lightning_llm.datamodules.rows import EMPTY_ROW, RowDataset
from lightning_llm.datamodules.windows import Int64Array


def mixture_weights(
    sizes: Mapping[str, int], weights: Mapping[str, float] | None, temperature: float = 1.0
) -> dict[str, float]:
    """The share of each source, summing to 1.

    Args:
        sizes: Rows of each source.
        weights: As asked for; None follows the sizes.
        temperature: Without weights: shares in proportion to rows^(1/temperature).

    Example:
        >>> mixture_weights({"code": 300, "prose": 100}, None)
        {'code': 0.75, 'prose': 0.25}
    """
    if weights is None:
        shares = temperature_weights(list(sizes.values()), temperature)
    else:
        shares = np.array([weights[name] for name in sizes], dtype=np.float64)
        shares = shares / shares.sum()
    return dict(zip(sizes, shares.tolist(), strict=True))


class MixedOrder:
    """The order of a mixture: an epoch has as many rows as all sources together, drawn in the given proportions.

    Each source is gone through from end to end, in a new order each time, before any of its rows comes again; sources
    with a large share come round more often than once an epoch, others less, and go on there in the next epoch.

    Args:
        sizes: (num_sources,) rows of each source.
        weights: (num_sources,) shares.
        seed: Of the order.
        shuffle: Whether each source is shuffled.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool = True) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.num_rows = int(self.sizes.sum())
        self.seed = seed
        self.shuffle = shuffle
        self._mixture = MixtureOrder(weights, seed)
        self._first = np.cumsum(self.sizes) - self.sizes

    def rows(self, positions: Int64Array, epoch: int) -> Int64Array:
        """Rows of the sources laid end to end; a position in an epoch is one in the whole run."""
        source, place = self._mixture(np.asarray(positions, dtype=np.int64) + epoch * self.num_rows)
        rows = np.empty(len(source), np.int64)
        for number in np.unique(source).tolist():
            mine = np.flatnonzero(source == number)
            size = int(self.sizes[number])
            times, inside = np.divmod(place[mine], size)
            if self.shuffle:
                for time in np.unique(times).tolist():
                    now = times == time
                    inside[now] = shuffled(inside[now], size, self.seed, time, number)
            rows[mine] = self._first[number] + inside
        return rows


class MixedTable:
    """What a loader asks the table of a mixture's rows.

    Attributes:
        row_lengths: (num_rows,) int64, tokens in each row.
        num_label_tokens: Targets in an epoch, which draws sources by their shares: an expectation.
    """

    def __init__(self, datasets: Sequence[RowDataset], shares: Sequence[float] | None = None) -> None:
        self.row_lengths = np.concatenate([dataset.table.row_lengths for dataset in datasets])
        tokens = np.array([dataset.table.num_label_tokens for dataset in datasets], dtype=np.float64)
        sizes = np.array([len(dataset) for dataset in datasets])
        drawn = sizes if shares is None else np.asarray(shares) * sizes.sum()
        self.num_label_tokens = round(float((tokens / sizes) @ drawn))


class MixedRowDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Batches of rows of several sources: row ids count through the sources one after the other.

    Args:
        datasets: The rows of each source, by its name; all collated alike.
        numbers: What batches call each source in ``source_ids``; None counts them.
        shares: Of the sources in an epoch, summing to 1; None: each row once.
    """

    def __init__(
        self,
        datasets: Mapping[str, RowDataset],
        numbers: Sequence[int] | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.names = list(datasets)
        self.datasets = list(datasets.values())
        self.numbers = np.arange(len(self.datasets)) if numbers is None else np.asarray(numbers, dtype=np.int64)
        self.sizes = [len(dataset) for dataset in self.datasets]
        self.table = MixedTable(self.datasets, shares)
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row_ids: Sequence[int]) -> dict[str, Any]:
        """Collate rows.

        Args:
            row_ids: Rows of all sources, counted through; -1 stands for an empty row.

        Returns:
            The batch of :class:`~lightning_llm.datamodules.rows.RowDataset`, with ``source_ids`` beside its
            ``row_ids``; an empty row belongs to the first source.
        """
        ids = np.asarray(row_ids, dtype=np.int64)
        source = np.where(ids == EMPTY_ROW, 0, np.searchsorted(self._ends, ids, side="right"))
        local = np.where(ids == EMPTY_ROW, EMPTY_ROW, ids - (self._ends - self.sizes)[source])
        rows: list[list[Segment]] = [[] for _ in ids]
        for number in np.unique(source).tolist():
            mine = np.flatnonzero(source == number)
            found = self.datasets[number].row_segments(local[mine].tolist())
            for index, row in zip(mine.tolist(), found, strict=True):
                rows[index] = row
        return self.datasets[0].collate(rows, row_ids, {"row_ids": ids, "source_ids": self.numbers[source]})
