"""transformers' learning-rate schedules by name, by optimizer steps or by tokens, with a warm-up in any unit."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from lightning_llm.decay import DECAYS
from lightning_llm.duration import Duration


def make_schedule(
    name: str,
    optimizer: Optimizer,
    *,
    total_steps: float = math.inf,
    total_tokens: float | None = None,
    warmup: Duration,
    tokens_seen: Callable[[], int],
    options: dict[str, Any] | None = None,
) -> LRScheduler | ReduceLROnPlateau:
    """One of transformers' schedules by name, whose time is optimizer steps or tokens.

    By tokens, what transformers takes for a step is a token: the learning rate of a step depends on the tokens trained
    on before it, whatever the batches were. A warm-up in the other unit than the schedule's multiplies it by
    min(1, share of the warm-up that is done). Beyond its end a schedule stays where it ended.

    Args:
        name: transformers' ``SchedulerType``: ``linear``, ``cosine``, ``constant``, ``warmup_stable_decay``, ...; or
            ``quarter_cosine``, cos(pi / 2 · share of the run).
        optimizer: Whose learning rates are set.
        total_steps: Optimizer steps of the whole run; infinite if unknown.
        total_tokens: Label tokens that the schedule takes; None for a schedule by optimizer steps.
        warmup: Length of the warm-up, in steps, tokens or as a share of the schedule.
        tokens_seen: Gives the label tokens trained on so far in this run, over all ranks.
        options: ``scheduler_specific_kwargs`` of transformers, for instance ``{"min_lr_rate": 0.1}``.

    Raises:
        ValueError: For an unknown name, for an option that the schedule lacks or needs, for a warm-up in epochs, and
            for a schedule that must know the length of a run whose length nobody knows.
    """
    known = sorted(kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION if kind.value != "greedy")  # it searches
    if name not in (*known, "quarter_cosine"):
        raise ValueError(f"`lr_schedule` must be one of {', '.join([*known, 'quarter_cosine'])}, but got {name!r}.")
    if warmup.unit not in ("steps", "tokens", "run"):
        raise ValueError(f"`warmup` is given in steps, tokens or as a share of the run ('5%'), but got '{warmup}'.")
    if name == "constant" and warmup.value:
        name = "constant_with_warmup"  # transformers' `constant` ignores the warm-up without a word
    unit, total = ("steps", total_steps) if total_tokens is None else ("tokens", total_tokens)
    _check_length(name, warmup, total)
    inner_warmup = {unit: warmup.value, "run": warmup.value * total if warmup.unit == "run" else 0.0}
    length, warm = (total if total < math.inf else None), inner_warmup.get(warmup.unit, 0.0)
    if unit == "steps":
        length, warm = (None if length is None else int(length)), round(warm)
    schedule = _make(name, optimizer, warm, length, options)
    if isinstance(schedule, ReduceLROnPlateau):
        if warmup.value:
            raise ValueError(f"The schedule {name!r} has no warm-up, but got warmup='{warmup}'. Set it to 0.")
        if total_tokens is not None:
            raise ValueError(f"The schedule {name!r} has no length. Leave lr_schedule_length out.")
        return schedule
    outer_warmup = warmup.value if warmup.unit not in inner_warmup else 0.0

    def clocked(factor: Callable[[float], float]) -> Callable[[int], float]:
        def at(step: int) -> float:
            tokens = tokens_seen()
            now, other = (step, tokens) if unit == "steps" else (tokens, step)
            warmed = min(1.0, other / outer_warmup) if outer_warmup else 1.0
            return factor(min(now, total)) * warmed

        return at

    assert isinstance(schedule, LambdaLR)
    for group in schedule.optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    factors: list[Any] = schedule.lr_lambdas  # of numbers that need not be whole
    return LambdaLR(schedule.optimizer, [clocked(factor) for factor in factors])


def _check_length(name: str, warmup: Duration, total: float) -> None:
    make: Any = _quarter_cosine if name == "quarter_cosine" else TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    needs_length = "num_training_steps" in inspect.signature(make).parameters or warmup.unit == "run"
    if needs_length and total == math.inf:
        raise ValueError(
            f"The schedule {name!r} with warm-up '{warmup}' must know how long the run is, but its number of optimizer "
            f"steps is not known: it is endless, or a callback adapts the batch. Set lr_schedule_length='2B tokens' "
            f"(or '1 epoch'), Trainer(max_steps=...), or Trainer(max_epochs=...) with a loader that has a length; or "
            f"use 'constant' with a warm-up in steps or tokens."
        )


def _make(
    name: str, optimizer: Optimizer, warmup: Any, total: Any, options: dict[str, Any] | None
) -> LRScheduler | ReduceLROnPlateau:
    """The schedule, in whatever unit its numbers are."""
    try:
        if name == "quarter_cosine":
            return _quarter_cosine(optimizer, warmup, total, **(options or {}))
        schedule: LRScheduler | ReduceLROnPlateau = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total,
            scheduler_specific_kwargs=options or {},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"`lr_schedule_options` {options} do not fit the schedule {name!r}: {error}") from error
    return schedule


def _quarter_cosine(
    optimizer: Optimizer, num_warmup_steps: float, num_training_steps: float, min_lr_rate: float = 0.0
) -> LambdaLR:
    def factor(step: float) -> float:
        if step < num_warmup_steps:
            return step / max(1, num_warmup_steps)
        share = (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)
        return min_lr_rate + (1 - min_lr_rate) * DECAYS["quarter_cosine"].factor(share)

    return LambdaLR(optimizer, factor)
