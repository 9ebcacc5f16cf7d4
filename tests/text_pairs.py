"""Texts that belong together, and a tiny encoder of them, for tests and for the workers of multi-process tests."""

from __future__ import annotations

from typing import Any

import torch
from task_models import BERT, VOCAB
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_llm import LLMModule

DROPOUT = {**BERT, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}


def texts(number: int, names: tuple[str, ...] = ("anchor", "positive"), seed: int = 0) -> dict[str, Tensor]:
    """A batch of token ids of ragged lengths; a positive shares some tokens with its anchor."""
    generator = torch.Generator().manual_seed(seed)
    batch = {"row_ids": torch.arange(number)}
    for index, name in enumerate(names):
        lengths = torch.randint(3, 6 + 3 * index, (number,), generator=generator).tolist()
        rows = [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]
        if name == "positive":
            rows = [torch.cat([row, anchor[:2]]) for row, anchor in zip(rows, batch["anchor_input_ids"], strict=True)]
        batch[f"{name}_input_ids"] = pad_sequence(rows, True)
        batch[f"{name}_attention_mask"] = pad_sequence([torch.ones_like(row) for row in rows], True)
    return batch


def embedding(config: dict[str, Any] = BERT, task_options: dict[str, Any] | None = None, **options: Any) -> LLMModule:
    """A module with random weights in float64."""
    defaults: dict[str, Any] = {"lr_schedule": "constant", "warmup": 0, "weight_decay": 0.0, "dtype": "float64"}
    torch.manual_seed(0)
    module = LLMModule(dict(config), "embedding", **{**defaults, **options}, task_options=task_options)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def gradient_of(module: LLMModule, value: Tensor) -> Tensor:
    """Of all trained parameters, in a row."""
    module.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in module.model.parameters() if p.requires_grad])
