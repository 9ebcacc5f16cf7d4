"""Cutting a batch into pieces: along its rows, whatever holds them, and a packed row between its documents."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_llm.loss import IGNORE_INDEX

SplitFn = Callable[[Any, int], Sequence[Any]]
CostFn = Callable[[Any], int]

_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
_LONGEST = ("max_length_q", "max_length_k", "max_seqlen")
# Entries of Hugging Face batches that have one column per token, so that padding can be cut off.
_COLUMNS = {
    *("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "labels", "loss_mask"),
    *("special_tokens_mask", "decoder_input_ids", "decoder_attention_mask", "completion_mask", "assistant_masks"),
}
# Those of them that say which columns count.
_MASKS = {"decoder_attention_mask", "loss_mask", "completion_mask", "assistant_masks"}


class CannotSplit(ValueError):  # noqa: N818 - says what is wrong better than with Error at its end
    """A batch, or an entry of it, that nobody has said how to cut."""


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
        return self._piece(batch, float(_rows_or_none(batch) or 1))

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
        lengths = _row_lengths(piece.batch, num_rows) if self.trim_padding or self.sort_by_length else None
        if lengths is None:
            per_piece = max(int(limit * num_rows // piece.cost), 1)
            return self._cut_evenly(piece, num_rows, -(-num_rows // per_piece))
        return self._cut_by_length(piece, lengths, limit_of)

    def halve(self, piece: Piece) -> list[Piece]:
        """Two parts, or the piece itself if it is a single row of a single document."""
        if self.split_fn is not None:
            if self.cost_fn is None and _rows_or_none(piece.batch) is None:
                raise CannotSplit(
                    f"split_fn cuts this {type(piece.batch).__name__}, but without tensors in it nothing says how "
                    f"large a piece is. Pass cost_fn=lambda batch: ... too."
                )
            parts = list(self.split_fn(piece.batch, 2))
            if len(parts) < 2:
                return [piece]
            rows = [_rows_or_none(part) for part in parts]
            total = sum(row or 0 for row in rows) if all(rows) else 0
            shares = [row / total for row in rows if row] if total else [1 / len(parts)] * len(parts)
            if total == piece.num_rows:
                return [self._piece(part, float(row or 0)) for part, row in zip(parts, rows, strict=True)]
            return [self._piece(part, piece.num_rows * share) for part, share in zip(parts, shares, strict=True)]
        num_rows = count_rows(piece.batch)
        if num_rows <= 1:
            return self._cut_documents(piece, -(-piece.cost // 2))
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
        rows, columns, longest = _shape(batch)
        cost = int(self.cost_fn(batch)) if self.cost_fn is not None else rows * columns
        return Piece(batch, num_rows, longest, cost)

    def _rows(self, piece: Piece, rows: slice | Tensor, num_rows: int, length: int | None = None) -> Piece:
        batch = take_rows(piece.batch, rows, num_rows)
        taken = len(range(*rows.indices(num_rows))) if isinstance(rows, slice) else len(rows)
        if length is not None and self.trim_padding:
            batch = _trim(batch, length)
        return self._piece(batch, piece.num_rows * taken / num_rows)

    def _cut_evenly(self, piece: Piece, num_rows: int, number: int) -> list[Piece]:
        number = min(number, num_rows)
        edges = [round(i * num_rows / number) for i in range(number + 1)]
        return [self._rows(piece, slice(a, b), num_rows) for a, b in zip(edges, edges[1:], strict=False)]

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
        edges = _document_edges(piece.batch)
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
                _take_documents(piece.batch, edges, first, end),
                piece.num_rows * (edges[end] - edges[first]) / tokens,
            )
            for first, end in zip(cuts, cuts[1:], strict=False)
        ]


# ---- rows --------------------------------------------------------------------------------------------------------


def count_rows(batch: Any) -> int:
    """Rows of a batch: the leading dimension of its first tensor, or the length of a list in a mapping.

    Raises:
        CannotSplit: If neither is there, or it could be both.
    """
    if isinstance(batch, list) and any(isinstance(value, Mapping) for value in batch):
        raise CannotSplit(
            "The batch is a list of mappings, which may be rows or batches. Pass split_fn=lambda batch, "
            "number_of_pieces: [...], or collate it."
        )
    rows = _rows_or_none(batch)
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
        items = {key: take_rows(value, rows, num_rows, f"{path}[{key!r}]") for key, value in batch.items()}
        return items if type(batch) is dict else _like(batch, items, path)
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


def _take_from_sequence(batch: Any, rows: slice | Tensor, num_rows: int, path: str) -> Any:
    """A list of strings, numbers or ragged tensors has one entry per row; a list of batches is cut entry by entry."""
    found = [_rows_or_none(value) for value in batch]
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


def _like(batch: Any, items: dict[Any, Any], path: str) -> Any:
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
        return items if type(batch) is dict else _like(batch, items, "batch")
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


def _rows_or_none(batch: Any) -> int | None:
    if isinstance(batch, Mapping) and any(isinstance(batch.get(key), Tensor) for key in _BOUNDARIES):
        return 1  # flattened: all documents in one row
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
    plain = (_rows_or_none(value) for value in values if not isinstance(value, list))
    rows = next((number for number in plain if number is not None), None)
    if rows is None and isinstance(batch, (list, tuple)):
        return next((number for number in map(_rows_or_none, lists) if number is not None), None)
    if rows is None:  # what has no tensors but in lists has an entry per row in those
        return next((len(value) for value in lists if any(True for _ in tensors_in(value))), None)
    return rows


# ---- columns -----------------------------------------------------------------------------------------------------


def _shape(batch: Any) -> tuple[int, int, int]:
    """Rows, columns, and tokens that see each other; images and other tensors of 4 dimensions have one column."""
    found = _rows_or_none(batch)
    rows = 1 if found is None else found
    by_row = (tensor for tensor in tensors_in(batch) if tensor.ndim in (2, 3) and tensor.shape[0] == rows)
    columns = max((tensor.shape[1] for tensor in by_row), default=1)
    if isinstance(batch, Mapping):
        for key in _LONGEST:
            if isinstance(batch.get(key), int):
                return rows, columns, batch[key]
    return rows, columns, columns


def _row_lengths(batch: Any, num_rows: int) -> list[int] | None:
    """Columns of each row up to its last token or target; None if the batch does not tell (one copy to the host)."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != num_rows or not isinstance(labels, Tensor):
        return None  # without labels the loss may be made of anything
    same_shape = {key for key, v in batch.items() if isinstance(v, Tensor) and v.ndim > 1 and v.shape[:2] == mask.shape}
    if not same_shape <= _COLUMNS or ("decoder_input_ids" in same_shape and "decoder_attention_mask" not in same_shape):
        return None  # an unknown entry: its second dimension may be tokens, or may only be as long
    used = mask != 0
    for key in same_shape & _MASKS:
        used = used | (batch[key] != 0)
    if labels.shape == mask.shape:
        used = used | (labels != IGNORE_INDEX)
    elif labels.ndim != 1:
        return None
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths: list[int] = (used * places).amax(1).clamp(min=1).tolist()
    return lengths


