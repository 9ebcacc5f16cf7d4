"""A global batch that follows the gradient's noise scale while the run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_llm.callbacks.steps.exact_windows import ExactWindows

Unit = Literal["sequences", "tokens"]
Rule = Literal["unknown", "waiting", "uncertain", "close", "grow", "shrink"]

_REMEMBERED = 100  # decisions


class Decision(NamedTuple):
    """What becomes of the global batch, and why.

    Attributes:
        batch: From the next optimizer step on.
        rule: Which of the rules decided: ``grow`` and ``shrink`` change the batch, the others leave it as it is.
        reason: In words, with the numbers.
    """

    batch: float
    rule: Rule
    reason: str


def next_batch(
    batch: float,
    noise_scale: float | None,
    interval: tuple[float, float] | None,
    *,
    bounds: tuple[float, float],
    share: float = 1.0,
    hysteresis: float = 1.5,
    max_change: float = 2.0,
    max_spread: float = 4.0,
    since_change: float = math.inf,
    min_steps: float = 0,
) -> Decision:
    """Where a global batch goes, given the noise scale. All batches and scales are in one unit.

    Args:
        batch: The present one.
        noise_scale: The estimate; None if there is none yet, infinite if the gradient is no larger than its noise.
        interval: Between which numbers the noise scale certainly lies.
        bounds: Smallest and largest batch.
        share: The batch wanted, as a share of the noise scale.
        hysteresis: The batch stays while it is off the wanted one by less than this factor.
        max_change: The factor by which it changes at most; by 1 it may always change.
        max_spread: The batch stays where the interval's ends are further apart than this factor.
        since_change: Optimizer steps since the last change.
        min_steps: Optimizer steps that a batch is kept at least.

    Example:
        >>> next_batch(100, 520.0, (400.0, 700.0), bounds=(50, 1000))
        Decision(batch=200, rule='grow', reason='noise scale 520 (400 to 700), by a factor of 2 at most')
        >>> next_batch(100, 520.0, (90.0, 3000.0), bounds=(50, 1000))
        Decision(batch=100, rule='uncertain', reason='noise scale 520 is between 90 and 3e+03')
        >>> next_batch(450, 520.0, (400.0, 700.0), bounds=(50, 1000)).rule
        'close'
    """
    if noise_scale is None or math.isnan(noise_scale):
        return Decision(batch, "unknown", "no noise scale yet")
    if since_change < min_steps:
        return Decision(batch, "waiting", f"{since_change:.0f} of {min_steps:.0f} steps since the last change")
    if interval is None or not math.isfinite(noise_scale):
        return Decision(batch, "uncertain", f"noise scale {noise_scale:.3g}, with no interval or no bound")
    low, high = interval
    if not 0 < low <= high <= max_spread * low:
        return Decision(batch, "uncertain", f"noise scale {noise_scale:.3g} is between {low:.3g} and {high:.3g}")
    found = f"noise scale {noise_scale:.3g} ({low:.3g} to {high:.3g})"
    wanted = min(max(share * noise_scale, bounds[0]), bounds[1])
    if wanted != share * noise_scale:
        found += f", bounded to {wanted:.3g}"
    is_inside = bounds[0] <= batch <= bounds[1]
    if is_inside and batch / hysteresis < wanted < batch * hysteresis:
        return Decision(batch, "close", found)
    new = round(min(max(wanted, batch / max_change), batch * max_change))
    if abs(new - batch) < 1 <= abs(wanted - batch):  # a batch of few sequences would be rounded back for ever
        new = round(batch + math.copysign(1, wanted - batch))
    if new == batch:
        return Decision(batch, "close", found)
    if abs(math.log(wanted / batch)) > math.log(max_change):
        found += f", by a factor of {max_change:g} at most"
    return Decision(new, "grow" if new > batch else "shrink", found)


class AdaptiveAccumulation(ExactWindows):
    """Drive the global batch towards the gradient's noise scale, which another callback measures.

    Below the noise scale a larger batch saves optimizer steps at little cost in tokens; above it, tokens are spent for
    few steps. After each optimizer step :func:`next_batch` decides. If the data module was given a global batch, it is
    set there; else the number of micro-batches follows, as exactly as in
    :class:`~lightning_llm.callbacks.AccumulationSchedule`.
    :class:`~lightning_llm.callbacks.LearningRateScaling` beside it lets the learning rate follow.

    Each change, and each new reason to make none, is a line of text and an entry of ``decisions``; the batch is logged
    as ``<prefix>adaptive_batch``. A resumed run decides as if it had never stopped. All ranks must measure the same
    noise scale, as ``GradientNoiseScale`` does.

    Args:
        bounds: Smallest and largest global batch over all ranks.
        unit: ``tokens`` (label tokens) or ``sequences``; None: the data module's, else tokens.
        start: The first batch; the smallest if None. A data module's own counts where it has one.
        share: The batch wanted, as a share of the noise scale.
        hysteresis: The batch stays while it is off the wanted one by less than this factor.
        max_change: The factor by which it changes at most, up or down.
        min_steps: Optimizer steps between two changes, and before the first.
        max_spread: The batch stays while the noise scale is known no better than to this factor (the ratio of its
            interval's ends).
        token_fn: ``batch -> number of label tokens``, where batches are not Hugging Face's.
        seed_steps: Seed the random generators at each step's start, as ``AccumulationSchedule`` does; nothing is seeded
            where a data module makes the batches.
        log_prefix: Of the metrics; None for none.

    Attributes:
        decisions: The last hundred: ``step``, ``before``, ``after``, ``noise_scale``, ``rule``, ``reason``.

    Raises:
        ValueError: For bounds and factors out of range; without a callback that measures; with manual optimization,
            DeepSpeed, ``Trainer(accumulate_grad_batches=...)`` (but for a data module that makes the batches), and
            beside another callback that sets the batch.

    References:
        McCandlish et al., An empirical model of large-batch training (2018); Merrill et al., Critical batch size
        revisited (2025), which finds that with Adam the noise scale follows the critical batch only roughly: choose
        ``share`` and ``bounds`` with care.
    """

    decisions: list[dict[str, Any]]
    _rule: str | None  # of the last decision

    def __init__(
        self,
        bounds: tuple[float, float],
        unit: Unit | None = None,
        start: float | None = None,
        share: float = 1.0,
        hysteresis: float = 1.5,
        max_change: float = 2.0,
        min_steps: int = 100,
        max_spread: float = 4.0,
        token_fn: Callable[[Any], Any] | None = None,
        seed_steps: bool = True,
        log_prefix: str | None = "train/",
    ) -> None:
        if unit not in (None, *get_args(Unit)):
            raise ValueError(f"`unit` must be 'tokens', 'sequences' or None, but got {unit!r}.")
        if not 1 <= bounds[0] <= bounds[1] < math.inf:
            raise ValueError(f"`bounds` are the smallest and the largest batch, 1 at least, but got {bounds}.")
        if start is not None and not bounds[0] <= start <= bounds[1]:
            raise ValueError(f"`start` lies within the bounds {tuple(bounds)}, but got {start}.")
        if not (0 < share < math.inf and hysteresis >= 1 and max_change > 1 and max_spread >= 1 and min_steps >= 0):
            raise ValueError(
                f"AdaptiveAccumulation needs share > 0, hysteresis >= 1, max_change > 1, max_spread >= 1 and min_steps "
                f">= 0, but got share={share}, hysteresis={hysteresis}, max_change={max_change}, "
                f"max_spread={max_spread}, min_steps={min_steps}."
            )
        self.bounds = (float(bounds[0]), float(bounds[1]))
        self.unit = unit
        self.start = start
        self.min_steps = min_steps
        self.rules = {"share": share, "hysteresis": hysteresis, "max_change": max_change, "max_spread": max_spread}
        self.log_prefix = log_prefix
        self._decided_at = 0
        log_name = None if log_prefix is None else f"{log_prefix}micro_batches"
        super().__init__(unit or "tokens", False, token_fn, seed_steps, log_name)

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find who measures, and who makes the batches."""
        if stage == "fit":
            self._find_batches(trainer)
            self._measures(trainer)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with the batch at hand."""
        super().on_train_start(trainer, pl_module)
        self._decided_at = trainer.global_step
        if not self.sets_windows:
            self.global_batch = self._batch = float(_datamodule(trainer).global_batch)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log the step's batch."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.log_prefix is not None:
            pl_module.log(f"{self.log_prefix}adaptive_batch", self._batch, batch_size=1)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the step: decide what the next one holds."""
        if trainer.global_step > self._decided_at:
            self._decided_at = trainer.global_step
            self._decide(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def state_dict(self) -> dict[str, Any]:
        """The batch, when it last changed, and the decisions: equal on all ranks."""
        own = {"batch": self._batch, "changed_at": self._changed_at, "rule": self._rule, "decisions": self.decisions}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        super().load_state_dict(state_dict)
        self._batch = state_dict["batch"]
        self._changed_at = state_dict["changed_at"]
        self._rule = state_dict["rule"]
        self.decisions = [dict(decision) for decision in state_dict["decisions"]]

    # ---- what others may ask -------------------------------------------------------------------------------------

    def wanted(self, trainer: L.Trainer, batch_idx: int) -> float:
        """What was decided after the last step."""
        return self._batch

    def count_optimizer_steps(self, trainer: L.Trainer, num_batches: int, loader: Any) -> float:
        """Nobody knows: infinite. Learning-rate schedules go by tokens, or to ``max_steps``."""
        return math.inf

    # ---- details -------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        super()._forget()
        self._batch = float(self.start or self.bounds[0])
        self._changed_at = 0
        self._rule = None
        self.decisions = []

    def _find_batches(self, trainer: L.Trainer) -> None:
        datamodule = _datamodule(trainer)
        unit = getattr(datamodule, "global_batch_unit", None) if hasattr(datamodule, "set_global_batch") else None
        self.sets_windows = unit is None
        if unit is not None and (self.unit not in (None, unit) or self.start is not None):
            raise ValueError(
                f"The data module has a global batch, in {unit}, with which the run starts, but got unit={self.unit!r} "
                f"and start={self.start}. Leave both out."
            )
        self.content.target = unit or self.unit or "tokens"

    def _measures(self, trainer: L.Trainer) -> tuple[float | None, tuple[float, float] | None]:
        names = (f"noise_scale_{self.target}", f"interval_{self.target}")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if all(hasattr(callback, name) for name in names):
                return getattr(callback, names[0]), getattr(callback, names[1])
        raise ValueError(
            f"AdaptiveAccumulation follows the noise scale, but no callback measures it: none has `{names[0]}` and "
            f"`{names[1]}`. Add GradientNoiseScale() to Trainer(callbacks=[...])."
        )

    def _decide(self, trainer: L.Trainer) -> None:
        if not self.sets_windows:
            self._batch = float(_datamodule(trainer).global_batch)
        before, (noise_scale, interval) = self._batch, self._measures(trainer)
        decision = next_batch(
            before,
            noise_scale,
            interval,
            bounds=self.bounds,
            **self.rules,
            since_change=self._decided_at - self._changed_at,
            min_steps=self.min_steps,
        )
        changes = decision.rule in ("grow", "shrink")
        if changes:
            self._changed_at = self._decided_at
            self._batch = float(decision.batch)
            if not self.sets_windows:
                _datamodule(trainer).set_global_batch(self._batch)
                self._batch = float(_datamodule(trainer).global_batch)  # of whole rows
        if not self.sets_windows:
            self.global_batch = self._batch
        if changes or decision.rule not in (self._rule, "waiting"):  # that it waits after a change goes without saying
            self._tell(before, noise_scale, decision)
        self._rule = decision.rule

    def _tell(self, before: float, noise_scale: float | None, decision: Decision) -> None:
        entry: dict[str, Any] = {"step": self._decided_at, "before": before, "after": self._batch}
        entry |= {"noise_scale": noise_scale, "rule": decision.rule, "reason": decision.reason}
        self.decisions = [*self.decisions, entry][-_REMEMBERED:]
        what = f"goes from {before:.0f} to {self._batch:.0f}" if self._batch != before else f"stays at {before:.0f}"
        rank_zero_info(
            f"AdaptiveAccumulation, step {self._decided_at}: the batch {what} {self.target} ({decision.rule}): "
            f"{decision.reason}."
        )


def _datamodule(trainer: L.Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]
