"""How long the rows of a step are, by schedule: short ones first, the same tokens in each step, no token dropped."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_llm.callbacks.dynamic_batch_scaler import DynamicBatchScaler
from lightning_llm.callbacks.pieces.columns import truncate
from lightning_llm.callbacks.pieces.rehearsal import rehearse_step
from lightning_llm.callbacks.steps.counting import num_targets
from lightning_llm.callbacks.steps.run_progress import check_milestones, progress_of
from lightning_llm.loss import exact_dtype
from lightning_llm.parallel import data_parallel_size
from lightning_llm.schedule import Interpolation, Progress, Schedule


def length_at(schedule: Schedule, progress: Progress, round_to: int = 64) -> int:
    """Tokens in a row: a milestone's value as it stands, values between two rounded down to few different ones.

    Example:
        >>> ramp = Schedule({"0 steps": 100, "10 steps": 1000}, interpolation="linear")
        >>> [length_at(ramp, Progress(steps=steps)) for steps in (0, 1, 5, 10, 99)]
        [100, 128, 512, 1000, 1000]
    """
    value = schedule(progress)
    if value in schedule.values:
        return int(value)
    return max(int(value) // round_to * round_to, int(min(schedule.values)))


class SequenceLengthSchedule(L.Callback):
    """Train on short rows first and on longer ones later, with the tokens of each optimizer step as they are.

    The loader goes on as ever: the rows that it samples, their order and where a run is resumed do not change. Each of
    its batches of rows * width tokens is cut into about rows * width / length rows of ``length`` tokens, with every
    target in one of them: a step has the same label tokens, but less context, and attention costs less. The data
    module cuts, by a method ``cut_batch(batch, length)``, as :class:`~lightning_llm.datamodules.TextDataModule` and
    :class:`~lightning_llm.datamodules.StreamingTextDataModule` have. Batches of other loaders are truncated, which
    **drops tokens**, as a warning says once.

    The length changes only between optimizer steps. Batches are cut before they are moved to the device and before any
    callback sees them, so accumulation, pieces, windows along the sequence and counts are those of the short rows.
    Validation, test and prediction are not cut.

    Args:
        milestones: From when to the tokens in a row from then on, as in :class:`~lightning_llm.Schedule`:
            ``{"0 steps": 256, "1M tokens": 2048}``. Lengths above that of the loader's rows change nothing.
        interpolation: Between milestones: ``step``, ``linear``, ``geometric``.
        round_to: Lengths between two milestones are multiples of this, so that kernels see few shapes.
        reserve: Before the first step, run one at full length, with the optimizer's state in memory, and take it back:
            the allocator has its largest blocks then, and what would not fit fails now.
        cut_fn: ``(batch, length) -> batch``, in place of the data module's method, for what the loader gives.
        token_fn: ``batch -> number of label tokens``, where milestones count tokens and batches are not Hugging Face's.
        log_name: Name under which the length is logged; None for none.

    Raises:
        ValueError: For milestones that are no schedule or no lengths; for batches that nobody says how to cut; where
            ``training_step`` takes ``dataloader_iter``; for ``reserve`` with manual optimization or beside
            :class:`~lightning_llm.callbacks.DynamicBatchScaler`.

    References:
        Li et al., The stability-efficiency dilemma: sequence length warmup (arXiv 2108.06084); Pouransari et al.,
        Dataset decomposition (arXiv 2405.13226).
    """

    sequence_length: int | None  # tokens in a row of the current optimizer step at most
    _chosen_at: int | None  # the optimizer step that it was chosen for
    _tokens: float  # label tokens trained on, over all ranks
    _pending: tuple[int, float]  # an optimizer step, and the tokens that count once it is done
    _counted: list[Tensor]  # of this rank's micro-batches since the last step

    def __init__(
        self,
        milestones: Mapping[str, float] | Mapping[int, float] | float,
        interpolation: Interpolation = "step",
        round_to: int = 64,
        reserve: bool = False,
        cut_fn: Callable[[Any, int], Any] | None = None,
        token_fn: Callable[[Any], Any] | None = None,
        log_name: str | None = "train/sequence_length",
    ) -> None:
        self.schedule = Schedule(milestones, interpolation)
        if min(self.schedule.values) < 2 or not all(value.is_integer() for value in self.schedule.values):
            raise ValueError(f"`milestones` need whole numbers of tokens, 2 at least; got {self.schedule.values}.")
        if round_to < 1:
            raise ValueError(f"`round_to` is a number of tokens, 1 at least, but got {round_to}.")
        self.round_to = round_to
        self.reserve = reserve
        self.cut_fn = cut_fn
        self.token_fn = token_fn
        self.log_name = log_name
        self._trainer: L.Trainer | None = None  # while training
        self._unpatch: Callable[[], None] | None = None
        self._has_warned = False
        self._forget()

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be served; stand where batches pass on their way to the device."""
        self._leave()
        if stage != "fit":
            return
        _check(self, trainer, pl_module)
        if trainer.global_step == 0:
            self._forget()  # another run than the last; a checkpoint is loaded later
        self._listen(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From now on batches are cut; before that, take the memory of whole ones if asked."""
        check_milestones(self.schedule, trainer)
        _warn(self, trainer)
        if self.reserve:
            rehearse_step(trainer)
        self._counts = "tokens" in self.schedule.units
        self._counted = []
        self._settle(trainer)
        self._pending = (trainer.global_step, 0.0)  # a step that an earlier fit left undone is done anew
        self._trainer = trainer

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Count what the step is trained on, if milestones are in tokens (one all-reduce)."""
        if self._counted:
            mine = sum(self._counted[1:], self._counted[0])
            total = float(trainer.strategy.reduce(mine, reduce_op="sum"))
            share = data_parallel_size(trainer) / trainer.world_size  # ranks that split a layer count a batch each
            self._settle(trainer)
            self._pending = (trainer.global_step, self._pending[1] + total * share)
            self._counted = []
        if self.log_name is not None and self.sequence_length is not None:
            pl_module.log(self.log_name, float(self.sequence_length), batch_size=1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """No more batches are cut."""
        self._settle(trainer)
        self._trainer = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module its batches back."""
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the module its batches back."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Tokens trained on, the length and the optimizer step that it was chosen for: equal on all ranks."""
        if self._trainer is not None:
            self._settle(self._trainer)
        return {"tokens": self._tokens, "length": self.sequence_length, "chosen_at": self._chosen_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved; inside an accumulation window, with the length of its start."""
        self._tokens = state_dict["tokens"]
        self.sequence_length = state_dict["length"]
        self._chosen_at = state_dict["chosen_at"]
        self._pending = (0, 0.0)

    # ---- details -------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """As a new run begins."""
        self.sequence_length = self._chosen_at = None
        self._tokens = 0.0
        self._pending = (0, 0.0)
        self._counts = False
        self._counted = []

    def _listen(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning has no hook for callbacks before a batch is moved: stand before the module's own."""
        inner = pl_module._on_before_batch_transfer

        @functools.wraps(inner)
        def before_transfer(batch: Any, dataloader_idx: int = 0) -> Any:
            is_ours = self._trainer is trainer and trainer.training and self in trainer.callbacks  # type: ignore[attr-defined]
            return inner(self._cut(trainer, batch) if is_ours else batch, dataloader_idx)

        def unpatch() -> None:
            pl_module.__dict__.pop("_on_before_batch_transfer", None)

        pl_module.__dict__["_on_before_batch_transfer"] = before_transfer
        self._unpatch = unpatch

    def _leave(self) -> None:
        if self._unpatch is not None:
            self._unpatch()
        self._unpatch = None
        self._trainer = None

    def _cut(self, trainer: L.Trainer, batch: Any) -> Any:
        batch_idx = trainer.fit_loop.epoch_loop.batch_progress.current.ready  # not counted yet
        if batch_idx == 0 or self._chosen_at != trainer.global_step:
            self._choose(trainer, batch_idx)
        assert self.sequence_length is not None
        own: Callable[..., Any] = getattr(trainer.datamodule, "cut_batch", self._truncate)  # type: ignore[attr-defined]
        batch = (self.cut_fn or own)(batch, self.sequence_length)
        if self._counts:
            device = trainer.strategy.root_device
            number = num_targets(trainer.lightning_module, batch, self.token_fn)
            self._counted.append(torch.as_tensor(number).to(device, exact_dtype(device)))
        return batch

    def _choose(self, trainer: L.Trainer, batch_idx: int) -> None:
        """The length of the optimizer step that begins."""
        self._settle(trainer)
        progress = progress_of(trainer, self._tokens, batch_idx)
        self.sequence_length = length_at(self.schedule, progress, self.round_to)
        self._chosen_at = trainer.global_step
        self._counts = "tokens" in self.schedule.units and not self.schedule.is_final(progress)
        self._counted = []

    def _settle(self, trainer: L.Trainer) -> None:
        """The tokens of a step count when it is done: a step that raises an error, or is saved before, has none."""
        step, tokens = self._pending
        if trainer.global_step > step:
            self._tokens += tokens
            self._pending = (trainer.global_step, 0.0)

    def _truncate(self, batch: Any, length: int) -> Any:
        cut = truncate(batch, length)
        if cut is not batch and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"SequenceLengthSchedule truncates rows: of {batch['input_ids'].shape[1]} columns {length} are kept, "
                f"the tokens behind them are dropped, and a step has fewer tokens than at full length. No data module "
                f"with `cut_batch(batch, length)` belongs to the loader: use TextDataModule, which cuts rows and "
                f"drops nothing, or pass cut_fn=lambda batch, length: ..."
            )
        return cut


def _check(schedule: SequenceLengthSchedule, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise ValueError(
            "SequenceLengthSchedule must see each batch before it is moved, but training_step takes `dataloader_iter` "
            "and fetches its own. Let it take `batch`."
        )
    if not schedule.reserve:
        return
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"reserve=True runs training_step and takes it back, but {type(pl_module).__name__} optimizes manually in "
            f"it. Set reserve=False."
        )
    if any(isinstance(other, DynamicBatchScaler) for other in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            "reserve=True would run whole batches, which DynamicBatchScaler may have to cut. Set reserve=False and "
            "DynamicBatchScaler(find='start'): it searches at full length, with the optimizer's state in memory."
        )


def _warn(schedule: SequenceLengthSchedule, trainer: L.Trainer) -> None:
    shortest, rows = min(schedule.schedule.values), getattr(trainer.datamodule, "max_length", None)  # type: ignore[attr-defined]
    if isinstance(rows, int) and shortest >= rows:
        rank_zero_warn(
            f"SequenceLengthSchedule has no effect: its shortest length is {shortest:.0f}, and no row of "
            f"{type(trainer.datamodule).__name__} is longer than max_length={rows}."  # type: ignore[attr-defined]
        )
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if getattr(other, "target", None) == "sequences":
            option, others = "target", "target='tokens' or 'micro_batches'"
            if hasattr(other, "unit"):
                option, others = (
                    "unit",
                    "unit='tokens', or global_batch_tokens where the data module has a global batch",
                )
            rank_zero_warn(
                f"{type(other).__name__}({option}='sequences') counts rows, and SequenceLengthSchedule makes more of "
                f"them while they are short: a step would hold fewer tokens. Use {others}."
            )
