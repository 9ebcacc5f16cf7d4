"""Rows of whole conversations, or of windows of long ones, in which some tokens are targets; an index over a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from lightning_llm.datamodules.collate import Layout, Segment, collate_rows
from lightning_llm.datamodules.examples.store import ExampleStore
from lightning_llm.datamodules.packing import best_fit_decreasing
from lightning_llm.datamodules.rows import RowTable
from lightning_llm.datamodules.windows import Int64Array, WindowTable, window_table
from lightning_llm.loss import IGNORE_INDEX

ChatWindowing = Literal["packed", "documents"]
LongChats = Literal["cut", "windows"]


@dataclass(frozen=True)
class ConversationTable:
    """Which conversations stand in which row.

    Attributes:
        segments: Where their tokens are; ``document`` is the number of an example in the store.
        row_targets: (num_rows,) int64, targets in each row.
        num_cut: Conversations of which something is left out.
        num_cut_targets: Targets in what is left out.
    """

    segments: RowTable
    row_targets: Int64Array
    num_cut: int = 0
    num_cut_targets: int = 0

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def row_lengths(self) -> Int64Array:
        """(num_rows,) int64, tokens in each row, padding not counted."""
        return self.segments.row_lengths

    @property
    def num_label_tokens(self) -> int:
        """Targets in all rows."""
        return int(self.row_targets.sum())


def conversation_table(
    offsets: Int64Array,
    is_target: npt.NDArray[np.bool_],
    conversations: Int64Array,
    max_length: int,
    windowing: ChatWindowing = "packed",
    long: LongChats = "cut",
    stride: int | None = None,
) -> ConversationTable:
    """Lay conversations out in rows. Those without a target, and windows without one, are left out.

    Args:
        offsets: (num_examples + 1,) int64, conversation c holds tokens offsets[c]..offsets[c + 1] of the store.
        is_target: (num_tokens,) of the store.
        conversations: (n,) int64, those to lay out.
        max_length: Tokens in a row.
        windowing: ``packed``: conversations and windows are packed best-fit. ``documents``: one a row.
        long: What becomes of a conversation of more than ``max_length`` tokens. ``cut``: it ends there. ``windows``:
            it is cut into windows, and each of its targets is one in the first window that it stands in.
        stride: For ``windows``: new tokens in each window behind the first; the others are context and no targets.
            None: all but one.

    Example:
        Conversations of 5 and 2 tokens, of which the last ones are targets, in rows of 4.

        >>> offsets, is_target = np.array([0, 5, 7]), np.array([False, False, False, False, True, False, True])
        >>> table = conversation_table(offsets, is_target, np.array([0, 1]), 4, long="windows")
        >>> [table.segments.segments(row) for row in range(len(table))]
        [[(3, 2, 1), (5, 2, 0)]]
        >>> table = conversation_table(offsets, is_target, np.array([0, 1]), 4)
        >>> [table.segments.segments(row) for row in range(len(table))], table.num_cut_targets
        ([[(5, 2, 0)]], 1)
    """
    first = offsets[conversations]
    lengths = offsets[conversations + 1] - first
    if long == "cut":
        kept = np.minimum(lengths, max_length)
        pieces = WindowTable(np.arange(len(lengths)), np.zeros_like(kept), kept, np.zeros_like(kept))
    else:
        pieces = window_table(lengths, max_length, stride, right_align=windowing == "documents")
    before = np.append(0, np.cumsum(is_target))  # targets before each token
    begin = first[pieces.document] + pieces.start
    context = np.minimum(np.maximum(pieces.num_context, 1), pieces.length)
    targets = before[begin + pieces.length] - before[begin + context]
    some = np.flatnonzero(targets)
    if windowing == "packed":
        row, num_rows = best_fit_decreasing(pieces.length[some], max_length)
    else:
        row, num_rows = np.arange(len(some)), len(some)
    order = some[np.argsort(row, kind="stable")]
    row_offsets = np.append(0, np.cumsum(np.bincount(row, minlength=num_rows))).astype(np.int64)
    is_cut = lengths > max_length if long == "cut" else np.zeros(len(lengths), bool)
    num_cut_tokens = int(lengths.sum() - pieces.length[some].sum()) if is_cut.any() else 0
    table = RowTable(
        windowing,
        max_length,
        row_offsets,
        conversations[pieces.document[order]],
        *(begin[order], pieces.length[order], pieces.num_context[order]),
        num_cut_tokens=num_cut_tokens,
    )
    row_targets = np.diff(np.append(0, np.cumsum(targets[order]))[row_offsets])
    possible = before[first + lengths] - before[first + np.minimum(lengths, 1)]
    return ConversationTable(table, row_targets, int(is_cut.sum()), int(possible.sum() - targets.sum()))


class ConversationDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Batches of rows of conversations: ``dataset[[3, 17]]`` is the batch of rows 3 and 17.

    Args:
        store: With the columns ``input_ids`` and ``labels``.
        table: What stands in each row.
        pad_token_id: Fills the rest of a row.
        layout: See :func:`~lightning_llm.datamodules.collate.collate_rows`. None: ``packed`` for rows of several
            conversations, else ``padded``.
    """

    def __init__(
        self, store: ExampleStore, table: ConversationTable, pad_token_id: int, layout: Layout | None = None
    ) -> None:
        self.store = store
        self.table = table
        self.pad_token_id = pad_token_id
        self.layout: Layout = layout or ("packed" if table.segments.windowing == "packed" else "padded")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row_ids: Sequence[int]) -> dict[str, Any]:
        """Collate rows, packed ones of width ``max_length``.

        Args:
            row_ids: Rows of the table; -1 stands for an empty row.
        """
        return collate_rows(
            self.row_segments(row_ids),
            pad_token_id=self.pad_token_id,
            layout=self.layout,
            width=self.table.segments.max_length if self.layout == "packed" else None,
            per_row={"row_ids": np.array(row_ids, dtype=np.int64)},
        )

    def row_segments(self, row_ids: Sequence[int]) -> list[list[Segment]]:
        """The segments of each row, views of the store; -1 has none."""
        tokens, labels = self.store.values["input_ids"], self.store.values["labels"]
        return [
            [Segment(tokens[a : a + n], context, labels=labels[a : a + n]) for a, n, context in segments]
            for segments in self.table.segments.segments_of(row_ids)
        ]

    def examples_of(self, row_id: int) -> list[int]:
        """The conversations in a row."""
        begin, end = self.table.segments.row_offsets[row_id : row_id + 2]
        examples: list[int] = self.table.segments.document[begin:end].tolist()
        return examples


def targets_of(store: ExampleStore) -> npt.NDArray[np.bool_]:
    """(num_tokens,) which tokens of a store are targets."""
    is_target: npt.NDArray[np.bool_] = np.asarray(store.values["labels"]) != IGNORE_INDEX
    return is_target
