"""Segments of documents to the tensors of a batch: the one place where labels, positions and padding are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_llm.loss import IGNORE_INDEX

Layout = Literal["packed", "padded", "padding_free"]
Count = Literal["num_bytes", "num_words"]
IntArray = npt.NDArray[np.integer[Any]]
Int64Array = npt.NDArray[np.int64]


class Segment(NamedTuple):
    """A stretch of one document.

    Attributes:
        tokens: (n,) integers, n at least 1.
        num_context: Leading tokens that are no targets. The first token never is one: nothing stands before it.
        num_bytes: Bytes of text behind the targets, where somebody counts them.
        num_words: Words behind the targets, where somebody counts them.
        labels: (n,) integers, what each token is as a target, -100 where it is none; None: itself.
    """

    tokens: IntArray
    num_context: int = 0
    num_bytes: float = 0.0
    num_words: int = 0
    labels: IntArray | None = None


def collate_rows(
    rows: Sequence[Sequence[Segment]],
    *,
    pad_token_id: int,
    layout: Layout,
    width: int | None = None,
    per_row: Mapping[str, Int64Array] | None = None,
    counts: Sequence[Count] = (),
) -> dict[str, Any]:
    """Make a batch of rows of segments.

    ``packed``: (rows, width); documents do not see each other, for ``position_ids`` restart with each segment;
    the padding at a row's end is a document of its own. There is no attention mask: with one, transformers overlooks
    the restarts. ``padded``: (rows, width); one segment a row, with an ``attention_mask``. ``padding_free``:
    (1, tokens); the segments of all rows end to end and no padding. A single row of segments also carries
    ``cu_seq_lens_q``, ``cu_seq_lens_k`` (num_segments + 1,) int32 and ``max_length_q``, ``max_length_k``, for flash
    attention.

    Args:
        rows: One row at least; a row without a segment is padding alone, and nothing where there is no padding. A
            batch must hold a token, so one of empty rows without padding holds one padding token.
        pad_token_id: Fills the rest of a row.
        layout: As above.
        width: Tokens in a row, padding included; None takes the longest row. Not for ``padding_free``.
        per_row: Whatever else the batch says of its rows, (rows,) each, such as ``row_ids``.
        counts: What of ``num_bytes`` and ``num_words`` the segments know.

    Returns:
        int64 tensors: ``input_ids``; ``labels``, unshifted, with -100 on context, on padding, on each segment's first
        token, and where its own labels say so; what else is said above; and (rows,), or (num_segments,) if
        ``padding_free``: ``num_input_tokens`` without padding, the ``counts`` as whole numbers, what is ``per_row``.

    Raises:
        ValueError: If there is no row, a segment is empty, or rows do not fit the layout.

    Example:
        >>> rows = [[Segment(np.array([5, 6, 7])), Segment(np.array([8, 9]))], [Segment(np.array([1, 2, 3]), 2)]]
        >>> batch = collate_rows(rows, pad_token_id=0, layout="packed", width=6)
        >>> batch["labels"].tolist()
        [[-100, 6, 7, -100, 9, -100], [-100, -100, 3, -100, -100, -100]]
        >>> batch["position_ids"].tolist()
        [[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 1, 2]]
        >>> batch = collate_rows(rows, pad_token_id=0, layout="padding_free")
        >>> batch["input_ids"].tolist(), batch["cu_seq_lens_q"].tolist()
        ([[5, 6, 7, 8, 9, 1, 2, 3]], [0, 3, 5, 8])
    """
    _check(rows, layout, width)
    entries = _entries(rows, layout, per_row or {}, counts)
    if layout == "padding_free":
        segments = [segment for row in rows for segment in row] or [Segment(np.array([pad_token_id]), 1)]
    else:
        segments = _pad(rows, entries["num_input_tokens"].tolist(), pad_token_id, width)
    num_rows = 1 if layout == "padding_free" else len(rows)
    input_ids = np.concatenate([segment.tokens for segment in segments], dtype=np.int64)
    labels, positions = input_ids.copy(), np.empty_like(input_ids)
    lengths = [len(segment.tokens) for segment in segments]
    places = np.arange(max(lengths))
    begin = 0
    for segment, length in zip(segments, lengths, strict=True):  # slices cost less than building indices for all
        if segment.labels is not None:
            labels[begin : begin + length] = segment.labels
        labels[begin : begin + min(max(segment.num_context, 1), length)] = IGNORE_INDEX
        positions[begin : begin + length] = places[:length]
        begin += length
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(input_ids.reshape(num_rows, -1)),
        "labels": torch.from_numpy(labels.reshape(num_rows, -1)),
        **entries,
    }
    if layout == "padded":
        columns = torch.arange(batch["input_ids"].shape[1])
        return {**batch, "attention_mask": (columns < batch["num_input_tokens"][:, None]).long()}
    batch["position_ids"] = torch.from_numpy(positions.reshape(num_rows, -1))
    if num_rows == 1:
        edges = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
        batch |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
        batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return batch


def _check(rows: Sequence[Sequence[Segment]], layout: Layout, width: int | None) -> None:
    if layout not in get_args(Layout):
        raise ValueError(f"`layout` must be 'packed', 'padded' or 'padding_free', but got {layout!r}.")
    if layout == "padding_free" and width is not None:
        raise ValueError(f"layout='padding_free' has no padding and so no `width`, but got width={width}.")
    if not rows:
        raise ValueError("A batch needs at least one row, but got none. A row without a segment stands for padding.")
    if layout == "padded" and max(map(len, rows)) > 1:
        raise ValueError(
            f"layout='padded' takes one segment a row, for several would see each other, but got a row of "
            f"{max(map(len, rows))}. Use layout='packed'."
        )


def _pad(rows: Sequence[Sequence[Segment]], used: list[int], pad_token_id: int, width: int | None) -> list[Segment]:
    """The segments of all rows, each row filled up with a segment that is context alone; ``used`` tokens are there."""
    width = max(*used, 1) if width is None else width
    if max(used) > width:
        raise ValueError(f"Rows must hold `width` tokens at most, but got a row of {max(used)} with width={width}.")
    padding = np.full(width, pad_token_id, dtype=np.int64)
    segments: list[Segment] = []
    for row, length in zip(rows, used, strict=True):
        segments += row
        if length < width:
            segments.append(Segment(padding[length:], width - length))
    return segments


def _entries(
    rows: Sequence[Sequence[Segment]], layout: Layout, per_row: Mapping[str, Int64Array], counts: Sequence[Count]
) -> dict[str, Tensor]:
    """What a batch has one entry of for each row, or for each segment where there are no rows."""
    lengths = [[len(segment.tokens) for segment in row] for row in rows]
    if not all(map(all, lengths)):
        raise ValueError(
            f"A segment must hold one token at least, but segment {[*chain(*lengths)].index(0)} of the batch is empty."
        )
    if layout == "padding_free":  # a row of each segment; of an empty batch, one of its padding
        row = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        row = row if len(row) else np.zeros(1, np.int64)
        per_row = {name: values[row] for name, values in per_row.items()}
        lengths = [[length] for length in chain(*lengths)] or [[]]
        rows = [[segment] for segment in chain(*rows)] or [[]]
    counted = {name: [sum(getattr(segment, name) for segment in row) for row in rows] for name in counts}
    return {
        **{name: torch.from_numpy(values) for name, values in per_row.items()},
        # whole numbers, as precision plugins cast floats
        **{name: torch.from_numpy(np.rint(values).astype(np.int64)) for name, values in counted.items()},
        "num_input_tokens": torch.tensor([sum(each) for each in lengths], dtype=torch.int64),
    }
