"""A row of a batch is a list of windows into the token store; this file lays rows out and collates them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from lightning_llm.datamodules.collate import Count, Layout, Segment, collate_rows
from lightning_llm.datamodules.packing import best_fit_decreasing
from lightning_llm.datamodules.token_store import TokenStore
from lightning_llm.datamodules.windows import Int64Array, WindowTable, window_table

Windowing = Literal["packed", "wrapped", "windows", "documents"]

EMPTY_ROW = -1  # a row id that stands for padding alone: no token, no target


class RowIds(list[int]):
    """The rows of a batch, as a loader asks for them.

    Attributes:
        epoch: In which they are drawn, for rows that are not made alike in each.
    """

    def __init__(self, rows: Iterable[int] = (), epoch: int = 0) -> None:
        super().__init__(rows)
        self.epoch = epoch


@dataclass(frozen=True)
class RowTable:
    """Which tokens stand in which row: an index over a token store, no token copied.

    Attributes:
        windowing: How the rows were made.
        max_length: Tokens in a row at most.
        row_offsets: (num_rows + 1,) int64; row r holds segments row_offsets[r]..row_offsets[r + 1].
        document: (num_segments,) int64, the document of the store that a segment is of.
        start: (num_segments,) int64, first token in the store, from its beginning and not the document's.
        length: (num_segments,) int64, at least 1.
        num_context: (num_segments,) int64, leading tokens that are no targets.
        num_cut_tokens: Tokens of too long documents that no row holds (only ``documents`` cuts).
    """

    windowing: Windowing
    max_length: int
    row_offsets: Int64Array
    document: Int64Array
    start: Int64Array
    length: Int64Array
    num_context: Int64Array
    num_cut_tokens: int = 0

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, padding not counted, overlaps counted each time."""
        return int(self.length.sum())

    @property
    def num_label_tokens(self) -> int:
        """Targets in all rows: a window's first token has nothing before it, and context is scored elsewhere."""
        return int((self.length - np.maximum(self.num_context, 1)).clip(min=0).sum())

    @property
    def row_lengths(self) -> Int64Array:
        """(num_rows,) int64, tokens in each row, padding not counted."""
        ends = np.concatenate([[0], np.cumsum(self.length)])[self.row_offsets]
        lengths: Int64Array = np.diff(ends)
        return lengths

    @property
    def fill(self) -> float:
        """Share of the positions that hold a token, if every row is padded to ``max_length``."""
        return self.num_tokens / max(len(self) * self.max_length, 1)

    def segments(self, row: int) -> list[tuple[int, int, int]]:
        """(start, length, num_context) of each window in a row; none in an empty row."""
        return self.segments_of([row])[0]

    def segments_of(self, rows: Sequence[int]) -> list[list[tuple[int, int, int]]]:
        """The same for several rows, looked up at once.

        Raises:
            IndexError: For a row that does not exist.
        """
        ids = np.asarray(rows, dtype=np.int64)
        wrong = ids[(ids < EMPTY_ROW) | (ids >= len(self))]
        if len(wrong):
            raise IndexError(
                f"Row ids lie in 0..{len(self) - 1}, or are {EMPTY_ROW} for an empty row, but got {wrong[0]}."
            )
        begin = self.row_offsets[ids]
        counts = np.where(ids == EMPTY_ROW, 0, self.row_offsets[ids + 1] - begin)
        ends = np.cumsum(counts)
        index = np.repeat(begin - (ends - counts), counts) + np.arange(int(counts.sum()))
        columns = (self.start[index], self.length[index], self.num_context[index])
        windows = zip(*(column.tolist() for column in columns), strict=True)
        return [list(islice(windows, count)) for count in counts.tolist()]


