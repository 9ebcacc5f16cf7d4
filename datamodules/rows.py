"""A row of a batch is a list of windows into the token store; this file lays rows out and collates them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_llm.datamodules.packing import best_fit_decreasing
from lightning_llm.datamodules.token_store import TokenStore
from lightning_llm.datamodules.windows import Int64Array, window_table
from lightning_llm.loss import IGNORE_INDEX

Windowing = Literal["packed", "windows", "documents"]

EMPTY_ROW = -1  # a row id that stands for padding alone: no token, no target


@dataclass(frozen=True)
class RowTable:
    """Which tokens stand in which row: an index over a token store, no token copied.

    Attributes:
        windowing: How the rows were made.
        max_length: Tokens in a row at most.
        row_offsets: (num_rows + 1,) int64; row r holds segments row_offsets[r]..row_offsets[r + 1].
        start: (num_segments,) int64, first token in the store.
        length: (num_segments,) int64.
        num_context: (num_segments,) int64, leading tokens that are no targets.
        num_cut_tokens: Tokens of too long documents that no row holds (only ``documents`` cuts).
    """

    windowing: Windowing
    max_length: int
    row_offsets: Int64Array
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
        """(start, length, num_context) of each window in a row."""
        part = slice(self.row_offsets[row], self.row_offsets[row + 1])
        columns = (self.start[part], self.length[part], self.num_context[part])
        return list(zip(*(column.tolist() for column in columns), strict=True))


def make_rows(
    offsets: Int64Array,
    documents: Int64Array,
    max_length: int,
    windowing: Windowing,
    stride: int | None = None,
) -> RowTable:
    """Lay documents out in rows.

    ``packed``: documents longer than a row are cut into windows that overlap by one token, and all pieces are
    packed best-fit; every token but a document's first is a target exactly once. ``windows``: one window a row,
    ``stride`` new tokens in each. ``documents``: one document a row, the rest of a longer one is left out.

    Args:
        offsets: (num_documents + 1,) int64, document d holds tokens offsets[d]..offsets[d + 1] of the store.
        documents: (n,) int64, the documents to lay out.
        max_length: Tokens in a row.
        windowing: As above.
        stride: For ``windows``, see :func:`window_table`.
    """
    first = offsets[documents]
    lengths = offsets[documents + 1] - first
    if windowing == "documents":
        kept = np.minimum(lengths, max_length)
        rows = np.arange(len(documents) + 1)
        return RowTable(windowing, max_length, rows, first, kept, np.zeros_like(kept), int((lengths - kept).sum()))
    if windowing == "windows":
        table = window_table(lengths, max_length, stride)
        rows = np.arange(len(table.document) + 1)
        return RowTable(windowing, max_length, rows, first[table.document] + table.start, *table[2:])
    table = window_table(lengths, max_length, right_align=False)
    bins, num_bins = best_fit_decreasing(table.length, max_length)
    order = np.argsort(bins, kind="stable")
    rows = np.searchsorted(bins[order], np.arange(num_bins + 1))
    start = first[table.document] + table.start
    return RowTable(windowing, max_length, rows, start[order], table.length[order], table.num_context[order])


class RowDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Batches of rows, made on demand: ``dataset[[3, 17]]`` is the batch of rows 3 and 17.

    Args:
        store: Where the tokens are.
        table: Which tokens stand in which row.
        pad_token_id: Fills the rest of a row.
        token_bytes: (vocab,) float64, bytes of text behind each token; if given, batches carry ``num_bytes``.
    """

    def __init__(
        self,
        store: TokenStore,
        table: RowTable,
        pad_token_id: int,
        token_bytes: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.store = store
        self.table = table
        self.pad_token_id = pad_token_id
        self.token_bytes = token_bytes

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row_ids: Sequence[int]) -> dict[str, Tensor]:
        """Collate rows.

        Args:
            row_ids: Rows of the table; -1 stands for an empty row.

        Returns:
            int64 tensors: ``input_ids`` and ``labels`` (batch, seq), labels unshifted with -100 on context and
            padding; ``row_ids`` and ``num_input_tokens`` (batch,), the latter without padding; ``position_ids``
            (batch, seq), restarting with each document, for packed rows, else ``attention_mask`` (batch, seq).
            Packed rows carry no attention mask: with one, transformers overlooks the restarts. ``num_bytes``
            (batch,), bytes behind the label tokens, where ``token_bytes`` is given.
        """
        table, tokens = self.table, self.store.tokens
        packed = table.windowing == "packed"
        rows = [table.segments(row) if row != EMPTY_ROW else [] for row in row_ids]
        used = np.array([sum(length for _, length, _ in row) for row in rows], dtype=np.int64)
        width = table.max_length if packed else max(int(used.max(initial=0)), 1)
        input_ids = np.full((len(rows), width), self.pad_token_id, np.int64)
        labels = np.full((len(rows), width), IGNORE_INDEX, np.int64)
        arange = np.arange(width)
        position_ids = np.empty((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            at = 0
            for start, length, num_context in row:
                piece = tokens[start : start + length]
                input_ids[index, at : at + length] = piece
                # A segment's first token is no target: nothing of its document stands before it in the row.
                unscored = max(num_context, 1)
                labels[index, at + unscored : at + length] = piece[unscored:]
                position_ids[index, at : at + length] = arange[:length]
                at += length
            position_ids[index, at:] = arange[: width - at]  # padding is a document of its own
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "row_ids": torch.tensor(list(row_ids), dtype=torch.int64),
            "num_input_tokens": torch.from_numpy(used),
        }
        if packed:
            batch["position_ids"] = torch.from_numpy(position_ids)
        else:
            batch["attention_mask"] = torch.from_numpy((arange < used[:, None]).astype(np.int64))
        if self.token_bytes is not None:
            num_bytes = np.where(labels != IGNORE_INDEX, self.token_bytes[input_ids], 0.0).sum(1)
            batch["num_bytes"] = torch.from_numpy(
                np.rint(num_bytes).astype(np.int64)
            )  # no float: precision casts those
        return batch
