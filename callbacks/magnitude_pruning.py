"""Weights that become zero while the model trains, the smallest first, by a schedule in optimizer steps."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor

from lightning_llm.callbacks.pruning.layers import PrunedWeight, check_weights, linear_layers, zero_averages
from lightning_llm.callbacks.pruning.masks import (
    keep_largest_of_group,
    local_part,
    magnitude_keys,
    num_marked,
    pack,
    shard_like,
    smallest,
    unpack,
)
from lightning_llm.callbacks.steps.counting import num_targets
from lightning_llm.callbacks.steps.run_progress import check_milestones, share_of_run
from lightning_llm.duration import Duration
from lightning_llm.loss import exact_dtype
from lightning_llm.parallel import data_parallel_size
from lightning_llm.schedule import Progress, Schedule

Scope = Literal["layer", "global"]


def cubic_sparsity(done: float, final: float) -> float:
    r"""Share of weights that are zero, :math:`s = s_f - s_f (1 - x)^3`: fast at first, slowly towards the end.

    Args:
        done: x, share of the ramp that is done, 0 to 1.
        final: s_f, the share at its end.

    Example:
        >>> [cubic_sparsity(done, final=0.5) for done in (0.0, 0.5, 1.0)]
        [0.0, 0.4375, 0.5]

    References:
        Zhu and Gupta, To prune, or not to prune (2017), equation 1, arXiv 1710.01878.
    """
    return final - final * (1.0 - done) ** 3


class MagnitudePruning(L.Callback):
    """Set the smallest weights to zero while training, ever more of them, and keep them there.

    Masks change after an optimizer step, never inside an accumulation window, and a weight that is pruned stays zero:
    its gradient is zero when gradients are clipped and the optimizer steps, and what momentum makes of it is taken
    back. Masks of a resumed run, on any number of ranks, are those of the run that was stopped. Parameters keep their
    names and places: what is saved or exported is the model's own state dict, with zeros in it.

    Averages that Lightning's ``WeightAveraging``, ``EMAWeightAveraging`` and ``StochasticWeightAveraging`` keep are
    zero in the same places.

    Args:
        sparsity: Share of the weights that is zero in the end, along :func:`cubic_sparsity`; or milestones of the share
            in place of it, as in :class:`~lightning_llm.Schedule`: ``{"0 steps": 0.0, "1k steps": 0.5}``.
        begin: When the ramp begins: ``"10%"`` of the run, ``"500 steps"``, ``"2M tokens"``.
        end: When it ends, in the same unit.
        every_n_steps: Masks change after optimizer steps that are a multiple of this, and at the ramp's end.
        scope: ``layer``: each matrix has this share of zeros. ``global``: all of them together.
        modules: Regular expressions, searched in the names of linear layers (``nn.Linear``, and ``Conv1D`` of
            transformers' GPT-2), one or several; None takes all but the head. Matrices that are an embedding's too, and
            frozen ones, are never taken.
        structure: ``"2:4"``: of every four inputs of each output at least two stay, and exactly two at
            ``sparsity=0.5``; any n:m.
        token_fn: ``batch -> number of label tokens``, where time is in tokens and batches are not Hugging Face's.
        log_name: Name under which the share of zeros is logged; None for none.

    Raises:
        ValueError: For shares outside 0 to 1, falling ones, times that the run never knows of, patterns that no layer
            has, an adapter of peft without ``modules``, ``GradientNoiseScale`` after this in the list, DeepSpeed,
            FSDP1, parameters that are sharded over more than one dimension of ranks, and ``structure`` with sharded
            ones or where it does not divide a layer's inputs.

    References:
        Zhu and Gupta, To prune, or not to prune (2017); Han et al., Learning both weights and connections (2015);
        Mishra et al., Accelerating sparse deep neural networks (2021), 2:4.
    """

    _counted: list[Tensor]  # label tokens of this rank's micro-batches since the last step
    _bits: dict[str, Tensor]  # masks of whole weights, in host memory

    def __init__(
        self,
        sparsity: float | Mapping[str, float] | Schedule = 0.5,
        begin: str | float = "0 steps",
        end: str | float = "50%",
        every_n_steps: int = 100,
        scope: Scope = "layer",
        modules: str | Sequence[str] | None = None,
        structure: str | None = None,
        token_fn: Callable[[Any], Any] | None = None,
        log_name: str | None = "train/sparsity",
    ) -> None:
        if isinstance(sparsity, (Mapping, Schedule)):
            self.schedule = sparsity if isinstance(sparsity, Schedule) else Schedule(sparsity)
            self.final, self._is_cubic = max(self.schedule.values), False
        else:
            self.schedule, self.final, self._is_cubic = _ramp(begin, end), float(sparsity), True
        values = [self.final] if self._is_cubic else self.schedule.values
        if not all(0 <= value < 1 for value in values) or values != sorted(values):
            raise ValueError(f"`sparsity` is a share from 0 to below 1 that does not fall, but got {sparsity!r}.")
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be 1 at least, but got {every_n_steps}.")
        if scope not in get_args(Scope):
            raise ValueError(f"`scope` must be 'layer' or 'global', but got {scope!r}.")
        self.every_n_steps = every_n_steps
        self.scope = scope
        self.modules = [modules] if isinstance(modules, str) else modules
        self.structure = _parse_structure(structure, self.final)
        self.token_fn = token_fn
        self.log_name = log_name
        self._weights: list[PrunedWeight] = []
        self._handles: list[Any] = []
        self._forget()

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be pruned."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"MagnitudePruning cannot see the parameters that {type(trainer.strategy).__name__} keeps. Use "
                f"DDPStrategy, or ModelParallelStrategy for sharded parameters."
            )
        if trainer.global_step == 0:
            self._forget()  # another run than the last; a checkpoint is loaded later

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the weights, with the masks of the checkpoint; take part in the optimizers' steps."""
        self._leave()
        _check_order(self, trainer)
        check_milestones(self.schedule, trainer)
        self._weights = [
            PrunedWeight(name, module.weight, torch.zeros_like(local_part(module.weight), dtype=torch.bool), dim)
            for name, module, dim in linear_layers(pl_module, self.modules)
        ]
        check_weights(self._weights, self.structure)
        self._take_over_masks()
        for optimizer in trainer.optimizers:
            hook = optimizer.register_step_post_hook(lambda stepped, *_: self._after_step(trainer, stepped))
            self._handles.append(hook)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What an epoch left untrained does not count."""
        self._counted = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens, on the device's own time, where the schedule is in tokens."""
        if "tokens" in self.schedule.units and self.wanted < self.final:
            device = trainer.strategy.root_device
            number = num_targets(pl_module, batch, self.token_fn)
            self._counted.append(torch.as_tensor(number, device=device).to(exact_dtype(device)))

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients of pruned weights become zero, before clipping."""
        self._is_stepping = True
        for weight in self._weights if self.achieved else ():
            if weight.parameter.grad is not None:
                local_part(weight.parameter.grad).masked_fill_(weight.pruned, 0.0)
        if self.log_name is not None:
            pl_module.log(self.log_name, self.achieved, batch_size=1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the optimizers."""
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the optimizers."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Masks as bits (a thirty-second of float32 weights), sparsity, tokens: equal on all ranks."""
        return {
            "wanted": self.wanted,
            "changed_at": self._changed_at,
            "tokens": self._tokens,
            "masks": dict(self._bits),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same masks."""
        self.wanted = state_dict["wanted"]
        self._changed_at = state_dict["changed_at"]
        self._tokens = state_dict["tokens"]
        self._bits = {name: bits.cpu() for name, bits in state_dict["masks"].items()}

    # ---- details -------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self.wanted = 0.0  # share of zeros that the masks were made for
        self.achieved = 0.0  # share that they have
        self._changed_at = 0  # the optimizer step after which the schedule was last asked
        self._tokens = 0.0
        self._counted = []
        self._bits = {}
        self._is_stepping = False

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _take_over_masks(self) -> None:
        names = {weight.name for weight in self._weights}
        if self._bits and names != set(self._bits):
            raise ValueError(
                f"The checkpoint has masks of {len(self._bits)} matrices, but `modules` chooses {len(names)}; only in "
                f"one of the two: {sorted(names ^ set(self._bits))[:4]}. Prune the same layers as before."
            )
        for weight in self._weights if self._bits else ():
            device = local_part(weight.parameter).device
            weight.pruned = shard_like(
                weight.parameter, unpack(self._bits[weight.name], weight.parameter.shape, device)
            )
        self._measure()
        self._apply()

    @torch.no_grad()
    def _after_step(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Change the masks if it is time; put back to zero what the step has moved."""
        if self._is_stepping:  # and it is no other callback's rehearsal
            self._change_masks(trainer, optimizer)
        self._is_stepping = False
        self._apply()

    def _change_masks(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
        step = trainer.global_step + 1  # Lightning has not counted this one yet
        progress = self._progress(trainer, step)
        is_due = step // self.every_n_steps > self._changed_at // self.every_n_steps
        if not (is_due or self.schedule.is_final(progress)) or _was_skipped(optimizer):
            return
        self._changed_at = step
        value = self.schedule(progress)
        wanted = cubic_sparsity(value, self.final) if self._is_cubic else value
        if wanted <= self.wanted:
            return
        self.wanted = wanted
        for group in [self._weights] if self.scope == "global" else [[weight] for weight in self._weights]:
            self._prune(group)
        self._measure()
        zero_averages(trainer, self._weights)

    def _prune(self, group: Sequence[PrunedWeight]) -> None:
        dtype = functools.reduce(torch.promote_types, [weight.parameter.dtype for weight in group])
        keys = [magnitude_keys(weight.parameter, weight.pruned, dtype) for weight in group]
        if self.structure is not None:
            keys = [
                keep_largest_of_group(key, *self.structure, weight.dim) for key, weight in zip(keys, group, strict=True)
            ]
        number = round(self.wanted * sum(weight.parameter.numel() for weight in group))
        for weight, mask in zip(group, smallest(keys, number), strict=True):
            weight.pruned = shard_like(weight.parameter, mask)
            self._bits[weight.name] = pack(mask)

    def _apply(self) -> None:
        for weight in self._weights if self.achieved else ():
            local_part(weight.parameter.detach()).masked_fill_(weight.pruned, 0.0)

    def _measure(self) -> None:
        zeros = sum(num_marked(bits) for bits in self._bits.values())
        self.achieved = zeros / sum(weight.parameter.numel() for weight in self._weights)

    def _progress(self, trainer: L.Trainer, step: int) -> Progress:
        """After an optimizer step (one all-reduce, where tokens are counted)."""
        if self._counted:
            mine = sum(self._counted[1:], self._counted[0])
            share = data_parallel_size(trainer) / trainer.world_size  # ranks that split a layer count a batch each
            self._tokens += float(trainer.strategy.reduce(mine, reduce_op="sum")) * share
            self._counted = []
        epochs = trainer.current_epoch + (trainer.fit_loop.batch_idx + 1) / trainer.num_training_batches
        return Progress(step, self._tokens, epochs, share_of_run(trainer, step, epochs))


def _ramp(begin: str | float, end: str | float) -> Schedule:
    """The share of the ramp that is done."""
    first, last = Duration.parse(begin), Duration.parse(end)
    if first.value and first.unit != last.unit:
        raise ValueError(f"`begin` and `end` share one unit, but got '{first}' and '{last}'.")
    if not first.value <= last.value:
        raise ValueError(f"`begin` is not after `end`, but got '{first}' and '{last}'.")
    start = str(Duration(0.0, last.unit))
    if first.value == last.value:  # at once
        return Schedule({str(last): 1.0} if not last.value else {start: 0.0, str(last): 1.0})
    return Schedule({start: 0.0, **({str(first): 0.0} if first.value else {}), str(last): 1.0}, "linear")


def _parse_structure(structure: str | None, final: float) -> tuple[int, int] | None:
    if structure is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", structure)
    keep, group = (int(number) for number in match.groups()) if match else (0, 0)
    if not 0 < keep < group:
        raise ValueError(f"`structure` is like '2:4' (two of every four inputs stay), but got {structure!r}.")
    if final > 1 - keep / group:
        raise ValueError(
            f"structure={structure!r} leaves at most {1 - keep / group:g} zeros, but got sparsity={final}."
        )
    return keep, group


def _check_order(pruning: MagnitudePruning, trainer: L.Trainer) -> None:
    """What measures gradients compares those of micro-batches, which are whole, with that of the step."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks[callbacks.index(pruning) :]:
        if hasattr(other, "noise_scale_tokens"):
            raise ValueError(
                f"{type(other).__name__} must see the gradient before MagnitudePruning sets parts of it to zero. Put "
                f"it before MagnitudePruning in the list of callbacks."
            )


def _was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient scaler let a fused optimizer skip this step; others it does not even call."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
