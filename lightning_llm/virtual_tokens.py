"""Prompts that train (peft's prompt tuning, prefix tuning, p-tuning): tokens before each row that no batch shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_llm.compatibility import check_length
from lightning_llm.loss import IGNORE_INDEX


def prompt_config(model: nn.Module) -> Any:
    """The ``PeftConfig`` of a model's prompt; None if it has none, or if that is switched off."""
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    config = getattr(inner, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False) or inner._adapters_disabled:
        return None
    return config


def num_virtual_tokens(model: nn.Module) -> int:
    """How many positions a decoder's output has before those of ``input_ids``.

    None where the prompt is one of keys and values (prefix tuning): those have no output.
    """
    config = prompt_config(model)
    if config is None or config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        return 0
    return int(config.num_virtual_tokens)


def beside_prompt(model: nn.Module, labels: Tensor) -> Tensor:
    """Labels beside a decoder's output, as peft's own forward lays them: the prompt's end predicts the first token.

    Args:
        model: With a prompt, or without.
        labels: (batch, seq) int64, unshifted, -100 where there is no target.

    Returns:
        (batch, virtual tokens + seq).
    """
    number = num_virtual_tokens(model)
    return F.pad(labels, (number, 0), value=IGNORE_INDEX) if number else labels


def check_room(model: nn.Module, batch: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Refuse rows that have no room for the prompt before them.

    Args:
        model: With a prompt, or without.
        batch: With ``input_ids`` (batch, seq).
        config: Of the model, with the number of its positions.

    Raises:
        ValueError: If prompt and row together are longer than the model has positions for.
    """
    prompt, input_ids = prompt_config(model), batch.get("input_ids")
    if prompt is not None and isinstance(input_ids, Tensor):
        length = int(batch.get("max_length_q", input_ids.shape[-1])) + int(prompt.num_virtual_tokens)
        check_length(config, length, f"a batch after a prompt of {prompt.num_virtual_tokens}")
