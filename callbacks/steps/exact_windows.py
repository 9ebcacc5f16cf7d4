"""Optimizer steps of any number of micro-batches, changed inside an epoch without a wrong gradient."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from lightning_llm.callbacks.steps.accumulation_window import (
    AccumulationWindow,
    WindowStart,
    is_cut_stream,
    seed_window,
)
from lightning_llm.callbacks.steps.batch_content import BatchContent, Target, micro_batches_for
from lightning_llm.callbacks.steps.gradients import scale_gradients
from lightning_llm.parallel import data_parallel_rank, data_parallel_size


class ExactWindows(L.Callback):
    """Base of callbacks that decide how many micro-batches an optimizer step holds: they say it in :meth:`wanted`.

    Each step holds exactly the micro-batches asked for, also where the number changes inside an epoch; an epoch's
    last step holds what is left, and its gradient is the mean over that. No gradient of one step leaks into the next.
    A checkpoint asked for inside a window is that of the window's start.

    Args:
        target: Unit of :meth:`wanted`: ``micro_batches`` of a rank, or ``sequences`` or ``tokens`` over all ranks, from
            which their number follows by what the loader has delivered so far.
        counts_tokens: Whether label tokens are counted in any case.
        token_fn: ``batch -> number of label tokens``; None for Hugging Face's batches.
        seed_steps: Seed the random generators at each window's start.
        log_name: Name under which the number of micro-batches in the step is logged; None for none.

    Attributes:
        global_batch: Wanted in the current window over all ranks, in units of ``target``; None before the first.
        sets_windows: Whether the number of micro-batches is this callback's to set; if not, its hooks do nothing.
    """

    sets_windows = True
    _seed: int | None  # of the run
    _last_window: AccumulationWindow

    def __init__(
        self,
        target: Target,
        counts_tokens: bool,
        token_fn: Callable[[Any], Any] | None,
        seed_steps: bool,
        log_name: str | None,
    ) -> None:
        self.content = BatchContent(target, counts_tokens, token_fn)
        self.seed_steps = seed_steps
        self.log_name = log_name
        self.global_batch: float | None = None
        self._forget()
        # Of the current window:
        self._opened_at: int | None = None  # optimizer step; None outside a window
        self._is_open = False
        self._held = 0  # micro-batches whose gradient has been added
        self._is_awaited = False  # the current one's has not yet
        self._owns_flag = False
        self._start = WindowStart()
        self._has_warned = False

    @abstractmethod
    def wanted(self, trainer: L.Trainer, batch_idx: int) -> float:
        """How much the window that begins at this micro-batch is to hold, in units of ``target``."""

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be served; go first, so that others see a window that is set."""
        if stage != "fit":
            return
        check_optimization(self, trainer, pl_module)
        if self.sets_windows:
            _check_windows(self, trainer, pl_module)
        if trainer.global_step == 0:
            self._forget()  # another run than the last; a checkpoint is loaded later
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The first window begins where the checkpoint ends."""
        states = checkpoint.get("callbacks", {})
        own_state = {self.state_key: states.get(self.state_key, self.state_dict())}
        self._start.note_checkpoint(trainer, checkpoint, own_state)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the seed of a new run; a resumed one finds the last window as it was."""
        self._opened_at = None
        if not self.sets_windows:
            return
        self._owns_flag = True
        trainer.accumulate_grad_batches = self._last_window
        if self._seed is None:
            self._seed = int(trainer.strategy.broadcast(torch.initial_seed()))
        self._start.note_buffers(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open a window before its first micro-batch; count what the micro-batch holds."""
        if not self.sets_windows or trainer.fit_loop._skip_backward:
            return  # weight averaging has taken over, to renew batch statistics
        if batch_idx == 0 or self._opened_at != trainer.global_step:
            self._open(trainer, pl_module, batch, batch_idx)
        self._is_awaited = True
        self.content.add(trainer, batch)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The micro-batch's gradient is in, or that of a piece of it."""
        self._held += self._is_awaited
        self._is_awaited = False

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Close the window: divide by what it really held, count what it was trained on (one all-reduce)."""
        if not self._is_open or trainer.fit_loop._skip_backward:
            return  # an optimizer that evaluates its closure again; weight averaging
        size = int(trainer.accumulate_grad_batches)
        if 0 < self._held < size and not _is_normalized(trainer):  # an unforeseen end, or `training_step` gave None
            scale_gradients(optimizer, size / self._held)
        self.content.end_window(trainer)
        self._last_window = trainer.accumulate_grad_batches  # type: ignore[assignment]
        self._is_open = False
        if self.log_name is not None:
            pl_module.log(self.log_name, float(self._held), batch_size=1)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the step: note where the next window begins."""
        if self._opened_at is not None and trainer.global_step > self._opened_at:
            self._opened_at = None
            self._start.note_end_of_step(trainer, pl_module, {self.state_key: self.state_dict()})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A window that ``on_train_batch_start`` or early stopping left unfinished is gone."""
        self._opened_at = None
        if self.sets_windows:
            trainer.accumulate_grad_batches = AccumulationWindow(int(trainer.accumulate_grad_batches))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Inside a window: callbacks that watch the validation must not see it twice after a resume."""
        if self._is_inside(trainer):
            self._start.note_validation(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Inside a window: save the state of its start. At an epoch's end: let the next one start with a fresh loader.

        Lightning resumes a loader that has nothing left, and so skips the next epoch without a word.
        """
        if self._is_inside(trainer):
            self._start.rewind(trainer, checkpoint)
        elif self.sets_windows and trainer.is_last_batch and not is_cut_stream(trainer):
            checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the Trainer its flag back."""
        self._give_flag_back(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the Trainer its flag back."""
        self._give_flag_back(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Seed, tokens, mean content of a micro-batch, and the last window: equal on all ranks."""
        return {
            "seed": self._seed,
            "tokens": self.content.tokens,
            "content": self.content.mean,
            "window": [int(self._last_window), self._last_window.offset],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        self._seed = state_dict["seed"]
        self.content.tokens = state_dict["tokens"]
        self.content.mean = state_dict["content"]
        self._last_window = AccumulationWindow(*state_dict["window"])

    # ---- details -------------------------------------------------------------------------------------------------

    @property
    def target(self) -> Target:
        """Unit of what is wanted."""
        return self.content.target

    def _forget(self) -> None:
        """What is in the checkpoint, equal on all ranks, as a new run begins."""
        self._seed = None
        self.content.forget()
        self._last_window = AccumulationWindow(1)

    def _give_flag_back(self, trainer: L.Trainer) -> None:
        if self._owns_flag:
            trainer.accumulate_grad_batches = 1
        self._owns_flag = False

    def _is_inside(self, trainer: L.Trainer) -> bool:
        return self._opened_at is not None and self._opened_at == trainer.global_step

    def _open(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            # Between two epochs no step is due, wherever the last window ended.
            before = {**self.state_dict(), "window": [2, 1]}
            self._start.note_start_of_epoch(trainer, pl_module, {self.state_key: before})
        self.content.begin_window(trainer, batch)
        ranks = data_parallel_size(trainer)
        wanted = self.wanted(trainer, batch_idx)
        self.global_batch = wanted * (ranks if self.target == "micro_batches" else 1)
        size = self._size(wanted, self.content.mean, ranks)
        left = trainer.num_training_batches - batch_idx
        if left > 0:  # a run that was resumed with larger batches may be beyond the epoch's end
            size = int(min(size, left))  # an epoch's last window: what is left
        trainer.accumulate_grad_batches = AccumulationWindow(size, batch_idx)
        self._opened_at = trainer.global_step
        self._is_open = True
        self._held = 0
        if self.seed_steps:
            assert self._seed is not None
            seed_window(self._seed, trainer.global_step, data_parallel_rank(trainer))

    def _size(self, target: float, content: float | None, ranks: int) -> int:
        if self.target == "micro_batches":
            return max(1, round(target))
        if not content:
            return 1  # no token so far: the next micro-batch will tell
        size = micro_batches_for(target, content * ranks)
        if not 0.5 <= size * content * ranks / target <= 2 and not self._has_warned:
            rank_zero_warn(
                f"{type(self).__name__} was asked for {target:.0f} {self.target} per optimizer step, but one "
                f"micro-batch over all {ranks} ranks holds {content * ranks:.0f} already. Make the loader's batches "
                f"smaller."
            )
            self._has_warned = True
        return size


def check_optimization(callback: L.Callback, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Refuse where somebody else decides when an optimizer step is due."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{type(callback).__name__} needs automatic optimization, but {type(pl_module).__name__} optimizes "
            f"manually: it decides itself when to step. Set `automatic_optimization = True`, or schedule there."
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise ValueError(
            f"{type(trainer.strategy).__name__} accumulates inside its own engine, with a number fixed at the start. "
            f"Use DDPStrategy, or ModelParallelStrategy for sharded parameters."
        )
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is not callback and isinstance(other, (ExactWindows, GradientAccumulationScheduler)):
            raise ValueError(
                f"{type(callback).__name__} and another {type(other).__name__} would both set the number of "
                f"micro-batches. Keep one; AccumulationSchedule with milestones in epochs ('1 epoch') does what "
                f"Lightning's scheduler does."
            )


def _check_windows(callback: ExactWindows, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    name = type(callback).__name__
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise ValueError(
            f"{name} must know when a batch begins, which Lightning does not tell where training_step takes "
            f"`dataloader_iter`. Let it take `batch`."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"{name} sets the number of micro-batches, but so does Trainer(accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}). Remove the flag; AccumulationSchedule("
            f"{trainer.accumulate_grad_batches}) is the same."
        )


def _is_normalized(trainer: L.Trainer) -> bool:
    """Whether a callback divides each gradient by what it holds, so that the number of micro-batches has no part."""
    return any(getattr(callback, "normalizes_gradients", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
