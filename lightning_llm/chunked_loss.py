r"""Cross-entropy of hidden states and a head's weight, without logits in memory.

The logits :math:`z = \mathrm{softcap}(\mathrm{scale} \cdot (h W^\top + b))` of a vocabulary of 128k are by far the
largest tensor of a training step. Here they come one tile at a time, some label tokens by some entries of the
vocabulary, and go before the next (:mod:`lightning_llm.logit_tiles`). Tokens without a target cost nothing. All sums
are kept in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_llm.logit_tiles import LogitMap, LossOptions, Targets, Tiles, held_dtype, held_like
from lightning_llm.loss import IGNORE_INDEX, TokenLoss, shift_labels


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    reduction: Literal["sum"] = "sum",
) -> TokenLoss:
    r"""Cross-entropy summed over the label tokens, like :func:`~lightning_llm.loss.token_cross_entropy`.

    .. math:: \sum_t \mathrm{lse}_t - (1 - \varepsilon) z_{t y_t} - \frac{\varepsilon}{V} \sum_v z_{tv}
              + \zeta \, \mathrm{lse}_t^2, \qquad \mathrm{lse}_t = \log \sum_v e^{z_{tv}}

    The gradient is made in forward, where one is needed, and multiplied by the upstream gradient in backward: memory is
    that of inputs and gradients and a few tiles, for half types also the float32 sum of the gradient of ``hidden``.

    Args:
        hidden: (batch, seq, dim), any float type; under autocast, products are taken in autocast's type on a GPU.
        weight: (vocab, dim), of the type of ``hidden`` outside of autocast.
        labels: (batch, seq) int64, unshifted, -100 where there is no target.
        bias: (vocab,) or None.
        label_smoothing: :math:`\varepsilon`, as in ``F.cross_entropy``.
        z_loss: :math:`\zeta`, which keeps the normaliser near 1 (PaLM: 1e-4).
        softcap: Bound of the logits, ``softcap * tanh(z / softcap)`` (Gemma 2: 30); None for none.
        logit_scale: Factor of the logits, before the bound.
        chunk_size: Label tokens, and entries of the vocabulary, in a tile; chosen by device and ``dim`` if None.
        reduction: ``sum``. The mean is the result's ``mean``; each token's loss is :func:`chunked_token_nll`.

    Returns:
        The sum in nats and the number of label tokens; without a label token, 0 with zero gradients.

    Raises:
        ValueError: For shapes, types or options that do not fit, and labels outside of the vocabulary.
        RuntimeError: In backward, with ``create_graph=True`` or a second time: the gradient is given away once.

    Example:
        >>> loss = chunked_cross_entropy(torch.zeros(1, 3, 2), torch.zeros(4, 2), torch.tensor([[0, 1, -100]]))
        >>> round(loss.total.item(), 4), loss.num_tokens.item()  # log 4: one target, four equal choices
        (1.3863, 1)

    References:
        Wijmans et al., Cut your losses in large-vocabulary language models, 2024. Chowdhery et al., PaLM, section 5.
    """
    if reduction != "sum":
        raise ValueError(
            f"`reduction` must be 'sum', but got {reduction!r}. The mean over label tokens is "
            f"chunked_cross_entropy(...).mean; chunked_token_nll gives the loss of each token."
        )
    options = LossOptions(label_smoothing, z_loss, LogitMap(softcap, logit_scale), chunk_size)
    targets = _check(hidden, weight, bias, labels, options)
    total: Tensor = _SummedLoss.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), weight, bias, targets, options, torch.is_grad_enabled()
    )
    return TokenLoss(total, torch.full_like(total, len(targets.rows), dtype=torch.int64))


def chunked_token_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """The loss of each label token, on which any loss can be built; the arguments are :func:`chunked_cross_entropy`'s.

    Nothing of the size of a gradient is made before backward, which computes the logits again. Only that of ``hidden``
    is made in forward, and scaled token by token in backward, where head and bias are frozen.

    Returns:
        (batch, seq) in nats, float32 (float64 for float64), at the position of the *prediction*; 0 where there is no
        target.

    Raises:
        ValueError: As :func:`chunked_cross_entropy`.
        RuntimeError: In backward, with ``create_graph=True``.
    """
    options = LossOptions(label_smoothing, z_loss, LogitMap(softcap, logit_scale), chunk_size)
    targets = _check(hidden, weight, bias, labels, options)
    losses: Tensor = _TokenLosses.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), weight, bias, targets, options, labels.shape, torch.is_grad_enabled()
    )
    return losses


# ---- autograd --------------------------------------------------------------------------------------------------------


class _SummedLoss(torch.autograd.Function):
    """All passes in forward; backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        options: LossOptions,
        with_grad: bool,
    ) -> Tensor:
        """Hidden states (tokens, dim), weight (vocab, dim), bias (vocab,); the sum has shape ()."""
        tiles = Tiles(hidden, weight, bias, targets, options)
        needed = tuple(with_grad and needs for needs in ctx.needs_input_grad[:3])
        has_room = needed[1] and weight.dtype == tiles.dtype
        room = held_like(weight) if has_room else None
        gradients: tuple[Tensor | None, ...] = (None, None, None)
        with torch.autocast(hidden.device.type, enabled=False):
            if _is_one_pass_enough(needed, options):
                losses, of_hidden = tiles.in_one_pass()
                gradients = (of_hidden, None, None)
            else:
                losses, log_sums = tiles.losses(room)
                if any(needed):
                    gradients = tiles.gradients(needed, log_sums, room=room)
        if gradients[0] is not None:
            gradients = (gradients[0].to(held_dtype(hidden)), *gradients[1:])
        ctx.gradients = gradients
        ctx.dtypes = [None if of is None else of.dtype for of in (hidden, weight, bias)]
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that forward made, times the upstream one, which is a number."""
        _refuse_create_graph()
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradient of chunked_cross_entropy was made in forward and has been given away: a second backward "
                "through it needs another forward, chunked_token_nll(...).sum(), token_cross_entropy(logits, labels) "
                "or LLMModule(loss_kernel='plain')."
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(grad_total).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


class _TokenLosses(torch.autograd.Function):
    """The first pass in forward, the second in backward; if one is enough, backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        options: LossOptions,
        shape: torch.Size,
        with_grad: bool,
    ) -> Tensor:
        """As above; the losses have the labels' shape."""
        tiles = Tiles(hidden, weight, bias, targets, options)
        needed = tuple(with_grad and needs for needs in ctx.needs_input_grad[:3])
        ctx.is_one_pass = _is_one_pass_enough(needed, options)
        with torch.autocast(hidden.device.type, enabled=False):
            losses, known = tiles.in_one_pass() if ctx.is_one_pass else tiles.losses()
        ctx.save_for_backward(hidden, weight, bias, *targets, known)  # gradient of hidden, or log-sum-exps
        ctx.options, ctx.operand_dtype = options, tiles.operand_dtype
        placed = losses.new_zeros(shape)  # no view: FSDP2 warns of a module that returns one
        placed.view(-1).index_copy_(0, targets.rows, losses)
        return placed

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        """The logits once more, tile by tile, and each token's gradient times its upstream one."""
        _refuse_create_graph()
        hidden, weight, bias, index, labels, known = ctx.saved_tensors
        factor = grad_losses.flatten()[index]
        if ctx.is_one_pass:
            by_row = factor.new_zeros(len(known)).index_copy_(0, index, factor)
            return (known * by_row[:, None]).to(hidden.dtype), *[None] * 6
        tiles = Tiles(hidden, weight, bias, Targets(index, labels), ctx.options)
        tiles.operand_dtype = ctx.operand_dtype  # that of forward, which autocast may have chosen
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = tiles.gradients(ctx.needs_input_grad[:3], known, factor)
        dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        cast = [
            None if gradient is None else gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)
        ]
        return *cast, *[None] * 4


