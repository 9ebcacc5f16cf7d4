"""How many floating-point operations a training step is worth, and how many a device could do."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import nn

# Dense 16-bit peaks in FLOP/s of devices whose plain name Lightning's table does not match (vendors' data sheets).
_PEAK_16_BIT = {"h200": 989.4e12, "b200": 2250e12, "gb200": 2500e12, "mi300x": 1307.4e12}


def training_flops_per_token(model: nn.Module, seq_len: int) -> float | None:
    r"""Model FLOPs of forward and backward for one token, in the PaLM convention.

    .. math:: F = 6 N_{trained} + 4 N_{frozen} + 12 \cdot layers \cdot heads \cdot d_{head} \cdot seq\_len

    N counts the weights of matrix products: every matrix except embedding tables, plus the output head where it is
    tied to the embedding. Attention counts the whole row, without the saving of causality or of packed documents;
    recomputation (gradient checkpointing) does not count. A frozen matrix needs no gradient of its own: 4 in place
    of 6.

    Args:
        model: With a transformers ``config``.
        seq_len: Tokens in a row.

    Returns:
        FLOPs per token; None for a model without such a configuration, and for a mixture of experts, where a token
        meets only some of the matrices.

    References:
        Chowdhery et al., PaLM, appendix B.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    if not (layers and heads and hidden) or num_experts > 1:
        return None
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    return matrix_flops(model) + 12.0 * float(layers * heads * head_dim * seq_len)


def matrix_flops(model: nn.Module) -> float:
    """FLOPs of forward and backward for one token in matrix products: 6 for each weight, 4 where it is frozen."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in tables]
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if head is not None and id(head.weight) in tables:
        matrices.append(head.weight)
    return float(sum(p.numel() * (6 if p.requires_grad else 4) for p in matrices))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of a device in FLOP/s, from the vendors' data sheets; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace("nvidia", "").replace("amd", "").replace("instinct", "")
    if name.strip() in _PEAK_16_BIT and dtype in (torch.bfloat16, torch.float16):
        return _PEAK_16_BIT[name.strip()]
    flops = get_available_flops(device, dtype)
    return float(flops) if flops else None
