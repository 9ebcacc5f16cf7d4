"""What an optimizer step has to know of each task: its loss, its targets, its gradient at the last shared layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from lightning_llm.loss import TokenLoss, exact_dtype
from lightning_llm.parallel import data_parallel_size


class TaskMicroBatch(NamedTuple):
    """A micro-batch of one task.

    Attributes:
        task: Its name.
        loss: Summed, with its number of targets; detached, on the device.
        gradient: Of the summed loss by the last shared matrix, if somebody wants it.
        targets: Of each task in the whole step, as the batch says.
    """

    task: str
    loss: TokenLoss
    gradient: Tensor | None
    targets: Mapping[str, int]


class StepResult(NamedTuple):
    """An optimizer step over all micro-batches and ranks, of each task that had a target.

    Attributes:
        losses: Mean over the task's targets.
        norms: Of the gradient of that mean by the last shared matrix, if it was measured.
    """

    losses: dict[str, float]
    norms: dict[str, float]


class TaskStep:
    """Collects the micro-batches of an optimizer step, without waiting for the device.

    Args:
        names: Of the tasks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._sums: Tensor | None = None  # (tasks, 2): loss and targets
        self._gradients: Tensor | None = None  # (tasks, *matrix)
        self._targets: Mapping[str, int] = {}

    def __bool__(self) -> bool:
        return self._sums is not None

    def clear(self) -> None:
        """Forget all."""
        self._sums = self._gradients = None

    def add(self, micro: TaskMicroBatch) -> None:
        """A micro-batch whose gradient is in."""
        index = self.names.index(micro.task)
        exact = exact_dtype(micro.loss.total.device)
        if self._sums is None:
            self._sums = torch.zeros((len(self.names), 2), dtype=exact, device=micro.loss.total.device)
        self._sums[index] += torch.stack([micro.loss.total.to(exact), micro.loss.num_tokens.to(exact)])
        self._targets = micro.targets
        if micro.gradient is not None:
            if self._gradients is None:
                kind = torch.promote_types(micro.gradient.dtype, torch.float32)
                shape = (len(self.names), *micro.gradient.shape)
                self._gradients = torch.zeros(shape, dtype=kind, device=micro.gradient.device)
            self._gradients[index] += micro.gradient

    def finish(self, trainer: L.Trainer) -> StepResult:
        """Sum over ranks: one small all-reduce, and one of a matrix per task where gradients are measured.

        Raises:
            ValueError: If the step had other numbers of targets than its batches said.
        """
        assert self._sums is not None
        share = data_parallel_size(trainer) / trainer.world_size
        sums = trainer.strategy.reduce(self._sums, reduce_op="sum") * share
        gradients = self._gradients
        if gradients is not None:
            gradients = trainer.strategy.reduce(gradients, reduce_op="sum") * share
        totals, counts = sums.T.tolist()
        found = {name: round(count) for name, count in zip(self.names, counts, strict=True)}
        expected = {name: self._targets[name] for name in self.names}
        self.clear()
        if found != expected:
            raise ValueError(
                f"The micro-batches of this optimizer step held {found} targets, but their `step_targets` say "
                f"{expected}: the gradient would be of another size. `step_targets` are the targets of each task in "
                f"the whole optimizer step, over all its micro-batches and all ranks. Let nobody else change "
                f"accumulate_grad_batches or the labels."
            )
        losses = {name: total / found[name] for name, total in zip(self.names, totals, strict=True) if found[name]}
        norms: dict[str, float] = {}
        if gradients is not None:
            lengths = torch.linalg.vector_norm(gradients.flatten(1), dim=1).tolist()
            norms = {name: n / found[name] for name, n in zip(self.names, lengths, strict=True) if found[name]}
        return StepResult(losses, norms)


def touch(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A zero whose backward visits parameters and gives them no gradient.

    DistributedDataParallel waits for every parameter, also for those of heads that a batch has nothing to do with.

    Args:
        parameters: At least one, or the zero is a plain one.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return torch.zeros(())
    zero: Tensor = _Touch.apply(*trained)  # type: ignore[no-untyped-call]
    return zero


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        """Zero, with all parameters behind it."""
        ctx.number = len(parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        """No gradient for any of them."""
        return (None,) * ctx.number
