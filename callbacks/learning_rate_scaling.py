"""Learning rate, and Adam's betas, that follow the global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from lightning_llm.parallel import data_parallel_size


def learning_rate_factor(ratio: float, power: float) -> float:
    """What the learning rate is multiplied by when the global batch is ``ratio`` times the reference.

    Example:
        >>> learning_rate_factor(ratio=4.0, power=0.5)
        2.0
    """
    return float(ratio**power)


class LearningRateScaling(L.Callback):
    r"""Multiply the learning rate by :math:`\kappa^p` when the global batch is :math:`\kappa` times the reference.

    The factor applies within the optimizer's step and is taken back after it, so any learning-rate scheduler, also
    one that goes on from the last value, stays what it is.

    Args:
        power: p. 0.5 suits Adam and its kin, 1 plain SGD, 0 leaves the learning rate alone.
        scale_betas: Raise Adam's betas to :math:`\kappa` too, which keeps the half-lives of its averages the same in
            tokens.
        base_batch: The reference, in the unit of the batch; that of the run's first step if None.
        batch_fn: ``trainer -> global batch``, in any unit. If None: ``global_batch`` of a callback
            (``AccumulationSchedule``) or of the data module, if one has it, else the micro-batches over all ranks.
        log_prefix: The factor, the batch and the learning rate in use are logged as ``<prefix>lr_factor``,
            ``<prefix>global_batch_ratio`` and ``<prefix>learning_rate``; None for none.

    Raises:
        ValueError: For a power that is no finite number, a reference that is not positive, manual optimization, or
            ``scale_betas`` with an optimizer that has no betas.

    References:
        Goyal et al., Accurate, large minibatch SGD (2017), p = 1; Malladi et al., On the SDEs and scaling rules for
        adaptive gradient algorithms (2022), p = 0.5 and betas; Marek et al., Small batch size training for language
        models (2025), half-life in tokens.
    """

    def __init__(
        self,
        power: float = 0.5,
        scale_betas: bool = False,
        base_batch: float | None = None,
        batch_fn: Callable[[L.Trainer], float] | None = None,
        log_prefix: str | None = "train/",
    ) -> None:
        if not -10 <= power <= 10:
            raise ValueError(f"`power` is a small finite number such as 0.5 or 1, but got {power!r}.")
        if base_batch is not None and not 0 < base_batch < float("inf"):
            raise ValueError(f"`base_batch` is a batch, above 0, but got {base_batch!r}.")
        self.power = power
        self.scale_betas = scale_betas
        self.base_batch = base_batch
        self.batch_fn = batch_fn
        self.log_prefix = log_prefix
        self._reference: float | None = None
        self._ratio = 1.0
        self._in_step = False
        self._set_aside: list[dict[str, Any]] = []  # what each parameter group held before the step
        self._handles: list[Any] = []

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what cannot be scaled; take part in the optimizer's step."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"LearningRateScaling needs automatic optimization, but {type(pl_module).__name__} optimizes manually: "
                f"it steps when it likes, with a batch that nobody else knows."
            )
        for optimizer in trainer.optimizers:
            if self.scale_betas and not all("betas" in group for group in optimizer.param_groups):
                raise ValueError(
                    f"scale_betas=True needs an optimizer with `betas`, but got {type(optimizer).__name__}."
                )
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError("LBFGS reads its learning rate before it has seen the batch: it cannot be scaled.")
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if trainer.global_step == 0:
            self._reference = None  # another run than the last
        changing = [_source(trainer), *(c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler))]  # type: ignore[attr-defined]
        if self.batch_fn is None and not any(changing):
            rank_zero_warn(
                "LearningRateScaling sees no batch that changes: no data module or callback has a `global_batch`. Add "
                "AccumulationSchedule, or pass batch_fn=lambda trainer: ..."
            )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """See how large the step's batch is; log what is set."""
        batch = float(self.batch_fn(trainer) if self.batch_fn else _global_batch(trainer))
        if self._reference is None:
            self._reference = batch
        self._ratio = batch / (self.base_batch or self._reference)
        if self.log_prefix is not None:
            factor = learning_rate_factor(self._ratio, self.power)
            values = {"lr_factor": factor, "global_batch_ratio": self._ratio}
            unscaled = self._set_aside[0]["lr"] if self._set_aside else optimizer.param_groups[0]["lr"]
            values["learning_rate"] = float(unscaled) * factor
            pl_module.log_dict({self.log_prefix + name: value for name, value in values.items()}, batch_size=1)
        if self._in_step:
            self._scale(optimizer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the optimizers as they were."""
        self._leave(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the optimizers as they were, also where the step itself failed."""
        self._leave(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The batch of the run's first step, which is the reference if no other is given."""
        return {"reference": self._reference}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Scale by the same reference."""
        self._reference = state_dict["reference"]

    # ---- details -------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Scale now, unless the step has a closure, at whose end the batch is known; a scaler's step has none."""
        self._in_step = True
        if kwargs.get("closure") is None and len(args) < 2:
            self._scale(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._in_step = False
        self._restore(optimizer)

    def _scale(self, optimizer: torch.optim.Optimizer) -> None:
        self._restore(optimizer)  # a closure may be evaluated again
        factor = learning_rate_factor(self._ratio, self.power)
        for group in optimizer.param_groups:
            kept = {"lr": group["lr"]}
            group["lr"] = group["lr"] * factor
            if self.scale_betas:
                kept["betas"] = group["betas"]
                group["betas"] = tuple(beta**self._ratio for beta in group["betas"])
            self._set_aside.append(kept)

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        for group, kept in zip(optimizer.param_groups, self._set_aside, strict=False):
            group.update(kept)
        self._set_aside = []

    def _leave(self, trainer: L.Trainer) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._in_step = False  # also where the step never came to its end
        for optimizer in trainer.optimizers:
            self._restore(optimizer)


def _source(trainer: L.Trainer) -> Any:
    """What says how large the global batch is to be: a callback, or the data module."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "global_batch"):
            return callback
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule if getattr(datamodule, "global_batch", None) is not None else None


def _global_batch(trainer: L.Trainer) -> float:
    source = _source(trainer)
    if source is not None:
        return float(source.global_batch)
    return float(trainer.accumulate_grad_batches * data_parallel_size(trainer))
