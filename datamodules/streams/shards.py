"""Sources that are read in parts: shards (files, parts of a data set), cut into pieces, each resumed where it stood.

A source is a row of shards with sizes. Laid end to end they make a line, which :func:`deal` cuts into as many equal
stretches as there are streams, so that any number of shards serves any number of streams.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lightning_llm.datamodules.order import shuffled
from lightning_llm.datamodules.sources import CorruptDataError, Document

log = logging.getLogger(__name__)

MEND = "Mend it, and resume the run from its last checkpoint: no document is lost."

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: its multiples modulo 2^64 are spread evenly, however many


class ShardError(RuntimeError):
    """A shard cannot be read on: it is gone, has changed, or is cut short. No document was passed over."""


class Piece(NamedTuple):
    """A stretch of a shard, in the unit that the shard's size has.

    Attributes:
        shard: Number of the shard in its source.
        begin: Where the stretch begins.
        end: Where it ends; this belongs to the next one.
    """

    shard: int
    begin: int
    end: int


Position = Any  # an int, or what `datasets` keeps: dicts, lists, strings and numbers; None is a piece's beginning

Record = tuple[str, Callable[[str], str], Position]  # its name, how to read its text, and the position behind it


class PieceReader(Iterator[Document]):
    """Yields the documents of a piece; ``position`` is where a reader has to start to yield what comes next.

    Args:
        records: Of the piece; a position may also be a function that returns it.
        position: Where ``records`` begins.
        source: For messages.
        skip_corrupt: Leave out unreadable records, with a warning at the end, instead of raising.
    """

    def __init__(self, records: Iterator[Record], position: Position, source: str, skip_corrupt: bool) -> None:
        self._records = _guarded(records, source)
        self._position = position
        self._source = source
        self._skip_corrupt = skip_corrupt
        self._skipped: list[str] = []

    @property
    def position(self) -> Position:
        """Behind the last document that was yielded."""
        return self._position() if callable(self._position) else self._position

    def __next__(self) -> Document:
        for name, read, position in self._records:
            self._position = position
            try:
                return Document(name, read(name))
            except CorruptDataError as error:
                if not self._skip_corrupt:
                    raise
                self._skipped.append(str(error))
        if self._skipped:
            log.warning("Skipped %d corrupt records of %s: %s", len(self._skipped), self._source, self._skipped[0])
            self._skipped = []
        raise StopIteration


def _guarded(records: Iterator[Record], source: str) -> Iterator[Record]:
    try:
        yield from records
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        what = "gone" if isinstance(error, FileNotFoundError) else "damaged, or out of reach"
        raise ShardError(f"A shard of {source} is {what}: {error}. {MEND}") from error


class ShardedSource(ABC):
    """Documents in shards.

    Attributes:
        name: For messages.
        sizes: Size of each shard, in a unit of its own: bytes, rows, or 2^20 for a shard of unknown size.
        has_known_size: Whether the sizes say how much the source holds.
        identity: What a checkpoint remembers of the data, by name: another value means other data.
    """

    name: str
    sizes: list[int]
    has_known_size = True
    identity: dict[str, Any]

    @abstractmethod
    def read(self, piece: Piece, position: Position = None) -> PieceReader:
        """Read a piece from a position on that a reader of the same piece gave, None for its beginning."""

    def deal(self, num_streams: int, seed: int | None = None) -> list[list[Piece]]:
        """Deal the shards to streams, see :func:`deal`."""
        return deal(self.sizes, num_streams, seed)

    def is_read_whole(self, shard: int) -> bool:
        """Whether a piece of a shard takes as much reading as the whole shard."""
        return False


def deal(sizes: Sequence[int], num_streams: int, seed: int | None = None) -> list[list[Piece]]:
    """Deal shards to streams: equal stretches of all shards laid end to end, in an order that the seed shuffles.

    Args:
        sizes: (num_shards,) at least 0 each.
        num_streams: Streams to deal to.
        seed: Of the order of the shards; None keeps it.

    Returns:
        For each stream its pieces; together they are every shard exactly once.

    Example:
        >>> for pieces in deal([10, 2], num_streams=2): print([tuple(piece) for piece in pieces])
        [(0, 0, 6)]
        [(0, 6, 10), (1, 0, 2)]
    """
    order = list(range(len(sizes))) if seed is None else shuffled(np.arange(len(sizes)), len(sizes), seed, 0).tolist()
    total = sum(sizes)
    cuts = [total * stream // num_streams for stream in range(num_streams + 1)]
    dealt: list[list[Piece]] = [[] for _ in range(num_streams)]
    stream = begins = 0
    for shard in order:
        at, ends = begins, begins + sizes[shard]
        while at < ends:
            while cuts[stream + 1] <= at:
                stream += 1
            to = min(ends, cuts[stream + 1])
            dealt[stream].append(Piece(shard, at - begins, to - begins))
            at = to
        begins = ends
    return dealt


def begin_within(pieces: Sequence[Piece], number: int, *key: int) -> list[Piece]:
    """Begin inside the first piece; what lies before that place comes last.

    The places of successive numbers lie at the fractions (u + number · φ) mod 1 of the piece, u a hash of the key;
    these spread evenly, however many. So epochs that are cut short see other documents each.

    Args:
        pieces: In reading order.
        number: Of the beginning, from 0 on.
        *key: Each has places of its own.

    Returns:
        As many pieces or one more, which together are the same stretches.

    Example:
        >>> [tuple(piece) for piece in begin_within([Piece(0, 100, 200), Piece(3, 0, 50)], 0, 7)]
        [(0, 191, 200), (3, 0, 50), (0, 100, 191)]
    """
    if not pieces:
        return []
    first, *others = pieces
    start = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    at = first.begin + ((start + number * _GOLDEN) % (1 << 64) * (first.end - first.begin) >> 64)
    if at == first.begin:
        return list(pieces)
    return [first._replace(begin=at), *others, first._replace(end=at)]


def is_in_share(number: int, piece: Piece, size: int) -> bool:
    """Whether record ``number`` of a shard that can only be read whole belongs to a piece of it.

    Record i lies at the fraction i · φ mod 1 of the shard's size; these spread evenly for any number of records.

    Example:
        >>> [is_in_share(number, Piece(0, 0, 50), size=100) for number in range(6)]
        [True, False, True, False, True, True]
    """
    at = (number * _GOLDEN) % (1 << 64) * size
    return piece.begin << 64 <= at < piece.end << 64
