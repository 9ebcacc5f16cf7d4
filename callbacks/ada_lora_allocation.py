"""AdaLoRA's ranks, given up where they matter least, at optimizer steps, however many micro-batches those have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_llm.callbacks.steps.gradients import parameters_of
from lightning_llm.run_length import total_optimizer_steps


def allocation_step(step: int, last: int, is_final: bool) -> int:
    """The step number to tell peft, so that ranks become final once, also if the step that was due did not take place.

    Args:
        step: Optimizer steps before this one.
        last: The step at which ranks become final: the run's steps less ``tfinal``.
        is_final: Whether they are.

    Example:
        >>> [allocation_step(step, last=8, is_final=False) for step in (7, 8, 9)]  # 9: a scaler had skipped step 8
        [7, 8, 8]
        >>> allocation_step(9, last=8, is_final=True)
        9
    """
    return step if is_final else min(step, last)


def orthogonal_penalty(factors: Iterable[tuple[str, Tensor]]) -> Tensor:
    r"""How far AdaLoRA's singular vectors are from orthonormal, shape ().

    .. math:: R = \frac{1}{n} \sum_i \lVert P_i P_i^\top - I \rVert_F

    over the n factors, of which those named ``lora_A`` hold vectors in rows, those named ``lora_B`` in columns.

    Args:
        factors: Names and matrices, (rank, in) and (out, rank).

    Example:
        >>> round(orthogonal_penalty([("lora_A", torch.eye(2, 3)), ("lora_B", 2 * torch.eye(3, 1))]).item(), 3)
        1.5
    """
    norms = []
    for name, factor in factors:
        products = factor @ factor.T if "lora_A" in name else factor.T @ factor
        norms.append(torch.linalg.norm(products - torch.eye(len(products), dtype=factor.dtype, device=factor.device)))
    return torch.stack(norms).mean()


class AdaLoraAllocation(L.Callback):
    r"""Let AdaLoRA (package peft) give up ranks during training, and keep its matrices near orthogonal.

    After each optimizer step, while its gradients are there, peft's ``update_and_allocate`` is told how many steps were
    before it: it averages each weight's importance, and every ``deltaT`` steps the least important ranks become zero,
    until ``target_r`` a matrix are left on average; the last ``tfinal`` steps of the run leave them as they are. How
    long the run is, the Trainer says; ``total_step`` of the adapter's configuration is overwritten.

    Before each step the gradient of ``orth_reg_weight`` :math:`\cdot R` is added to that of the loss, R being
    :func:`orthogonal_penalty`, as peft adds R to a loss that the model itself computes. Once a step, after the loss has
    been averaged over its tokens and before clipping: so a step is peft's own step on the whole batch, in however many
    micro-batches, pieces and ranks (DDP) it runs.

    Importance, ranks and their being final are in the checkpoint. List it after ``GradientNoiseScale``, which then
    measures the loss alone.

    Args:
        log_name: Name under which the mean rank of a matrix is logged; None for none.

    Raises:
        ValueError: Without an AdaLoRA adapter; with sharded parameters; for a run without an end, or one that is too
            short for ``tinit`` and ``tfinal``.

    References:
        Zhang et al., AdaLoRA: Adaptive budget allocation for parameter-efficient fine-tuning, ICLR 2023, equations 4, 7
        to 11. peft, tuners/adalora/model.py.
    """

    allocates_ranks = True  # others may ask whether somebody does

    def __init__(self, log_name: str | None = "train/rank") -> None:
        self.log_name = log_name
        self._model: Any = None  # peft's AdaLoraModel
        self._is_final = False
        self._is_stepping = False
        self._loaded: dict[str, Any] | None = None
        self._step_hook: Any = None

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse manual optimization; begin a new run with nothing final."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"AdaLoraAllocation needs automatic optimization, but {type(pl_module).__name__} optimizes manually: "
                f"call peft's `update_and_allocate` there, after `optimizer.step()`."
            )
        if trainer.global_step == 0:  # another run than the last; a checkpoint is loaded later
            self._is_final = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the adapter, tell it how long the run is, and listen to the optimizer that steps it."""
        self._model = find_ada_lora(pl_module)
        config = self._model.peft_config[self._model.trainable_adapter_name]
        config.total_step = run_length(total_optimizer_steps(trainer), config.tinit, config.tfinal)
        if self._loaded is not None:
            self._restore(self._loaded)
        self._loaded = None
        ours = {id(parameter) for _, parameter in self._factors("lora_")}
        (optimizer,) = [one for one in trainer.optimizers if any(id(p) in ours for p in parameters_of(one))]
        self._step_hook = optimizer.register_step_post_hook(lambda *_: self._allocate(trainer.global_step))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the gradient of the penalty, if there is anything to learn in this step."""
        self._is_stepping = True
        factors = [(name, factor) for name, factor in self._factors("lora_A", "lora_B") if factor.numel()]
        config = self._model.peft_config[self._model.trainable_adapter_name]
        if config.orth_reg_weight and any(factor.grad is not None for _, factor in factors):
            with torch.enable_grad(), torch.autocast(pl_module.device.type, enabled=False):
                penalty = config.orth_reg_weight * orthogonal_penalty(factors)
            gradients = torch.autograd.grad(penalty, [factor for _, factor in factors])
            for (_, factor), gradient in zip(factors, gradients, strict=True):
                factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)
        if self.log_name is not None:
            pl_module.log(self.log_name, self.mean_rank(), batch_size=1)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the optimizer."""
        self._stop_listening()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the optimizer."""
        self._stop_listening()

    def state_dict(self) -> dict[str, Any]:
        """Importance averaged so far, which ranks are left, and whether for good: equal on all ranks of DDP."""
        if self._model is None:
            return self._loaded or {}
        allocator = self._model.rankallocator
        return {
            "is_final": self._is_final,
            "rank_pattern": self._model.peft_config[self._model.trainable_adapter_name].rank_pattern,
            "sensitivity": dict(allocator.exp_avg_ipt),
            "uncertainty": dict(allocator.exp_avg_unc),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, once the adapter is built."""
        self._loaded = state_dict
        self._model = None

    # ---- what others may ask ---------------------------------------------------------------------------------------

    def mean_rank(self) -> float:
        """Ranks that are left, on average over the matrices."""
        config = self._model.peft_config[self._model.trainable_adapter_name]
        if config.rank_pattern:
            return sum(map(sum, config.rank_pattern.values())) / len(config.rank_pattern)
        return float(config.init_r)

    # ---- details -------------------------------------------------------------------------------------------------

    def _factors(self, *names: str) -> list[tuple[str, nn.Parameter]]:
        adapter = self._model.trainable_adapter_name
        return [
            (name, parameter)
            for name, parameter in self._model.model.named_parameters()
            if adapter in name and any(part in name for part in names)
        ]

    @torch.no_grad()
    def _allocate(self, step: int) -> None:
        """After the optimizer's step, with the gradients that it was made with."""
        if not self._is_stepping:  # another callback's rehearsal
            return
        self._is_stepping = False
        config = self._model.peft_config[self._model.trainable_adapter_name]
        last = config.total_step - config.tfinal
        without = [parameter for _, parameter in self._factors("lora_") if parameter.grad is None]
        for parameter in without:  # no token reached it: it mattered nothing
            parameter.grad = torch.zeros_like(parameter)
        self._model.update_and_allocate(allocation_step(step, last, self._is_final))
        for parameter in without:
            parameter.grad = None
        self._is_final = self._is_final or step >= last

    def _restore(self, state: Mapping[str, Any]) -> None:
        allocator = self._model.rankallocator
        devices = {name: parameter.device for name, parameter in self._factors("lora_")}
        for name, sensitivity in state["sensitivity"].items():
            allocator.exp_avg_ipt[name] = sensitivity.to(devices[name])
            allocator.exp_avg_unc[name] = state["uncertainty"][name].to(devices[name])
            allocator.ipt[name] = allocator.exp_avg_ipt[name]  # peft begins anew where this is missing
        self._model.peft_config[self._model.trainable_adapter_name].rank_pattern = state["rank_pattern"]
        self._is_final = state["is_final"]

    def _stop_listening(self) -> None:
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None


