"""Tiny models of many kinds, and packed documents for them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

LENGTHS = [[7, 4, 9], [3, 9, 5, 3]]  # 20 tokens in each row, filled up to 24

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **_SPECIAL}
_DECODER = {**_SIZE, "intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 64}
# With the usual 0.02, tokens of so small an encoder hardly look at each other.
_ENCODER = {**_SIZE, "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2}
_GEMMA = {**_DECODER, "head_dim": 16, "sliding_window": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **_SPECIAL},
    **dict.fromkeys(("llama", "qwen3", "mistral"), _DECODER),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "mixtral": {**_DECODER, "num_local_experts": 4},
    "gpt_oss": {**_DECODER, "num_local_experts": 4, "head_dim": 16, "rope_parameters": {"rope_type": "default"}},
    "bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 2, **_SPECIAL},
    "opt": {**_SIZE, "max_position_embeddings": 64, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {**_SIZE},
    "mamba": {key: value for key, value in _SIZE.items() if key != "num_attention_heads"},
    "qwen3_next": {
        **_DECODER,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    },
    **dict.fromkeys(("bert", "electra", "roberta", "xlm-roberta", "camembert"), _ENCODER),
    "modernbert": {**_ENCODER, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2},
}
ENCODERS = ["bert", "electra", "roberta", "xlm-roberta", "camembert", "modernbert"]


def build(model_type: str, attention: str | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """A model with random weights and no dropout."""
    torch.manual_seed(0)
    known = AutoConfig.for_model(model_type).to_dict()
    off = {key: 0.0 for key, value in known.items() if isinstance(value, float) and ("drop" in key or "pdrop" in key)}
    config = AutoConfig.for_model(model_type, **{**off, **CONFIGS[model_type]})
    auto = AutoModelForMaskedLM if model_type in ENCODERS else AutoModelForCausalLM
    return auto.from_config(config, attn_implementation=attention).to(dtype)


def documents(seed: int = 0) -> list[list[torch.Tensor]]:
    """Random documents of two rows."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(3, 61, (n,), generator=generator) for n in lengths] for lengths in LENGTHS]


def pack(rows: list[list[torch.Tensor]], width: int = 24) -> dict[str, torch.Tensor]:
    """A packed batch; padding is a document of its own."""
    batch: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        filler = torch.zeros(width - sum(map(len, row)), dtype=torch.int64)
        pieces = [*row, filler]
        batch["input_ids"].append(torch.cat(pieces))
        batch["labels"].append(torch.cat([*map(without_first, row), filler - 100]))
        batch["position_ids"].append(torch.cat([torch.arange(len(piece)) for piece in pieces]))
    return {key: torch.stack(values) for key, values in batch.items()}


def join(rows: list[list[torch.Tensor]]) -> dict[str, Any]:
    """A batch without padding."""
    pieces = list(itertools.chain(*rows))
    edges = torch.tensor([0, *itertools.accumulate(map(len, pieces))], dtype=torch.int32)
    longest = max(map(len, pieces))
    return {
        "input_ids": torch.cat(pieces)[None],
        "labels": torch.cat([without_first(piece) for piece in pieces])[None],
        "position_ids": torch.cat([torch.arange(len(piece)) for piece in pieces])[None],
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), edges),
        **dict.fromkeys(("max_length_q", "max_length_k"), longest),
    }


def without_first(document: torch.Tensor) -> torch.Tensor:
    labels = document.clone()
    labels[0] = -100
    return labels


def gradients(model: Any, total: torch.Tensor) -> torch.Tensor:
    """All gradients of a summed loss, as one vector."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )
