"""Accumulated and distributed gradients that equal those of one big batch, whatever the micro-batches hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from lightning_llm.callbacks.steps.counting import num_samples
from lightning_llm.callbacks.steps.gradients import parameters_of, scale_gradients
from lightning_llm.callbacks.steps.step_outputs import listen_to_training_step
from lightning_llm.loss import exact_dtype
from lightning_llm.parallel import data_parallel_size


class _Contribution(NamedTuple):
    """Weight and mean loss of one micro-batch, both of shape (), on the device."""

    weight: Tensor
    loss: Tensor


def step_factor(total_weight: float, unit: float, world_size: int) -> float:
    """What the accumulated gradient is multiplied by before the optimizer step.

    Each micro-batch entered with weight n_i / unit, and data-parallel ranks were averaged:
    grad = 1/W sum_i (n_i / unit) dL_i. The wanted gradient is 1/N sum_i n_i dL_i, so the factor is W * unit / N.

    Args:
        total_weight: N, over all micro-batches and ranks.
        unit: The weight that counts as one; only conditions the numbers.
        world_size: W, the number of data-parallel ranks.

    Returns:
        The factor; 0 if nothing had a weight.

    Example:
        >>> step_factor(total_weight=8.0, unit=4.0, world_size=1)  # two micro-batches of four tokens
        0.5
    """
    return world_size * unit / total_weight if total_weight > 0 else 0.0


class TokenWeightedAccumulation(L.Callback):
    r"""Make the gradient of an optimizer step the mean over all its tokens.

    .. math:: g = \frac{1}{\sum_i n_i} \sum_i n_i \, \frac{\partial L_i}{\partial \theta}

    over every micro-batch i of the step on every rank, where :math:`L_i` is the mean loss that ``training_step``
    returned and :math:`n_i` its number of tokens. Lightning alone takes the mean of the means: wrong as soon as
    micro-batches hold unequal numbers of label tokens, and it divides a short last window by the full count.

    Exact over micro-batches, data-parallel ranks (DDP, FSDP2), short last windows, micro-batches or ranks without a
    label, gradient clipping (which comes afterwards) and gradient scalers. If no rank has a token in the whole window,
    parameters and optimizer state stay as they are.

    Args:
        weight: ``tokens`` reads ``num_tokens`` from what ``training_step`` returns; ``samples`` counts the batch's
            rows; any other name is a key of what ``training_step`` returns.
        weight_fn: ``(batch, outputs) -> weight``, in place of ``weight``; a number or a tensor of shape ().
        log_loss: Name under which the token mean of the whole step is logged, the same on every rank; None for none.

    Raises:
        ValueError: With manual optimization, or a strategy that accumulates inside its own engine (DeepSpeed).
        KeyError: If ``training_step`` returns no weight.

    References:
        Lightning issues 20350 (mean of means) and 19987 (short last window).
    """

    normalizes_gradients = True  # whatever the number of micro-batches: others need not

    def __init__(
        self,
        weight: str = "tokens",
        weight_fn: Callable[[Any, Any], Any] | None = None,
        log_loss: str | None = "train/loss",
    ) -> None:
        self.weight = weight
        self.weight_fn = weight_fn
        self.log_loss = log_loss
        self.unit: float | None = None  # mean weight of a micro-batch in the last step: equal on all ranks
        self.last_weight: Tensor | None = None  # of the last backward, shape ()
        self._window_unit: float | Tensor | None = None
        self._current: _Contribution | None = None
        self._added: list[_Contribution] = []
        self._unpatch: Callable[[], None] | None = None

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be made exact; listen to what ``training_step`` returns."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"TokenWeightedAccumulation needs automatic optimization, but {type(pl_module).__name__} optimizes "
                f"manually. Weight the losses there, or set `automatic_optimization = True`."
            )
        if trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                f"{type(trainer.strategy).__name__} accumulates and divides inside its own engine, where a callback "
                f"cannot weight. Use DDPStrategy, or ModelParallelStrategy for sharded parameters."
            )
        # First, so that callbacks after this one see the finished gradient before the optimizer step.
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.remove(self)
        callbacks.insert(0, self)
        self._unpatch = listen_to_training_step(pl_module, self._note)

    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Start a window; forget one that was left unfinished."""
        self._added.clear()
        self._window_unit = None

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Weight the micro-batch: by its tokens, and by K, as Lightning has divided by it."""
        current = self._current
        assert current is not None, "training_step was not seen"
        if self._window_unit is None:
            self._window_unit = self._choose_unit(trainer, current.weight)
        assert self._window_unit is not None
        weight = (current.weight * trainer.accumulate_grad_batches / self._window_unit).to(loss.dtype)
        loss.register_hook(lambda gradient: gradient * weight)  # type: ignore[no-untyped-call]

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the micro-batch, now that its gradient has been added."""
        assert self._current is not None
        self._added.append(self._current)
        self.last_weight = self._current.weight
        self._current = None

    def on_backward_failed(self, is_taken_back: bool) -> None:
        """Whoever catches a failed backward says so.

        Args:
            is_taken_back: It left no gradient: if it was the window's first, another weight may count as one.
        """
        self._current = None
        if is_taken_back and not self._added:
            self._window_unit = None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Divide by the step's tokens, before clipping: one all-reduce; no pass over gradients for a factor of 1."""
        if not self._added:
            return
        weight, loss, count, num_empty_bad = self._step_sums(trainer)
        if num_empty_bad:
            raise ValueError(
                "training_step returned a loss that is not finite for a micro-batch, or a piece of one, without a "
                "single token (weight 0); "
                "its gradient would spoil the whole step. Return a sum divided by max(num_tokens, 1)."
            )
        assert self._window_unit is not None
        factor = step_factor(weight, float(self._window_unit), data_parallel_size(trainer))
        if factor == 0.0:
            for parameter in parameters_of(optimizer):
                parameter.grad = None  # nothing to learn from: no momentum, no decay either
        else:
            scale_gradients(optimizer, factor)
            self.unit = weight / count
            if self.log_loss is not None:
                pl_module.log(self.log_loss, loss / weight, prog_bar=True, batch_size=1)
        self._added.clear()
        self._window_unit = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module its ``training_step`` back."""
        self._stop_listening()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the module its ``training_step`` back."""
        self._stop_listening()

    def state_dict(self) -> dict[str, Any]:
        """The mean weight of a micro-batch, which keeps gradients near their usual size."""
        return {"unit": self.unit}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same size."""
        self.unit = state_dict["unit"]

    # ---- details -------------------------------------------------------------------------------------------------

    def _note(self, batch: Any, outputs: Any) -> None:
        self._current = self._read(batch, outputs)

    def _stop_listening(self) -> None:
        if self._unpatch is not None:
            self._unpatch()
            self._unpatch = None

    def _read(self, batch: Any, outputs: Any) -> _Contribution:
        loss: Tensor = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        key = "num_tokens" if self.weight == "tokens" else self.weight
        if self.weight_fn is not None:
            weight = self.weight_fn(batch, outputs)
        elif self.weight == "samples":
            weight = num_samples(batch)
        elif isinstance(outputs, Mapping) and key in outputs:
            weight = outputs[key]
        else:
            found = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
            raise KeyError(
                f"TokenWeightedAccumulation expects training_step to return a mapping with 'loss' and {key!r}, but got "
                f"{found}. Return it, or pass weight_fn=lambda batch, outputs: ..., or weight='samples'."
            )
        exact = exact_dtype(loss.device)
        return _Contribution(torch.as_tensor(weight, device=loss.device).detach().to(exact), loss.detach().to(exact))

    def _choose_unit(self, trainer: L.Trainer, weight: Tensor) -> float | Tensor:
        """The weight that counts as one in this window: the same on every rank, near the usual weight.

        It keeps weighted gradients as large as Lightning's own, so that half precision neither overflows nor
        underflows. With one micro-batch on one rank it is that batch's own weight: the factor is exactly 1 then. Else
        it is a power of two, so that no rounding depends on it.
        """
        alone = data_parallel_size(trainer) == 1
        if alone and trainer.accumulate_grad_batches == 1:
            return weight.clamp(min=1)
        if self.unit is None:  # the run's first window
            self.unit = max(float(trainer.strategy.reduce(weight.clone(), reduce_op="mean")), 1.0)
        return float(2 ** round(math.log2(max(self.unit, 1.0))))

    def _step_sums(self, trainer: L.Trainer) -> list[float]:
        """Weight, weighted loss, micro-batches, and empty micro-batches with a bad loss; over data-parallel ranks."""
        weights = torch.stack([added.weight for added in self._added])
        losses = torch.stack([added.loss for added in self._added])
        empty = weights == 0
        weighted = torch.where(empty, torch.zeros_like(losses), weights * losses)
        bad = (empty & ~losses.isfinite()).to(weights)
        sums = torch.stack([weights.sum(), weighted.sum(), torch.ones_like(weights).sum(), bad.sum()])
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        share = data_parallel_size(trainer) / trainer.world_size  # ranks that split a layer share one batch
        return [value * share for value in sums.tolist()]