def find_ada_lora(module: nn.Module) -> Any:
    """The one ``AdaLoraModel`` of peft in a module.

    Raises:
        ValueError: If there is none, several, or one whose parameters are sharded.
    """
    found: Sequence[Any] = [one for one in module.modules() if "rankallocator" in vars(one)]
    if len(found) != 1:
        raise ValueError(
            f"AdaLoraAllocation expects one AdaLoRA adapter that trains, but {type(module).__name__} has {len(found)}. "
            f"Make one, for instance by LLMModule(peft={{'peft_type': 'ADALORA'}}), or leave the callback out."
        )
    if any(isinstance(parameter, DTensor) for parameter in found[0].parameters()):
        raise ValueError(
            "AdaLoraAllocation compares the importance of whole weights, but these are sharded over ranks. Use "
            "Trainer(strategy='ddp')."
        )
    return found[0]


def run_length(steps: float, initial: int, final: int) -> int:
    """The run's optimizer steps, if there is room between the first and the last ones, in which ranks stay.

    Args:
        steps: Of the run.
        initial: ``tinit``.
        final: ``tfinal``.

    Raises:
        ValueError: If there is none, or no end.
    """
    if math.isinf(steps):
        raise ValueError("AdaLoRA needs a run with an end: set Trainer(max_steps=...) or max_epochs.")
    if initial >= steps - final:
        raise ValueError(
            f"AdaLoRA has no step left to give up ranks in: the run has {int(steps)} optimizer steps, of which the "
            f"first tinit={initial} and the last tfinal={final} leave them. Lower these, or train longer."
        )
    return int(steps)
