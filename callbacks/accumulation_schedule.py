"""How many micro-batches an optimizer step holds, by schedule, changed inside an epoch without a wrong gradient."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_llm.callbacks.accumulation_window import AccumulationWindow, WindowStart, is_cut_stream, seed_window
from lightning_llm.callbacks.counting import num_label_tokens, num_samples
from lightning_llm.callbacks.gradients import scale_gradients
from lightning_llm.callbacks.run_progress import check_milestones, progress_of, share_of_run
from lightning_llm.parallel import data_parallel_rank, data_parallel_size
from lightning_llm.schedule import Interpolation, Progress, Schedule

Target = Literal["micro_batches", "sequences", "tokens"]

_MEMORY = 0.9  # of the mean content of a micro-batch: how much of it the next window keeps


def micro_batches_for(target: float, content: float) -> int:
    """Micro-batches that come nearest to a global batch, one at least.

    Args:
        target: Sequences or tokens wanted in an optimizer step, over all ranks.
        content: Sequences or tokens in a micro-batch, over all ranks.

    Example:
        >>> micro_batches_for(target=100, content=16)
        6
    """
    return max(1, round(target / max(content, 1e-9)))


class AccumulationSchedule(L.Callback):
    """Set how many micro-batches an optimizer step holds: a number, milestones, or a ramp.

    Each step holds exactly the micro-batches asked for, also where the number changes inside an epoch; an epoch's
    last step holds what is left, and its gradient is the mean over that. No gradient of one step leaks into the next.
    A checkpoint asked for inside a window is that of the window's start, so a resumed run continues as if it had
    never stopped. For unequal numbers of tokens in the micro-batches add
    :class:`~lightning_llm.callbacks.TokenWeightedAccumulation`.

    Args:
        milestones: From when to the value from then on, as in :class:`~lightning_llm.Schedule`:
            ``{"0 steps": 4, "2M tokens": 8, "1 epoch": 16}``; a number is a constant.
        target: What the values are. ``micro_batches``: K, loader batches per optimizer step and rank. ``sequences``
            or ``tokens`` (label tokens): the global batch over all ranks, from which K follows by what the loader
            has delivered so far.
        interpolation: Between milestones: ``step``, ``linear``, ``geometric``.
        token_fn: ``batch -> number of label tokens``, where tokens are counted and batches are not Hugging Face's.
        seed_steps: Seed the random generators at each window's start, as a function of the run's seed, the optimizer
            step and the rank, so that dropout is the same after a resume. False leaves the generators alone.
        log_name: Name under which the number of micro-batches in the step is logged; None for none.

    Raises:
        ValueError: For milestones that are no schedule or ask for less than one micro-batch; with manual
            optimization, a strategy that accumulates inside its own engine (DeepSpeed),
            ``Trainer(accumulate_grad_batches=...)``, or another callback that sets it.

    References:
        Lightning issues 21534 (schedules by step), 19987 (short last window), 20550 (loader state); Smith et al.,
        Don't decay the learning rate, increase the batch size (2018).
    """

    _seed: int | None  # of the run
    _tokens: float  # label tokens trained on
    _content: float | None  # of a micro-batch of one rank: mean sequences or tokens
    _last_window: AccumulationWindow

    def __init__(
        self,
        milestones: Mapping[str, float] | Mapping[int, float] | float,
        target: Target = "micro_batches",
        interpolation: Interpolation = "step",
        token_fn: Callable[[Any], Any] | None = None,
        seed_steps: bool = True,
        log_name: str | None = "train/micro_batches",
    ) -> None:
        if target not in get_args(Target):
            raise ValueError(f"`target` must be 'micro_batches', 'sequences' or 'tokens', but got {target!r}.")
        self.schedule = Schedule(milestones, interpolation)
        whole = all(value.is_integer() for value in self.schedule.values)
        if min(self.schedule.values) < 1 or (target == "micro_batches" and not whole):
            raise ValueError(f"`milestones` need whole numbers of {target}, 1 at least; got {self.schedule.values}.")
        self.target = target
        self.token_fn = token_fn or num_label_tokens
        self.seed_steps = seed_steps
        self.log_name = log_name
        self.global_batch: float | None = None  # wanted in the current window over all ranks, in units of `target`
        self._forget()
        # Of the current window:
        self._opened_at: int | None = None  # optimizer step; None outside a window
        self._is_open = False
        self._held = 0  # micro-batches whose gradient has been added
        self._is_awaited = False  # the current one's has not yet
        self._owns_flag = False
        self._counted: list[Tensor] = []
        self._start = WindowStart()
        self._has_warned = False

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be served; go first, so that others see a window that is set."""
        if stage != "fit":
            return
        _check(self, trainer, pl_module)
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
        check_milestones(self.schedule, trainer)
        self._opened_at = None
        self._owns_flag = True
        trainer.accumulate_grad_batches = self._last_window
        if self._seed is None:
            self._seed = int(trainer.strategy.broadcast(torch.initial_seed()))
        self._start.note_buffers(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open a window before its first micro-batch; count what the micro-batch holds."""
        if trainer.fit_loop._skip_backward:  # weight averaging has taken over, to renew batch statistics
            return
        if batch_idx == 0 or self._opened_at != trainer.global_step:
            self._open(trainer, pl_module, batch, batch_idx)
        self._is_awaited = True
        if self._counts:
            self._counted.append(torch.stack([self._count(trainer, batch, what) for what in self._counts]))

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
        if self._counted:
            self._commit_counts(trainer)
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
        elif trainer.is_last_batch and not is_cut_stream(trainer):
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
            "tokens": self._tokens,
            "content": self._content,
            "window": [int(self._last_window), self._last_window.offset],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        self._seed = state_dict["seed"]
        self._tokens = state_dict["tokens"]
        self._content = state_dict["content"]
        self._last_window = AccumulationWindow(*state_dict["window"])

    # ---- what others may ask -------------------------------------------------------------------------------------

    def count_optimizer_steps(self, trainer: L.Trainer, num_batches: int, loader: Any) -> int:
        """Optimizer steps from the first epoch to the last, for :func:`~lightning_llm.total_optimizer_steps`.

        Args:
            trainer: Its ``max_epochs`` and ``max_steps`` bound the run.
            num_batches: Micro-batches of a rank in an epoch.
            loader: Tells ``batch_size`` and ``tokens_per_epoch`` where the schedule needs them.

        Raises:
            ValueError: If the schedule needs what the loader does not tell.
        """
        ranks = data_parallel_size(trainer)
        rows = getattr(loader, "batch_size", None) or getattr(
            getattr(loader, "batch_sampler", None), "batch_size", None
        )
        tokens = getattr(loader, "tokens_per_epoch", None)
        known = {"sequences": rows and float(rows), "tokens": tokens and tokens / (num_batches * ranks)}
        content: dict[str, float] = {what: value for what, value in known.items() if value}
        missing = [what for what in self._counts if what not in content]
        max_epochs = trainer.max_epochs or 1
        if missing and trainer.max_steps != -1:
            bound = min(trainer.max_steps, num_batches * max_epochs)
            rank_zero_warn(
                f"{type(loader).__name__} does not tell its {missing[0]} beforehand: the run is taken to have {bound} "
                f"optimizer steps, and is shorter if its epochs end first."
            )
            return bound
        if missing:
            raise ValueError(
                f"The length of the run depends on its {missing[0]}, which {type(loader).__name__} does not tell "
                f"beforehand. Set Trainer(max_steps=...), or use a learning-rate schedule that needs no length."
            )
        step, position, end = 0, 0, num_batches * max_epochs
        while position < end and step != trainer.max_steps:
            epochs = position / num_batches
            tokens_done = position * ranks * content.get("tokens", 0.0)
            progress = Progress(step, tokens_done, epochs, share_of_run(trainer, step, epochs))
            size = self._size(self.schedule(progress), content.get(self.target), ranks)
            left = num_batches - position % num_batches
            if self.schedule.is_final(progress):  # nothing changes any more
                return (
                    step
                    + math.ceil(left / size)
                    + (end - position - left) // num_batches * math.ceil(num_batches / size)
                )
            position += min(size, left)
            step += 1
        return step

    # ---- details -------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """What is in the checkpoint, equal on all ranks, as a new run begins."""
        self._seed = None
        self._tokens = 0.0
        self._content = None
        self._last_window = AccumulationWindow(1)

    def _give_flag_back(self, trainer: L.Trainer) -> None:
        if self._owns_flag:
            trainer.accumulate_grad_batches = 1
        self._owns_flag = False

    def _is_inside(self, trainer: L.Trainer) -> bool:
        return self._opened_at is not None and self._opened_at == trainer.global_step

    @property
    def _counts(self) -> list[str]:
        """What has to be counted in each micro-batch."""
        tokens = "tokens" in self.schedule.units or self.target == "tokens"
        return ["sequences"] * (self.target == "sequences") + ["tokens"] * tokens

    def _open(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            # Between two epochs no step is due, wherever the last window ended.
            before = {**self.state_dict(), "window": [2, 1]}
            self._start.note_start_of_epoch(trainer, pl_module, {self.state_key: before})
        if self.target != "micro_batches" and self._content is None:  # the run's first window
            mine = self._count(trainer, batch, self.target)
            self._content = float(trainer.strategy.reduce(mine, reduce_op="mean"))
        ranks = data_parallel_size(trainer)
        wanted = self.schedule(progress_of(trainer, self._tokens, batch_idx))
        self.global_batch = wanted * (ranks if self.target == "micro_batches" else 1)
        size = self._size(wanted, self._content, ranks)
        left = trainer.num_training_batches - batch_idx
        if left > 0:  # a run that was resumed with larger batches may be beyond the epoch's end
            size = int(min(size, left))  # an epoch's last window: what is left
        trainer.accumulate_grad_batches = AccumulationWindow(size, batch_idx)
        self._opened_at = trainer.global_step
        self._is_open = True
        self._held = 0
        self._counted = []
        if self.seed_steps:
            assert self._seed is not None
            seed_window(self._seed, trainer.global_step, data_parallel_rank(trainer))

    def _size(self, target: float, content: float | None, ranks: int) -> int:
        if self.target == "micro_batches":
            return max(1, round(target))
        assert content is not None
        size = micro_batches_for(target, content * ranks)
        if not 0.5 <= size * content * ranks / target <= 2 and not self._has_warned:
            rank_zero_warn(
                f"AccumulationSchedule was asked for {target:.0f} {self.target} per optimizer step, but one "
                f"micro-batch over all {ranks} ranks holds {content * ranks:.0f} already. Make the loader's batches "
                f"smaller."
            )
            self._has_warned = True
        return size

    def _count(self, trainer: L.Trainer, batch: Any, what: str) -> Tensor:
        device = trainer.strategy.root_device
        exact = torch.float32 if device.type == "mps" else torch.float64
        number = num_samples(batch) if what == "sequences" else self.token_fn(batch)
        return torch.as_tensor(number, device=device).to(exact)

    def _commit_counts(self, trainer: L.Trainer) -> None:
        counted = torch.stack(self._counted)
        # An epoch's last micro-batch may be short: it counts, but says nothing of those to come.
        usual = counted[:-1] if trainer.is_last_batch and len(counted) > 1 else counted
        held = usual.new_tensor([float(len(usual))])
        sums = trainer.strategy.reduce(torch.cat([counted.sum(0), usual.sum(0), held]), reduce_op="sum")
        share = 1 / trainer.world_size  # ranks that split a layer count a batch each
        everything, typical = sums[: len(self._counts)].tolist(), sums[len(self._counts) : -1].tolist()
        number = float(sums[-1])
        if "tokens" in self._counts:
            self._tokens += everything[-1] * share * data_parallel_size(trainer)
        if self.target != "micro_batches":
            mean = typical[self._counts.index(self.target)] / number
            assert self._content is not None
            self._content = _MEMORY * self._content + (1 - _MEMORY) * mean


def _is_normalized(trainer: L.Trainer) -> bool:
    """Whether a callback divides each gradient by what it holds, so that the number of micro-batches has no part."""
    return any(getattr(callback, "normalizes_gradients", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _check(schedule: AccumulationSchedule, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"AccumulationSchedule needs automatic optimization, but {type(pl_module).__name__} optimizes manually: it "
            f"decides itself when to step. Set `automatic_optimization = True`, or schedule there."
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise ValueError(
            f"{type(trainer.strategy).__name__} accumulates inside its own engine, with a number fixed at the start. "
            f"Use DDPStrategy, or ModelParallelStrategy for sharded parameters."
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise ValueError(
            "AccumulationSchedule must know when a batch begins, which Lightning does not tell where training_step "
            "takes `dataloader_iter`. Let it take `batch`."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"AccumulationSchedule sets the number of micro-batches, but so does Trainer(accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}). Remove the flag; AccumulationSchedule("
            f"{trainer.accumulate_grad_batches}) is the same."
        )
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is not schedule and isinstance(other, (AccumulationSchedule, GradientAccumulationScheduler)):
            raise ValueError(
                f"AccumulationSchedule and another {type(other).__name__} would both set the number of micro-batches. "
                f"Keep one; milestones in epochs ('1 epoch') do what Lightning's scheduler does."
            )
