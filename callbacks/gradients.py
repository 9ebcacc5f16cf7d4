"""Whole gradients, touched in as few kernels as possible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def scale_gradients(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply the gradients of an optimizer's parameters in place; a factor of 1 touches nothing."""
    if factor == 1.0:
        return
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters_of(optimizer):
        gradient = parameter.grad
        if gradient is not None and gradient.is_sparse:
            gradient.mul_(factor)
        elif gradient is not None:
            groups.setdefault((type(gradient), gradient.device, gradient.dtype), []).append(gradient)
    for gradients in groups.values():
        torch._foreach_mul_(gradients, factor)
