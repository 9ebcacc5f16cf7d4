"""The rows of a batch cut into shorter ones, with every target in one of them; pure index mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_llm.datamodules.collate import Layout
from lightning_llm.datamodules.packing import best_fit_decreasing
from lightning_llm.datamodules.windows import Int64Array, window_table
from lightning_llm.loss import IGNORE_INDEX

_EDGES = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = ("max_length_q", "max_length_k")
_AMOUNTS = ("num_bytes", "num_words")


def cut_rows(batch: Mapping[str, Any], length: int, *, layout: Layout, pad_token_id: int) -> Mapping[str, Any]:
    """Cut a training batch into rows of ``length`` tokens at most: as many tokens, less context.

    Each stretch of a document is cut into windows that overlap by one token, which is context in the later one, as
    ``windowing="packed"`` and ``"windows"`` cut documents: a target is scored once, from as much context as a row of
    ``length`` allows. ``packed``: the windows of all rows are packed best-fit, so that there are about rows * width /
    length new rows, and one more at most times a little padding. ``padded``: a row each. ``padding_free``: end to end.
    Windows without a target are left out (padding, context alone); where no window has one, one stays.

    How a document is cut does not depend on its neighbours. So the sum of the loss does not depend on which rows share
    a batch, nor on how an optimizer step is cut into micro-batches and ranks.

    Args:
        batch: What :func:`~lightning_llm.datamodules.collate.collate_rows` made for training.
        length: Tokens in a row at most, 2 at least.
        layout: Of the batch.
        pad_token_id: Fills the rest of a row.

    Returns:
        A batch of the same layout, ``packed`` rows ``length`` wide; the batch itself if no row is longer. Entries
        (rows, width, ...) are cut, those with one entry per row (per document, if ``padding_free``) are repeated; a
        packed row that holds parts of several rows has the entry of the first of them.

    Raises:
        ValueError: For a length below 2, or a batch that counts bytes or words, which evaluation does.

    Example:
        Documents of 5 and 2 tokens in a row: windows of 3, 3 and 2.

        >>> positions, ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1]]), torch.tensor([[11, 12, 13, 14, 15, 21, 22]])
        >>> batch = {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}
        >>> short = cut_rows(batch, 3, layout="packed", pad_token_id=0)
        >>> short["input_ids"].tolist()
        [[11, 12, 13], [13, 14, 15], [21, 22, 0]]
        >>> short["labels"].tolist()
        [[-100, 12, 13], [-100, 14, 15], [-100, 22, -100]]
    """
    if length < 2:
        raise ValueError(f"A row holds 2 tokens at least, one to predict and one before it, but got {length}.")
    width = batch["input_ids"].shape[1]
    longest = batch["max_length_q"] if layout == "padding_free" else width
    if longest <= length:
        return batch
    counted = [name for name in _AMOUNTS if name in batch]
    if counted:
        raise ValueError(f"A batch with {counted} is one of evaluation, which is not cut into shorter rows.")
    begin, size = _stretches(batch, layout)
    windows = _Windows.of(begin, size, length, batch["labels"], right_align=layout == "padded")
    windows, row = _in_rows(windows, length, layout)
    used = np.bincount(row, windows.length).astype(np.int64)
    places = _Places(windows, row, used, length if layout == "packed" else int(used.max()), batch["input_ids"].numel())
    if layout == "padding_free":
        entries, used, num_entries = windows.stretch, windows.length, len(begin)
    else:
        first = np.searchsorted(row, np.arange(len(used)))  # window of each row
        entries, num_entries = windows.first[first] // width, len(batch["input_ids"])
    cut = _with_entries(batch, places, entries, num_entries, pad_token_id)
    cut["num_input_tokens"] = torch.from_numpy(used)
    if layout == "padded":
        cut["attention_mask"] = (torch.arange(places.width) < cut["num_input_tokens"][:, None]).long()
    else:
        cut["position_ids"] = places.inside
        cut |= _boundaries(cut["position_ids"])
    if batch["input_ids"].is_pinned():
        cut = {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in cut.items()}
    return cut


class _Windows(NamedTuple):
    """Windows of the batch's stretches of documents, all int64 of shape (num_windows,).

    Attributes:
        stretch: Which stretch.
        first: First token, in the batch laid end to end.
        length: Tokens.
        num_context: Leading tokens that are no targets, one at least.
    """

    stretch: Int64Array
    first: Int64Array
    length: Int64Array
    num_context: Int64Array

    @classmethod
    def of(cls, begin: Int64Array, size: Int64Array, length: int, labels: Tensor, *, right_align: bool) -> _Windows:
        """Cut the stretches; windows without a target are left out, the first aside if there is no other."""
        table = window_table(size, length, right_align=right_align)
        first = begin[table.document] + table.start
        context = np.maximum(table.num_context, 1)
        targets = np.append(0, np.cumsum(labels.numpy().ravel() != IGNORE_INDEX))  # before each token
        kept = np.flatnonzero(targets[first + table.length] > targets[first + context])
        kept = kept if len(kept) else np.zeros(1, np.int64)
        return cls(*(column[kept] for column in (table.document, first, table.length, context)))


def _in_rows(windows: _Windows, length: int, layout: Layout) -> tuple[_Windows, Int64Array]:
    """The windows in the order of the new rows, and the row of each."""
    if layout != "packed":
        number = len(windows.length)
        return windows, np.arange(number) if layout == "padded" else np.zeros(number, np.int64)
    row, _ = best_fit_decreasing(windows.length, length)
    order = np.argsort(row, kind="stable")
    return _Windows(*(column[order] for column in windows)), row[order]


class _Places:
    """Where the tokens of the new rows come from: windows one after the other, and padding at the end of each row.

    Padding is a window too, into as much padding behind the old batch. So each place is one of a range of old places.

    Args:
        windows: In the order of their rows.
        row: (num_windows,) ascending.
        used: (num_rows,) tokens in each row.
        width: Of the rows, padding included.
        num_old: Tokens of the old batch, padding included.

    Attributes:
        inside: (num_rows, width) int64, counted from 0 in each window.
    """

    def __init__(self, windows: _Windows, row: Int64Array, used: Int64Array, width: int, num_old: int) -> None:
        self.width = width
        ends = np.searchsorted(row, np.arange(len(used)), side="right")
        first = np.insert(windows.first, ends, num_old)
        length = np.insert(windows.length, ends, width - used)
        context = np.insert(windows.num_context, ends, 0)
        begin = np.cumsum(length) - length
        self._source = torch.from_numpy(_ranges(first, length))
        self.inside = torch.from_numpy(_ranges(np.zeros_like(first), length)).view(-1, width)
        self._context = torch.from_numpy(_ranges(begin, context))

    def take(self, value: Tensor, fill: int) -> Tensor:
        """Entries of the old batch, (rows, width, ...), in the new one."""
        padding = value.new_full((self.width, *value.shape[2:]), fill)
        taken = torch.cat([value.flatten(0, 1), padding]).index_select(0, self._source)
        return taken.view(-1, self.width, *value.shape[2:])

    def labels(self, value: Tensor) -> Tensor:
        """The labels, without those that another window scores."""
        taken = self.take(value, IGNORE_INDEX)
        taken.view(-1)[self._context] = IGNORE_INDEX
        return taken


def _ranges(begin: Int64Array, length: Int64Array) -> Int64Array:
    """begin[i], begin[i] + 1, ..., begin[i] + length[i] - 1, for one i after the other."""
    before = np.cumsum(length) - length
    ranges: Int64Array = np.repeat(begin - before, length)
    ranges += np.arange(len(ranges))
    return ranges


def _stretches(batch: Mapping[str, Any], layout: Layout) -> tuple[Int64Array, Int64Array]:
    """Where each stretch of a document begins, in the batch laid end to end, and its tokens."""
    rows, width = batch["input_ids"].shape
    if layout == "padded":
        return np.arange(rows) * width, batch["attention_mask"].sum(1).clamp(min=1).numpy()
    begin = np.flatnonzero(batch["position_ids"].numpy().ravel() == 0)
    return begin, np.diff(begin, append=rows * width)


def _with_entries(
    batch: Mapping[str, Any], places: _Places, entries: Int64Array, num_entries: int, pad_token_id: int
) -> dict[str, Any]:
    """Everything of a batch but what says where its documents and its padding are."""
    shape, index = batch["input_ids"].shape, torch.from_numpy(entries)
    made_anew = (*_EDGES, *_LONGEST, "position_ids", "attention_mask", "num_input_tokens")
    cut: dict[str, Any] = {}
    for key, value in batch.items():
        if key in made_anew:
            continue
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            fill = pad_token_id if key == "input_ids" else 0
            cut[key] = places.labels(value) if key == "labels" else places.take(value, fill)
        elif isinstance(value, Tensor) and value.ndim and len(value) == num_entries:
            cut[key] = value[index]
        elif isinstance(value, list) and len(value) == num_entries:
            cut[key] = [value[entry] for entry in entries.tolist()]
        else:
            cut[key] = value
    return cut


def _boundaries(position_ids: Tensor) -> dict[str, Any]:
    """What a batch of a single row says of its documents, as :func:`collate_rows` does."""
    if len(position_ids) > 1:
        return {}
    begins = (position_ids[0] == 0).nonzero().flatten()
    edges = torch.cat([begins, begins.new_tensor([position_ids.shape[1]])]).int()
    longest = int(edges.diff().max())
    return dict.fromkeys(_EDGES, edges) | dict.fromkeys(_LONGEST, longest)
