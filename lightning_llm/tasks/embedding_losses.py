"""Losses of embeddings: a text's partner among all others, similarities that are given, triplets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_llm.loss import TokenLoss, class_cross_entropy


def contrastive_scores(anchor: Tensor, candidates: Sequence[Tensor], scale: float) -> Tensor:
    """Cosines of each anchor (rows, dim) with all candidates, each (number, dim), times a scale: (rows, all)."""
    return scale * F.normalize(anchor, dim=-1) @ F.normalize(torch.cat(list(candidates)), dim=-1).T


def contrastive_loss(
    anchor: Tensor,
    positive: Tensor,
    negatives: Sequence[Tensor] = (),
    *,
    scale: float = 20.0,
    symmetric: bool = False,
    across_ranks: bool = False,
) -> TokenLoss:
    r"""InfoNCE with in-batch negatives: cross-entropy of each anchor's own positive among all candidates of the batch.

    .. math:: L_i = -\log \frac{e^{s \cos(a_i, p_i)}}{\sum_j e^{s \cos(a_i, p_j)} + \sum_j e^{s \cos(a_i, n_j)}}

    It depends on the batch as a whole: cut into parts, each would see its own negatives only.

    Args:
        anchor: (rows, dim).
        positive: (rows, dim), the anchor's partner in each row.
        negatives: Further candidates, (rows, dim) each.
        scale: s, the inverse of the temperature.
        symmetric: Mean of this and of the loss of each positive's own anchor among all anchors.
        across_ranks: Candidates are those of all ranks, which take part with one batch each.

    Returns:
        The sum over anchors in nats, and their number.

    Example:
        >>> eye = torch.eye(2)
        >>> round(contrastive_loss(eye, eye, scale=1.0).mean.item(), 4)  # log(1 + 1 / e)
        0.3133

    References:
        van den Oord et al., Representation learning with contrastive predictive coding, 2018. Henderson et al.,
        Efficient natural language response suggestion for smart reply, 2017.
    """
    rows, first = len(anchor), 0
    anchors, candidates = anchor, [positive, *negatives]
    if across_ranks:
        counts = rows_of_ranks(anchor)
        first = sum(counts[: dist.get_rank()])
        candidates = [gather_rows(values, counts) for values in candidates]
        anchors = gather_rows(anchor, counts) if symmetric else anchor
    own = torch.arange(first, first + rows, device=anchor.device)
    loss = class_cross_entropy(contrastive_scores(anchor, candidates, scale), own)
    if not symmetric:
        return loss
    back = class_cross_entropy(contrastive_scores(positive, [anchors], scale), own)
    return TokenLoss((loss.total + back.total) / 2, loss.num_tokens)


def cosine_loss(anchor: Tensor, positive: Tensor, similarity: Tensor) -> TokenLoss:
    """Squared difference of the pairs' cosines and given similarities (rows,), summed; and their number."""
    difference = F.cosine_similarity(anchor, positive) - similarity.to(anchor)
    return TokenLoss(difference.square().sum(), similarity.new_full((), len(similarity), dtype=torch.int64))


def triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float) -> TokenLoss:
    """How far the negative's cosine is not below the positive's by a margin, summed over rows; and their number."""
    difference = F.cosine_similarity(anchor, negative) - F.cosine_similarity(anchor, positive)
    return TokenLoss(torch.relu(difference + margin).sum(), torch.tensor(len(anchor), device=anchor.device))


def rows_of_ranks(rows: Tensor) -> list[int]:
    """How many rows each rank has."""
    mine = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, mine)
    return torch.cat(counts).tolist()


def gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all ranks, in their order; the gradient of each is summed over all ranks' losses.

    Args:
        rows: (own count, dim).
        counts: Rows of each rank.
    """
    gathered: Tensor = _GatherRows.apply(rows, list(counts))  # type: ignore[no-untyped-call]
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        """Gather, filled up to the largest count."""
        ctx.counts = counts
        padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows))).contiguous()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Add up, and take this rank's rows."""
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        begin = sum(ctx.counts[: dist.get_rank()])
        return total[begin : begin + ctx.counts[dist.get_rank()]], None
