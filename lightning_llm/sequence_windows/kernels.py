r"""Attention on a part of the keys, with the logarithm of its normaliser, from which parts are joined.

For queries i and keys j with scores :math:`s_{ij} = c\, q_i \cdot k_j` a part gives
:math:`o_i = \sum_j e^{s_{ij} - \ell_i} v_j` and :math:`\ell_i = \log \sum_j e^{s_{ij}}`. Parts a and b are joined by
:math:`\ell = \log(e^{\ell_a} + e^{\ell_b})` and :math:`o = e^{\ell_a - \ell} o_a + e^{\ell_b - \ell} o_b`. The backward
of a part needs only the joined o and :math:`\ell`.

References:
    Dao et al., 2022, FlashAttention (https://arxiv.org/abs/2205.14135), algorithms 1 and 4;
    Liu et al., 2023, Ring Attention (https://arxiv.org/abs/2310.01889), for the joining.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_aten = torch.ops.aten
_BLOCK = 512


@dataclass(frozen=True)
class Scores:
    """How scores are made.

    Attributes:
        scale: Factor of the products of queries and keys.
        softcap: If set, scores become softcap * tanh(score / softcap).
        dropout: Probability that an attention weight is dropped.
    """

    scale: float
    softcap: float | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Visible:
    """Which of a part's keys a query sees: key j <= i + diagonal, and of these the last ``width``.

    Attributes:
        diagonal: None if every query sees every key.
        width: None for no limit.
    """

    diagonal: int | None = None
    width: int | None = None

    @property
    def is_causal_square(self) -> bool:
        """Whether this is what fused kernels call causal, for as many keys as queries."""
        return self.diagonal == 0 and self.width is None

    def mask(self, num_queries: int, keys: range, device: torch.device) -> Tensor | None:
        """(queries, keys) bool, True where visible; None if all are."""
        if self.diagonal is None:
            return None
        last = torch.arange(num_queries, device=device)[:, None] + self.diagonal
        key = torch.arange(keys.start, keys.stop, device=device)
        visible = key <= last
        return visible if self.width is None else visible & (key > last - self.width)


ALL, CAUSAL = Visible(), Visible(diagonal=0)


def forward(query: Tensor, key: Tensor, value: Tensor, scores: Scores, visible: Visible) -> tuple[Tensor, Tensor]:
    """Attend to one part of the keys.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim); ``heads`` is a multiple of ``kv_heads``, and no key is copied for it.
        value: (batch, kv_heads, keys, value_dim).
        scores: How scores are made.
        visible: Which keys a query sees; each query sees at least one.

    Returns:
        Output (batch, heads, queries, value_dim) of the query's type, and the logarithm of the normaliser
        (batch, heads, queries), float32 or float64.
    """
    kind = _fused_kind(query, value, scores, visible)
    if kind == "cpu":
        mask = _additive_mask(query, key, visible)
        out, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, visible.is_causal_square, attn_mask=mask, scale=scores.scale
        )
        return out, log_sum
    if kind == "cuda":
        out, log_sum, *_ = _aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, visible.is_causal_square, False, scale=scores.scale
        )
        return out, log_sum
    return _blockwise_forward(query, key, value, scores, visible)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    scores: Scores,
    visible: Visible,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part's query, key and value; ``out`` and ``log_sum`` are those of all parts joined."""
    kind = _fused_kind(query, value, scores, visible)
    if kind == "cpu":
        mask = _additive_mask(query, key, visible)
        grads: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(grad_out, query, key, value, out, log_sum, 0.0, visible.is_causal_square),
            attn_mask=mask,
            scale=scores.scale,
        )
        return grads
    if kind == "cuda":
        no_seed = torch.zeros((), dtype=torch.int64, device=query.device)  # read only for dropout
        fused: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_backward(
            *(grad_out, query, key, value, out, log_sum.contiguous(), None, None, query.shape[2], key.shape[2]),
            *(0.0, visible.is_causal_square, no_seed, no_seed),
            scale=scores.scale,
        )
        return fused
    return _blockwise_backward(grad_out, query, key, value, out, log_sum, scores, visible)


def join(out_a: Tensor, log_a: Tensor, out_b: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """The output and logarithm of the normaliser of two parts together."""
    log_sum = torch.logaddexp(log_a, log_b)
    weight_a, weight_b = ((log - log_sum).exp()[..., None] for log in (log_a, log_b))
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), log_sum


def _fused_kind(query: Tensor, value: Tensor, scores: Scores, visible: Visible) -> str | None:
    """The fused kernel that does exactly this, if there is one."""
    if scores.softcap is not None or scores.dropout or query.shape[-1] != value.shape[-1]:
        return None
    if query.device.type == "cpu":
        return "cpu"
    is_plain = visible.diagonal is None or visible.is_causal_square
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    size = query.shape[-1]
    if query.device.type != "cuda" or not is_plain or not is_half or size % 8 or size > 256:
        return None
    has_kernel = torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return "cuda" if has_kernel else None


def _additive_mask(query: Tensor, key: Tensor, visible: Visible) -> Tensor | None:
    """0 where visible and minus infinity elsewhere, (queries, keys)."""
    if visible.is_causal_square:
        return None
    mask = visible.mask(query.shape[2], range(key.shape[2]), query.device)
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, -torch.inf)


