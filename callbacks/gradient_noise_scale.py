"""The gradient noise scale of a run, measured from what accumulation and ranks compute anyway."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_llm.callbacks.noise.parts import MeasuredStep, Part, pair_up, sums_of
from lightning_llm.callbacks.noise.watch import GradientWatch
from lightning_llm.callbacks.steps.accumulation_window import AccumulationWindow
from lightning_llm.callbacks.steps.counting import num_label_tokens, num_samples
from lightning_llm.callbacks.steps.step_outputs import listen_to_training_step
from lightning_llm.noise_scale import NoiseScaleAverage, noise_and_signal
from lightning_llm.parallel import data_parallel_size

_UNITS = ("tokens", "sequences")
_ONE_PART = (
    "GradientNoiseScale compares the gradients of two micro-batches of an optimizer step at least, but this step has "
    "one, on one rank: it is not measured. Set Trainer(accumulate_grad_batches=2) or more (where a callback sets the "
    "global batch: one of two micro-batches at least), use several ranks or DynamicBatchScaler(max_piece=...), or pass "
    "consecutive=True, which compares steps that follow each other and keeps a copy of the gradient."
)


class GradientNoiseScale(L.Callback):
    r"""Measure the gradient noise scale :math:`S / G^2`, the batch at which signal and noise are equal.

    A step's gradient is the mean over parts: its micro-batches, the pieces of them, and ranks. How far the parts'
    gradients scatter tells the noise S of a single token (or sequence); what is left of the step's squared norm is the
    signal :math:`G^2`. Parts may be of any unequal sizes. Each part's norm is taken as its backward makes it, so no
    gradient is kept, and the only communication is one small all-reduce in a measured step.

    Both are averaged over steps, and divided by each other at the end. After each measured step, equal on all ranks:
    ``noise_scale_tokens`` and ``noise_scale_sequences``, with ``interval_tokens`` and ``interval_sequences``. They say
    how large a batch is worth its cost *now*; the noise scale grows in training, often by orders of magnitude.

    Counting in tokens takes a batch's tokens to be independent, which those of a sequence are not: the value holds for
    batches of sequences like these. ``noise_scale_sequences`` takes sequences to be independent and equally noisy.

    Args:
        smoothing: Of the averages, per measured step: 0.99 looks back over about 200.
        every_n_steps: Optimizer steps from one measured step to the next; the others cost nothing.
        confidence: Of the intervals.
        per_group: Also for each of the optimizer's parameter groups: :meth:`of_groups`, and logged.
        precondition: Measure gradients as Adam divides them, with the second moment of the step before.
        consecutive: Where a step has one part only, compare it with the next step's: needs a copy of the gradient.
            Without it such steps are not measured.
        token_fn: ``(batch, outputs) -> label tokens``. By default ``num_tokens`` of what ``training_step`` returns,
            else the batch's ``labels``, else tokens are not counted.
        sequence_fn: ``batch -> sequences``, its rows by default. Rows that are packed hold several.
        log_prefix: Logged as ``<prefix>noise_scale_tokens`` and so on, with ``_low`` and ``_high`` for the interval,
            where they are finite; None for none.

    Raises:
        ValueError: With manual optimization, strategies other than one device, DDP and FSDP2, ranks that share a batch
            (tensor and context parallelism), or what :class:`~lightning_llm.callbacks.noise.watch.GradientWatch`
            cannot measure.

    References:
        McCandlish et al., An empirical model of large-batch training (2018), appendix A; Qiao et al., Pollux (2021),
        for the preconditioned form and consecutive gradients; Gray et al., Normalization layer per-example gradients
        are sufficient to predict gradient noise scale in transformers (2024).
    """

    def __init__(
        self,
        smoothing: float = 0.99,
        every_n_steps: int = 1,
        confidence: float = 0.9,
        per_group: bool = False,
        precondition: bool = False,
        consecutive: bool = False,
        token_fn: Callable[[Any, Any], Any] | None = None,
        sequence_fn: Callable[[Any], Any] | None = None,
        log_prefix: str | None = "train/",
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be 1 at least, but got {every_n_steps}.")
        if not 0 < confidence < 1:
            raise ValueError(f"`confidence` is a share between 0 and 1, such as 0.9, but got {confidence}.")
        if precondition and consecutive:
            raise ValueError(
                "`precondition` and `consecutive` exclude each other: Adam's divisor changes between steps."
            )
        self.smoothing = smoothing
        self.every_n_steps = every_n_steps
        self.confidence = confidence
        self.per_group = per_group
        self.precondition = precondition
        self.consecutive = consecutive
        self.token_fn = token_fn or _label_tokens
        self.sequence_fn = sequence_fn or _rows
        self.log_prefix = log_prefix
        self._averages = self._fresh_averages(num_groups=0)
        self._watch: GradientWatch | None = None
        self._leave: Callable[[], None] | None = None
        self._has_warned = False
        # Of the current step:
        self._is_measured = False
        self._part: Part | None = None
        self._parts: list[Part] = []
        self._is_spoilt = False
        self._previous: _Previous | None = None

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be measured; see what each ``training_step`` is given and returns."""
        if stage != "fit":
            return
        _check(trainer, pl_module)
        if trainer.global_step == 0:
            self._averages = self._fresh_averages(num_groups=0)  # another run than the last; a checkpoint comes later
        self._leave = listen_to_training_step(pl_module, self._note)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the parameters' gradients."""
        if data_parallel_size(trainer) != trainer.world_size:
            raise ValueError(
                "GradientNoiseScale needs ranks that hold different batches, but here several share one (tensor or "
                "context parallelism): none of them sees its gradient before it is reduced. Leave it out there."
            )
        self._watch = GradientWatch(pl_module, trainer.optimizers[0], self.precondition)
        self._is_measured, self._previous, self._has_warned = False, None, False
        num_groups = self._watch.num_groups if self.per_group else 0
        for unit, fresh in self._fresh_averages(num_groups).items():
            found = self._averages[unit]
            self._averages[unit] = found if len(found) == len(fresh) else [found[0], *fresh[1:]]

    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """A step begins: is it to be measured?"""
        assert self._watch is not None
        is_next = self._previous is not None and self._previous.step == trainer.global_step - 1
        self._is_measured = trainer.global_step % self.every_n_steps == 0 or is_next
        self._parts.clear()
        self._is_spoilt = False
        if self._is_measured:
            self._watch.begin_step()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Measure this backward."""
        if self._is_measured:
            assert self._watch is not None
            self._watch.begin()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The part's gradient is in."""
        part, self._part = self._part, None
        if self._is_measured and part is not None and part.weight is not None:
            assert self._watch is not None
            part.squares = self._watch.end(trainer.strategy.root_device)
            self._parts.append(part)

    def on_backward_failed(self, is_taken_back: bool) -> None:
        """Forget the part. If a share of its gradient stays, the step cannot be measured."""
        self._part = None
        self._is_spoilt |= not is_taken_back
        if self._watch is not None:
            self._watch.cancel()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Compare the parts with the whole: one small all-reduce, before gradients are clipped."""
        if not self._is_measured or trainer.fit_loop._skip_backward:
            return
        self._is_measured = False
        step = self._measure(trainer)
        if step is None:
            return
        if step.number > 1:
            self._previous = None
            self._average(step)
        elif step.number == 1 and self.consecutive and trainer.world_size == 1:
            self._compare_with_previous(trainer, step)
        elif trainer.world_size == 1 and not self._has_warned and self.noise_scale_sequences is None:
            self._has_warned = True
            rank_zero_warn(_ONE_PART)
        if self.log_prefix is not None and (values := self._values_to_log()):
            pl_module.log_dict(values, batch_size=1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the hooks off."""
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the hooks off."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """The averages: equal on all ranks."""
        return {unit: [average.state_dict() for average in averages] for unit, averages in self._averages.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on averaging."""
        for unit in _UNITS:
            self._averages[unit] = [NoiseScaleAverage(self.smoothing) for _ in state_dict[unit]]
            for average, state in zip(self._averages[unit], state_dict[unit], strict=True):
                average.load_state_dict(state)

    # ---- what others may ask -------------------------------------------------------------------------------------

    @property
    def noise_scale_tokens(self) -> float | None:
        """In label tokens; None until known, infinite where no signal shows."""
        return self._averages["tokens"][0].noise_scale

    @property
    def noise_scale_sequences(self) -> float | None:
        """In sequences; None until known, infinite where no signal shows."""
        return self._averages["sequences"][0].noise_scale

    @property
    def interval_tokens(self) -> tuple[float, float] | None:
        """Where ``noise_scale_tokens`` may lie; None before the third measured step."""
        return self._averages["tokens"][0].interval(self.confidence)

    @property
    def interval_sequences(self) -> tuple[float, float] | None:
        """Where ``noise_scale_sequences`` may lie; None before the third measured step."""
        return self._averages["sequences"][0].interval(self.confidence)

    def of_groups(self, unit: str = "tokens") -> list[NoiseScaleAverage]:
        """The averages for each parameter group, with ``per_group=True``.

        Args:
            unit: ``tokens`` or ``sequences``.
        """
        return self._averages[unit][1:]

    # ---- details -------------------------------------------------------------------------------------------------

    def _fresh_averages(self, num_groups: int) -> dict[str, list[NoiseScaleAverage]]:
        """Of all parameters, then of each group."""
        return {unit: [NoiseScaleAverage(self.smoothing) for _ in range(1 + num_groups)] for unit in _UNITS}

    def _note(self, batch: Any, outputs: Any) -> None:
        sizes = (self.token_fn(batch, outputs), self.sequence_fn(batch))
        if all(size is None for size in sizes):
            raise TypeError(
                f"GradientNoiseScale can count neither the tokens nor the sequences of a {type(batch).__name__}. "
                f"Return `num_tokens` from training_step, or pass token_fn=lambda batch, outputs: ... or sequence_fn."
            )
        self._part = Part(outputs["loss"] if isinstance(outputs, Mapping) else outputs, sizes)

    def _stop(self) -> None:
        if self._leave is not None:
            self._leave()
        if self._watch is not None:
            self._watch.remove()
        self._leave = self._watch = self._part = self._previous = None
        self._parts.clear()

    def _measure(self, trainer: L.Trainer) -> MeasuredStep | None:
        """The step's sums over all ranks; None if it cannot be used: not finite, without a token, partly repeated."""
        assert self._watch is not None
        device = trainer.strategy.root_device
        whole = self._watch.of_step(device)
        sums = sums_of(self._parts, len(_UNITS), like=whole)
        if not self._watch.is_sharded:
            whole = whole / trainer.world_size  # each rank has it all
        self._parts.clear()
        counted = (whole.new_tensor(float(self._is_spoilt)), *sums, whole)
        packed = torch.cat([value.reshape(-1) for value in counted])
        if trainer.world_size > 1:
            packed = trainer.strategy.reduce(packed, reduce_op="sum")
        values = iter(packed.tolist())  # waits for the device
        lists = [list(islice(values, value.numel())) for value in counted]
        (is_spoilt,), (number,), (weight,), squares, inverse, inverse_squared, square_of_mean = lists
        if is_spoilt or not number or not math.isfinite(sum(squares) + sum(square_of_mean) + weight):
            return None
        if sum(squares) == 0:
            if sum(square_of_mean) > 0:
                raise ValueError(
                    "GradientNoiseScale saw no gradient in any backward of a step that has some: they were put there "
                    "by other means than autograd. Leave it out."
                )
            return None  # preconditioned, before Adam's first step
        total = _total_weight(trainer, weight)
        return MeasuredStep(
            round(number),
            [value / weight for value in squares],
            [value / total**2 for value in square_of_mean],
            [value / weight for value in inverse],
            [value / weight**2 for value in inverse_squared],
            total,
        )

    def _average(self, step: MeasuredStep) -> None:
        """Add the step to the averages, in each unit in which it could be counted."""
        pairs = list(zip(step.mean_of_squares, step.square_of_mean, strict=True))
        both = [(sum(step.mean_of_squares), sum(step.square_of_mean)), *pairs]
        for unit, inverse, inverse_squared in zip(_UNITS, step.inverse, step.inverse_squared, strict=True):
            if math.isfinite(inverse) and inverse > inverse_squared:
                for average, (mean_of_squares, square_of_mean) in zip(self._averages[unit], both, strict=False):
                    average.update(*noise_and_signal(mean_of_squares, square_of_mean, inverse, inverse_squared))

    def _compare_with_previous(self, trainer: L.Trainer, step: MeasuredStep) -> None:
        """Two steps of one part each, as if they were two parts of one; pairs do not overlap."""
        assert self._watch is not None
        previous, self._previous = self._previous, None
        if previous is None or previous.step != trainer.global_step - 1:
            copies = {p: gradient.clone() for p, gradient in self._watch.gradients().items()}
            self._previous = _Previous(trainer.global_step, step, copies)
            return
        products = self._watch.products(previous.gradients, trainer.strategy.root_device).tolist()
        pair = pair_up(previous.measured, step, products)
        if pair is not None:
            self._average(pair)

    def _values_to_log(self) -> dict[str, float]:
        values: dict[str, float | None] = {}
        for unit, (average, *groups) in self._averages.items():
            name = f"{self.log_prefix}noise_scale_{unit}"
            low, high = average.interval(self.confidence) or (None, None)
            values |= {name: average.noise_scale, f"{name}_low": low, f"{name}_high": high}
            values |= {f"{name}/group_{number}": group.noise_scale for number, group in enumerate(groups)}
        return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


