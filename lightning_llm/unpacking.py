"""Packed documents taken apart: one document a row, for models that would let them see each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_llm.document_masks import document_ids
from lightning_llm.loss import IGNORE_INDEX

# What describes a packed row's boundaries, and nothing in a batch of one document a row.
_BOUNDARIES = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# What has one entry per row, or per document of a batch without padding.
_PER_ROW = ("source_ids", "row_ids", "num_input_tokens")


def unpack_documents(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Lay each document of a packed batch in a row of its own, padded on the right.

    Documents without a target are left out, padding among them: they add nothing to the loss. If there are no others,
    the first one stays, so that the model runs all the same.

    Args:
        batch: A packed batch: ``input_ids``, ``labels`` and ``position_ids``, (rows, seq), the latter restarting with
            each document; a batch without padding is one such row. A batch without ``position_ids`` is not packed and
            comes back as it is.

    Returns:
        The batch with everything of shape (rows, seq, ...) as (documents, longest, ...), filled up with 0 (labels:
        -100); ``attention_mask``; no ``position_ids`` and other boundaries; ``unpacked_rows`` (documents,), the row
        that each document came from, and ``num_packed_rows``, by which :func:`sum_rows` sums over rows again.

    Example:
        >>> positions, labels = torch.tensor([[0, 1, 2, 0, 1, 0]]), torch.tensor([[-100, 6, 7, -100, 9, -100]])
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 0]]), "position_ids": positions, "labels": labels}
        >>> rows = unpack_documents(batch)
        >>> rows["input_ids"].tolist(), rows["attention_mask"].tolist()
        ([[5, 6, 7], [8, 9, 0]], [[1, 1, 1], [1, 1, 0]])
    """
    positions, labels = batch.get("position_ids"), batch.get("labels")
    if positions is None:
        return dict(batch)
    shape = batch["input_ids"].shape
    ids = document_ids(positions.expand(shape))
    first = torch.cat([ids.new_ones(len(ids), 1), ids.diff(dim=1)], 1).flatten().nonzero().flatten()  # in row order
    lengths = torch.cat([first[1:], first.new_tensor([shape.numel()])]) - first
    kept = _has_target(labels, first, lengths) if labels is not None else torch.ones_like(first, dtype=torch.bool)
    kept[0] |= ~kept.any()
    row = _row_of_documents(batch, first, shape)
    first, lengths, row = first[kept], lengths[kept], row[kept]
    columns = torch.arange(int(lengths.max()), device=first.device)
    is_token = columns < lengths[:, None]
    source = (first[:, None] + columns).where(is_token, 0)
    unpacked = {
        key: _take(value, source, is_token, IGNORE_INDEX if key == "labels" else 0)
        if _has_shape(value, shape)
        else value
        for key, value in batch.items()
        if key not in _BOUNDARIES
    }
    mask = unpacked.get("attention_mask")
    unpacked["attention_mask"] = is_token.long() if mask is None or mask.shape != is_token.shape else mask
    return {**unpacked, "unpacked_rows": row, "num_packed_rows": _num_rows(batch)}


def sum_rows(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Sum over each row, whatever the layout: also over the documents of a row that was taken apart.

    In a batch without padding that has an entry of ``row_ids``, ``source_ids`` or ``num_input_tokens`` for each
    document, the documents are its rows.

    Args:
        values: (batch, seq), beside the batch's ``input_ids``.
        batch: As a data module or :func:`unpack_documents` made it.

    Returns:
        (rows,).

    Example:
        >>> sum_rows(torch.tensor([[1, 2, 3, 4, 5]]), {"cu_seq_lens_q": torch.tensor([0, 3, 5]), "row_ids": [7, 8]})
        tensor([6, 9])
    """
    if "unpacked_rows" in batch:
        return values.new_zeros(batch["num_packed_rows"]).index_add_(0, batch["unpacked_rows"], values.sum(1))
    if not _counts_documents(batch):
        return values.sum(1)
    ends = batch["cu_seq_lens_q"][1:]
    place = torch.arange(values.shape[1], dtype=ends.dtype, device=ends.device)
    document = torch.bucketize(place, ends, right=True)  # ends 3, 5: documents 0 0 0 1 1
    return values.new_zeros(len(ends)).index_add_(0, document, values[0])


def _counts_documents(batch: Mapping[str, Any]) -> bool:
    edges = batch.get("cu_seq_lens_q")
    counted = next((batch[key] for key in _PER_ROW if key in batch), None)
    return edges is not None and counted is not None and len(counted) == len(edges) - 1


def _num_rows(batch: Mapping[str, Any]) -> int:
    return len(batch["cu_seq_lens_q"]) - 1 if _counts_documents(batch) else len(batch["input_ids"])


def _row_of_documents(batch: Mapping[str, Any], first: Tensor, shape: torch.Size) -> Tensor:
    """The row, as :func:`sum_rows` counts rows, of each document; ``first`` (documents,) is its first token."""
    if _counts_documents(batch):
        return torch.bucketize(first, batch["cu_seq_lens_q"][1:].to(first), right=True)
    return first // shape[1]


def _has_target(labels: Tensor, first: Tensor, lengths: Tensor) -> Tensor:
    """(documents,) bool: a document's first token is never a target, as nothing stands before it."""
    is_target = (labels != IGNORE_INDEX).flatten()
    is_target[first] = False
    before = torch.nn.functional.pad(is_target.cumsum(0), (1, 0))
    return before[first + lengths] > before[first]


def _has_shape(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == shape


def _take(value: Tensor, source: Tensor, is_token: Tensor, fill: int) -> Tensor:
    taken = value.flatten(0, 1)[source]
    is_padding = ~is_token.view(*is_token.shape, *[1] * (taken.ndim - 2))
    return taken.masked_fill(is_padding, fill)
