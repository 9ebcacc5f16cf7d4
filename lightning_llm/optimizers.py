"""Optimizers with decay groups: a fused AdamW, or another by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

ADAMW_BETAS = (0.9, 0.95)
ADAMW_EPS = 1e-8
_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters: matrices decay; biases, norms and other vectors do not.

    Args:
        named_parameters: As ``model.named_parameters()`` gives them (tied weights once).
        weight_decay: For the first group.

    Returns:
        Optimizer parameter groups, empty ones left out.

    Raises:
        ValueError: If no parameter requires a gradient.
    """
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError("No parameter of the model requires a gradient: there is nothing to train. Unfreeze some.")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    options: dict[str, Any] | None = None,
) -> AdamW:
    """AdamW in one fused kernel where every parameter lives on a device that has it.

    Args:
        model: Its trainable parameters are optimized.
        learning_rate: Peak learning rate; the schedule multiplies it.
        weight_decay: Decoupled weight decay of matrices.
        betas: Decay rates of the two moment averages.
        eps: Added to the denominator.
        options: Further arguments of ``torch.optim.AdamW``.
    """
    groups = decay_groups(model.named_parameters(), weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
    optimizer = AdamW(groups, **{"lr": learning_rate, "betas": betas, "eps": eps, "fused": fused, **(options or {})})
    # A fused AdamW offers to unscale fp16 gradients inside its step. Lightning then refuses to clip them, in bf16 too,
    # although it has unscaled them before: decline the offer, keep the kernel.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def optimizer_class(name: str) -> type[Optimizer]:
    """An optimizer by name: torch's, else that of the package pytorch-optimizer (``lamb``, ``lars``, ``lion``, ...).

    Args:
        name: In any case; with dots, the import path of a class.

    Raises:
        ImportError: If the name is none of torch's and pytorch-optimizer is not installed.
        ValueError: For a name that neither knows, and a path that leads to no optimizer.
    """
    if "." in name:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute, None)
        if not (inspect.isclass(found) and issubclass(found, Optimizer)):
            raise ValueError(f"`optimizer` is the import path of an optimizer, but {name!r} is {found!r}.")
        return found
    of_torch = {each.lower(): getattr(torch.optim, each) for each in torch.optim.__all__}
    candidate = of_torch.get(name.lower())
    if inspect.isclass(candidate) and issubclass(candidate, Optimizer):
        return candidate
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ImportError(
            f"The optimizer {name!r} is none of torch's, and the package with LAMB, LARS, Lion and many others is not "
            f"installed: pip install 'lightning-llm[optimizers]', or pip install pytorch-optimizer."
        ) from error
    known = pytorch_optimizer.get_supported_optimizers()
    if name.lower() not in known:
        raise ValueError(f"`optimizer` is one of torch's or one of {', '.join(known)}, but got {name!r}.")
    loaded: type[Optimizer] = pytorch_optimizer.load_optimizer(name.lower())
    return loaded


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = ADAMW_BETAS,
    eps: float = ADAMW_EPS,
    options: dict[str, Any] | None = None,
) -> Optimizer:
    """An optimizer by name, with decay groups.

    Args:
        name: ``adamw`` (fused where it can be), or as in :func:`optimizer_class`.
        model: Its trainable parameters are optimized.
        learning_rate: Peak learning rate; the schedule multiplies it.
        weight_decay: Of matrices; other parameters do not decay.
        betas: Of AdamW.
        eps: Of AdamW.
        options: Further arguments of the optimizer, which otherwise keeps its own defaults.

    Raises:
        ValueError: If ``betas`` or ``eps`` are given for another optimizer than AdamW, for a weight decay that it does
            not have, and for options that it does not take.
    """
    if name.lower() == "adamw":
        return make_adamw(
            model, learning_rate=learning_rate, weight_decay=weight_decay, betas=betas, eps=eps, options=options
        )
    if (*betas, eps) != (*ADAMW_BETAS, ADAMW_EPS):
        raise ValueError(
            f"`betas` and `eps` are AdamW's, but the optimizer is {name!r}. Give it its own as "
            f"optimizer_options={{'betas': {tuple(betas)}, ...}}."
        )
    kind = optimizer_class(name)
    if weight_decay and "weight_decay" not in inspect.signature(kind).parameters:
        raise ValueError(f"{kind.__name__} has no weight decay, but got weight_decay={weight_decay}. Set it to 0.")
    make: Any = kind
    try:
        optimizer: Optimizer = make(
            decay_groups(model.named_parameters(), weight_decay), **{"lr": learning_rate, **(options or {})}
        )
    except TypeError as error:
        raise ValueError(f"`optimizer_options` {options} do not fit {kind.__name__}: {error}") from error
    if hasattr(optimizer, "_step_supports_amp_scaling"):
        optimizer._step_supports_amp_scaling = False  # as for AdamW
    return optimizer
