"""Attention of packed rows, document by document: scores that a mask would set to minus infinity are not computed.

transformers gives SDPA a boolean mask of (batch, 1, seq, seq) for packed rows: all seq² scores are computed, although a
document of length n needs n² / 2 of them. Here the mask is O(seq): where documents start.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "packed_sdpa"


def use_packed_attention(model: nn.Module, device: torch.device) -> None:
    """Let a causal language model on a CPU attend document by document, if it uses SDPA; otherwise change nothing.

    Rows that are not packed, sliding windows and caches go transformers' own way. On a GPU the fused kernels of flash
    attention do this, and SDPA with a mask is faster than a loop over documents.
    """
    switch = getattr(model, "set_attn_implementation", None)
    if device.type == "cpu" and switch is not None and getattr(model.config, "_attn_implementation", None) == "sdpa":
        switch(PACKED_SDPA)


def document_starts(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of packed rows, (batch, 1, 1, seq) bool: True where a document starts; transformers' own in other cases.

    In a packed row a token sees the one before it, unless it is the first of its document.
    """
    is_packed = attention_mask is None and not allow_is_causal_skip and not use_vmap and local_size is None
    if not is_packed or q_length != kv_length or torch.device(device).type != "cpu":
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,  # type: ignore[arg-type]
            attention_mask,
            local_size,
            allow_is_causal_skip,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
    rows = torch.arange(batch_size, device=device)[:, None]
    position = torch.arange(1, q_length, device=device)[None]
    assert mask_function is not None
    sees_previous = mask_function(rows, torch.zeros_like(rows), position, position - 1)
    return F.pad(~sees_previous, (1, 0), value=True)[:, None, None]


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention in each document, (batch, heads, seq, head_dim) to (batch, seq, heads, head_dim)."""
    seq = query.shape[2]
    is_starts = attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.shape[2] < seq
    if not is_starts:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    assert attention_mask is not None
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    rows = []
    for starts, *row in zip(attention_mask[:, 0, 0], query, key, value, strict=True):
        lengths = torch.diff(starts.nonzero().flatten(), append=torch.tensor([seq])).tolist()
        documents = zip(*(states[None].split(lengths, dim=2) for states in row), strict=True)
        attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, is_causal=True, scale=scaling)
        rows.append(torch.cat([attend(*document) for document in documents], dim=2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, document_starts)
