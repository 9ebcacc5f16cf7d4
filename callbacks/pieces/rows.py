"""The rows of a batch, whatever holds them: counted, and taken out."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Which document of the batch each window is of: all windows of a document stay together, and it is the row.
DOCUMENTS = "document_ids"
# Entries of flattened batches, which hold all documents in one row.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
LONGEST = ("max_length_q", "max_length_k", "max_seqlen")


class CannotSplit(ValueError):  # noqa: N818 - says what is wrong better than with Error at its end
    """A batch, or an entry of it, that nobody has said how to cut."""


def count_rows(batch: Any) -> int:
    """Rows of a batch: the leading dimension of its first tensor, or the length of a list in a mapping.

    Where rows are windows of documents (``document_ids``), a document is the row.

    Raises:
        CannotSplit: If neither is there, or it could be both.
    """
    if isinstance(batch, list) and any(isinstance(value, Mapping) for value in batch):
        raise CannotSplit(
            "The batch is a list of mappings, which may be rows or batches. Pass split_fn=lambda batch, "
            "number_of_pieces: [...], or collate it."
        )
    rows = rows_or_none(batch)
    if rows is None:
        raise CannotSplit(
            f"A batch is cut along the first dimension of its tensors, but this {type(batch).__name__} holds none. "
            f"Pass split_fn=lambda batch, number_of_pieces: [...]."
        )
    return rows


def take_rows(batch: Any, rows: slice | Tensor, num_rows: int, path: str = "batch") -> Any:
    """Some rows of every entry of a batch.

    Tensors and lists with one entry per row are cut; numbers, strings, None and tensors without dimensions are the
    same for all pieces. Anything else is refused.

    Args:
        batch: A tensor, or mappings, (named) tuples, lists and dataclasses of them, nested as you like.
        rows: Which; a slice gives views, an index (n,) int64 gives copies.
        num_rows: Rows of the whole batch.
        path: Where in the batch this is, for messages.

    Raises:
        CannotSplit: Naming the entry that does not have ``num_rows`` rows.

    Example:
        >>> import torch
        >>> take_rows({"x": torch.arange(4), "names": ["a", "b", "c", "d"]}, slice(1, 3), 4)
        {'x': tensor([1, 2]), 'names': ['b', 'c']}
    """
    if batch is None or isinstance(batch, (str, bytes, int, float, complex)):
        return batch
    if isinstance(batch, (Tensor, np.ndarray)):
        if batch.ndim == 0:
            return batch
        if batch.shape[0] != num_rows:
            raise _no_rows(path, f"shape {tuple(batch.shape)}", num_rows)
        return batch[rows]
    if isinstance(batch, Mapping):
        if isinstance(batch.get(DOCUMENTS), Tensor):
            return _take_documents(batch, rows, num_rows, path)
        items = {key: take_rows(value, rows, num_rows, f"{path}[{key!r}]") for key, value in batch.items()}
        return items if type(batch) is dict else like(batch, items, path)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        values = (
            take_rows(value, rows, num_rows, f"{path}.{name}") for name, value in zip(batch._fields, batch, strict=True)
        )
        return type(batch)(*values)
    if isinstance(batch, (list, tuple)):
        return _take_from_sequence(batch, rows, num_rows, path)
    if is_dataclass(batch) and not isinstance(batch, type):
        taken = copy.copy(batch)
        for f in fields(batch):
            value = take_rows(getattr(batch, f.name), rows, num_rows, f"{path}.{f.name}")
            object.__setattr__(taken, f.name, value)
        return taken
    raise _no_rows(path, f"type {type(batch).__name__}", num_rows)


def window_edges(batch: Any) -> list[int] | None:
    """First window of each document, and the end of the last; None if a batch's rows are no windows of documents."""
    ids = batch.get(DOCUMENTS) if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        return None
    counts = torch.bincount(ids, minlength=_num_documents(batch))
    edges: list[int] = [0, *counts.cumsum(0).tolist()]
    return edges


def _take_documents(batch: Mapping[str, Any], rows: slice | Tensor, num_documents: int, path: str) -> Any:
    """Some documents, each with all its windows, numbered from 0 again."""
    edges = window_edges(batch)
    assert edges is not None
    documents = list(range(num_documents)[rows]) if isinstance(rows, slice) else rows.tolist()
    spans = [(edges[document], edges[document + 1]) for document in documents]
    ids = batch[DOCUMENTS]
    windows: slice | Tensor
    if isinstance(rows, slice) and rows.step in (None, 1) and spans:
        windows = slice(spans[0][0], spans[-1][1])  # a view, no copy
    else:
        windows = torch.cat([torch.arange(*span, device=ids.device) for span in spans])
    counts = torch.tensor([end - begin for begin, end in spans], device=ids.device)
    items: dict[str, Any] = {}
    for key, value in batch.items():
        if key == DOCUMENTS:
            items[key] = torch.arange(len(spans), device=ids.device).repeat_interleave(counts)
        elif rows_or_none(value) == edges[-1] or (isinstance(value, list) and len(value) == edges[-1]):
            items[key] = take_rows(value, windows, edges[-1], f"{path}[{key!r}]")
        else:
            items[key] = take_rows(value, rows, num_documents, f"{path}[{key!r}]")
    return items if type(batch) is dict else like(batch, items, path)


