"""Does the model fit the data? Questions that are asked before the first step, and answers that say what to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from lightning_llm.pretrained import max_positions
from lightning_llm.tasks import Task


def check_length(config: PretrainedConfig, length: int, where: str) -> None:
    """Refuse rows that are longer than the model has positions.

    Args:
        config: Of the model.
        length: Tokens in a row.
        where: What has that length, for the message.

    Raises:
        ValueError: If it does not fit.
    """
    limit = max_positions(config)
    if limit is not None and length > limit:
        raise ValueError(
            f"The model has {limit} positions (max_position_embeddings), but {where} has {length} tokens. Lower "
            f"the data module's `max_length`, or choose a model with more positions."
        )


def check_vocabulary(config: PretrainedConfig, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids the model has no embedding for.

    Raises:
        ValueError: If it does not fit.
    """
    vocab_size = config.get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model's vocabulary only {vocab_size} "
            f"(vocab_size). Use the model's own tokenizer, set `vocab_size: {len(tokenizer)}` in the model's "
            f"configuration, or call `model.resize_token_embeddings({len(tokenizer)})` and pass the built model."
        )


def check_isolation(task: Task, model: nn.Module, device: torch.device) -> None:
    """Refuse a model that lets packed documents see each other.

    Whether ``position_ids`` that restart keep documents apart depends on the model; many ignore them in silence. So a
    packed row is run twice, once with another first document: the second must not notice.

    Args:
        task: Runs the model as training does.
        model: Left in the mode that it was in.
        device: Where the model is.

    Raises:
        ValueError: If the second document's logits change by more than rounding explains.
    """
    leak = task.packing_leak(model, device)
    is_half = next(model.parameters()).dtype.itemsize < 4 or torch.is_autocast_enabled(device.type)
    if leak > (1e-2 if is_half else 1e-4):
        raise ValueError(
            f"{type(model).__name__} lets packed documents see each other: changing the first of two in a row changes "
            f"the second's logits by {leak:.1%} of the change in the first's. Use "
            f"TextDataModule(windowing='windows') or 'documents', one document a row."
        )
