"""Modules that run out of memory when told to: in forward, in the middle of backward, in the transfer."""

import torch
from token_training import Module

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB (injected)"


class _FailInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fails, module):
        ctx.fails, ctx.module = fails, module
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.fails:
            ctx.module.num_failed += 1
            raise torch.OutOfMemoryError(MESSAGE)
        return gradient, None, None


class Scarce(Module):
    """Runs out of memory with more than so many tokens at once, on some ranks.

    In backward, it does so between the two layers: the later one's gradients have been added by then.
    """

    def __init__(
        self, config, optimizer="adamw", forward_limit=None, backward_limit=None, ranks=None, fail_at=None, **options
    ):
        super().__init__(config, optimizer, **options)
        self.forward_limit, self.backward_limit, self.ranks = forward_limit, backward_limit, ranks
        self.fail_at = fail_at  # (number of the attempt, "forward" or "backward"): fails whatever its size
        self.shapes, self.num_failed = [], 0
        self.model.transformer.h[0].register_forward_hook(self._after_first_layer)

    def _scarce(self, limit, area, where):
        if self.fail_at == (len(self.shapes) - 1, where):
            return True
        return limit is not None and area > limit and (self.ranks is None or self.global_rank in self.ranks)

    def _after_first_layer(self, layer, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        fails = torch.is_grad_enabled() and self._scarce(
            self.backward_limit, hidden.shape[0] * hidden.shape[1], "backward"
        )
        hidden = _FailInBackward.apply(hidden, fails, self)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def training_step(self, batch, batch_idx):
        self.shapes.append(tuple(batch["input_ids"].shape))
        output = super().training_step(batch, batch_idx)
        if self._scarce(self.forward_limit, batch["input_ids"].numel(), "forward"):
            self.num_failed += 1
            raise torch.OutOfMemoryError(MESSAGE)
        return output