def _num_documents(batch: Mapping[str, Any]) -> int:
    """From what there is for each document; a device is waited for only if there is nothing."""
    for key in ("labels", "row_ids"):
        if isinstance(batch.get(key), Tensor):
            return len(batch[key])
    return int(batch[DOCUMENTS][-1]) + 1


def _take_from_sequence(batch: Any, rows: slice | Tensor, num_rows: int, path: str) -> Any:
    """A list of strings, numbers or ragged tensors has one entry per row; a list of batches is cut entry by entry."""
    found = [rows_or_none(value) for value in batch]
    holds_rows = len(batch) == num_rows and path != "batch"
    holds_batches = num_rows in found and all(number in (num_rows, None) for number in found)
    if holds_rows and holds_batches:
        raise CannotSplit(
            f"The batch has {num_rows} rows, and {path} has as many entries of {num_rows} rows each: it could be cut "
            f"in two ways. Pass split_fn=lambda batch, number_of_pieces: [...]."
        )
    if holds_rows and not holds_batches:
        chosen = batch[rows] if isinstance(rows, slice) else [batch[i] for i in rows.tolist()]
        return type(batch)(chosen)
    if batch and all(isinstance(value, (str, bytes, int, float)) for value in batch):
        raise _no_rows(path, f"{len(batch)} entries", num_rows)
    return type(batch)(take_rows(value, rows, num_rows, f"{path}[{i}]") for i, value in enumerate(batch))


def like(batch: Any, items: dict[Any, Any], path: str) -> Any:
    """A mapping of the same type with other entries."""
    if isinstance(batch, OrderedDict):
        return type(batch)(items)
    try:
        return type(batch)(items)  # BatchEncoding and its kin take the data first
    except TypeError as error:
        raise CannotSplit(
            f"{path} is a {type(batch).__name__}, which cannot be made from a dict. Pass split_fn=lambda batch, "
            f"number_of_pieces: [...]."
        ) from error


def _no_rows(path: str, what: str, num_rows: int) -> CannotSplit:
    return CannotSplit(
        f"The batch has {num_rows} rows, but {path} has {what}, and nothing says how to cut it. Pass "
        f"split_fn=lambda batch, number_of_pieces: [...], or keep it out of the batch."
    )


def fresh(batch: Any) -> Any:
    """The same tensors in new containers, so that whoever pops an entry pops it from his own."""
    if isinstance(batch, Mapping):
        items = {key: fresh(value) for key, value in batch.items()}
        return items if type(batch) is dict else like(batch, items, "batch")
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(fresh, batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map(fresh, batch))
    return copy.copy(batch) if is_dataclass(batch) and not isinstance(batch, type) else batch


def tensors_in(batch: Any) -> Iterable[Tensor]:
    """Every tensor in a batch, in its order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_in(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors_in(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for f in fields(batch):
            yield from tensors_in(getattr(batch, f.name))


def rows_or_none(batch: Any) -> int | None:
    """Rows of a batch; None if it does not tell."""
    if isinstance(batch, Mapping) and any(isinstance(batch.get(key), Tensor) for key in BOUNDARIES):
        return 1  # flattened: all documents in one row
    if isinstance(batch, Mapping) and isinstance(batch.get(DOCUMENTS), Tensor):
        return _num_documents(batch)
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    if isinstance(batch, Mapping):
        values = list(batch.values())
    elif isinstance(batch, (list, tuple)):
        values = list(batch)
    elif is_dataclass(batch) and not isinstance(batch, type):
        values = [getattr(batch, f.name) for f in fields(batch)]
    else:
        return None
    lists = [value for value in values if isinstance(value, list)]
    plain = (rows_or_none(value) for value in values if not isinstance(value, list))
    rows = next((number for number in plain if number is not None), None)
    if rows is None and isinstance(batch, (list, tuple)):
        return next((number for number in map(rows_or_none, lists) if number is not None), None)
    if rows is None:  # what has no tensors but in lists has an entry per row in those
        return next((len(value) for value in lists if any(True for _ in tensors_in(value))), None)
    return rows
