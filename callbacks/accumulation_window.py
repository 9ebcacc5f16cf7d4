"""The micro-batches of one optimizer step: where they begin, and what the run was like at that point."""

from __future__ import annotations

import copy
import random
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase


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
    and the data module's position, and batch statistics do; gradients are in no checkpoint. So those are noted when a
    window starts, and replace what a checkpoint inside it would have held.
    """

    def __init__(self) -> None:
        self._loop: dict[str, Any] | None = None
        self._datamodule: dict[str, Any] | None = None
        self._callback: dict[str, Any] = {}
        self._buffers: dict[str, Tensor] = {}

    def note_end_of_step(self, trainer: L.Trainer, pl_module: L.LightningModule, state: dict[str, Any]) -> None:
        """After an optimizer step, in ``on_train_batch_end``: the next window begins where this batch ends."""
        self._note(trainer, pl_module, state)

    def note_start_of_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule, state: dict[str, Any]) -> None:
        """In ``on_train_batch_start`` of an epoch's first batch: the epoch has begun, no batch is done.

        The loader has been asked for the first batch already; on resume it starts the epoch afresh.
        """
        self._note(trainer, pl_module, state)
        assert self._loop is not None
        self._loop["state_dict"].pop("combined_loader", None)
        progress = self._loop["epoch_loop.batch_progress"]
        progress["is_last_batch"] = False
        for count in (progress["total"], progress["current"]):
            count["ready"] = count["started"] = count["processed"] = count["completed"]

    def note_checkpoint(self, trainer: L.Trainer, checkpoint: dict[str, Any], state: dict[str, Any]) -> None:
        """In ``on_load_checkpoint``: the run's first window begins where the checkpoint ends."""
        self._loop = copy.deepcopy(checkpoint["loops"]["fit_loop"])
        self._datamodule = copy.deepcopy(checkpoint.get(type(trainer.datamodule).__qualname__))  # type: ignore[attr-defined]
        self._callback = state

    def note_buffers(self, pl_module: L.LightningModule) -> None:
        """Before the run's first window: batch statistics as they were loaded."""
        self._buffers = {
            f"{prefix}.{name}" if prefix else name: buffer.clone()
            for prefix, module in pl_module.named_modules()
            if isinstance(module, _NormBase)
            for name, buffer in module.named_buffers(recurse=False)
        }

    def rewind(self, trainer: L.Trainer, checkpoint: dict[str, Any], state_key: str) -> None:
        """In ``on_save_checkpoint`` inside a window: put the state of its start into the checkpoint.

        Args:
            trainer: Whose data module's state is replaced.
            checkpoint: As Lightning is about to write it.
            state_key: Of the callback whose state was noted.
        """
        if self._loop is None:
            return
        checkpoint["loops"]["fit_loop"] = copy.deepcopy(self._loop)
        checkpoint["callbacks"][state_key] = dict(self._callback)
        if self._datamodule:
            checkpoint[type(trainer.datamodule).__qualname__] = copy.deepcopy(self._datamodule)  # type: ignore[attr-defined]
        for name, buffer in self._buffers.items():
            if name in checkpoint["state_dict"]:
                checkpoint["state_dict"][name] = buffer.clone()

    def _note(self, trainer: L.Trainer, pl_module: L.LightningModule, state: dict[str, Any]) -> None:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        self._loop = copy.deepcopy(trainer.fit_loop.state_dict())
        self._datamodule = copy.deepcopy(datamodule.state_dict()) if datamodule is not None else None
        self._callback = state
        self.note_buffers(pl_module)


def seed_window(seed: int, step: int, rank: int) -> None:
    """Seed Python, NumPy and torch (every device) for one optimizer step of one data-parallel rank.

    The random numbers of a step, dropout's above all, then depend on these three numbers alone: not on what was drawn
    before, on validation in between, or on whether the run was resumed.

    Args:
        seed: Of the run.
        step: Number of the optimizer step.
        rank: Among the data-parallel ranks.
    """
    mixed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002 - users' code draws from this generator
    torch.manual_seed(mixed % 2**63)
