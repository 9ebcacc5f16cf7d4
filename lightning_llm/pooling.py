"""One vector for a document of several windows: means, maxima, and a learned weighting."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pooling = Literal["mean", "token_mean", "max", "first"]


def pool_windows(
    values: Tensor,
    document_ids: Tensor,
    num_documents: int,
    how: Pooling = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    r"""Join the windows of each document into one vector, :math:`\sum_w a_w v_w / \sum_w a_w` for the means.

    A document's result depends on its own windows alone, so losses and gradients do not depend on which documents
    share a micro-batch. Sums of bfloat16 and float16 are taken in float32.

    Args:
        values: (num_windows, hidden), one vector a window; for "token_mean" also (num_windows, seq, hidden).
        document_ids: (num_windows,) ascending int64, the windows of a document stand together.
        num_documents: Documents in the batch.
        how: "mean" over windows; "token_mean", weighted; "max", each feature by itself; "first" window.
        weights: ``values.shape[:-1]``, for "token_mean". A batch's ``new_token_mask`` counts each token of a
            document once; for values of whole windows, it is ``new_token_mask.sum(1)``.

    Returns:
        (num_documents, hidden), NaN for a document without a window or with weights that sum to 0.

    Raises:
        ValueError: If weights are missing, superfluous or of a wrong shape; or if single tokens are to be pooled
            without weights, where padding would count.

    Example:
        >>> values = torch.tensor([[1.0], [5.0], [4.0]])
        >>> pool_windows(values, torch.tensor([0, 0, 1]), num_documents=2).tolist()
        [[3.0], [4.0]]
        >>> weights = torch.tensor([3.0, 1.0, 2.0])
        >>> pool_windows(values, torch.tensor([0, 0, 1]), 2, "token_mean", weights).tolist()
        [[2.0], [4.0]]
    """
    _check_pooling(values, document_ids, how, weights)
    dtype = values.dtype
    values = values.to(torch.promote_types(dtype, torch.float32))
    if values.ndim == 3:  # each token is a window of its own
        document_ids = document_ids.repeat_interleave(values.shape[1])
        values = values.flatten(0, 1)
    hidden = values.shape[-1]
    if how == "max":
        index = document_ids[:, None].expand_as(values)
        empty = values.new_full((num_documents, hidden), torch.nan)
        return empty.scatter_reduce(0, index, values, "amax", include_self=False).to(dtype)
    if weights is None:
        weights = values.new_ones(len(values))
    if how == "first":  # a document's first window follows another document's
        before = torch.cat([document_ids.new_full((1,), -1), document_ids[:-1]])
        weights = (document_ids != before).to(values.dtype)
    weights = weights.flatten().to(values.dtype)
    weighted = torch.where(weights[:, None] == 0, 0.0, values * weights[:, None])  # 0 times inf is no NaN
    total = values.new_zeros(num_documents, hidden).index_add(0, document_ids, weighted)
    mass = values.new_zeros(num_documents).index_add(0, document_ids, weights)
    return (total / mass[:, None]).to(dtype)


class WindowAttention(nn.Module):
    r"""A weighted mean of each document's windows, whose weights are learned.

    A window's weight is the softmax, over the windows of its document, of :math:`u^\top \tanh(W v_w + b)`. With
    :math:`u = 0`, as it begins, that is their mean.

    Args:
        hidden: Entries of a window's vector.
        size: Of what is inside the tanh.

    References:
        Yang et al., Hierarchical Attention Networks for Document Classification, 2016, equations 8 to 10; Ilse, Tomczak
        and Welling, Attention-based Deep Multiple Instance Learning, arXiv 1802.04712, equation 8.

    Example:
        >>> pool = WindowAttention(hidden=2)
        >>> pool(torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([0, 0, 1]), 2).tolist()
        [[2.0, 2.0], [5.0, 6.0]]
    """

    def __init__(self, hidden: int, size: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, hidden))
        self.bias = nn.Parameter(torch.zeros(size))
        self.score = nn.Parameter(torch.zeros(size))
        if not self.weight.is_meta:
            nn.init.xavier_uniform_(self.weight)

    def forward(self, values: Tensor, document_ids: Tensor, num_documents: int) -> Tensor:
        """Pool (num_windows, hidden) to (num_documents, hidden), as :func:`pool_windows` does."""
        inside = torch.tanh(F.linear(values, self.weight.to(values.dtype), self.bias.to(values.dtype)))
        scores = (inside.to(torch.promote_types(inside.dtype, torch.float32)) * self.score).sum(-1)
        highest = scores.new_full((num_documents,), -torch.inf)
        highest = highest.scatter_reduce(0, document_ids, scores.detach(), "amax")  # of each document: exp stays finite
        weights = (scores - highest[document_ids]).exp()
        return pool_windows(values, document_ids, num_documents, "token_mean", weights)


def _check_pooling(values: Tensor, document_ids: Tensor, how: str, weights: Tensor | None) -> None:
    if how not in ("mean", "token_mean", "max", "first"):
        raise ValueError(f"`how` must be 'mean', 'token_mean', 'max' or 'first', but got {how!r}.")
    if values.ndim != 2 and not (values.ndim == 3 and how == "token_mean"):
        raise ValueError(
            "Expected `values` (num_windows, hidden), or (num_windows, seq, hidden) with how='token_mean', but got "
            f"{tuple(values.shape)} and how={how!r}."
        )
    if len(values) != len(document_ids):
        raise ValueError(f"Expected a document id for each of {len(values)} windows, but got {len(document_ids)} ids.")
    if (how == "token_mean") != (weights is not None) or (weights is not None and weights.shape != values.shape[:-1]):
        got = None if weights is None else tuple(weights.shape)
        raise ValueError(
            f"Expected `weights` of shape {tuple(values.shape[:-1])} for how='token_mean' and none otherwise, but got "
            f"weights of {got} and how={how!r}."
        )
