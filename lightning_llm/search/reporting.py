"""A run tells its trial how it goes, at each validation, and stops where the trial is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import lightning as L

from lightning_llm.duration import Duration
from lightning_llm.loss import NonFiniteLossError
from lightning_llm.run_length import tokens_of


class Judge(Protocol):
    """What hears of a run: an Optuna trial."""

    def report(self, value: float, step: int) -> None:
        """Take a value note."""

    def should_prune(self) -> bool:
        """Whether the run is not worth its end."""


def percents(share: float, value: float, before: tuple[float, float] | None = None) -> dict[int, float]:
    """A validation as values at whole percents of the run, those since the validation before by interpolation.

    Pruners compare trials at equal steps. Runs with another batch have other steps, and validate at slightly other
    places; on the percents of their runs they meet.

    Args:
        share: Of the run, 0..1.
        value: Of the metric.
        before: Share and value of the validation before.

    Example:
        >>> percents(0.254, 5.0)
        {25: 5.0}
        >>> percents(0.29, 4.0, before=(0.25, 5.0))
        {26: 4.75, 27: 4.5, 28: 4.25, 29: 4.0}
    """
    last = round(100 * share)
    if before is None:
        return {last: value}
    start, first = before
    values = {}
    for percent in range(round(100 * start) + 1, last + 1):
        way = (percent / 100 - start) / (share - start)
        values[percent] = round(first + min(max(way, 0.0), 1.0) * (value - first), 12)
    return values


class TrialReport(L.Callback):
    """Report the metric at each validation, at the share of the run in label tokens, and stop what is pruned.

    The share is that of the tokens where the data module tells how many an epoch holds, else of epochs or steps. A
    pruned run ends as if it were over: hooks, loggers and teardown all run, and ``is_pruned`` says so.

    Args:
        metric: As it is logged in validation, such as ``val/loss``.
        judge: Hears the values, and decides.
        tell: Is called with each value, to show it.

    Raises:
        ValueError: If the metric is not logged.
        NonFiniteLossError: If it is NaN or infinite.
    """

    def __init__(self, metric: str, judge: Judge, tell: Callable[[float], Any] = lambda value: None) -> None:
        self.metric = metric
        self.judge = judge
        self.tell = tell
        self.is_pruned = False
        self.history: list[tuple[float, float]] = []
        self._validated_at = -1

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report, and ask whether to go on."""
        if trainer.sanity_checking:
            return
        value = self._value(trainer)
        share = share_of_run(trainer, pl_module)
        self._validated_at = trainer.global_step
        before = self.history[-1] if self.history else None
        for percent, reported in percents(share, value, before).items():
            self.judge.report(reported, percent)
        self.history.append((share, value))
        self.tell(value)
        if share < 1 and self.judge.should_prune():
            self.is_pruned = True
            trainer.should_stop = True
            trainer.fit_loop.min_epochs = 0
            trainer.fit_loop.epoch_loop.min_steps = 0

    # ---- what others may ask -------------------------------------------------------------------------------------

    def has_validated(self, trainer: L.Trainer) -> bool:
        """Whether the last validation saw the weights as they are."""
        return self._validated_at == trainer.global_step

    # ---- details -------------------------------------------------------------------------------------------------

    def _value(self, trainer: L.Trainer) -> float:
        metrics = trainer.callback_metrics
        if self.metric not in metrics:
            known = ", ".join(sorted(metrics)) or "nothing"
            raise ValueError(f"There is no metric {self.metric!r} after a validation. There is {known}: --metric NAME.")
        value = float(metrics[self.metric])
        if not math.isfinite(value):
            raise NonFiniteLossError(f"{self.metric} is {value} at optimizer step {trainer.global_step}.")
        return value


def share_of_run(trainer: L.Trainer, pl_module: L.LightningModule) -> float:
    """How much of a run that has an end is over, 0..1: the larger share of what ends it, tokens (or epochs) or steps.

    Args:
        trainer: At a validation in ``fit``, or after it.
        pl_module: Whose ``tokens_seen`` counts, if it has it.
    """
    share = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    if share < 1 and trainer.max_epochs is not None and trainer.max_epochs > 0:
        of_epochs = _share_of_epochs(trainer, trainer.max_epochs, getattr(pl_module, "tokens_seen", None))
        share = max(share, of_epochs)
    return min(share, 1.0)


def _share_of_epochs(trainer: L.Trainer, max_epochs: int, tokens: int | None) -> float:
    is_over = trainer.current_epoch >= max_epochs
    if tokens is not None and not is_over:
        try:
            return tokens / tokens_of(trainer, Duration(1.0, "run"))
        except ValueError:
            pass  # a loader that cannot tell its tokens
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    in_epoch = batches / trainer.num_training_batches if not is_over else 0.0
    return min((trainer.current_epoch + in_epoch) / max_epochs, 1.0)
