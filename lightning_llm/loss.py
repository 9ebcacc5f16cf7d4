"""The loss of an optimizer step is a sum over label tokens; every mean is taken once, by who knows the count.

Hugging Face's ``labels`` are unshifted: ``labels[:, t]`` is the id of the token *at* position t, and -100 marks a
position that is no target. The prediction of that token stands one position earlier. The shift is made here,
in :func:`shift_labels`, and nowhere else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the weights were not touched by it."""


class TokenLoss(NamedTuple):
    """A summed loss and what it was summed over.

    Attributes:
        total: Negative log-likelihood in nats, summed over the label tokens; shape (), float32 or float64.
        num_tokens: Number of label tokens; shape (), int64. Of other tasks the number of their targets: rows, values.
    """

    total: Tensor
    num_tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """Nats per label token, shape (); 0 with a graph where there is no label token."""
        return self.total / self.num_tokens.clamp(min=1)


def shift_labels(labels: Tensor) -> Tensor:
    """Align unshifted labels with the predictions: position t gets the label of position t + 1.

    Args:
        labels: (batch, seq) int64, Hugging Face's convention.

    Returns:
        (batch, seq) int64; the last position predicts nothing and holds -100.

    Example:
        >>> shift_labels(torch.tensor([[5, 6, -100, 8]]))
        tensor([[   6, -100,    8, -100]])
    """
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label token, -log softmax(logits[b, t])[labels[b, t + 1]].

    Args:
        logits: (batch, seq, vocab), any float type; half types are computed in float32.
        labels: (batch, seq) int64, unshifted, -100 where there is no target.

    Returns:
        (batch, seq) in nats, float32 (float64 for float64 logits), at the position of the *prediction*;
        0 where there is no target.
    """
    targets = shift_labels(labels)
    return F.cross_entropy(
        accumulation_dtype(logits).flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    ).view(targets.shape)


def token_cross_entropy(logits: Tensor, labels: Tensor) -> TokenLoss:
    r"""Cross-entropy summed over the label tokens, :math:`\sum_t -\log p(\mathrm{label}_t)`.

    A batch without a label token has loss 0 and zero gradients, so that every rank runs the same backward.

    Args:
        logits: (batch, seq, vocab), any float type; half types are computed in float32.
        labels: (batch, seq) int64, unshifted, -100 where there is no target.

    Returns:
        The sum in nats and the number of label tokens, both of shape ().

    Example:
        >>> loss = token_cross_entropy(torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]]))
        >>> round(loss.total.item(), 4), loss.num_tokens.item()  # log 4: one target, four equal choices
        (1.3863, 1)
    """
    return class_cross_entropy(logits, shift_labels(labels))


def class_cross_entropy(logits: Tensor, targets: Tensor) -> TokenLoss:
    r"""Cross-entropy summed over targets that stand beside their predictions, :math:`\sum_i -\log p_i(y_i)`.

    Args:
        logits: (..., classes), any float type; half types are computed in float32.
        targets: (...) int64, -100 where there is none.

    Returns:
        The sum in nats and the number of targets, both of shape (); 0 with a graph where there is none.

    Raises:
        ValueError: If there are more or fewer targets than predictions.

    Example:
        >>> loss = class_cross_entropy(torch.zeros(3, 4), torch.tensor([0, -100, 3]))
        >>> round(loss.total.item(), 4), loss.num_tokens.item()
        (2.7726, 2)
    """
    if logits.shape[:-1].numel() != targets.numel():  # one target alone would go with every prediction
        raise ValueError(
            f"Each prediction needs a target beside it, but logits are {tuple(logits.shape)} and labels "
            f"{tuple(targets.shape)}. Either the model has the head of another task, or the labels do not fit the rows."
        )
    targets = targets.flatten()
    total: Tensor = _SummedNLL.apply(logits.flatten(0, -2), targets)  # type: ignore[no-untyped-call]
    return TokenLoss(total, (targets != IGNORE_INDEX).sum())


class _SummedNLL(torch.autograd.Function):
    r"""The sum of :math:`\mathrm{logsumexp}_v\, z_{tv} - z_{t y_t}` over targets, and its gradient softmax - one-hot.

    ``F.cross_entropy`` keeps the log-probabilities and makes two more arrays of (tokens, vocab) in backward. Here the
    only one is the gradient itself; all else is done in slices of rows that stay in a cache, half types in float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (tokens, vocab), targets (tokens,) with -100 for none; the sum has shape ()."""
        has_target = targets != IGNORE_INDEX
        rows = _slices(logits)
        log_sums = torch.cat([accumulation_dtype(logits[part]).logsumexp(-1) for part in rows])
        index = targets.masked_fill(~has_target, 0)
        chosen = logits.gather(-1, index[:, None])[:, 0].to(log_sums.dtype)
        ctx.save_for_backward(logits, index, has_target, log_sums)
        return (log_sums - chosen).masked_fill(~has_target, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None]:
        """Row t: grad_total * (softmax(z_t) - one-hot(y_t)), 0 where there is no target."""
        logits, index, has_target, log_sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # `create_graph`: the gradient is to be differentiated in turn
            one_hot = F.one_hot(index, logits.shape[-1])
            gradient = (accumulation_dtype(logits).softmax(-1) - one_hot) * has_target[:, None] * grad_total
            return gradient.to(logits.dtype), None
        gradient = torch.empty_like(logits)
        in_place = logits.dtype == log_sums.dtype  # half types are rounded once, at the end
        for part in _slices(logits):
            rows = torch.sub(logits[part], log_sums[part, None], out=gradient[part] if in_place else None).exp_()
            rows[torch.arange(len(rows), device=rows.device), index[part]] -= 1.0
            rows.mul_(grad_total).masked_fill_(~has_target[part, None], 0.0)
            if not in_place:
                gradient[part] = rows
        return gradient, None


def _slices(logits: Tensor) -> list[slice]:
    """Slices of rows: small enough for a processor's cache, large enough to fill a GPU."""
    num_values = 1 << (18 if logits.device.type == "cpu" else 26)
    size = max(num_values // max(logits.shape[-1], 1), 1)
    return [slice(begin, begin + size) for begin in range(0, max(len(logits), 1), size)]


def exact_dtype(device: torch.device) -> torch.dtype:
    """The type in which sums over many tokens are kept: float64, but float32 on Apple's devices, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def accumulation_dtype(logits: Tensor) -> Tensor:
    """The same values in float32, or in float64 where they are so already."""
    return logits if logits.dtype == torch.float64 else logits.float()
