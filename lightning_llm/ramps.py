"""Batches that grow during a run, ready by name: plain ramps, and those of published runs.

Each is a :class:`~lightning_llm.Schedule` for ``AccumulationSchedule`` or ``TextDataModule(global_batch_tokens=...)``.
In YAML a ramp stands by its name, with the published figures, or as a ``class_path`` with one's own::

    milestones: llama-3
    target: tokens

    milestones:
      class_path: lightning_llm.ramps.llama_3
      init_args: {start: 32_000, run: 2B tokens}
    target: tokens

Put ``LearningRateScaling(power=0.5)`` beside it for a learning rate that follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning_llm.duration import Duration
from lightning_llm.schedule import Interpolation, Schedule
from lightning_llm.seesaw import Seesaw, seesaw

__all__ = [
    "RAMPS",
    "Seesaw",
    "as_schedule",
    "critical_batch",
    "deepseek_v3",
    "geometric",
    "linear",
    "llama_3",
    "olmo",
    "ramp",
    "seesaw",
]


def linear(start: float, end: float, length: str) -> Schedule:
    """From one batch to another, by equal amounts, then constant.

    Args:
        start: First batch.
        end: Last batch.
        length: How long it takes: ``"10B tokens"``, ``"2k steps"``, ``"10%"`` of the run.

    Example:
        >>> from lightning_llm import Progress
        >>> linear(32, 512, "10B tokens")(Progress(tokens=5e9))
        272.0
    """
    return _between(start, end, length, "linear")


def geometric(start: float, end: float, length: str) -> Schedule:
    """From one batch to another, by equal ratios, then constant.

    Args:
        start: First batch.
        end: Last batch.
        length: How long it takes: ``"10B tokens"``, ``"2k steps"``, ``"10%"`` of the run.

    Example:
        >>> from lightning_llm import Progress
        >>> geometric(32, 512, "10B tokens")(Progress(tokens=5e9))
        128.0
    """
    return _between(start, end, length, "geometric")


def deepseek_v3(start: float = 3072, run: str = "14.8T tokens") -> Schedule:
    """DeepSeek-V3: from 3072 to 15360 sequences over the first 469B of 14.8T tokens, then constant.

    The report says "gradually"; here it is linear in tokens.

    Args:
        start: First batch; the last one is 5 times as large.
        run: Length of the run, of which the ramp takes the same share as there (3.2%).

    References:
        DeepSeek-AI, DeepSeek-V3 technical report (2024), section 4.2, arXiv 2412.19437; sequences of 4096 tokens.
    """
    whole = Duration.parse(run)
    return Schedule({_at(0, whole): start, _at(0.469 / 14.8, whole): 5 * start}, "linear")


def llama_3(start: float = 4e6, run: str = "15.6T tokens") -> Schedule:
    """Llama 3 405B: 4M tokens, 8M after 252M tokens, 16M after 2.87T, of 15.6T.

    There the sequences grew from 4096 to 8192 tokens together with the first doubling.

    Args:
        start: First batch; it doubles twice.
        run: Length of the run, of which the milestones are the same shares as there (0.0016% and 18.4%).

    References:
        Llama team, The Llama 3 herd of models (2024), section 3.4.1, arXiv 2407.21783.
    """
    whole = Duration.parse(run)
    return Schedule({_at(0, whole): start, _at(252e-6 / 15.6, whole): 2 * start, _at(2.87 / 15.6, whole): 4 * start})


def olmo(start: float = 1024, doublings: tuple[str, ...] = ("168B tokens", "503B tokens")) -> Schedule:
    """OLMo 1B: 1024 sequences, doubled at 168B and at 503B tokens, where the critical batch had reached twice as many.

    The learning rate was multiplied by the square root of two each time; the run took 43% fewer steps than one with the
    first batch throughout, and ended at a slightly lower loss.

    Args:
        start: First batch.
        doublings: When it doubles; for critical batches of one's own see :func:`critical_batch`.

    References:
        Merrill et al., Critical batch size revisited (2025), section 4, arXiv 2505.23971; sequences of 4096 tokens.
    """
    unit = Duration.parse(doublings[0]).unit if doublings else "tokens"
    return Schedule({f"0 {unit}": start, **{at: start * 2 ** (k + 1) for k, at in enumerate(doublings)}})


def critical_batch(measured: dict[str, float], start: float) -> Schedule:
    """Double the batch whenever the critical batch has become twice the present one.

    Args:
        measured: The critical batch, by when it was measured (``{"10B tokens": 900, "100B tokens": 2100}``), in the
            unit of ``start``; the batch doubles at a measurement, as often as that allows, and never shrinks.
        start: First batch.

    Example:
        >>> critical_batch({"1B tokens": 700, "10B tokens": 1100, "30B tokens": 4200}, start=512)
        Schedule({'0 tokens': 512.0, '10000000000 tokens': 1024.0, '30000000000 tokens': 4096.0}, interpolation='step')

    References:
        Merrill et al., Critical batch size revisited (2025), arXiv 2505.23971.
    """
    if not measured:
        raise ValueError("Without a measurement there is nothing to follow, for instance {'10B tokens': 900}.")
    if not 0 < start < math.inf or not all(math.isfinite(critical) for critical in measured.values()):
        raise ValueError(
            f"`start` and the measured critical batches are finite, and `start` is above 0, but got start={start} and "
            f"{measured}. Leave out where a noise scale is infinite: no signal showed there."
        )
    times = [Duration.parse(at) for at in measured]
    milestones, batch = {str(Duration(0.0, times[0].unit)): start}, start
    for at, critical in zip(times, measured.values(), strict=True):
        while critical >= 2 * batch:
            batch *= 2
            milestones[str(at)] = batch
    return Schedule(milestones)


RAMPS: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "geometric": geometric,
    "deepseek-v3": deepseek_v3,
    "llama-3": llama_3,
    "olmo": olmo,
    "critical-batch": critical_batch,
    "seesaw": seesaw,
}


def ramp(name: str, **options: Any) -> Schedule:
    """A ramp by its name in :data:`RAMPS`.

    Args:
        name: ``deepseek-v3``, ``llama-3`` and ``olmo`` need no options; ``linear``, ``geometric``, ``critical-batch``
            and ``seesaw`` do.
        **options: As the function of that name takes them.

    Raises:
        ValueError: For an unknown name, and for options that are missing or too many.

    Example:
        >>> from lightning_llm import Progress
        >>> ramp("llama-3")(Progress(tokens=1e12))
        8000000.0
    """
    if name not in RAMPS:
        raise ValueError(f"A ramp's name is one of {', '.join(RAMPS)}, but got {name!r}.")
    try:
        return RAMPS[name](**options)
    except TypeError as error:
        function = f"lightning_llm.ramps.{RAMPS[name].__name__}"
        raise ValueError(f"The ramp {name!r} needs other options: {error}. Call {function}(...).") from error


def as_schedule(
    value: Schedule | Mapping[str, float] | Mapping[int, float] | float | str, interpolation: Interpolation = "step"
) -> Schedule:
    """What a user may give for a schedule: one that is ready, the name of a ramp, milestones, or a number.

    Args:
        value: Which of these.
        interpolation: Between milestones.

    Raises:
        ValueError: For what makes no schedule, and for an interpolation beside a schedule that has one.
    """
    if isinstance(value, str):
        value = ramp(value)
    if not isinstance(value, Schedule):
        return Schedule(value, interpolation)
    if interpolation not in ("step", value.interpolation):
        raise ValueError(
            f"{value!r} says itself how to interpolate, but got interpolation={interpolation!r} beside it."
        )
    return value


def _between(start: float, end: float, length: str, interpolation: Interpolation) -> Schedule:
    whole = Duration.parse(length)
    return Schedule({_at(0, whole): start, _at(1, whole): end}, interpolation)


def _at(share: float, whole: Duration) -> str:
    """A point of a run, as a milestone."""
    return str(Duration(share * whole.value, whole.unit))