def make_rows(
    offsets: Int64Array,
    documents: Int64Array,
    max_length: int,
    windowing: Windowing,
    stride: int | None = None,
) -> RowTable:
    """Lay documents out in rows; empty documents give none.

    ``packed``: documents longer than a row are cut into windows that overlap, and all pieces are packed best-fit.
    ``wrapped``: all documents end to end, cut into rows of ``max_length`` that overlap by one token, so that only the
    last one is shorter; documents are cut wherever a row ends. In both, documents do not see each other. ``windows``:
    one window a row. In all three every token but a document's first is a target exactly once. ``documents``: one
    document a row, the rest of a longer one is left out.

    Args:
        offsets: (num_documents + 1,) int64, document d holds tokens offsets[d]..offsets[d + 1] of the store.
        documents: (n,) int64, the documents to lay out.
        max_length: Tokens in a row.
        windowing: As above.
        stride: For ``packed`` and ``windows``: new tokens in each window of a long document, the others are context
            and no targets; see :func:`window_table`. None: all but one. With ``max_length`` windows do not overlap,
            and no window's first token is a target.

    Raises:
        ValueError: If ``windowing`` is unknown, or has no ``stride``.

    Example:
        Documents of 5 and 2 tokens in rows of 4: pieces of 4, 2 (one of them context) and 2; or rows of 4, 4 and 1.

        >>> offsets = np.array([0, 5, 7])
        >>> table = make_rows(offsets, np.array([0, 1]), max_length=4, windowing="packed")
        >>> [table.segments(row) for row in range(len(table))]
        [[(0, 4, 0)], [(3, 2, 1), (5, 2, 0)]]
        >>> table = make_rows(offsets, np.array([0, 1]), max_length=4, windowing="wrapped")
        >>> [table.segments(row) for row in range(len(table))]
        [[(0, 4, 0)], [(3, 2, 1), (5, 2, 0)]]
    """
    if windowing not in get_args(Windowing):
        raise ValueError(f"`windowing` must be 'packed', 'wrapped', 'windows' or 'documents', but got {windowing!r}.")
    if stride is not None and windowing not in ("packed", "windows"):
        raise ValueError(
            f"`stride` has a meaning for windowing='packed' and 'windows', but got stride={stride} for {windowing!r}."
        )
    documents = documents[offsets[documents + 1] > offsets[documents]]
    first = offsets[documents]
    lengths = offsets[documents + 1] - first
    if windowing == "documents":
        kept = np.minimum(lengths, max_length)
        rows = np.arange(len(documents) + 1)
        num_cut = int((lengths - kept).sum())
        return RowTable(windowing, max_length, rows, documents, first, kept, np.zeros_like(kept), num_cut)
    if windowing == "wrapped":
        rows, pieces = _wrap(lengths, max_length)
    else:
        pieces = window_table(lengths, max_length, stride, right_align=windowing == "windows")
        rows = np.arange(len(pieces.document) + 1)
        if windowing == "packed":
            bins, num_bins = best_fit_decreasing(pieces.length, max_length)
            order = np.argsort(bins, kind="stable")
            rows = np.searchsorted(bins[order], np.arange(num_bins + 1))
            pieces = WindowTable(*(column[order] for column in pieces))
    document, start, length, num_context = pieces
    return RowTable(windowing, max_length, rows, documents[document], first[document] + start, length, num_context)


def _wrap(lengths: Int64Array, max_length: int) -> tuple[Int64Array, WindowTable]:
    """Cut the documents, laid end to end, into rows of ``max_length`` that overlap by one token.

    A row [a, b) of the whole holds the documents from the one that token a is of to the one that token b - 1 is of.
    Documents of 5 and 2 tokens, rows of 4: [0, 4) holds document 0, [3, 7) both.

    Args:
        lengths: (num_documents,) int64, all at least 1.
        max_length: Tokens in a row.

    Returns:
        (num_rows + 1,) int64, where each row's pieces begin, and the pieces.
    """
    edges = np.append(0, np.cumsum(lengths))
    _, begin, length, num_context = window_table([edges[-1]], max_length, right_align=False)
    end = begin + length
    first = np.searchsorted(edges, begin, side="right") - 1
    counts = np.searchsorted(edges, end, side="left") - first
    rows = np.append(0, np.cumsum(counts))
    row = np.repeat(np.arange(len(counts)), counts)
    document = first[row] + np.arange(len(row)) - rows[row]
    start = np.maximum(begin[row], edges[document])
    stop = np.minimum(end[row], edges[document + 1])
    context = np.where(start == begin[row], num_context[row], 0)
    return rows, WindowTable(document, start - edges[document], stop - start, context)


class RowDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Batches of rows, made on demand: ``dataset[[3, 17]]`` is the batch of rows 3 and 17.

    Args:
        store: Where the tokens are.
        table: Which tokens stand in which row.
        pad_token_id: Fills the rest of a row.
        token_bytes: (vocab,) float64, bytes of text behind each token; if given, batches carry ``num_bytes``, and
            ``num_words`` if the store knows the words of its documents.
        layout: See :func:`collate_rows`. None: ``packed`` for rows of several documents, else ``padded``.

    Raises:
        ValueError: If ``layout`` is ``padded`` and rows hold several documents.
    """

    def __init__(
        self,
        store: TokenStore,
        table: RowTable,
        pad_token_id: int,
        token_bytes: npt.NDArray[np.float64] | None = None,
        *,
        layout: Layout | None = None,
    ) -> None:
        is_packed = table.windowing in ("packed", "wrapped")
        if layout == "padded" and is_packed:
            raise ValueError(
                f"layout='padded' is for rows of one document, but windowing={table.windowing!r} puts several into a "
                f"row. Use layout='packed' or 'padding_free', or windowing='windows'."
            )
        self.store = store
        self.table = table
        self.pad_token_id = pad_token_id
        self.token_bytes = token_bytes
        self.layout: Layout = layout or ("packed" if is_packed else "padded")

    def __len__(self) -> int:
        return len(self.table)

    @property
    def width(self) -> int | None:
        """Tokens in a row of a batch, padding included; None where that depends on the rows."""
        return self.table.max_length if self.layout == "packed" else None

    @property
    def counts(self) -> tuple[Count, ...]:
        """What batches count besides tokens."""
        if self.token_bytes is None:
            return ()
        return ("num_bytes",) if self.store.num_words is None else ("num_bytes", "num_words")

    def __getitem__(self, row_ids: Sequence[int]) -> dict[str, Any]:
        """Collate rows.

        Args:
            row_ids: Rows of the table; -1 stands for an empty row.

        Returns:
            What :func:`collate_rows` makes of the rows, packed ones of width ``max_length``, with ``row_ids``;
            ``num_bytes`` of text behind the label tokens and ``num_words``, where ``token_bytes`` is given.
        """
        return self.collate(self.row_segments(row_ids), row_ids, {"row_ids": np.array(row_ids, dtype=np.int64)})

    def collate(
        self, rows: Sequence[Sequence[Segment]], row_ids: Sequence[int], per_row: Mapping[str, Int64Array]
    ) -> dict[str, Any]:
        """Make a batch of rows that were looked up; ``per_row`` is what it says of each."""
        return collate_rows(
            rows,
            pad_token_id=self.pad_token_id,
            layout=self.layout,
            width=self.width,
            per_row=per_row,
            counts=self.counts,
        )

    def row_segments(self, row_ids: Sequence[int]) -> list[list[Segment]]:
        """The segments of each row, views of the store; -1 has none."""
        self.store.check()  # a file that was cut short would otherwise kill the process when it is read
        tokens = self.store.tokens
        rows = [
            [Segment(tokens[begin : begin + length], num_context) for begin, length, num_context in windows]
            for windows in self.table.segments_of(row_ids)
        ]
        if self.token_bytes is None:
            return rows
        return [self._count(row_id, row) if row else row for row_id, row in zip(row_ids, rows, strict=True)]

    def _count(self, row_id: int, row: list[Segment]) -> list[Segment]:
        """The segments of a row with the bytes and words behind their targets."""
        assert self.token_bytes is not None
        words = self._words(row_id, self.store.num_words)
        targets = [segment.tokens[max(segment.num_context, 1) :] for segment in row]
        num_bytes = [float(self.token_bytes[tokens].sum()) for tokens in targets]
        counted = zip(row, num_bytes, words, strict=True)
        return [segment._replace(num_bytes=size, num_words=count) for segment, size, count in counted]

    def _words(self, row_id: int, num_words: Int64Array | None) -> list[int]:
        """Words of each segment of a row, if the words of a document are spread evenly over its tokens.

        Tokens [s, e) of a document of L tokens and w words hold floor(w e / L) - floor(w s / L) of them, so that the
        windows of a document add up to w. A document's first token, which is no target, counts with the next ones.
        """
        table, offsets = self.table, self.store.offsets
        part = slice(*table.row_offsets[row_id : row_id + 2])
        document = table.document[part]
        if num_words is None:
            return [0] * len(document)
        end = table.start[part] - offsets[document] + table.length[part]
        new = end - table.length[part] + table.num_context[part]
        num_tokens, words = offsets[document + 1] - offsets[document], np.asarray(num_words)[document]
        counts: list[int] = (words * end // num_tokens - words * new // num_tokens).tolist()
        return counts
