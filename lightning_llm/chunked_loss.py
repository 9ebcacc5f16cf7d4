r"""Cross-entropy of hidden states and a head's weight, without logits in memory.

The logits :math:`z = \mathrm{softcap}(\mathrm{scale} \cdot (h W^\top + b))` of a vocabulary of 128k are by far the
largest tensor of a training step. Here they come one tile at a time, some label tokens by some entries of the
vocabulary, in two passes: the first sums the exponentials of each token, the second makes each tile's gradient and
multiplies it on at once. One pass is enough for a frozen head: what a token's hidden state gets is linear in its
exponentials, so it is summed beside them and divided at the end. Tokens without a target cost nothing. All sums are
kept in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_llm.loss import IGNORE_INDEX, TokenLoss, shift_labels


class LogitMap(NamedTuple):
    """What a model does to the output of its head: ``softcap * tanh(scale * x / softcap)``.

    Attributes:
        softcap: Bound of the logits' absolute value; None for no bound.
        scale: Factor of the head's output.
    """

    softcap: float | None = None
    scale: float = 1.0


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


# ---- tiles -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossOptions:
    """What a loss may add to cross-entropy; the fields are :func:`chunked_cross_entropy`'s arguments."""

    label_smoothing: float
    z_loss: float
    logits: LogitMap
    chunk_size: int | None


class _Targets(NamedTuple):
    """The rows that have a target, ascending, and their targets; each (tokens,)."""

    rows: Tensor
    labels: Tensor