# ---- plain torch, block by block of keys: any device, soft-capping, dropout; memory O(queries x block) ------------


def _blockwise_forward(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores, visible: Visible
) -> tuple[Tensor, Tensor]:
    grouped = _grouped(query, key)
    lowest = torch.finfo(grouped.dtype).min
    largest = grouped.new_full((*grouped.shape[:-1], 1), lowest)
    total = torch.zeros_like(largest)
    out = grouped.new_zeros((*grouped.shape[:-1], value.shape[-1]))
    for keys in _blocks(key):
        values = _block_scores(grouped, key, keys, scores, visible, lowest)
        new_largest = torch.maximum(largest, values.amax(-1, keepdim=True))
        # Where a query has seen no key yet, what it sums is shrunk to 0 later.
        weights = values.sub_(new_largest).exp_()
        shrink = (largest - new_largest).exp_()
        total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        kept = _keep_mask(weights, scores.dropout)
        weights = weights if kept is None else weights.mul_(kept)
        out = out.mul_(shrink).add_(_matmul(weights, _slice(value, keys, grouped.dtype)))
        largest = new_largest
    out = out / total
    log_sum = (largest + total.log())[..., 0]
    return out.view(*query.shape[:3], -1).to(query.dtype), log_sum.view(query.shape[:3])


def _blockwise_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    scores: Scores,
    visible: Visible,
) -> tuple[Tensor, Tensor, Tensor]:
    grouped, grad = _grouped(query, key), _grouped(grad_out, key)
    delta = (grad * _grouped(out, key)).sum(-1, keepdim=True)
    log_sum = log_sum.reshape(*grouped.shape[:-1], 1).to(grouped.dtype)
    grad_query = torch.zeros_like(grouped)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    for keys in _blocks(key):
        part = slice(keys.start, keys.stop)
        values = _block_scores(grouped, key, keys, scores, visible, -torch.inf)
        weights = (values - log_sum).exp_()
        kept = _keep_mask(weights, scores.dropout)
        dropped = weights if kept is None else weights * kept
        grad_value[:, :, part] = _sum_over_queries(dropped, grad)
        grad_weights = _matmul(grad, _slice(value, keys, grouped.dtype).transpose(-1, -2))
        grad_weights = grad_weights if kept is None else grad_weights.mul_(kept)
        grad_scores = grad_weights.sub_(delta).mul_(weights)
        if scores.softcap is not None:  # d tanh = 1 - tanh²; where a key is hidden the score is infinite, its weight 0
            slope = 1 - (values.masked_fill(weights == 0, 0.0) / scores.softcap).square_()
            grad_scores.mul_(slope)
        grad_scores.mul_(scores.scale)
        grad_query.add_(_matmul(grad_scores, _slice(key, keys, grouped.dtype)))
        grad_key[:, :, part] = _sum_over_queries(grad_scores, grouped)
    return grad_query.view_as(query).to(query.dtype), grad_key, grad_value


def _grouped(states: Tensor, key: Tensor) -> Tensor:
    """(batch, heads, queries, dim) as (batch, kv_heads, heads / kv_heads, queries, dim); half types in float32."""
    states = states if states.dtype == torch.float64 else states.float()
    return states.reshape(states.shape[0], key.shape[1], -1, *states.shape[2:])


def _blocks(key: Tensor) -> Iterator[range]:
    for begin in range(0, key.shape[2], _BLOCK):
        yield range(begin, min(begin + _BLOCK, key.shape[2]))


def _slice(states: Tensor, keys: range, dtype: torch.dtype) -> Tensor:
    """(batch, kv_heads, 1, block, dim)."""
    return states[:, :, None, keys.start : keys.stop].to(dtype)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """(batch, kv_heads, groups, queries, m) @ (batch, kv_heads, 1, m, n), without repeating the latter."""
    return torch.matmul(a.flatten(2, 3), b[:, :, 0]).view(*a.shape[:-1], b.shape[-1])


def _sum_over_queries(a: Tensor, b: Tensor) -> Tensor:
    """(batch, kv_heads, m, n) of (batch, kv_heads, groups, queries, m) and (.., n)."""
    return torch.matmul(a.flatten(2, 3).transpose(-1, -2), b.flatten(2, 3))


def _block_scores(query: Tensor, key: Tensor, keys: range, scores: Scores, visible: Visible, hidden: float) -> Tensor:
    """(batch, kv_heads, groups, queries, block); ``hidden`` where a query does not see a key."""
    values = _matmul(query, _slice(key, keys, query.dtype).transpose(-1, -2)).mul_(scores.scale)
    if scores.softcap is not None:
        values.div_(scores.softcap).tanh_().mul_(scores.softcap)
    mask = visible.mask(query.shape[3], keys, query.device)
    return values if mask is None else values.masked_fill_(~mask, hidden)


def _keep_mask(weights: Tensor, dropout: float) -> Tensor | None:
    """0 for dropped weights and 1 / (1 - dropout) for kept ones."""
    if not dropout:
        return None
    return torch.empty_like(weights).bernoulli_(1 - dropout).div_(1 - dropout)
