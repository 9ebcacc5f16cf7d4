r"""The logits of a large vocabulary tile by tile: what cross-entropy and its gradients need of each, and no more.

A tile holds some label tokens by some entries of the vocabulary. Two passes serve in general: the first sums each
token's exponentials, the second makes each tile's gradient and multiplies it on at once. One is enough for a frozen
head: what a token's hidden state gets is linear in its exponentials, so it is summed beside them and divided at the
end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class LogitMap(NamedTuple):
    """What a model does to the output of its head: ``softcap * tanh(scale * x / softcap)``.

    Attributes:
        softcap: Bound of the logits' absolute value; None for no bound.
        scale: Factor of the head's output.
    """

    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class LossOptions:
    """What a loss may add to cross-entropy; the fields are :func:`chunked_cross_entropy`'s arguments."""

    label_smoothing: float
    z_loss: float
    logits: LogitMap
    chunk_size: int | None


class Targets(NamedTuple):
    """The rows that have a target, ascending, and their targets; each (tokens,)."""

    rows: Tensor
    labels: Tensor


class Tiles:
    """The logits of the label tokens, tile by tile; see :func:`chunked_cross_entropy` for what is computed."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets, options: LossOptions
    ) -> None:
        """Hidden (rows, dim), weight (vocab, dim)."""
        self.hidden, self.weight, self.bias, self.options = hidden, weight, bias, options
        self.index, self.labels = targets
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.operand_dtype = _operand_dtype(hidden, self.dtype)
        side = options.chunk_size or tile_side(weight)
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
        of_weight = (held_like(self.weight) if room is None else room) if needed[1] else None
        of_bias = held_like(self.bias) if needed[2] and self.bias is not None else None
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


def tile_side(weight: Tensor) -> int:
    """As large as products need to be fast; tiles, with the pieces of weight and hidden beside them, below 16 MiB."""
    return 2048 if weight.device.type == "cuda" else max(128, min(1024, (1 << 20) // weight.shape[1]))


def held_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory for a gradient of ``tensor``, in the type in which it is kept until backward."""
    return torch.empty_like(tensor, dtype=held_dtype(tensor), memory_format=torch.contiguous_format)


def held_dtype(tensor: Tensor) -> torch.dtype:
    """Float16 stays float32 until backward: a sum over the batch may exceed its range before the mean is taken."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
