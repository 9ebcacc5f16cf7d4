"""How many micro-batches an optimizer step holds, by schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_llm.callbacks.steps.batch_content import Target, micro_batches_for
from lightning_llm.callbacks.steps.exact_windows import ExactWindows
from lightning_llm.callbacks.steps.run_progress import check_milestones, progress_of, share_of_run
from lightning_llm.parallel import data_parallel_size
from lightning_llm.ramps import as_schedule
from lightning_llm.schedule import Interpolation, Progress, Schedule

__all__ = ["AccumulationSchedule", "micro_batches_for"]


class AccumulationSchedule(ExactWindows):
    """Set how many micro-batches an optimizer step holds: a number, milestones, or a ramp.

    Each step holds exactly the micro-batches asked for, also where the number changes inside an epoch; an epoch's
    last step holds what is left, and its gradient is the mean over that. No gradient of one step leaks into the next.
    A checkpoint asked for inside a window is that of the window's start, so a resumed run continues as if it had
    never stopped. For unequal numbers of tokens in the micro-batches add
    :class:`~lightning_llm.callbacks.TokenWeightedAccumulation`.

    Args:
        milestones: From when to the value from then on, as in :class:`~lightning_llm.Schedule`:
            ``{"0 steps": 4, "2M tokens": 8, "1 epoch": 16}``; a number is a constant. Or a ready schedule, or the name
            of a ramp (:mod:`lightning_llm.ramps`).
        target: What the values are. ``micro_batches``: K, loader batches per optimizer step and rank. ``sequences``
            or ``tokens`` (label tokens): the global batch over all ranks, from which K follows by what the loader
            has delivered so far.
        interpolation: Between milestones: ``step``, ``linear``, ``geometric``.
        token_fn: ``batch -> number of label tokens``, where tokens are counted and batches are not Hugging Face's.
        seed_steps: Seed the random generators at each window's start, as a function of the run's seed, the optimizer
            step and the rank, so that dropout is the same after a resume. False leaves the generators alone.
        log_name: Name under which the number of micro-batches in the step is logged; None for none.

    Raises:
        ValueError: For milestones that are no schedule or ask for less than one micro-batch; for the name of a ramp
            with ``target="micro_batches"``; with manual optimization, a strategy that accumulates inside its own engine
            (DeepSpeed), ``Trainer(accumulate_grad_batches=...)``, or another callback that sets it.

    References:
        Lightning issues 21534 (schedules by step), 19987 (short last window), 20550 (loader state); Smith et al.,
        Don't decay the learning rate, increase the batch size (2018).
    """

    def __init__(
        self,
        milestones: Mapping[str, float] | Mapping[int, float] | float | Schedule | str,
        target: Target = "micro_batches",
        interpolation: Interpolation = "step",
        token_fn: Callable[[Any], Any] | None = None,
        seed_steps: bool = True,
        log_name: str | None = "train/micro_batches",
    ) -> None:
        if target not in get_args(Target):
            raise ValueError(f"`target` must be 'micro_batches', 'sequences' or 'tokens', but got {target!r}.")
        self.schedule = as_schedule(milestones, interpolation)
        if isinstance(milestones, str) and target == "micro_batches":
            raise ValueError(
                f"The ramp {milestones!r} gives a global batch, not a number of micro-batches. Set target='sequences' "
                f"or 'tokens', whichever its batches are in."
            )
        whole = all(value.is_integer() for value in self.schedule.values)
        if min(self.schedule.values) < 1 or (target == "micro_batches" and not whole):
            raise ValueError(f"`milestones` need whole numbers of {target}, 1 at least; got {self.schedule.values}.")
        counts_tokens = "tokens" in self.schedule.units
        super().__init__(target, counts_tokens, token_fn, seed_steps, log_name)

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse milestones that this run never knows of, before anything is trained."""
        check_milestones(self.schedule, trainer)
        super().on_train_start(trainer, pl_module)

    # ---- what others may ask -------------------------------------------------------------------------------------

    def wanted(self, trainer: L.Trainer, batch_idx: int) -> float:
        """What the schedule says at this point of the run."""
        return self.schedule(progress_of(trainer, self.content.tokens, batch_idx))

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
        missing = [what for what in self.content.kinds if what not in content]
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
                f"beforehand. Set Trainer(max_steps=...), or use a learning-rate schedule by tokens "
                f"(LLMModule(lr_schedule_length='2B tokens')) or one that needs no length."
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
