"""What ranks that share a row tell each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_llm.context_parallel.layout import Share

_MULTIPLIER = 6364136223846793005  # Knuth's, for linear congruential generators modulo 2^64


def gather(part: Tensor, share: Share, group: dist.ProcessGroup, dim: int) -> Tensor:
    """All ranks' parts in the order of the sequence: ``padded_length`` in ``dim``; without a gradient."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(share.size)]
    dist.all_gather(parts, part, group=group)
    return share.join(parts, dim)


def sum_to_owners(whole: Tensor, share: Share, group: dist.ProcessGroup, dim: int) -> Tensor:
    """The sum over the ranks of what each holds for the whole sequence; each rank gets its own part of it."""
    parts = [part.contiguous() for part in share.split(whole, dim)]
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts, group=group)
    return own


class SumOverRanks(torch.autograd.Function):
    """The sum of a scalar over the ranks, on each of them.

    Each rank is expected to go backward from the same loss; n times the gradient of its own term is such that the mean
    over the ranks, as DDP and FSDP take it, is the gradient of the sum.
    """

    @staticmethod
    def forward(ctx: Any, term: Tensor, share: Share, group: dist.ProcessGroup) -> Tensor:
        """Add up."""
        ctx.size = share.size
        total = term.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Of each rank's own term."""
        return grad * ctx.size, None, None


class JoinOverRanks(torch.autograd.Function):
    """A value for each token, (batch, 2 chunk) on each rank, as (batch, seq) on all; gradients as in the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, share: Share, group: dist.ProcessGroup) -> Tensor:
        """Put together, without what the rows are filled up with."""
        ctx.share = share
        return gather(part, share, group, dim=1)[:, : share.length]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Of each rank's own tokens."""
        return ctx.share.take(grad, fill=0) * ctx.share.size, None, None


def check_same_rows(group: dist.ProcessGroup, *rows: Tensor | None) -> None:
    """Make sure that every rank was given the same rows, and wants a gradient or does not, as all do.

    Raises:
        ValueError: On every rank, if not: ranks with rows of other lengths would wait for each other for ever.
    """
    device = next(tensor.device for tensor in rows if tensor is not None)
    values = [int(torch.is_grad_enabled())]
    for number, tensor in enumerate(rows):
        values += [number, *tensor.shape] if tensor is not None else [-1]
    sums = [_fingerprint(tensor) for tensor in rows if tensor is not None]
    mine = torch.stack([_fingerprint(torch.tensor(values, device=device)), torch.stack(sums).sum()])
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, mine, group=group)
    different = (torch.stack(ranks) != ranks[0]).any(1).nonzero().flatten().tolist()
    if different:
        raise ValueError(
            f"All ranks of a context-parallel group must be given the same rows, labels, masks and positions, and all "
            f"or none a gradient, but those of its rank {different[0]} are not those of its rank 0. Let the sampler "
            f"count data-parallel groups, not ranks: `num_replicas` is the number of groups."
        )


def _fingerprint(values: Tensor) -> Tensor:
    """An int64 that depends on values and on their order; overflow is meant."""
    values = values.flatten().long()
    place = torch.arange(1, len(values) + 1, device=values.device)
    mixed = (values + 1) * (place * _MULTIPLIER + 1442695040888963407)
    return (mixed ^ (mixed >> 29)).sum()
