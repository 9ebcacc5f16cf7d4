"""How long a run is: its optimizer steps, its tokens."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_llm.duration import Duration


def total_optimizer_steps(trainer: L.Trainer) -> float:
    """Optimizer steps of the whole run, for learning-rate schedules: call it in ``configure_optimizers``.

    Counts the windows as they will be: a short last one in each epoch, and those of an
    :class:`~lightning_llm.callbacks.AccumulationSchedule` or of Lightning's ``GradientAccumulationScheduler``, which
    ``trainer.estimated_stepping_batches`` does not know. A stateful loader keeps the state that it is resumed with.

    Args:
        trainer: In ``fit``, with its callbacks and data.

    Returns:
        The number of steps: exact, but for a schedule of tokens an estimate from the mean tokens of a micro-batch.
        Infinite for a run without an end, and for one whose batch adapts to what is measured. With ``max_steps`` the
        run may still end earlier where ``max_time``, early stopping or a loader of unknown length ends it.

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


def tokens_of(trainer: L.Trainer, length: Duration) -> float:
    """Label tokens that a run trains on in a length of time: call it in ``configure_optimizers``.

    Args:
        trainer: In ``fit``, with its data.
        length: In tokens, in epochs, or as a share of the run, which is then one of ``Trainer(max_epochs=)``.

    Raises:
        ValueError: For steps and samples, for a loader that does not tell its ``tokens_per_epoch``, and for a share of
            a run without ``max_epochs``.
    """
    if length.unit == "tokens":
        return length.value
    if length.unit in ("steps", "samples"):
        raise ValueError(f"How many tokens '{length}' hold depends on the batch. Use tokens or epochs.")
    epochs = length.value
    if length.unit == "run":
        if trainer.max_epochs is None or trainer.max_epochs == -1:
            raise ValueError(f"'{length}' of the run needs Trainer(max_epochs=...). Set it, or use tokens or epochs.")
        epochs *= trainer.max_epochs
    num_batches, loader = _epoch(trainer)
    tokens = getattr(loader, "tokens_per_epoch", None)
    if tokens is None:
        raise ValueError(f"{type(loader).__name__} does not tell how many tokens '{length}' are. Use tokens.")
    share = num_batches / max(len(loader), 1)  # Trainer(limit_train_batches=)
    return float(epochs * tokens * share)


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