class _Previous(NamedTuple):
    """A step of one part, and a copy of its gradient."""

    step: int
    measured: MeasuredStep
    gradients: dict[nn.Parameter, Tensor]


def _label_tokens(batch: Any, outputs: Any) -> Any:
    if isinstance(outputs, Mapping) and "num_tokens" in outputs:
        return outputs["num_tokens"]
    try:
        return num_label_tokens(batch)
    except TypeError:
        return None


def _rows(batch: Any) -> int | None:
    try:
        return num_samples(batch)
    except TypeError:
        return None


def _total_weight(trainer: L.Trainer, weight: float) -> float:
    """What the parts' weights add up to in the gradient at hand: 1, save in a window that Lightning has left short."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    is_normalized = any(getattr(callback, "normalizes_gradients", False) for callback in callbacks)
    if is_normalized or isinstance(trainer.accumulate_grad_batches, AccumulationWindow):
        return 1.0
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return weight / data_parallel_size(trainer) / (scaler.get_scale() if scaler is not None else 1.0)


def _check(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"GradientNoiseScale needs automatic optimization, but {type(pl_module).__name__} optimizes manually: what "
            f"belongs to a step is not known. Set `automatic_optimization = True`."
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
        raise ValueError(
            f"GradientNoiseScale works with one device, DDPStrategy and ModelParallelStrategy (FSDP2), but the Trainer "
            f"has {type(trainer.strategy).__name__}, which keeps a micro-batch's gradients to itself. Use one of those."
        )