def _is_one_pass_enough(needed: tuple[bool, ...], options: LossOptions) -> bool:
    """Smoothed labels pull at every entry of the vocabulary, by another sum, which would take a product of its own."""
    return needed == (True, False, False) and not options.label_smoothing


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The chunked loss has no second derivative (`create_graph=True`). Use "
            "token_cross_entropy(logits, labels), or LLMModule(loss_kernel='plain')."
        )


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions) -> Targets:
    """Refuse what does not fit; find the targets, for which the host waits once."""
    if hasattr(weight, "full_tensor"):
        raise ValueError("`weight` is sharded (a DTensor). Compute the loss in the model's forward: `call_head` does.")
    vocab, dim = weight.shape if weight.ndim == 2 else (-1, -1)
    if labels.ndim != 2 or hidden.shape != (*labels.shape, dim) or (bias is not None and bias.shape != (vocab,)):
        raise ValueError(
            f"Expected `hidden` (batch, seq, dim), `weight` (vocab, dim), `labels` (batch, seq) and `bias` (vocab,) or "
            f"None, but got shapes {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(labels.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}."
        )
    is_one_type = hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type)
    if not is_one_type or not hidden.is_floating_point():
        raise ValueError(
            f"Expected `hidden` and `weight` of one float type, but got {hidden.dtype} and {weight.dtype}. "
            f"Convert one, or run under torch.autocast."
        )
    for name, value, allowed, fits in (
        ("label_smoothing", options.label_smoothing, "in [0, 1]", 0.0 <= options.label_smoothing <= 1.0),
        ("z_loss", options.z_loss, "0 or more", options.z_loss >= 0.0),
        ("softcap", options.logits.softcap, "positive or None", (options.logits.softcap or 1.0) > 0.0),
        ("chunk_size", options.chunk_size, "positive or None", options.chunk_size is None or options.chunk_size > 0),
    ):
        if not fits:
            raise ValueError(f"`{name}` must be {allowed}, but got {value}.")
    targets = shift_labels(labels).flatten()
    has_target = targets != IGNORE_INDEX
    known = targets.masked_fill(~has_target, 0)
    count, low, high = torch.stack([has_target.sum(), *known.aminmax()]).tolist() if len(known) else (0, 0, 0)
    if low < 0 or high >= vocab:
        raise ValueError(
            f"Labels must be in [0, {vocab}), the rows of `weight`, or {IGNORE_INDEX} for none, but there is "
            f"{low if low < 0 else high}. Does the tokenizer have more tokens than the model's head?"
        )
    index = torch.nonzero_static(has_target, size=count)[:, 0]
    return Targets(index, targets[index])
