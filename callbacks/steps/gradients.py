"""Whole gradients, touched in as few kernels as possible."""

from __future__ import annotations

from collections.abc import Sequence
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


def gradient_norm(gradient: Tensor) -> Tensor:
    """A gradient's norm, shape (), in float32 at least; of a sharded one the norm of this rank's shard."""
    values = _values(gradient.detach())
    norm: Tensor = torch._foreach_norm([values], 2, dtype=torch.promote_types(values.dtype, torch.float32))[0]
    return norm


def gradient_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each gradient, as :func:`gradient_norm` takes it, in as few kernels as possible."""
    norms: dict[int, Tensor] = {}
    groups: dict[Any, tuple[list[int], list[Tensor]]] = {}
    for index, gradient in enumerate(gradients):
        values = _values(gradient.detach())
        indices, group = groups.setdefault((values.device, values.dtype), ([], []))
        indices.append(index)
        group.append(values)
    for (_, dtype), (indices, group) in groups.items():
        found = torch._foreach_norm(group, 2, dtype=torch.promote_types(dtype, torch.float32))
        norms.update(zip(indices, found, strict=True))
    return [norms[index] for index in range(len(gradients))]


def _values(gradient: Tensor) -> Tensor:
    """What a gradient's norm is that of: the rows of a sparse one, each once; the local part of a sharded one."""
    if gradient.is_sparse:
        return gradient.coalesce().values()
    local: Tensor = getattr(gradient, "_local_tensor", gradient)
    return local
