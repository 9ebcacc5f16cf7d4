"""The gradient of a single backward, measured as autograd makes it: before it is added to others or reduced."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_llm.callbacks.steps.gradients import gradient_norm, gradient_norms
from lightning_llm.loss import exact_dtype


class GradientWatch:
    """Squared norms of gradients per parameter group: of single backwards, and of the optimizer step.

    A hook on each parameter is called once in a backward, however often the parameter is used in it (tied weights),
    with the sum of that backward alone. It takes the norm and keeps nothing else. Parameters sharded by FSDP2 are
    watched where a backward leaves its gradients: on the whole parameter, which exists while a layer is gathered.

    Args:
        module: Of the run, with its parameters in place. If it is sharded, all ranks take part.
        optimizer: Its parameters are watched; those of each group are measured together.
        precondition: Divide gradients by what Adam divides them by, as of the last optimizer step. Entries without a
            second moment yet are left out.

    Raises:
        ValueError: If parameters are distributed in another way than by FSDP2, or ``precondition`` cannot be done.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, precondition: bool = False) -> None:
        self._optimizer = optimizer
        self._precondition = precondition
        self._betas = [0.0] * len(optimizer.param_groups)
        self._watched: set[nn.Parameter] = set()  # as the optimizer knows them
        self._handles: list[Any] = []
        self._norms: list[list[Tensor]] | None = None  # of the backward at hand, by group; None outside
        self._seen: set[nn.Parameter] = set()
        if precondition and not all("betas" in group and "eps" in group for group in optimizer.param_groups):
            raise ValueError(
                f"precondition=True divides by Adam's second moment, which {type(optimizer).__name__} does not have. "
                f"Use an optimizer of Adam's kind, or precondition=False."
            )
        if any(isinstance(parameter, DTensor) for parameter in self._groups()):
            self._watch_shards(module)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has a shard of each gradient."""
        return any(isinstance(parameter, DTensor) for parameter in self._watched)

    @property
    def num_groups(self) -> int:
        """Parameter groups."""
        return len(self._optimizer.param_groups)

    def begin_step(self) -> None:
        """Before the first backward of an optimizer step: watch parameters that are new."""
        self._betas = [group["betas"][1] if self._precondition else 0.0 for group in self._optimizer.param_groups]
        for parameter, group in self._groups().items():
            if parameter not in self._watched and parameter.requires_grad and not isinstance(parameter, DTensor):
                self._watch(parameter, parameter, group)

    def begin(self) -> None:
        """Before a backward."""
        self._norms = [[] for _ in range(self.num_groups)]
        self._seen.clear()

    def cancel(self) -> None:
        """The backward failed, or will not come."""
        self._norms = None

    def end(self, device: torch.device) -> Tensor:
        """After a backward: squared norm of its gradient, (groups,), in float64 where the device has it."""
        assert self._norms is not None
        squares = torch.stack([_sum_of_squares(norms, device) for norms in self._norms])
        self._norms = None
        return squares

    def of_step(self, device: torch.device) -> Tensor:
        """Squared norm of the gradients that the optimizer is about to use (this rank's shards of them), (groups,)."""
        norms: list[list[Tensor]] = [[] for _ in range(self.num_groups)]
        found = [(p, group) for p, group in self._groups().items() if p.grad is not None]
        if any(isinstance(parameter, DTensor) and parameter not in self._watched for parameter, _ in found):
            raise ValueError(
                "A parameter sharded by FSDP2 has a gradient but was frozen when training started, when its hook was "
                "due. Unfreeze it before `fit`, or leave GradientNoiseScale out."
            )
        gradients = [_gradient(parameter) for parameter, _ in found]
        if not self._precondition:
            for norm, (_, group) in zip(gradient_norms(gradients), found, strict=True):
                norms[group].append(norm)
        else:  # one at a time: each is a copy
            for gradient, (parameter, group) in zip(gradients, found, strict=True):
                norms[group] += self._norm(parameter, group, gradient)
        return torch.stack([_sum_of_squares(group, device) for group in norms])

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Those that the optimizer is about to use; not copied."""
        return {p: _gradient(p) for p in self._groups() if p.grad is not None}

    def products(self, others: dict[nn.Parameter, Tensor], device: torch.device) -> Tensor:
        """Inner product of the step's gradients with ``others``, (groups,)."""
        exact = exact_dtype(device)
        result = torch.zeros(self.num_groups, device=device, dtype=exact)
        for parameter, group in self._groups().items():
            if parameter.grad is not None and parameter in others:
                result[group] += _product(_gradient(parameter), others[parameter]).to(result)
        return result

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched.clear()
        self._norms = None

    # ---- details -------------------------------------------------------------------------------------------------

    def _groups(self) -> dict[nn.Parameter, int]:
        """Each parameter once, with the number of its group."""
        return {p: number for number, group in enumerate(self._optimizer.param_groups) for p in group["params"]}

    def _watch(self, parameter: nn.Parameter, whole: nn.Parameter, group: int) -> None:
        hook = functools.partial(self._on_gradient, parameter, group)
        self._handles.append(whole.register_hook(hook))  # type: ignore[no-untyped-call]
        self._watched.add(parameter)

    def _watch_shards(self, module: nn.Module) -> None:
        if self._precondition:
            raise ValueError(
                "precondition=True needs the whole second moment of a parameter on each rank, but FSDP2 shards it. Use "
                "precondition=False, or DDPStrategy."
            )
        groups = self._groups()
        for part in module.modules():
            if not isinstance(part, FSDPModule):
                continue
            part.reshard()  # what a forward without a backward has left whole
            shards = dict(part.named_parameters())
            part.unshard()
            for name, whole in part.named_parameters():
                shard = shards[name]
                if whole is not shard and shard in groups and whole.requires_grad and not isinstance(whole, DTensor):
                    self._watch(shard, whole, groups[shard])
            part.reshard()
        strange = sum(p.requires_grad and isinstance(p, DTensor) and p not in self._watched for p in groups)
        strange += sum(not placement.is_shard() for p in self._watched for placement in getattr(p, "placements", ()))
        if strange:
            raise ValueError(
                f"GradientNoiseScale knows distributed parameters of FSDP2 only, each in one shard per rank, but "
                f"{strange} are split or replicated otherwise (tensor parallelism, hybrid sharding). Leave it out."
            )

    def _on_gradient(self, parameter: nn.Parameter, group: int, gradient: Tensor | None) -> None:
        if self._norms is None or gradient is None:
            return
        if parameter in self._seen:
            self._norms = None
            raise ValueError(
                "A parameter got its gradient in several parts within one backward, so that its norm cannot be taken. "
                "GradientNoiseScale works neither with windows along the sequence in a model sharded by FSDP2 nor with "
                "reentrant checkpointing of layers that share weights. Leave it out, or use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        self._seen.add(parameter)
        self._norms[group] += self._norm(parameter, group, gradient)

    def _norm(self, parameter: nn.Parameter, group: int, gradient: Tensor) -> list[Tensor]:
        conditioned = self._conditioned(parameter, group, gradient)
        return [] if conditioned is None else [gradient_norm(conditioned)]

    @torch.no_grad()
    def _conditioned(self, parameter: nn.Parameter, group: int, gradient: Tensor) -> Tensor | None:
        """The gradient as Adam divides it, sign and momentum aside; None before its first step."""
        if not self._precondition:
            return gradient
        state = self._optimizer.state.get(parameter)
        if not state:
            return None
        if "exp_avg_sq" not in state or gradient.is_sparse:
            raise ValueError(
                f"precondition=True reads `exp_avg_sq` from the state of {type(self._optimizer).__name__}, for "
                f"gradients that are not sparse; the state has {sorted(state)}. Use torch's Adam or AdamW, or "
                f"precondition=False."
            )
        settings = self._optimizer.param_groups[group]
        moment, steps = state["exp_avg_sq"], torch.as_tensor(state["step"])
        steps = steps.to(exact_dtype(steps.device))
        started = 1 - self._betas[group] ** steps  # what an average from 0 has come to hold
        root: Tensor = moment.to(torch.promote_types(moment.dtype, torch.float32)).sqrt()
        quotient = root.div_(started.sqrt()).add_(settings["eps"]).reciprocal_().mul_(gradient)
        return quotient.masked_fill_(moment == 0, 0.0)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _product(first: Tensor, second: Tensor) -> Tensor:
    if first.is_sparse:
        return (first * second).sum()
    wide = torch.promote_types(first.dtype, torch.float32)
    return torch.dot(first.flatten().to(wide), second.flatten().to(wide))


def _sum_of_squares(norms: list[Tensor], device: torch.device) -> Tensor:
    if not norms:
        return torch.zeros((), device=device, dtype=exact_dtype(device))
    return torch.stack([norm.to(device) for norm in norms]).to(exact_dtype(device)).square().sum()
