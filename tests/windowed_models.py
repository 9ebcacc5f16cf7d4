"""Tiny decoders in full float64, their uncut gradients, and how far windowed ones are from these."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm.loss import token_cross_entropy
from lightning_llm.windowed import windowed_loss

VOCAB = 61
LENGTH = 37
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {**_SMALL, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 9, "num_hidden_layers": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SMALL},
    "llama_tied": {"model_type": "llama", **_SMALL, "tie_word_embeddings": True},
    "llama_mqa": {"model_type": "llama", **_SMALL, "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", **_SMALL, "head_dim": 8},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
    "mistral": {"model_type": "mistral", **_SMALL, "sliding_window": 9},
    "gemma2": {"model_type": "gemma2", **_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": {
        "model_type": "gemma3_text",
        **_GEMMA,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}

_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
LINEAR: dict[str, dict[str, Any]] = {
    "lfm2": {"model_type": "lfm2", **_SMALL, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        "model_type": "qwen3_next",
        **_SMALL,
        **_HEADS,
        **_EXPERTS,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "experts_implementation": "eager",
    },
}


def build(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model with random weights, in training mode; the reference attention is transformers' eager one."""
    torch.manual_seed(1)
    settings = {**(FAMILIES | LINEAR)[family], **changes}
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    with torch.no_grad():  # larger than at the start of training, so that tokens look at each other
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return to_dtype(model, dtype)


def to_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast, but for rotary frequencies, which transformers keeps in float32."""
    frequencies = {module: module.inv_freq for module in model.modules() if hasattr(module, "inv_freq")}
    model.to(dtype)
    for module, inv_freq in frequencies.items():
        module.inv_freq = inv_freq
    return model


def full_float64(monkeypatch: Any) -> None:
    """Keep transformers from rounding to float32 in norms, rotary embeddings and softmax of a float64 model.

    ``monkeypatch`` sets attributes: pytest's, or, for good, ``SimpleNamespace(setattr=setattr)``.
    """
    to, as_float, softmax = torch.Tensor.to, torch.Tensor.float, nn.functional.softmax

    def to_but_not_down(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype == torch.float64 and (torch.float32 in args or kwargs.get("dtype") is torch.float32):
            return self
        return to(self, *args, **kwargs)

    def softmax_but_not_down(x: torch.Tensor, dim: int, dtype: Any = None, **kwargs: Any) -> torch.Tensor:
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.Tensor, "to", to_but_not_down)
    monkeypatch.setattr(torch.Tensor, "float", lambda x, **k: x if x.dtype == torch.float64 else as_float(x, **k))
    monkeypatch.setattr(nn.functional, "softmax", softmax_but_not_down)


def batch_of(rows: int = 2, length: int = LENGTH, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels some of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(rows, length, generator=generator) < 0.3, -100)
    labels[0, 4:12] = -100
    return ids, labels


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Of every parameter by name."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def uncut(model: Any, ids: torch.Tensor, labels: torch.Tensor, **inputs: Any) -> tuple[float, dict[str, Any]]:
    """Mean loss and gradients of one ordinary step."""
    model.zero_grad()
    loss = token_cross_entropy(model(input_ids=ids, use_cache=False, **inputs).logits, labels)
    loss.mean.backward()
    return loss.mean.item(), gradients(model)


def windowed(model: Any, ids: torch.Tensor, labels: torch.Tensor, **options: Any) -> tuple[float, dict[str, Any]]:
    """The same in windows."""
    model.zero_grad()
    loss = windowed_loss(model, ids, labels, **options)
    loss.mean.backward()
    return loss.mean.item(), gradients(model)


def worst_error(grads: dict[str, Any], truth: dict[str, Any]) -> float:
    """Largest relative error of a parameter's gradient; those that are zero (of key biases) count by the whole."""
    assert [name for name in truth if truth[name] is None] == [name for name in grads if grads[name] is None]
    truth = {name: grad.double() for name, grad in truth.items() if grad is not None}
    whole = sum(grad.square().sum() for grad in truth.values()) ** 0.5
    return max(
        float((grads[name].double() - grad).norm() / max(grad.norm(), 1e-6 * whole)) for name, grad in truth.items()
    )


def total_error(grads: dict[str, Any], truth: dict[str, Any]) -> float:
    """Relative error of all gradients as one vector."""
    pairs = [(grads[name].double(), truth[name].double()) for name in truth if truth[name] is not None]
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5)
