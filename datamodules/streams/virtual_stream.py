"""A virtual stream: an endless-looking source of rows that a few integers bring back to where it stood.

A data set is dealt to a fixed number of virtual streams, whatever the number of ranks and workers that read them. Each
reads its pieces of each source in pools, from another place on in each epoch. It encodes and lays out a pool at a time,
and shuffles the pool's rows by a key of seed, stream, source, epoch and pool. So the rows of a stream are a pure
function of where its pool began and how many rows of it were taken: that is its state.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_llm.datamodules.collate import Segment
from lightning_llm.datamodules.mixture import MixtureOrder
from lightning_llm.datamodules.order import shuffled
from lightning_llm.datamodules.rows import RowTable, Windowing, make_rows
from lightning_llm.datamodules.sources import Document
from lightning_llm.datamodules.store_builder import check_ids
from lightning_llm.datamodules.streams.shards import Piece, PieceReader, ShardedSource, begin_within
from lightning_llm.datamodules.windows import Int64Array

Stop = Literal["all_exhausted", "first_exhausted", "each_once"]
State = dict[str, Any]  # of integers, strings and lists: what a checkpoint loads without running code

_FEWEST_CHARACTERS, _MOST_CHARACTERS = 1 << 16, 1 << 18  # that are encoded at once


class StreamRow(NamedTuple):
    """A row of a batch.

    Attributes:
        segments: Its documents, or parts of them.
        source: Which source it is of.
        counts: (num_segments, 2) int64, bytes and words of text behind each segment's targets; None if not counted.
    """

    segments: list[Segment]
    source: int
    counts: Int64Array | None = None


@dataclass(frozen=True)
class StreamSettings:
    """What all virtual streams of a data set share, and every process that reads some of them.

    Attributes:
        sources: Where documents come from.
        weights: (num_sources,) how often a row is of each, of any sum.
        num_streams: Number of virtual streams.
        encode: Texts to token ids, one int64 array each.
        max_length: Tokens in a row.
        windowing: How documents are laid out, see :func:`~lightning_llm.datamodules.rows.make_rows`.
        stride: New tokens in each window, see there.
        min_length: Documents with fewer tokens are left out.
        pool_tokens: A pool is full with so many tokens.
        shuffle: Shuffle shards and the rows of each pool, and begin each epoch elsewhere.
        seed: Of the order.
        stop: When a stream of several sources ends, see :class:`VirtualStream`.
        token_bytes: (vocab,) float64, bytes of text behind each token, to count bytes and words; None does not count.
        vocab_size: Token ids beyond it are refused; None takes all.
    """

    sources: Sequence[ShardedSource]
    weights: Sequence[float]
    num_streams: int
    encode: Callable[[Sequence[str]], list[npt.NDArray[np.int64]]]
    max_length: int
    windowing: Windowing = "packed"
    stride: int | None = None
    min_length: int = 2
    pool_tokens: int = 1 << 18
    shuffle: bool = True
    seed: int = 0
    stop: Stop = "all_exhausted"
    token_bytes: npt.NDArray[np.float64] | None = None
    vocab_size: int | None = None

    @cached_property
    def dealt(self) -> list[list[list[Piece]]]:
        """``dealt[source][stream]``: the pieces that a stream reads of a source."""
        return [source.deal(self.num_streams, self.seed if self.shuffle else None) for source in self.sources]


class VirtualStream:
    """Rows of one stream, drawn from its share of each source in the proportions of the mixture.

    ``all_exhausted``: it ends when each source has been read whole, and those that ended before are read again, in
    another order. ``first_exhausted``: it ends when a source has been read whole; the rest of the others is left.
    ``each_once``: it ends when each source has been read whole, and none is read again; whatever is left at the end is
    drawn alone.

    Args:
        settings: Of all streams.
        stream: Which one, from 0 on.
        epoch: Each has an order of its own.
        state: Where to go on; None begins.

    Attributes:
        state: Where the stream stands. Each row makes a new one; none is ever changed.
    """

    def __init__(self, settings: StreamSettings, stream: int, epoch: int, state: State | None = None) -> None:
        self.settings = settings
        self.state: State = state or {"drawn": 0, "has_ended": False, "sources": [None] * len(settings.sources)}
        self._parts = [
            _SourceStream(settings, stream, source, epoch, part) for source, part in enumerate(self.state["sources"])
        ]
        self._order = MixtureOrder(settings.weights, settings.seed, stream, epoch if settings.shuffle else 0)

    @property
    def has_ended(self) -> bool:
        """Whether there is no further row; known once :meth:`next_row` has found none."""
        return bool(self.state["has_ended"])

    def next_row(self) -> StreamRow | None:
        """The next row; None at the end."""
        drawn, row = self.state["drawn"], None
        has_ended = self.has_ended
        while row is None and not has_ended:
            source = int(self._order(drawn)[0])
            part = self._parts[source]
            drawn += 1
            row = part.next_row()
            if row is None:
                has_ended = self._is_over(source)
                if not has_ended and not part.is_empty and self.settings.stop != "each_once":
                    part.restart()
                    row = part.next_row()
        self.state = {"drawn": drawn, "has_ended": has_ended, "sources": [part.state for part in self._parts]}
        return row

    def _is_over(self, source: int) -> bool:
        """Whether the stream ends now that a source has. An empty share of a source counts for nothing."""
        if self.settings.stop == "first_exhausted" and not self._parts[source].is_empty:
            return True
        return all(part.has_been_read for part in self._parts)


class _SourceStream:
    """A stream's share of one source, pool by pool."""

    def __init__(self, settings: StreamSettings, stream: int, source: int, epoch: int, state: State | None) -> None:
        self.settings = settings
        self.stream = stream
        self.source = source
        self.epoch = epoch
        self.state: State = state or self._beginning(0)
        self._pieces = self._in_order()
        self._pool: _Pool | None = None
        self._reader: PieceReader | None = None  # stands at the end of the pool
        self._piece = 0
        self._has_more = True

    @property
    def has_been_read(self) -> bool:
        """Whether the whole share has been read once at least, and its end was found by a draw."""
        return bool(self.state["repeat"] > 0 or self.state["has_ended"])

    @property
    def is_empty(self) -> bool:
        """Whether the share has turned out to hold no row."""
        return bool(self.state["has_ended"] and self.state["pool"] == self.state["taken"] == 0)

    def next_row(self) -> StreamRow | None:
        """The next row; None where the source has been read to its end."""
        if self.state["has_ended"]:
            return None
        if self._pool is None:
            self._pool = self._read_pool()
        while self.state["taken"] == len(self._pool):
            if not self._has_more:
                self.state = {**self.state, "has_ended": True}
                return None
            # Behind the pool: that is where a resumed stream begins the next one.
            position = self._reader.position if self._reader is not None else None
            following = {"pool": self.state["pool"] + 1, "piece": self._piece, "position": position, "taken": 0}
            self.state = {**self.state, **following}
            self._pool = self._read_pool()
        row = self._pool.row(self.state["taken"], self.source)
        self.state = {**self.state, "taken": self.state["taken"] + 1}
        return row

    def restart(self) -> None:
        """Begin again, in another order."""
        self.state = self._beginning(self.state["repeat"] + 1)
        self._pieces = self._in_order()
        self._pool = self._reader = None
        self._has_more = True

    @staticmethod
    def _beginning(repeat: int) -> State:
        return {"repeat": repeat, "pool": 0, "piece": 0, "position": None, "taken": 0, "has_ended": False}

    @property
    def _key(self) -> tuple[int, ...]:
        return (self.settings.seed, self.stream, self.source, self.epoch, self.state["repeat"])

    def _in_order(self) -> list[Piece]:
        """The share's pieces as this epoch reads them."""
        settings, dealt = self.settings, self.settings.dealt[self.source][self.stream]
        if not settings.shuffle or not dealt:
            return dealt
        pieces = [dealt[number] for number in shuffled(np.arange(len(dealt)), len(dealt), *self._key)]
        if settings.sources[self.source].is_read_whole(pieces[0].shard):
            return pieces  # a piece more would be a reading more
        return begin_within(pieces, self.epoch + self.state["repeat"], settings.seed, self.stream, self.source)

    def _documents(self) -> Iterator[Document]:
        """Documents from where the reader stands, one after the other; the reader is never ahead of them."""
        while self._piece < len(self._pieces):
            if self._reader is None:
                is_first = self._piece == self.state["piece"]
                position = self.state["position"] if is_first else None
                self._reader = self.settings.sources[self.source].read(self._pieces[self._piece], position)
            yield from self._reader
            self._reader = None
            self._piece += 1
        self._has_more = False

    def _read_pool(self) -> _Pool:
        """Read on until the pool is full.

        A stream's first pool is smaller, each stream's by another amount, so that not all are empty at the same time.
        """
        settings, limit = self.settings, self.settings.pool_tokens
        if self.state["pool"] == 0:
            limit = math.ceil(limit * (self.stream + 1) / settings.num_streams)
        if self._reader is None:
            self._piece = self.state["piece"]
        documents: list[npt.NDArray[np.int64]] = []
        words_and_bytes: list[tuple[int, int]] = []
        num_tokens = 0
        unread = self._documents()
        while num_tokens < limit and self._has_more:
            wanted = min(max(limit - num_tokens, min(_FEWEST_CHARACTERS, limit)), _MOST_CHARACTERS)
            for text, ids in self._encoded(_take_characters(unread, wanted)):
                if len(ids) >= max(settings.min_length, 1):
                    documents.append(ids)
                    num_tokens += len(ids)
                    if settings.token_bytes is not None:
                        words_and_bytes.append((len(text.split()), len(text.encode())))
        order_key = (*self._key, self.state["pool"]) if settings.shuffle else None
        return _Pool(settings, documents, words_and_bytes, order_key)

    def _encoded(self, documents: Sequence[Document]) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
        texts = [document.text for document in documents]
        encoded = self.settings.encode(texts)
        if self.settings.vocab_size is not None and encoded:
            lengths = np.array([len(ids) for ids in encoded])
            check_ids(np.concatenate(encoded), lengths, documents, self.settings.vocab_size)
        return zip(texts, encoded, strict=True)


