"""Data sets of the `datasets` library, with random access or iterable, read in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lightning_llm.datamodules.cache import fingerprint
from lightning_llm.datamodules.sources import check_text, no_column
from lightning_llm.datamodules.streams.shards import Piece, PieceReader, Position, Record, ShardedSource, is_in_share

_SAMPLED_ROWS = 16  # the first, the last and some in between tell data sets of as many rows apart


class DatasetShards(ShardedSource):
    """A `datasets` data set with random access: one shard of rows.

    Args:
        dataset: One split.
        name: For messages.
        text_column: The column that holds the text.
        skip_corrupt: Leave out rows whose text is none, with a warning, instead of raising.

    Raises:
        ValueError: If it has no such column, or no row.
    """

    def __init__(self, dataset: Any, name: str, text_column: str, skip_corrupt: bool = False) -> None:
        if text_column not in dataset.column_names:
            raise no_column(name, text_column, dataset.column_names)
        self.dataset = dataset.select_columns([text_column])
        self.name = name
        self.text_column = text_column
        self.skip_corrupt = skip_corrupt
        self.sizes = [len(dataset)]
        if not self.sizes[0]:
            raise ValueError(f"{name} has no row, so there is nothing to train or validate on. Check its split.")
        some = np.unique(np.linspace(0, len(dataset) - 1, _SAMPLED_ROWS).astype(int))
        self.identity = {
            "rows": len(dataset),
            "text of some rows": fingerprint(map(repr, self.dataset[some.tolist()][text_column])),
            "text_column": text_column,
            "skip_corrupt": skip_corrupt,
        }

    def read(self, piece: Piece, position: Position = None) -> PieceReader:
        """Read rows, some at a time; the position is a row."""
        return PieceReader(
            self._rows(piece.begin if position is None else position, piece.end), position, self.name, self.skip_corrupt
        )

    def _rows(self, at: int, end: int) -> Iterator[Record]:
        for begin in range(at, end, 256):
            values = self.dataset[begin : min(begin + 256, end)][self.text_column]
            for row, value in enumerate(values, start=begin):
                yield f"{self.name}, row {row}", _text_of(self.text_column, value), row + 1


class IterableShards(ShardedSource):
    """A `datasets.IterableDataset`: its shards, each resumed by the state that `datasets` keeps.

    A shard that several streams share is read by each of them, and each takes its share of the examples.

    Args:
        dataset: One split; not shuffled with a buffer, for `datasets` forgets what is in it.
        name: For messages.
        text_column: The column that holds the text.
        skip_corrupt: Leave out examples whose text is none, with a warning, instead of raising.

    Raises:
        ValueError: For a data set that shuffles with a buffer.
    """

    has_known_size = False

    def __init__(self, dataset: Any, name: str, text_column: str, skip_corrupt: bool = False) -> None:
        if "BufferShuffledExamplesIterable" in str(_type_names(dataset._ex_iterable)):
            raise ValueError(
                f"{name} shuffles with a buffer, whose content `datasets` does not save: a resumed run would lose it. "
                f"Pass the data set without `.shuffle(...)`; the stream shuffles by itself, and resumes exactly."
            )
        self.dataset = dataset
        self.name = name
        self.text_column = text_column
        self.skip_corrupt = skip_corrupt
        self.sizes = [1 << 20] * dataset.num_shards
        self.identity = {
            "number of shards": dataset.num_shards,
            "columns": list(dataset.column_names or []),
            "data set": " ".join(str(x) for x in _origin(dataset) if x is not None),
            "text_column": text_column,
            "skip_corrupt": skip_corrupt,
        }

    def read(self, piece: Piece, position: Position = None) -> PieceReader:
        """Read a shard's share; the position is the number of an example and the state of `datasets`."""
        shard = self.dataset.shard(num_shards=len(self.sizes), index=piece.shard)  # a copy, with a state of its own
        number = 0
        if position is not None:
            number = position["number"]
            shard.load_state_dict(position["state"])
        return PieceReader(self._examples(shard, piece, number), position, self.name, self.skip_corrupt)

    def is_read_whole(self, shard: int) -> bool:
        """Iterable data sets have no other way in than their shards."""
        return True

    def _examples(self, shard: Any, piece: Piece, number: int) -> Iterator[Record]:
        # Batches of one: plain iteration would split the shard among the loader's worker processes once more.
        for batch in shard.iter(batch_size=1):
            if self.text_column not in batch:
                raise no_column(self.name, self.text_column, sorted(batch))
            number += 1
            if is_in_share(number - 1, piece, self.sizes[piece.shard]):
                name = f"{self.name}, example {number - 1} of shard {piece.shard}"
                yield name, _text_of(self.text_column, batch[self.text_column][0]), _state_of(shard, number)


def _origin(dataset: Any) -> tuple[Any, ...]:
    info = dataset.info
    return info.builder_name, info.config_name, info.version, dataset.split


def _state_of(shard: Any, number: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"number": number, "state": shard.state_dict()}


def _text_of(column: str, value: Any) -> Callable[[str], str]:
    return lambda name: check_text(column, value, name)


def _type_names(iterable: Any) -> list[str]:
    names = []
    while iterable is not None:
        names.append(type(iterable).__name__)
        iterable = getattr(iterable, "ex_iterable", None)
    return names
