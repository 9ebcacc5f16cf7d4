"""How many optimizer steps a run has."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def total_optimizer_steps(trainer: L.Trainer) -> float:
    """Optimizer steps of the whole run, for learning-rate schedules: call it in ``configure_optimizers``.

    Counts the windows as they will be: a short last one in each epoch, and those of an
    :class:`~lightning_llm.callbacks.AccumulationSchedule` or of Lightning's ``GradientAccumulationScheduler``, which
    ``trainer.estimated_stepping_batches`` does not know. A stateful loader keeps the state that it is resumed with.

    Args:
        trainer: In ``fit``, with its callbacks and data.

    Returns:
        The number of steps: exact, but for a schedule of tokens an estimate from the mean tokens of a micro-batch.
        Infinite for a run without an end. With ``max_steps`` the run may still end earlier where ``max_time``, early
        stopping or a loader of unknown length ends it.

    Raises:
        ValueError: If an accumulation schedule depends on tokens or sequences whose number nobody knows.
    """
    limit = math.inf if trainer.max_steps == -1 else trainer.max_steps
    if trainer.max_epochs is None or trainer.max_epochs == -1:
        return limit
    num_batches, loader = _epoch(trainer)
    if math.isinf(num_batches):
        return limit
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "count_optimizer_steps"):
            return min(limit, float(callback.count_optimizer_steps(trainer, int(num_batches), loader)))
    factors = [trainer.accumulate_grad_batches] * trainer.max_epochs
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            factors = [callback.get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs)]
    epochs = [num_batches] * trainer.max_epochs
    if hasattr(loader, "epoch_lengths"):  # epochs of unequal length, such as under a growing global batch
        epochs = loader.epoch_lengths(trainer.max_epochs)
    return min(limit, sum(math.ceil(batches / factor) for batches, factor in zip(epochs, factors, strict=True)))


def _epoch(trainer: L.Trainer) -> tuple[float, Any]:
    """Micro-batches of one rank in an epoch, and the loader; sets the training data up if Lightning has not yet."""
    loop: Any = trainer.fit_loop
    was_set_up = loop._combined_loader is not None
    loop.setup_data()
    num_batches = float(trainer.num_training_batches)
    loaders = loop._combined_loader.flattened if loop._combined_loader is not None else [None]
    if not was_set_up and any(hasattr(loader, "load_state_dict") for loader in loaders):
        # Lightning loads a loader's state only while it sets the data up, and the checkpoint comes later: once more.
        loop._data_fetcher.teardown()
        loop._data_fetcher = loop._combined_loader = None
        loop._last_train_dl_reload_epoch = float("-inf")
    return num_batches, loaders[0]