class _Tiles:
    """The logits of the label tokens, tile by tile; see :func:`chunked_cross_entropy` for what is computed."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: _Targets, options: LossOptions
    ) -> None:
        """Hidden (rows, dim), weight (vocab, dim)."""
        self.hidden, self.weight, self.bias, self.options = hidden, weight, bias, options
        self.index, self.labels = targets
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.operand_dtype = _operand_dtype(hidden, self.dtype)
        side = options.chunk_size or _tile_side(weight)
        self.blocks = [slice(i, min(i + side, len(weight))) for i in range(0, len(weight), side)]
        self.chunks = [slice(i, min(i + side, len(self.index))) for i in range(0, len(self.index), side)]

    def losses(self, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """First pass: loss and log-sum-exp, each (tokens,). The logits that find ``room`` (vocab, dim) stay there."""
        log_sums = self._per_token(-torch.inf)
        chosen, sums = self._per_token(0.0), self._per_token(0.0)
        for block, columns in self._weights():
            for chunk in self.chunks:
                logits = self._logits(self._rows(chunk), columns, block, out=_room(room, chunk, block))
                log_sums[chunk] = torch.logaddexp(log_sums[chunk], logits.logsumexp(-1))
                chosen[chunk] += self._chosen(logits, chunk, block)
                if self.options.label_smoothing:
                    sums[chunk] += logits.sum(-1)
        smoothing = self.options.label_smoothing
        losses = log_sums - (1.0 - smoothing) * chosen
        if smoothing:
            losses -= smoothing / len(self.weight) * sums
        return self._with_z_loss(losses, log_sums), log_sums

    def gradients(
        self,
        needed: Sequence[bool],
        log_sums: Tensor,
        factor: Tensor | None = None,
        room: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Second pass: gradients of hidden, weight and bias, each token's times its ``factor`` (tokens,)."""
        of_hidden = torch.zeros_like(self.hidden, dtype=self.dtype) if needed[0] else None
        of_weight = (_held_like(self.weight) if room is None else room) if needed[1] else None
        of_bias = _held_like(self.bias) if needed[2] and self.bias is not None else None
        for block, columns in self._weights():
            block_of_weight = columns.new_zeros(columns.shape, dtype=self.dtype) if of_weight is not None else None
            block_of_bias = columns.new_zeros(len(columns), dtype=self.dtype) if of_bias is not None else None
            for chunk in self.chunks:
                rows = self._rows(chunk)
                logits = _room(room, chunk, block)
                if logits is None:
                    logits = self._logits(rows, columns, block)
                gradient = self._logit_gradient(logits, chunk, block, log_sums, factor)
                if block_of_bias is not None:
                    block_of_bias += gradient.sum(0)
                gradient = gradient.to(self.operand_dtype)
                if of_hidden is not None:  # the label tokens stand together at the front, until the end
                    _add_product(of_hidden[chunk], gradient, columns)
                if block_of_weight is not None:
                    _add_product(block_of_weight, gradient.T, rows)
            if of_weight is not None and block_of_weight is not None:
                of_weight[block] = block_of_weight
            if of_bias is not None and block_of_bias is not None:
                of_bias[block] = block_of_bias
        return None if of_hidden is None else self._spread(of_hidden), of_weight, of_bias

    def in_one_pass(self) -> tuple[Tensor, Tensor]:
        r"""Losses (tokens,) and the gradient of hidden; of a frozen head, without label smoothing.

        .. math:: \frac{\partial L_t}{\partial h_t} = s \Big( \frac{1 + 2 \zeta \, \mathrm{lse}_t}{S_t}
                  \sum_v e^{z_{tv} - m_t} c_{tv} W_v - c_{t y_t} W_{y_t} \Big), \qquad S_t = \sum_v e^{z_{tv} - m_t}

        with the scale s and the slope c of the bound; both sums are scaled down when the largest logit m grows.
        """
        top = self._per_token(torch.finfo(self.dtype).min)  # finite, so that a tile of -inf gives no NaN
        sums, chosen = self._per_token(0.0), self._per_token(0.0)
        of_hidden = torch.zeros_like(self.hidden, dtype=self.dtype)  # label tokens in front, as in `gradients`
        for block, columns in self._weights():
            for chunk in self.chunks:
                logits = self._logits(self._rows(chunk), columns, block)
                chosen[chunk] += self._chosen(logits, chunk, block)
                new_top = torch.maximum(top[chunk], logits.amax(-1))
                shrink = (top[chunk] - new_top).exp_()
                top[chunk] = new_top
                slope = self._slope(logits)
                exponentials = logits.sub_(new_top[:, None]).exp_()
                sums[chunk] = sums[chunk] * shrink + exponentials.sum(-1)
                if slope is not None:
                    exponentials *= slope
                _add_product(of_hidden[chunk].mul_(shrink[:, None]), exponentials.to(self.operand_dtype), columns)
        log_sums = top + sums.log()
        scale = self.options.logits.scale
        slope = self._slope(chosen)
        of_target = self._per_token(scale) if slope is None else scale * slope
        factor = scale * (1.0 + 2.0 * self.options.z_loss * log_sums) / sums
        for chunk in self.chunks:
            targets = self.weight[self.labels[chunk]].to(self.operand_dtype).to(self.dtype)
            of_hidden[chunk].mul_(factor[chunk, None]).sub_(targets.mul_(of_target[chunk, None]))
        return self._with_z_loss(log_sums - chosen, log_sums), self._spread(of_hidden)

    def _chosen(self, logits: Tensor, chunk: slice, block: slice) -> Tensor:
        """The targets' logits, (tokens,); 0 for targets outside of the block."""
        column, inside = self._target(chunk, block)
        return logits.gather(1, column)[:, 0].masked_fill_(~inside, 0.0)

    def _with_z_loss(self, losses: Tensor, log_sums: Tensor) -> Tensor:
        return losses + self.options.z_loss * log_sums.square() if self.options.z_loss else losses

    def _slope(self, logits: Tensor) -> Tensor | None:
        """Of the bound, at logits that are bounded; None without a bound."""
        softcap = self.options.logits.softcap
        return None if softcap is None else (logits / softcap).square_().neg_().add_(1.0)

    def _logits(self, rows: Tensor, columns: Tensor, block: slice, out: Tensor | None = None) -> Tensor:
        if rows.dtype == self.dtype:
            logits = torch.mm(rows, columns.T, out=out)
        else:
            product = torch.mm(rows, columns.T, out_dtype=self.dtype)
            logits = product if out is None else out.copy_(product)
        softcap, scale = self.options.logits
        if self.bias is not None:
            logits += self.bias[block]
        if scale != 1.0:
            logits *= scale
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)

    def _logit_gradient(
        self, logits: Tensor, chunk: slice, block: slice, log_sums: Tensor, factor: Tensor | None
    ) -> Tensor:
        """Gradient of the losses by the head's output, in place of the logits."""
        scale = self.options.logits.scale
        slope = self._slope(logits)
        gradient = logits.sub_(log_sums[chunk, None]).exp_()
        if self.options.z_loss:
            gradient *= 1.0 + 2.0 * self.options.z_loss * log_sums[chunk, None]
        if self.options.label_smoothing:
            gradient -= self.options.label_smoothing / len(self.weight)
        column, inside = self._target(chunk, block)
        gradient.scatter_add_(1, column, (self.options.label_smoothing - 1.0) * inside[:, None].to(self.dtype))
        if slope is not None:
            gradient *= slope
        if factor is not None:
            gradient *= factor[chunk, None]
        return gradient if scale == 1.0 else gradient.mul_(scale)

    def _weights(self) -> Iterator[tuple[slice, Tensor]]:
        for block in self.blocks:
            yield block, self.weight[block].to(self.operand_dtype)

    def _rows(self, chunk: slice) -> Tensor:
        return self.hidden[self.index[chunk]].to(self.operand_dtype)

    def _target(self, chunk: slice, block: slice) -> tuple[Tensor, Tensor]:
        """Column (tokens, 1) of each target in the block, and whether it is in there, (tokens,)."""
        column = self.labels[chunk] - block.start
        inside = (column >= 0) & (column < block.stop - block.start)
        return column.masked_fill(~inside, 0)[:, None], inside

    def _per_token(self, value: float) -> Tensor:
        return torch.full_like(self.index, value, dtype=self.dtype)

    def _spread(self, rows: Tensor) -> Tensor:
        """Move the label tokens' rows from the front to their places: in place, last first, as none moves forward."""
        if len(self.index) < len(rows):
            for chunk in reversed(self.chunks):
                rows[self.index[chunk]] = rows[chunk].clone()
            is_target = torch.zeros(len(rows), dtype=torch.bool, device=rows.device).index_fill_(0, self.index, True)
            rows.masked_fill_(~is_target[:, None], 0.0)
        return rows


