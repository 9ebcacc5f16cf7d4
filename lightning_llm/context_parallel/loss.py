r"""The loss of rows whose tokens are spread over ranks, with the gradient of the whole rows.

Each of n ranks holds 1 / n of a row's tokens, and so of the activations. Attention gathers keys and values one layer at
a time; all else a decoder does token by token. Every rank gets the loss of the whole rows, and goes backward from it to
n times the gradient of its own tokens' terms: the mean over the ranks, which DDP and FSDP take, is the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_llm.context_parallel.attention import Place, attending_across_ranks
from lightning_llm.context_parallel.collectives import JoinOverRanks, SumOverRanks, check_same_rows, gather
from lightning_llm.context_parallel.layout import Share
from lightning_llm.context_parallel.requirements import check_group, check_model
from lightning_llm.loss import IGNORE_INDEX, TokenLoss, shift_labels
from lightning_llm.sequence_windows.head import Head, WindowLoss, base_model
from lightning_llm.sequence_windows.layout import document_starts
from lightning_llm.sequence_windows.requirements import check_rows


def context_parallel_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    loss_kernel: WindowLoss = "chunked",
) -> TokenLoss:
    """Cross-entropy summed over the label tokens of rows that the ranks of a group share.

    The value equals ``token_cross_entropy(model(input_ids).logits, labels)`` on every rank, to rounding. Its gradient
    is the *mean over the ranks* of ``group`` of what backward leaves in ``.grad``, as for ranks with rows of their own:
    DDP and FSDP, over all ranks, take it. In a loop without them, average gradients over the group before the step.

    Args:
        model: A decoder of transformers, or of peft around one, the same on every rank.
        input_ids: (batch, seq) int64: the whole rows, the same on every rank of the group.
        labels: (batch, seq) int64, unshifted, -100 where there is no target.
        group: The ranks that share the rows; all of them call this.
        attention_mask: (batch, seq), 1 for tokens and 0 for padding at a row's ends.
        position_ids: (batch, seq); where they restart, a document of its own begins. Counted from 0 if None.
        loss_kernel: ``chunked``: from hidden states, without logits in memory, for models whose head allows it;
            ``plain``: from logits; or a function of hidden states, as
            :class:`~lightning_llm.sequence_windows.head.HeadLoss` describes it.

    Returns:
        The sum in nats and the number of label tokens of the whole rows, both of shape ().

    Raises:
        UnsupportedModelError: If the model cannot be spread over ranks along the sequence.
        ValueError: For inputs of a wrong shape, padding between tokens, or rows that are not the same on every rank.
        TypeError: If ``group`` is no process group.
        PackingLeakError: If positions restart between two tokens of an ``attention_mask``.
    """
    call = _Call(model, input_ids, labels, group, attention_mask, position_ids)
    term = call.loss(Head(model, loss_kernel, per_token=False))
    total: Tensor = SumOverRanks.apply(term, call.share, group)  # type: ignore[no-untyped-call]
    return TokenLoss(total, (call.targets != IGNORE_INDEX).sum())


def context_parallel_nll(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    loss_kernel: WindowLoss = "chunked",
) -> Tensor:
    """Negative log-likelihood of each label token, on every rank; arguments and errors as in the summed loss.

    What is built on it must be the same on every rank; the gradient is then the mean over the ranks, as that of
    :func:`context_parallel_loss`.

    Returns:
        (batch, seq) in nats, float32 or float64, at the position of the *prediction*; 0 where there is no target.
    """
    call = _Call(model, input_ids, labels, group, attention_mask, position_ids)
    part = call.loss(Head(model, loss_kernel, per_token=True))
    nll: Tensor = JoinOverRanks.apply(part, call.share, group)  # type: ignore[no-untyped-call]
    return nll


@torch.no_grad()
def context_parallel_logits(
    model: nn.Module, input_ids: Tensor, *, group: dist.ProcessGroup, position_ids: Tensor | None = None
) -> Tensor:
    """Logits of the whole rows, (batch, seq, vocab), on every rank, without a gradient.

    Arguments and errors are those of :func:`context_parallel_loss`.
    """
    call = _Call(model, input_ids, input_ids, group, None, position_ids)
    with call.running():
        logits: Tensor = model(**call.inputs).logits
    return gather(logits, call.share, group, dim=1)[:, : call.share.length]


class _Call:
    """A call's arguments, checked, and this rank's share of them."""

    def __init__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> None:
        check_group(group)
        # First: what is checked afterwards is then found on every rank, and none waits for one that has stopped.
        check_same_rows(group, input_ids, labels, attention_mask, position_ids)
        check_rows(input_ids, labels)
        length = input_ids.shape[1]
        starts = document_starts(input_ids.shape, attention_mask, position_ids)
        sliding_windows = check_model(model, length)
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        self.model, self.input_ids = model, input_ids
        self.share = Share(dist.get_rank(group), dist.get_world_size(group), length)
        self.targets = shift_labels(labels)  # before the cut: a chunk's last token predicts the next one's first
        self.place = Place(self.share, group, self.share.windows(starts), sliding_windows)
        tokens = self.share.take(input_ids, fill=0)
        self.inputs: dict[str, Any] = {
            "input_ids": tokens,
            "position_ids": self.share.take(position_ids, fill=0),
            # With a mask, transformers does not take the place between this rank's two chunks for a document's border.
            "attention_mask": torch.ones_like(tokens),
            "use_cache": False,
            "context_parallel": self.place,
        }

    def loss(self, head: Head) -> Tensor:
        """Of this rank's tokens: their sum, or each of them."""
        head.measure(self.model, self.input_ids)
        with self.running():
            return head.loss(self.model, self.inputs, self.share.take(self.targets, fill=IGNORE_INDEX))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model attends across ranks; afterwards, every layer must have done so."""
        with attending_across_ranks(self.model, base_model(self.model).config.get_text_config(decoder=True)):
            yield
        self.place.check_used()
