"""Tiny models and ragged rows, for tests and for the workers of multi-process tests."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

from lightning_llm.datamodules.rows import RowDataset, make_rows
from lightning_llm.datamodules.token_store import TokenStore

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


def store_of(lengths: list[int], vocab_size: int = 50, seed: int = 0) -> TokenStore:
    """A token store in memory, of random tokens."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(1, vocab_size, int(offsets[-1])).astype(np.uint16)
    token_bytes = rng.integers(1, 9, vocab_size).astype(np.float64)
    num_bytes = np.array([token_bytes[tokens[a:b]].sum() for a, b in zip(offsets[:-1], offsets[1:], strict=True)])
    return TokenStore(tokens, offsets, num_bytes.astype(np.int64), token_bytes)


def dataset_of(
    lengths: list[int], max_length: int, windowing: Any, stride: int | None = None, documents: Any = None
) -> RowDataset:
    """Rows of random documents of these lengths."""
    store = store_of(lengths)
    numbers = np.arange(len(lengths)) if documents is None else np.array(documents)
    table = make_rows(store.offsets, numbers, max_length, windowing, stride)
    return RowDataset(store, table, pad_token_id=0, token_bytes=store.token_bytes)


class Positions:
    """Batches with a position that Lightning saves and loads; a plain iterable, so that it puts no sampler in."""

    def __init__(self, batches: list[Any]):
        self.batches, self.position, self.resumed_at = batches, 0, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.position, self.resumed_at = self.resumed_at, 0
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.resumed_at = state["position"]


class Plain(L.LightningModule):
    """Knows nothing of tokens."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