def _room(room: Tensor | None, chunk: slice, block: slice) -> Tensor | None:
    """Where the tile's logits wait: the block's gradient, (entries, dim), has room for the first ``dim`` tokens.

    They need not be computed twice, and the second pass overwrites them with the gradient when it has read them all.
    """
    if room is None or chunk.stop > room.shape[1]:
        return None
    entries = block.stop - block.start
    return room[block].view(-1)[chunk.start * entries : chunk.stop * entries].view(-1, entries)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)


def _operand_dtype(hidden: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Half types go into products as such on CUDA, which sums them in float32; elsewhere tiles are float32."""
    if hidden.device.type != "cuda" or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype


def _tile_side(weight: Tensor) -> int:
    """As large as products need to be fast; tiles, with the pieces of weight and hidden beside them, below 16 MiB."""
    return 2048 if weight.device.type == "cuda" else max(128, min(1024, (1 << 20) // weight.shape[1]))


# ---- autograd --------------------------------------------------------------------------------------------------------


class _SummedLoss(torch.autograd.Function):
    """All passes in forward; backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: _Targets,
        options: LossOptions,
        with_grad: bool,
    ) -> Tensor:
        """Hidden states (tokens, dim), weight (vocab, dim), bias (vocab,); the sum has shape ()."""
        tiles = _Tiles(hidden, weight, bias, targets, options)
        needed = tuple(with_grad and needs for needs in ctx.needs_input_grad[:3])
        has_room = needed[1] and weight.dtype == tiles.dtype
        room = _held_like(weight) if has_room else None
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
            gradients = (gradients[0].to(_held_dtype(hidden)), *gradients[1:])
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
        targets: _Targets,
        options: LossOptions,
        shape: torch.Size,
        with_grad: bool,
    ) -> Tensor:
        """As above; the losses have the labels' shape."""
        tiles = _Tiles(hidden, weight, bias, targets, options)
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
        tiles = _Tiles(hidden, weight, bias, _Targets(index, labels), ctx.options)
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


def _held_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, dtype=_held_dtype(tensor), memory_format=torch.contiguous_format)


def _held_dtype(tensor: Tensor) -> torch.dtype:
    """Float16 stays float32 until backward: a sum over the batch may exceed its range before the mean is taken."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The chunked loss has no second derivative (`create_graph=True`). Use "
            "token_cross_entropy(logits, labels), or LLMModule(loss_kernel='plain')."
        )


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions) -> _Targets:
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
    return _Targets(index, targets[index])
