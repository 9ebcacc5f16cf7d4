"""Tiny models and ragged rows, for tests and for the workers of multi-process tests."""

from __future__ import annotations

from typing import Any

import torch

TINY_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def ragged_rows(num_rows: int, seed: int = 0, vocab_size: int = 97, max_length: int = 24) -> list[dict[str, Any]]:
    """Rows with random lengths and randomly ignored labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_rows):
        length = int(torch.randint(4, max_length + 1, (), generator=generator))
        input_ids = torch.randint(0, vocab_size, (length,), generator=generator)
        labels = input_ids.masked_fill(torch.rand(length, generator=generator) < 0.3, -100)
        rows.append({"input_ids": input_ids, "labels": labels})
    return rows


def pad_rows(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A Hugging Face batch: right padding, attention mask, unshifted labels."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True),
    }