def _take_characters(documents: Iterator[Document], wanted: int) -> list[Document]:
    batch: list[Document] = []
    while wanted > 0 and (document := next(documents, None)) is not None:
        batch.append(document)
        wanted -= max(len(document.text), 1)
    return batch


class _Pool:
    """Some documents laid out in rows, in memory."""

    def __init__(
        self,
        settings: StreamSettings,
        documents: Sequence[npt.NDArray[np.int64]],
        words_and_bytes: Sequence[tuple[int, int]],
        order_key: tuple[int, ...] | None,
    ) -> None:
        self.tokens = np.concatenate([np.empty(0, np.int64), *documents]).astype(np.uint32)
        offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        self.table = make_rows(
            offsets, np.arange(len(documents)), settings.max_length, settings.windowing, settings.stride
        )
        _warn_of_cut_tokens(self.table)
        self._order = np.arange(len(self.table))
        if order_key is not None and len(self.table):
            self._order = shuffled(self._order, len(self.table), *order_key)
        self._counts: Int64Array | None = None
        if settings.token_bytes is not None and len(documents):
            words, text_bytes = np.array(words_and_bytes, dtype=np.int64).T
            self._counts = _count_text(self.table, offsets, words, text_bytes, settings.token_bytes[self.tokens])

    def __len__(self) -> int:
        return len(self.table)

    def row(self, number: int, source: int) -> StreamRow:
        """Row ``number`` in the pool's order."""
        row = int(self._order[number])
        segments = [
            Segment(self.tokens[start : start + length], context) for start, length, context in self.table.segments(row)
        ]
        part = slice(self.table.row_offsets[row], self.table.row_offsets[row + 1])
        return StreamRow(segments, source, None if self._counts is None else self._counts[part])


