"""Where a Trainer stands in its epoch, read and set: the one place that touches Lightning's counters of batches.

Lightning counts the micro-batches of a rank. A run that goes on with another number of ranks or micro-batches per step,
or with other batches, has another count for the same place in the data, and one that was saved inside an accumulation
window has to begin that window again, since no checkpoint holds its gradients.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn


def is_fitting(trainer: L.Trainer | None) -> bool:
    """Whether the trainer is in ``fit``, validation inside it included."""
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def trained_batches(trainer: L.Trainer) -> int:
    """Micro-batches of a rank in this epoch up to its last optimizer step.

    Those after it are in gradients that no checkpoint holds, and those that workers have prepared are in nothing.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    processed = int(progress.current.processed)
    is_over = progress.is_last_batch and processed == progress.current.ready
    if is_over or processed == trainer.num_training_batches:
        return processed  # an epoch's last window may be short
    return processed - int(processed % trainer.accumulate_grad_batches)


def is_resuming(trainer: L.Trainer) -> bool:
    """Whether Lightning goes on from a checkpoint's counters: true until the first batch after it."""
    loop: Any = trainer.fit_loop.epoch_loop
    return bool(loop.restarting)


def align_batches(trainer: L.Trainer, batches: int) -> None:
    """After a checkpoint was loaded, before the epoch goes on: let Lightning count ``batches`` of it as done.

    All its counts move by the same number, so that what Lightning reads from their differences (at which point of a
    batch the checkpoint was saved) stays as it was.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    processed = int(loop.batch_progress.current.processed)
    if processed in (0, batches):
        return
    if batches < processed and processed % trainer.accumulate_grad_batches:
        loop._batches_that_stepped -= 1  # Lightning takes a restart to follow a step, and adds one
    for counts in (loop.batch_progress.current, loop.batch_progress.total):
        for name in ("ready", "started", "processed", "completed"):
            setattr(counts, name, getattr(counts, name) + batches - processed)


def begin_epoch(trainer: L.Trainer) -> None:
    """After a checkpoint was loaded at an epoch's end: let Lightning begin the next one, and not take it for done."""
    loop: Any = trainer.fit_loop.epoch_loop
    if loop.restarted_on_train_batch_end:
        align_batches(trainer, int(trainer.num_training_batches))  # Lightning itself resets what is complete
    else:
        align_batches(trainer, 0)
        loop.batch_progress.is_last_batch = False


def step_back_epoch(trainer: L.Trainer) -> None:
    """Let Lightning count one epoch less: one that ``max_steps`` ended early, which it takes for done, goes on."""
    loop: Any = trainer.fit_loop
    for counts in (loop.epoch_progress.current, loop.epoch_progress.total):
        for name in ("ready", "started", "processed", "completed"):
            setattr(counts, name, getattr(counts, name) - 1)
    loop.epoch_loop.batch_progress.is_last_batch = False


def limited(trainer: L.Trainer, num_batches: int) -> int:
    """How many of an epoch's batches ``Trainer(limit_train_batches=)`` lets through."""
    limit = trainer.limit_train_batches
    return int(num_batches * limit) if isinstance(limit, float) else min(num_batches, limit)


def announce_length(trainer: L.Trainer, num_batches: int) -> None:
    """Tell Lightning that the epoch has another number of batches than when it set the data up."""
    loop: Any = trainer.fit_loop
    if loop._combined_loader is None or len(loop._combined_loader.flattened) != 1:
        return
    allowed = limited(trainer, num_batches)
    if allowed == loop.max_batches:
        return
    loop.max_batches = allowed
    loop._combined_loader.limits = [allowed]
    if loop._combined_loader._iterator is not None:
        loop._combined_loader._iterator.limits = [allowed]
    if loop._data_fetcher is not None:
        loop._data_fetcher.length = allowed
    if isinstance(trainer.val_check_interval, float) and trainer.val_check_batch is not None:
        trainer.val_check_batch = max(1, int(allowed * trainer.val_check_interval))
