"""The columns of a batch: how many there are, and how many of them are padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_llm.callbacks.pieces.rows import LONGEST, like, rows_or_none, tensors_in
from lightning_llm.loss import IGNORE_INDEX

# Entries of Hugging Face batches that have one column per token, so that padding can be cut off.
_COLUMNS = {
    *("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "labels", "loss_mask"),
    *("special_tokens_mask", "decoder_input_ids", "decoder_attention_mask", "completion_mask", "assistant_masks"),
}
# Those of them that say which columns count.
_MASKS = {"decoder_attention_mask", "loss_mask", "completion_mask", "assistant_masks"}


def shape_of(batch: Any) -> tuple[int, int, int]:
    """Rows, columns, and tokens that see each other; images and other tensors of 4 dimensions have one column."""
    found = rows_or_none(batch)
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
    items = {
        key: value[:, :length]
        if key in _COLUMNS and isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] == shape
        else value
        for key, value in batch.items()
    }
    return items if type(batch) is dict else like(batch, items, "batch")
