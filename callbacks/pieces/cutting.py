"""Cutting a batch into pieces: along its rows, whatever holds them, and a packed row between its documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_llm.callbacks.pieces.columns import row_lengths, shape_of, trim
from lightning_llm.callbacks.pieces.documents import document_edges, take_documents
from lightning_llm.callbacks.pieces.rows import (
    CannotSplit,
    count_rows,
    rows_or_none,
    take_rows,
    tensors_in,
    window_edges,
)

SplitFn = Callable[[Any, int], Sequence[Any]]
CostFn = Callable[[Any], int]


class Piece(NamedTuple):
    """Part of a batch.

    Attributes:
        batch: Of the same kind as the whole batch.
        num_rows: Rows in it, as a share of the whole batch's: a fraction where a row itself was cut.
        length: Columns of its rows; tokens of its longest document where rows are flattened.
        cost: What the limit counts: rows times columns, or what ``cost_fn`` says.
    """

    batch: Any
    num_rows: float
    length: int
    cost: int


class BatchCutter:
    """Cuts batches into pieces of limited cost.

    Args:
        split_fn: ``(batch, number of pieces) -> pieces``, in place of everything below.
        cost_fn: ``batch -> cost``, in place of rows times columns.
        trim_padding: Cut off columns that are right padding in all of a piece's rows.
        sort_by_length: Put rows of similar length into the same piece, longest first.
    """

    def __init__(
        self,
        split_fn: SplitFn | None = None,
        cost_fn: CostFn | None = None,
        trim_padding: bool = True,
        sort_by_length: bool = False,
    ) -> None:
        self.split_fn = split_fn
        self.cost_fn = cost_fn
        self.trim_padding = trim_padding
        self.sort_by_length = sort_by_length

    def whole(self, batch: Any) -> Piece:
        """The batch as one piece; nothing is copied and no device is waited for."""
        return self._piece(batch, float(rows_or_none(batch) or 1))

    def cut(self, piece: Piece, limit_of: Callable[[int], int | None]) -> list[Piece]:
        """Cut a piece so that each part is within its limit, or is a single row.

        Args:
            piece: Of any cost.
            limit_of: Largest cost for rows of a length; None for any.

        Returns:
            Parts that hold each row once; the piece itself where it is within the limit.

        Raises:
            CannotSplit: If the batch is not made of rows.
        """
        limit = limit_of(piece.length)
        if limit is None or piece.cost <= limit:
            return [piece]
        if self.split_fn is not None or self.cost_fn is not None:
            parts = self.halve(piece)
            return [small for part in parts for small in self.cut(part, limit_of)] if len(parts) > 1 else [piece]
        num_rows = count_rows(piece.batch)
        if num_rows <= 1:
            return self._cut_documents(piece, limit)
        edges = window_edges(piece.batch)
        if edges is not None:
            return self._cut_between(piece, edges, limit_of)
        lengths = row_lengths(piece.batch, num_rows) if self.trim_padding or self.sort_by_length else None
        if lengths is None:
            per_piece = max(int(limit * num_rows // piece.cost), 1)
            return self._cut_evenly(piece, num_rows, -(-num_rows // per_piece))
        return self._cut_by_length(piece, lengths, limit_of)

    def halve(self, piece: Piece) -> list[Piece]:
        """Two parts, or the piece itself if it is a single row of a single document."""
        if self.split_fn is not None:
            if self.cost_fn is None and rows_or_none(piece.batch) is None:
                raise CannotSplit(
                    f"split_fn cuts this {type(piece.batch).__name__}, but without tensors in it nothing says how "
                    f"large a piece is. Pass cost_fn=lambda batch: ... too."
                )
            parts = list(self.split_fn(piece.batch, 2))
            if len(parts) < 2:
                return [piece]
            rows = [rows_or_none(part) for part in parts]
            total = sum(row or 0 for row in rows) if all(rows) else 0
            shares = [row / total for row in rows if row] if total else [1 / len(parts)] * len(parts)
            if total == piece.num_rows:
                return [self._piece(part, float(row or 0)) for part, row in zip(parts, rows, strict=True)]
            return [self._piece(part, piece.num_rows * share) for part, share in zip(parts, shares, strict=True)]
        num_rows = count_rows(piece.batch)
        if num_rows <= 1:
            return self._cut_documents(piece, -(-piece.cost // 2))
        edges = window_edges(piece.batch)
        if edges is not None:
            middle = min(range(1, num_rows), key=lambda document: abs(2 * edges[document] - edges[-1]))
            return [self._rows(piece, rows, num_rows) for rows in (slice(0, middle), slice(middle, num_rows))]
        return self._cut_evenly(piece, num_rows, 2)

    def at_least(self, pieces: list[Piece], number: int) -> list[Piece]:
        """Halve the largest pieces until there are so many, or none can be halved."""
        pieces = list(pieces)
        final: set[int] = set()
        while len(pieces) < number:
            open_ = [i for i, piece in enumerate(pieces) if id(piece) not in final]
            if not open_:
                break
            at = max(open_, key=lambda i: pieces[i].cost)
            parts = self.halve(pieces[at])
            if len(parts) == 1:
                final.add(id(pieces[at]))
            pieces[at : at + 1] = parts if len(parts) > 1 else [pieces[at]]
        return pieces

    # ---- details -------------------------------------------------------------------------------------------------

    def _piece(self, batch: Any, num_rows: float) -> Piece:
        rows, columns, longest = shape_of(batch)
        cost = int(self.cost_fn(batch)) if self.cost_fn is not None else rows * columns
        return Piece(batch, num_rows, longest, cost)

    def _rows(self, piece: Piece, rows: slice | Tensor, num_rows: int, length: int | None = None) -> Piece:
        batch = take_rows(piece.batch, rows, num_rows)
        taken = len(range(*rows.indices(num_rows))) if isinstance(rows, slice) else len(rows)
        if length is not None and self.trim_padding:
            batch = trim(batch, length)
        return self._piece(batch, piece.num_rows * taken / num_rows)

    def _cut_evenly(self, piece: Piece, num_rows: int, number: int) -> list[Piece]:
        number = min(number, num_rows)
        edges = [round(i * num_rows / number) for i in range(number + 1)]
        return [self._rows(piece, slice(a, b), num_rows) for a, b in zip(edges, edges[1:], strict=False)]

    def _cut_between(self, piece: Piece, edges: list[int], limit_of: Callable[[int], int | None]) -> list[Piece]:
        """Cut between documents of several windows each."""
        num_documents = len(edges) - 1
        lengths = row_lengths(piece.batch, edges[-1]) if self.trim_padding else None
        widths = [piece.length] * num_documents
        if lengths is not None:
            widths = [max(lengths[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
        cuts, longest = [0], widths[0]
        for document in range(1, num_documents):
            width = max(longest, widths[document])
            limit = limit_of(width)
            if limit is not None and width * (edges[document + 1] - edges[cuts[-1]]) > limit:
                cuts.append(document)
                width = widths[document]
            longest = width
        cuts.append(num_documents)
        return [
            self._rows(piece, slice(a, b), num_documents, None if lengths is None else max(widths[a:b]))
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]

    def _cut_by_length(self, piece: Piece, lengths: list[int], limit_of: Callable[[int], int | None]) -> list[Piece]:
        num_rows = len(lengths)
        order = list(range(num_rows))
        if self.sort_by_length:
            order.sort(key=lambda row: -lengths[row])
        groups: list[list[int]] = []
        longest = 0
        for row in order:
            width = max(longest, lengths[row]) if self.trim_padding else piece.length
            limit = limit_of(width)
            if groups and (limit is None or width * (len(groups[-1]) + 1) <= limit):
                groups[-1].append(row)
                longest = max(longest, lengths[row])
            else:
                groups.append([row])
                longest = lengths[row]
        device = next(iter(tensors_in(piece.batch))).device
        pieces = []
        for group in groups:
            in_place = not self.sort_by_length  # then they follow each other: a view, no copy
            rows = slice(group[0], group[-1] + 1) if in_place else torch.tensor(group, device=device)
            pieces.append(self._rows(piece, rows, num_rows, max(lengths[row] for row in group)))
        return pieces

    def _cut_documents(self, piece: Piece, limit: int) -> list[Piece]:
        edges = document_edges(piece.batch)
        if len(edges) <= 2:
            return [piece]
        tokens = edges[-1] - edges[0]
        cuts = [0]
        for document in range(1, len(edges) - 1):
            if edges[document + 1] - edges[cuts[-1]] > limit:
                cuts.append(document)
        cuts.append(len(edges) - 1)
        return [
            self._piece(
                take_documents(piece.batch, edges, first, end),
                piece.num_rows * (edges[end] - edges[first]) / tokens,
            )
            for first, end in zip(cuts, cuts[1:], strict=False)
        ]