_has_warned_of_cut_tokens = False


def _warn_of_cut_tokens(table: RowTable) -> None:
    global _has_warned_of_cut_tokens
    if not table.num_cut_tokens or _has_warned_of_cut_tokens:
        return
    _has_warned_of_cut_tokens = True  # each pool would say it
    total = table.num_cut_tokens + table.num_tokens
    warnings.warn(
        f"windowing='documents' leaves out what is beyond max_length={table.max_length}: {table.num_cut_tokens:,} of "
        f"{total:,} tokens ({table.num_cut_tokens / total:.0%}) of a first pool of documents, and so of all others. "
        f"'packed' and 'windows' lose none.",
        stacklevel=2,
    )


def _count_text(
    table: RowTable,
    offsets: Int64Array,
    words: Int64Array,
    text_bytes: Int64Array,
    token_bytes: npt.NDArray[np.float64],
) -> Int64Array:
    """Bytes and words behind the targets of each segment, (num_segments, 2).

    Token bytes are scaled so that the pool adds up to the bytes of its text: exactly 1 for byte-level tokenizers.
    Words are spread evenly over a document's tokens: tokens [s, e) of L hold floor(w e / L) - floor(w s / L) of w.
    """
    total = token_bytes.sum()
    scale = text_bytes.sum() / total if total else 1.0
    sums = np.append(0.0, np.cumsum(token_bytes * scale))
    end = table.start + table.length
    scored = np.minimum(table.start + np.maximum(table.num_context, 1), end)
    num_bytes = np.rint(sums[end] - sums[scored]).astype(np.int64)
    first, length = offsets[table.document], np.diff(offsets)[table.document]
    behind, new = end - first, table.start + table.num_context - first
    num_words = words[table.document] * behind // length - words[table.document] * new // length
    return np.stack([num_bytes, num_words], axis=1)
