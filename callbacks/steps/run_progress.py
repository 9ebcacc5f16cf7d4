"""How far a run is, for callbacks that follow a schedule."""

from __future__ import annotations

import lightning as L

from lightning_llm.schedule import Progress, Schedule


def progress_of(trainer: L.Trainer, tokens: float, batch_idx: int) -> Progress:
    """The progress before a micro-batch, equal on all ranks.

    Args:
        trainer: In ``fit``.
        tokens: Label tokens trained on, which the caller counts.
        batch_idx: Number of the micro-batch in the epoch.
    """
    epochs = trainer.current_epoch + batch_idx / trainer.num_training_batches
    return Progress(trainer.global_step, tokens, epochs, share_of_run(trainer, trainer.global_step, epochs))


def share_of_run(trainer: L.Trainer, steps: int, epochs: float) -> float | None:
    """The larger share of what ends the run, its steps or its epochs; None for a run without an end."""
    shares = [steps / trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        shares.append(epochs / trainer.max_epochs)
    return min(max(shares), 1.0) if shares else None


def check_milestones(schedule: Schedule, trainer: L.Trainer) -> None:
    """Refuse milestones that nobody can tell: parts of an epoch of unknown length, shares of an endless run.

    Raises:
        ValueError: Saying what to set.
    """
    is_endless = trainer.num_training_batches == float("inf")
    parts = any(at.unit == "epochs" and not at.value.is_integer() for at, _ in schedule.milestones)
    between = "epochs" in schedule.units and schedule.interpolation != "step"
    if is_endless and (parts or between or ("run" in schedule.units and trainer.max_steps == -1)):
        raise ValueError(
            f"{schedule!r} needs the length of an epoch, but the loader has none. Set Trainer(limit_train_batches= or "
            f"max_steps=), or use milestones in steps or tokens."
        )
    schedule(progress_of(trainer, 0.0, 0))  # a share of an endless run is refused now
