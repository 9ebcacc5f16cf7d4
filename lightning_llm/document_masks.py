"""Attention masks that keep packed documents apart in encoder models.

Decoders read the boundaries from ``position_ids``; encoders do not look at them for their masks. They take a mask over
all pairs of tokens, and its form depends on how attention is computed: ``sdpa`` wants booleans, ``eager`` numbers that
are added to the scores (booleans would be added as 0 and 1, in silence). Memory: rows x seq x seq entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

# Position embeddings of the second kind count from `pad_token_id + 1`.
_PLAIN = ("bert", "electra", "modernbert")
_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert")


def document_ids(position_ids: Tensor) -> Tensor:
    """Number the documents of each row; one begins wherever a position is not the one before it plus one.

    Args:
        position_ids: (rows, seq) int64, restarting with each document.

    Returns:
        (rows, seq) int64, from 0 in each row.

    Example:
        >>> document_ids(torch.tensor([[0, 1, 2, 0, 1, 0]]))
        tensor([[0, 0, 0, 1, 1, 2]])
    """
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return nn.functional.pad(begins.long().cumsum(1), (1, 0))


def packed_attention_mask(
    model: nn.Module | PretrainedConfig, position_ids: Tensor, dtype: torch.dtype | None = None
) -> Tensor | dict[str, Tensor]:
    """Make the ``attention_mask`` with which an encoder keeps packed documents apart.

    Args:
        model: The encoder or its configuration: BERT, ELECTRA, RoBERTa, XLM-RoBERTa, CamemBERT or ModernBERT.
        position_ids: (rows, seq) int64, restarting with each document; padding is a document of its own.
        dtype: Of the mask for ``eager`` attention; if None, the model's.

    Returns:
        (rows, 1, seq, seq): bool, True where attention is allowed, for ``sdpa``; for ``eager`` 0 there and the
        type's lowest number elsewhere. For ModernBERT a dictionary of such masks, one for each type of layer.

    Raises:
        ValueError: For another model, a decoder, or another attention implementation.

    Example:
        >>> from transformers import BertConfig
        >>> config = BertConfig(attn_implementation="sdpa")
        >>> packed_attention_mask(config, torch.tensor([[0, 1, 0]])).int()[0, 0].tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    config = _config(model)
    if not is_encoder(config):
        raise ValueError(
            f"Masks for packed documents are known for the encoders {', '.join(_PLAIN + _AFTER_PADDING)}, but got a "
            f"model of type {config.model_type!r}. Decoders separate documents by `position_ids` alone, if they do: "
            f"ask `verify_packing(model)`. Other encoders: one document a row, with padding."
        )
    ids = document_ids(position_ids)
    allowed = (ids[:, None, :, None] == ids[:, None, None, :]).contiguous()  # (rows, 1, query, key)
    dtype = dtype or getattr(model, "dtype", None) or torch.float32
    if config.model_type != "modernbert":
        return _for_implementation(config, allowed, dtype)
    place = torch.arange(position_ids.shape[1], device=position_ids.device)
    near = (place[:, None] - place).abs() <= config.sliding_window  # half of `local_attention`, to either side
    masks = {"full_attention": allowed, "sliding_attention": allowed & near}
    return {name: _for_implementation(config, mask, dtype) for name, mask in masks.items()}


def packed_encoder_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Make what an encoder's ``forward`` takes for a batch of packed documents.

    Args:
        model: As in :func:`packed_attention_mask`.
        batch: ``input_ids`` and ``position_ids``, (rows, seq), the latter restarting at 0 with each document; without
            ``position_ids`` a row is one document.

    Returns:
        ``input_ids``; and with ``position_ids`` these, counted as the model counts them, and the ``attention_mask``.

    Raises:
        ValueError: As in :func:`packed_attention_mask`.
    """
    position_ids = batch.get("position_ids")
    if position_ids is None:
        return {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    config = _config(model)
    mask = packed_attention_mask(model, position_ids)
    first = config.pad_token_id + 1 if config.model_type in _AFTER_PADDING else 0
    return {"input_ids": batch["input_ids"], "position_ids": position_ids + first, "attention_mask": mask}


def is_encoder(config: Any) -> bool:
    """Whether masks for packed documents are known for a model of this configuration."""
    known = getattr(config, "model_type", None) in _PLAIN + _AFTER_PADDING
    return known and not getattr(config, "is_decoder", False)


def _config(model: Any) -> Any:
    return getattr(model, "config", model)


def _for_implementation(config: Any, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    implementation = config._attn_implementation or "sdpa"  # transformers' choice, where none was made
    if implementation == "sdpa":
        return allowed
    if implementation == "eager":
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    raise ValueError(
        f"Masks for packed documents are known for attn_implementation='sdpa' and 'eager', but the model has "
        f"{implementation!r}. Load it with attn_implementation='sdpa'."
    )
