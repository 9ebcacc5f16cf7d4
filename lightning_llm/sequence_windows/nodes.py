"""The autograd nodes of a windowed loss: to what is outside, one operation with the parameters as its inputs."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_llm.sequence_windows.passes import Passes


class Run(Protocol):
    """What a node needs to know of a call."""

    def aliases(self) -> dict[str, Tensor]:
        """The trained parameters as other leaves, by name."""

    def passes(self, aliases: dict[str, Tensor]) -> Passes:
        """Passes through the model with these in the parameters' place."""

    def collect(self, losses: list[Tensor]) -> Tensor:
        """The windows' losses as one."""


class GradientInForward(torch.autograd.Function):
    """Both passes in forward, for a gradient of 1 of the summed loss; backward scales."""

    @staticmethod
    def forward(ctx: Any, run: Run, *parameters: Tensor) -> Tensor:
        """Return the loss, and keep the gradients."""
        aliases = run.aliases()
        passes = run.passes(aliases)
        passes.forward(with_graph=True, with_loss=False)
        losses = passes.backward(torch.ones((), device=parameters[0].device))
        ctx.gradients = [(alias.grad, alias.dtype) for alias in aliases.values()]
        return run.collect(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients."""
        gradients = _once(ctx, "gradients")
        return None, *(None if total is None else total.mul_(grad).to(dtype) for total, dtype in gradients)


class GradientInBackward(torch.autograd.Function):
    """The first pass in forward, the second in backward."""

    @staticmethod
    def forward(ctx: Any, run: Run, *parameters: Tensor) -> Tensor:
        """Return the losses, and keep the keys and values."""
        ctx.aliases = run.aliases()
        ctx.passes = run.passes(ctx.aliases)
        return run.collect(ctx.passes.forward(with_graph=True, with_loss=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Run the second pass, and return what it has summed."""
        passes, aliases = _once(ctx, "passes"), _once(ctx, "aliases")
        passes.backward(grad)
        return None, *(None if alias.grad is None else alias.grad.to(alias.dtype) for alias in aliases.values())


class GradientOfShards(torch.autograd.Function):
    """As the last, for parameters that only the model itself can gather: they get their gradient directly.

    ``anchor`` is a leaf by which the result has a gradient at all.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, anchor: Tensor) -> Tensor:
        """Return the losses, and keep the keys and values."""
        ctx.passes = run.passes({})
        return run.collect(ctx.passes.forward(with_graph=True, with_loss=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        """Run the second pass; gradients are where they belong when it ends."""
        _once(ctx, "passes").backward(grad)
        return None, None


def _once(ctx: Any, name: str) -> Any:
    value = getattr(ctx, name)
    if value is None:
        raise RuntimeError("A windowed loss frees its windows in backward; it cannot be run backward a second time.")
    setattr(ctx, name, None)
    return value