def _trim(batch: Any, length: int) -> Any:
    shape = batch["attention_mask"].shape
    if length >= shape[1]:
        return batch
    items = {
        key: value[:, :length]
        if key in _COLUMNS and isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] == shape
        else value
        for key, value in batch.items()
    }
    return items if type(batch) is dict else _like(batch, items, "batch")


# ---- documents of one row ----------------------------------------------------------------------------------------


def _document_edges(batch: Any) -> list[int]:
    """Where the documents of a single packed row begin, and where the last one ends; [] if it is not packed."""
    if not isinstance(batch, Mapping):
        return []
    for key in _BOUNDARIES:
        if isinstance(batch.get(key), Tensor):
            edges: list[int] = batch[key].flatten().tolist()
            return edges
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[0] != 1:
        return []
    begins: list[int] = (positions[0] == 0).nonzero().flatten().tolist()
    return [*begins, positions.shape[1]] if begins and begins[0] == 0 else []


def _take_documents(batch: Mapping[str, Any], edges: list[int], first: int, end: int) -> Any:
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
        if key in _BOUNDARIES:
            items[key] = value[..., first : end + 1] - begin
        elif key in _LONGEST:
            items[key] = torch.full_like(value, longest) if isinstance(value, Tensor) else longest
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
    return items if type(batch) is dict else _like(batch, items, "batch")


def _shape_of(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, (Tensor, np.ndarray)):
        return tuple(value.shape)
    return (1,) if isinstance(value, (list, tuple)) and len(value) == 1 else None


def _not_by_document(key: str, what: str, tokens: int, documents: int) -> CannotSplit:
    return CannotSplit(
        f"The batch is one row of {tokens} tokens in {documents} documents, but batch[{key!r}] has {what}, and nothing "
        f"says how to cut it. Pass split_fn=lambda batch, number_of_pieces: [...]."
    )
