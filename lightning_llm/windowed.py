r"""The exact gradient of long sequences in the memory of a window.

A row of L tokens is cut into windows of W. The first pass runs them in order without a graph and keeps only keys and
values. The second runs them last to first, each with a graph of its own: a window's backward takes the gradient that
later windows have left at its keys and values, and adds to that of earlier ones. The result is the gradient of the
uncut sequence, to rounding: activations need O(W) memory, keys, values and their gradients O(L). Time: one more forward
pass, less the last window's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_llm.loss import IGNORE_INDEX, TokenLoss, shift_labels
from lightning_llm.sequence_windows.attention import UnsupportedModelError
from lightning_llm.sequence_windows.head import Head, HeadLoss, WindowLoss
from lightning_llm.sequence_windows.layout import document_starts, even_edges, make_windows, window_edges
from lightning_llm.sequence_windows.nodes import GradientInBackward, GradientInForward, GradientOfShards
from lightning_llm.sequence_windows.passes import Passes, Sequence
from lightning_llm.sequence_windows.requirements import check_inputs, check_model, has_linear_layers
from lightning_llm.sequence_windows.sharded import is_sharded, most_windows, pad_to

__all__ = ["HeadLoss", "UnsupportedModelError", "windowed_loss", "windowed_nll"]


def windowed_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    window: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    keep: int = 1,
    when: Literal["forward", "backward"] = "forward",
    loss_kernel: WindowLoss = "chunked",
    gradient_dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> TokenLoss:
    """Cross-entropy summed over the label tokens, as of the uncut sequence, in the memory of a window.

    Both value and gradient equal ``token_cross_entropy(model(input_ids).logits, labels)`` to rounding.

    Args:
        model: A decoder of transformers, or of peft around one.
        input_ids: (batch, seq) int64.
        labels: (batch, seq) int64, unshifted, -100 where there is no target.
        window: Tokens in a window; the last one may be shorter.
        attention_mask: (batch, seq), 1 for tokens and 0 for padding at a row's ends.
        position_ids: (batch, seq); where they restart, a document of its own begins. Counted from 0 if None.
        keep: Number of windows, from the last, whose graph is kept rather than made again: time for memory.
        when: ``forward`` makes the gradient at once, and backward only scales it. ``backward`` makes it in backward:
            slower by the head's time, right for float16, whose gradients must be scaled beforehand. Models sharded by
            FSDP2 always do.
        loss_kernel: ``chunked``: from hidden states, without logits in memory, for models whose head allows it;
            ``plain``: from logits; or a function of hidden states, as :class:`HeadLoss` describes it.
        gradient_dtype: Type in which gradients of half-precision parameters are summed over the windows; theirs saves
            memory and adds a rounding error with each window.
        offload: Keep keys, values and their gradients in host memory; on the device are those of a layer or two.

    Returns:
        The sum in nats and the number of label tokens, both of shape (). One autograd node: each parameter gets its
        gradient once, as hooks and DistributedDataParallel expect.

    Raises:
        UnsupportedModelError: If the model cannot be cut into windows.
        ValueError: For inputs of a wrong shape, or padding between tokens.
        PackingLeakError: If positions restart between two tokens of an ``attention_mask``.

    Example:
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2))
        >>> ids = torch.randint(0, 32, (1, 10))
        >>> loss = windowed_loss(model, ids, ids, window=4)
        >>> loss.mean.backward()
        >>> loss.num_tokens.item()
        9
    """
    if when not in ("forward", "backward"):
        raise ValueError(f"`when` must be 'forward' or 'backward', but got {when!r}.")
    run = _Run(
        *(model, input_ids, labels, window, attention_mask, position_ids, keep, loss_kernel, gradient_dtype),
        offload=offload,
        per_token=False,
    )
    return TokenLoss(run.loss(in_forward=when == "forward"), run.num_tokens)


def windowed_nll(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    window: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    keep: int = 1,
    loss_kernel: WindowLoss = "chunked",
    gradient_dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> Tensor:
    """Negative log-likelihood of each label token, on which any loss can be built: of preferences, of rewards, ...

    Value and gradient equal ``token_nll(model(input_ids).logits, labels)`` to rounding. Arguments and errors are those
    of :func:`windowed_loss`; the gradient is made in backward, as it depends on what is built on the result.

    Returns:
        (batch, seq) in nats, float32 or float64, at the position of the *prediction*; 0 where there is no target.
    """
    run = _Run(
        *(model, input_ids, labels, window, attention_mask, position_ids, keep, loss_kernel, gradient_dtype),
        offload=offload,
        per_token=True,
    )
    return run.loss(in_forward=False)


class _Run:
    """A call's arguments, checked, and what the autograd node needs of them."""

    def __init__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        labels: Tensor,
        window: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        keep: int,
        loss_kernel: WindowLoss,
        gradient_dtype: torch.dtype,
        *,
        offload: bool,
        per_token: bool,
    ) -> None:
        check_inputs(input_ids, labels, window, keep)
        starts = document_starts(input_ids.shape, attention_mask, position_ids)
        check_model(model, input_ids.shape[1], window, is_packed=starts is not None)
        self.length = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(self.length, device=input_ids.device)[None]
        # Shifted before the cut: a window's last token predicts the next one's first.
        sequence = Sequence(input_ids, shift_labels(labels), position_ids, [])
        self.is_sharded = is_sharded(model)
        edges = window_edges(self.length, window, min_last=2 if has_linear_layers(model) else 1)
        if self.is_sharded:
            edges = self._edges_of_all_ranks(model, sequence, len(edges) - 1)
        sequence.windows = make_windows(edges, starts)
        self.model, self.sequence, self.keep, self.gradient_dtype = model, sequence, keep, gradient_dtype
        self.offload, self.per_token = offload, per_token
        self.num_tokens = (sequence.targets != IGNORE_INDEX).sum()
        self.head = Head(model, loss_kernel, per_token=per_token)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(self, *, in_forward: bool) -> Tensor:
        """The loss, with a node that makes the gradient in forward or in backward, where one is wanted."""
        if not torch.is_grad_enabled() or not self.trained:
            return self.collect(self.passes({}).forward(with_graph=False, with_loss=True))
        if self.is_sharded:
            anchor = torch.zeros((), device=self.sequence.input_ids.device, requires_grad=True)
            loss: Tensor = GradientOfShards.apply(self, anchor)  # type: ignore[no-untyped-call]
        else:
            node: Any = GradientInForward if in_forward else GradientInBackward
            loss = node.apply(self, *self.trained.values())
        return loss

    def aliases(self) -> dict[str, Tensor]:
        """The parameters' own memory as other leaves: what windows add to their gradients starts no hook."""
        aliases = {name: p.detach().requires_grad_() for name, p in self.trained.items()}
        for alias in aliases.values():
            if alias.dtype.itemsize < 4:
                alias.grad_dtype = self.gradient_dtype
        return aliases

    def passes(self, aliases: dict[str, Tensor]) -> Passes:
        """Passes through the model with these in the parameters' place."""
        return Passes(self.model, self.sequence, self.head, keep=self.keep, parameters=aliases, offload=self.offload)

    def collect(self, losses: list[Tensor]) -> Tensor:
        """The windows' losses as one."""
        return torch.cat(losses, 1)[:, : self.length] if self.per_token else torch.stack(losses).sum()

    def _edges_of_all_ranks(self, model: nn.Module, sequence: Sequence, num_windows: int) -> list[int]:
        """As many windows as the rank with the longest row has, if need be of padding, which changes nothing."""
        num_windows = most_windows(model, num_windows)
        sequence.input_ids = pad_to(sequence.input_ids, num_windows, 0)
        sequence.targets = pad_to(sequence.targets, num_windows, IGNORE_INDEX)
        sequence.position_ids = pad_to(sequence.position_ids, num_windows, 0)
        return even_edges(sequence.input_ids.shape[1], num_windows)
