"""A single packed row, which is cut between its documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_llm.callbacks.pieces.rows import BOUNDARIES, LONGEST, CannotSplit, like
from lightning_llm.loss import IGNORE_INDEX

# What evaluation adds up, given for the row as a whole: pieces add up to it too.
AMOUNTS = ("num_bytes", "num_words")


def document_edges(batch: Any) -> list[int]:
    """Where the documents of a single packed row begin, and where the last one ends; [] if it is not packed."""
    if not isinstance(batch, Mapping):
        return []
    for key in BOUNDARIES:
        if isinstance(batch.get(key), Tensor):
            edges: list[int] = batch[key].flatten().tolist()
            return edges
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[0] != 1:
        return []
    begins: list[int] = (positions[0] == 0).nonzero().flatten().tolist()
    return [*begins, positions.shape[1]] if begins and begins[0] == 0 else []


def take_documents(batch: Mapping[str, Any], edges: list[int], first: int, end: int) -> Any:
    """Documents first..end of a single packed row, with their boundaries counted from the first one."""
    begin, stop, tokens = edges[first], edges[end], edges[-1]
    longest = max(b - a for a, b in zip(edges[first:end], edges[first + 1 : end + 1], strict=True))
    labels = batch.get("labels")
    if begin and isinstance(labels, Tensor) and bool((labels.flatten()[begin] != IGNORE_INDEX).any()):
        raise CannotSplit(
            f"batch['labels'] has a target at a document's first token (position {begin}), which the document before "
            f"it predicts: cut there, it would be lost. Set it to {IGNORE_INDEX}, as packing collators do, or pass "
            f"split_fn=lambda batch, number_of_pieces: [...]."
        )
    items: dict[str, Any] = {}
    for key, value in batch.items():
        if key in BOUNDARIES:
            items[key] = value[..., first : end + 1] - begin
        elif key in LONGEST:
            items[key] = torch.full_like(value, longest) if isinstance(value, Tensor) else longest
        elif first and key in AMOUNTS and _shape_of(value) == (1,):
            items[key] = torch.zeros_like(value)  # the first piece has it all
        elif value is None or isinstance(value, (str, bytes, int, float)) or _shape_of(value) in ((), (1,)):
            items[key] = value  # of the row as a whole
        elif isinstance(value, list) and len(value) in (tokens, len(edges) - 1):
            items[key] = value[begin:stop] if len(value) == tokens else value[first:end]
        elif not isinstance(value, (Tensor, np.ndarray)):
            raise _not_by_document(key, f"type {type(value).__name__}", tokens, len(edges) - 1)
        elif value.ndim >= 2 and tuple(value.shape[:2]) == (1, tokens):
            items[key] = value[:, begin:stop]
        elif value.shape[0] == tokens:
            items[key] = value[begin:stop]
        elif value.shape[0] == len(edges) - 1:
            items[key] = value[first:end]  # one entry per document
        else:
            raise _not_by_document(key, f"shape {tuple(value.shape)}", tokens, len(edges) - 1)
    return items if type(batch) is dict else like(batch, items, "batch")


def _shape_of(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, (Tensor, np.ndarray)):
        return tuple(value.shape)
    return (1,) if isinstance(value, (list, tuple)) and len(value) == 1 else None


def _not_by_document(key: str, what: str, tokens: int, documents: int) -> CannotSplit:
    return CannotSplit(
        f"The batch is one row of {tokens} tokens in {documents} documents, but batch[{key!r}] has {what}, and nothing "
        f"says how to cut it. Pass split_fn=lambda batch, number_of_pieces: [...]."
    )
