"""The columns of a batch: how many there are, and how many of them are padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_llm.callbacks.pieces.rows import BOUNDARIES, DOCUMENTS, LONGEST, like, rows_or_none, tensors_in
from lightning_llm.loss import IGNORE_INDEX

# Entries of Hugging Face batches that have one column per token, so that padding can be cut off.
_COLUMNS = {
    *("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "labels", "loss_mask"),
    *("special_tokens_mask", "decoder_input_ids", "decoder_attention_mask", "completion_mask", "assistant_masks"),
    "new_token_mask",
}
# Those of them that say which columns count.
_MASKS = {"decoder_attention_mask", "loss_mask", "completion_mask", "assistant_masks"}


def shape_of(batch: Any) -> tuple[int, int, int]:
    """Rows, columns, and tokens that see each other; images and other tensors of 4 dimensions have one column.

    Of documents in windows, each window is a row here: it needs memory like one.
    """
    if _is_of_windows(batch):  # labels are of documents: several of one are no columns
        batch = {key: value for key, value in batch.items() if key != "labels"}
    found = len(batch[DOCUMENTS]) if _is_of_windows(batch) else rows_or_none(batch)
    rows = 1 if found is None else found
    by_row = (tensor for tensor in tensors_in(batch) if tensor.ndim in (2, 3) and tensor.shape[0] == rows)
    columns = max((tensor.shape[1] for tensor in by_row), default=1)
    if isinstance(batch, Mapping):
        for key in LONGEST:
            if isinstance(batch.get(key), int):
                return rows, columns, batch[key]
    return rows, columns, columns


def row_lengths(batch: Any, num_rows: int) -> list[int] | None:
    """Columns of each row up to its last token or target; None if the batch does not tell (one copy to the host)."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if _is_of_windows(batch) and isinstance(labels, Tensor):  # a label for each document
        batch = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch[DOCUMENTS]
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


def trim(batch: Any, length: int) -> Any:
    """Cut off all columns from ``length`` on."""
    shape = batch["attention_mask"].shape
    if length >= shape[1]:
        return batch
    columns = _COLUMNS - {"labels"} if _is_of_windows(batch) else _COLUMNS
    items = {
        key: value[:, :length]
        if key in columns and isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] == shape
        else value
        for key, value in batch.items()
    }
    return items if type(batch) is dict else like(batch, items, "batch")


def _is_of_windows(batch: Any) -> bool:
    return isinstance(batch, Mapping) and isinstance(batch.get(DOCUMENTS), Tensor)


def truncate(batch: Any, length: int) -> Any:
    """The first ``length`` columns of a Hugging Face batch; what stands behind them is lost.

    Args:
        batch: A mapping with ``input_ids`` (batch, seq). Every tensor of that shape, or (batch, seq, ...), is cut.
        length: Columns to keep.

    Raises:
        ValueError: If the batch is of another kind, or says where documents lie or which tokens see each other.

    Example:
        >>> truncate({"input_ids": torch.arange(4)[None], "row_ids": torch.tensor([7])}, 2)
        {'input_ids': tensor([[0, 1]]), 'row_ids': tensor([7])}
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        got = f"the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ValueError(
            f"Rows are shortened in mappings with `input_ids` (batch, seq), but got {got}. "
            f"Pass cut_fn=lambda batch, length: ..."
        )
    if ids.shape[1] <= length:
        return batch
    unclear = [key for key in (*BOUNDARIES, *LONGEST, DOCUMENTS) if key in batch]  # windows would each lose their end
    unclear += [key for key, value in batch.items() if isinstance(value, Tensor) and value.ndim == 4]  # pairs of tokens
    if unclear:
        raise ValueError(
            f"Rows of {ids.shape[1]} tokens are to have {length}, but nobody says how to cut {unclear}. Give the "
            f"Trainer the data module itself, if it has `cut_batch`, or pass cut_fn=lambda batch, length: ..."
        )
    items = {
        key: value[:, :length] if isinstance(value, Tensor) and value.shape[:2] == ids.shape else value
        for key, value in batch.items()
    }
    if isinstance(items.get("num_input_tokens"), Tensor):  # of each row
        items["num_input_tokens"] = items["num_input_tokens"].clamp(max=length)
    return items if type(batch) is dict else like(batch, items, "batch")
