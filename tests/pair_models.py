"""Pairs of answers to prompts, and a tiny model that prefers, for tests and for the workers of multi-process tests."""

from __future__ import annotations

from typing import Any

import torch
from support import TINY_GPT2
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_llm import LLMModule

SIDES = ("chosen", "rejected")
VOCAB = 60
GPT2 = {**TINY_GPT2, "vocab_size": VOCAB, "n_embd": 16}  # no RMS norms, which round to float32 in float64 models


def make_pairs(number: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Prompts with two answers, token ids of ragged lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    return [
        {"prompt_ids": tokens(3, 8), "chosen_ids": tokens(1, 12), "rejected_ids": tokens(1, 9)} for _ in range(number)
    ]


def batch_of(pairs: list[dict[str, list[int]]], first_id: int = 0) -> dict[str, Tensor]:
    """One row per pair; each side is padded to a length of its own."""
    batch = {"row_ids": torch.arange(first_id, first_id + len(pairs))}
    for side in SIDES:
        rows = [torch.tensor(pair["prompt_ids"] + pair[f"{side}_ids"]) for pair in pairs]
        labels = [row.clone() for row in rows]
        for row, pair in zip(labels, pairs, strict=True):
            row[: len(pair["prompt_ids"])] = -100
        batch[f"{side}_input_ids"] = pad_sequence(rows, True)
        batch[f"{side}_attention_mask"] = pad_sequence([torch.ones_like(row) for row in rows], True)
        batch[f"{side}_labels"] = pad_sequence(labels, True, -100)
    return batch


def rows_of(batch: dict[str, Tensor], rows: Any) -> dict[str, Tensor]:
    """Some pairs of a batch."""
    return {key: value[rows] for key, value in batch.items()}


def loader_of(batches: list[Any]) -> DataLoader[Any]:
    """Batches as they are."""
    return DataLoader(batches, batch_size=None)


def preferring(config: dict[str, Any] = GPT2, **options: Any) -> LLMModule:
    """A module whose model is some way from its reference."""
    defaults: dict[str, Any] = {"lr_schedule": "constant", "warmup": 0, "weight_decay": 0.0, "dtype": "float64"}
    task_options = {"beta": 0.5, **options.pop("task_options", {})}
    torch.manual_seed(0)
    module = LLMModule(dict(config), "dpo", **{**defaults, **options}, task_options=task_options)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def weights_of(module: LLMModule) -> Tensor:
    """All parameters in a row."""
    return torch.cat([parameter.detach().flatten() for parameter in module.model.parameters()])


def gradient_of(module: LLMModule, value: Tensor) -> Tensor:
    """Of all parameters, in a row."""
    module.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in module.model.parameters() if p.grad is not None])


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative."""
    return float((found - truth).norm() / truth.norm())
