"""AdamW with decay groups, and transformers' learning-rate schedules with a warm-up in any unit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from lightning_llm.duration import Duration

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
) -> AdamW:
    """AdamW in one fused kernel where every parameter lives on a device that has it.

    Args:
        model: Its trainable parameters are optimized.
        learning_rate: Peak learning rate; the schedule multiplies it.
        weight_decay: Decoupled weight decay of matrices.
        betas: Decay rates of the two moment averages.
        eps: Added to the denominator.
    """
    groups = decay_groups(model.named_parameters(), weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
    optimizer = AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)
    # A fused AdamW offers to unscale fp16 gradients inside its step. Lightning then refuses to clip them, in bf16 too,
    # although it has unscaled them before: decline the offer, keep the kernel.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def make_schedule(
    name: str,
    optimizer: Optimizer,
    *,
    total_steps: float,
    warmup: Duration,
    tokens_seen: Callable[[], int],
    options: dict[str, Any] | None = None,
) -> LRScheduler | ReduceLROnPlateau:
    """One of transformers' schedules by name, with its warm-up in optimizer steps, tokens or a share of the run.

    A warm-up in steps or as a share is transformers' own. A warm-up of T tokens multiplies the schedule by
    min(1, tokens / T), so it lasts as long as the tokens do, whatever the batch.

    Args:
        name: transformers' ``SchedulerType``: ``linear``, ``cosine``, ``constant``, ``warmup_stable_decay``, ...
        optimizer: Whose learning rates are set.
        total_steps: Optimizer steps of the whole run; infinite if unknown.
        warmup: Length of the warm-up.
        tokens_seen: Gives the label tokens trained on so far, over all ranks.
        options: ``scheduler_specific_kwargs`` of transformers, for instance ``{"min_lr_rate": 0.1}``.

    Raises:
        ValueError: For an unknown name, for an option that the schedule lacks or needs, for a warm-up in epochs, and
            for a schedule that must know the length of an endless run.
    """
    known = sorted(kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION if kind.value != "greedy")  # it searches
    if name not in known:
        raise ValueError(f"`lr_schedule` must be one of {', '.join(known)}, but got {name!r}.")
    if warmup.unit == "epochs":
        raise ValueError(f"`warmup` is given in steps, tokens or as a share of the run ('5%'), but got '{warmup}'.")
    if name == "constant" and warmup.value:
        name = "constant_with_warmup"  # transformers' `constant` ignores the warm-up without a word
    make: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    parameters = inspect.signature(make).parameters
    if not total_steps < float("inf") and ("num_training_steps" in parameters or warmup.unit == "run"):
        raise ValueError(
            f"The schedule {name!r} with warm-up '{warmup}' must know how long the run is, but it is endless. Set "
            f"Trainer(max_steps=...) or Trainer(max_epochs=...) with a loader that has a length, or use 'constant' "
            f"with a warm-up in steps or tokens."
        )
    warmup_steps = {"steps": warmup.value, "run": warmup.value * total_steps if warmup.unit == "run" else 0.0}
    known_steps = int(total_steps) if total_steps < float("inf") else None
    try:
        schedule: LRScheduler | ReduceLROnPlateau = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=round(warmup_steps.get(warmup.unit, 0.0)),
            num_training_steps=known_steps,
            scheduler_specific_kwargs=options or {},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"`lr_schedule_options` {options} do not fit the schedule {name!r}: {error}") from error
    if warmup.value and isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(f"The schedule {name!r} has no warm-up, but got warmup='{warmup}'. Set it to 0.")
    if warmup.value and warmup.unit == "tokens":
        assert isinstance(schedule, LambdaLR)
        return _with_token_warmup(schedule, warmup.value, tokens_seen)
    return schedule


def _with_token_warmup(schedule: LambdaLR, warmup_tokens: float, tokens_seen: Callable[[], int]) -> LambdaLR:
    def warmed(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: factor(step) * min(1.0, tokens_seen() / warmup_tokens)

    for group in schedule.optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    return LambdaLR(schedule.optimizer, [warmed(factor) for factor in schedule.lr_lambdas])
