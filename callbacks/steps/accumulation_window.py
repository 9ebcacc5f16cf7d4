"""The micro-batches of one optimizer step: where they begin, and what the run was like at that point."""

from __future__ import annotations

import copy
import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

_LARGEST_STATISTIC = 2**20  # elements; larger buffers are tables or quantised weights, which a forward does not change


class AccumulationWindow(int):
    """A number of micro-batches per optimizer step, for ``trainer.accumulate_grad_batches``, counted from an offset.

    Lightning asks ``position % accumulate_grad_batches == 0`` to know whether a step is due and whether gradients are
    to be zeroed, with positions that count from the start of the epoch. A subclass of int is asked first, and
    answers from the offset. So a window may begin at any micro-batch, whatever sizes the windows before it had.

    Args:
        size: Micro-batches in the window.
        offset: Number of its first micro-batch in the epoch.

    Example:
        >>> window = AccumulationWindow(3, offset=4)  # micro-batches 4, 5, 6
        >>> [ready % window == 0 for ready in (5, 6, 7)]
        [False, False, True]
    """

    offset: int

    def __new__(cls, size: int, offset: int = 0) -> AccumulationWindow:
        """Make the number, and remember where its windows begin."""
        window = super().__new__(cls, size)
        window.offset = offset
        return window

    def __rmod__(self, position: int, /) -> int:
        return (position - self.offset) % int(self)


class WindowStart:
    """What a checkpoint asked for inside a window has to hold: the run at the window's start.

    Weights, optimizer and learning-rate schedules do not change within a window. Lightning's counters, the loader's
    and the data module's position, and statistics in buffers do, and after a validation the state of callbacks that
    watch it; gradients are in no checkpoint. So those are noted when a window starts, and replace what a checkpoint
    inside it would have held.

    ``own_state`` is the state of the callback that uses this, by its state key.
    """

    def __init__(self) -> None:
        self._loop: dict[str, Any] | None = None
        self._datamodule: dict[str, Any] | None = None
        self._callbacks: dict[str, Any] = {}  # by state key
        self._buffers: dict[str, Tensor] = {}

    def note_end_of_step(self, trainer: L.Trainer, pl_module: L.LightningModule, own_state: dict[str, Any]) -> None:
        """After an optimizer step, in ``on_train_batch_end``: the next window begins where this batch ends."""
        self._note(trainer, pl_module, own_state)

    def note_start_of_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule, own_state: dict[str, Any]) -> None:
        """In ``on_train_batch_start`` of an epoch's first batch: the epoch has begun, no batch is done.

        The loader has been asked for the first batch already. On resume it starts the epoch afresh, unless it is a
        stream that epochs only cut: that one goes on where the last epoch ended.
        """
        before = self._loop["state_dict"].get("combined_loader") if self._loop is not None else None
        self._note(trainer, pl_module, own_state)
        assert self._loop is not None
        self._loop["state_dict"].pop("combined_loader", None)
        if before is not None and is_cut_stream(trainer):
            self._loop["state_dict"]["combined_loader"] = before
        progress = self._loop["epoch_loop.batch_progress"]
        progress["is_last_batch"] = False
        for count in (progress["total"], progress["current"]):
            count["ready"] = count["started"] = count["processed"] = count["completed"]

    def note_checkpoint(self, trainer: L.Trainer, checkpoint: dict[str, Any], own_state: dict[str, Any]) -> None:
        """In ``on_load_checkpoint``: the run's first window begins where the checkpoint ends."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        self._loop = copy.deepcopy(checkpoint["loops"]["fit_loop"])
        self._datamodule = copy.deepcopy(checkpoint.get(type(datamodule).__qualname__))
        self._callbacks = own_state

    def note_validation(self, trainer: L.Trainer) -> None:
        """Before a validation inside a window, which a resumed run will repeat: how the callbacks were before it."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        watching = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        for callback in watching:
            if callback.state_key not in self._callbacks and (state := callback.state_dict()):
                self._callbacks[callback.state_key] = copy.deepcopy(state)

    def note_buffers(self, pl_module: L.LightningModule) -> None:
        """Before the run's first window: statistics as they were loaded."""
        self._buffers = {
            f"{prefix}.{name}" if prefix else name: buffer.detach().clone()
            for prefix, module in pl_module.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
            and name not in module._non_persistent_buffers_set
            and buffer.numel() <= _LARGEST_STATISTIC
        }

    def rewind(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
        """In ``on_save_checkpoint`` inside a window: put the state of its start into the checkpoint."""
        if self._loop is None:
            return
        checkpoint["loops"]["fit_loop"] = copy.deepcopy(self._loop)
        checkpoint["callbacks"].update(copy.deepcopy(self._callbacks))
        if self._datamodule:
            name = type(trainer.datamodule).__qualname__  # type: ignore[attr-defined]
            checkpoint[name] = copy.deepcopy(self._datamodule)
        for name, buffer in self._buffers.items():
            if name in checkpoint["state_dict"]:
                checkpoint["state_dict"][name] = buffer.clone()

    def _note(self, trainer: L.Trainer, pl_module: L.LightningModule, own_state: dict[str, Any]) -> None:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        self._loop = copy.deepcopy(trainer.fit_loop.state_dict())
        self._datamodule = copy.deepcopy(datamodule.state_dict()) if datamodule is not None else None
        self._callbacks = own_state
        self.note_buffers(pl_module)


def is_cut_stream(trainer: L.Trainer) -> bool:
    """Whether an epoch is a number of batches out of a loader without a length, which so never comes to an end."""
    loader: Any = trainer.fit_loop._combined_loader
    endless = loader is not None and all(sized_len(one) is None for one in loader.flattened)
    return endless and trainer.num_training_batches != float("inf")


def seed_window(seed: int, step: int, rank: int) -> None:
    """Seed Python, NumPy and torch (every device) for one optimizer step of one data-parallel rank.

    The random numbers of a step, dropout's above all, then depend on these three numbers alone: not on what was drawn
    before, on validation in between, or on whether the run was resumed. Ranks draw different numbers.

    Args:
        seed: Of the run.
        step: Number of the optimizer step.
        rank: Among the data-parallel ranks.
    """
    mixed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002 - users' code draws from this generator
    torch.manual_seed(mixed % 2**63)
