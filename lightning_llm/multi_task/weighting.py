"""How the losses of several tasks are weighed against each other: by numbers, by uncertainty, by gradient norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_llm.loss import TokenLoss
from lightning_llm.metrics import moves_only


def task_weights(names: Sequence[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    """The weight of each task, 1 where nothing is said.

    Raises:
        ValueError: For a task that is not there, and for a weight that is not above 0.

    Example:
        >>> task_weights(["topic", "lm"], {"lm": 0.5})
        {'topic': 1.0, 'lm': 0.5}
    """
    unknown = sorted(set(weights or {}) - set(names))
    if unknown:
        raise ValueError(f"`weights` name {', '.join(unknown)}, but the tasks are {', '.join(names)}.")
    found = {name: float((weights or {}).get(name, 1.0)) for name in names}
    for name, weight in found.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(
                f"The weight of a task must be above 0, but that of {name!r} is {weight}. Leave out a task that is "
                f"not to be trained."
            )
    return found


def balanced_weights(
    norms: Sequence[float], losses: Sequence[float], base: Sequence[float], alpha: float
) -> list[float]:
    r"""Weights under which each task's gradient has the norm that GradNorm wants it to have.

    .. math:: w_t \propto b_t \, r_t^\alpha / \lVert g_t \rVert, \qquad \sum_t w_t = \sum_t b_t

    so that :math:`w_t \lVert g_t \rVert` is the same for all tasks, times :math:`b_t r_t^\alpha`, where :math:`r_t` is
    the share of its first loss that a task has left, over the mean of these.

    Args:
        norms: Of the gradient of each task's loss at the last layer that all share.
        losses: Each task's loss now over its first one.
        base: :math:`b_t`.
        alpha: 0 makes norms equal; above 0, tasks that have learned less get more.

    Example:
        >>> balanced_weights([4.0, 1.0], [1.0, 1.0], [1.0, 1.0], alpha=0.0)
        [0.4, 1.6]

    References:
        Chen et al., GradNorm, arXiv 1711.02257, equations 1 and 2: the weights that its second optimizer approaches.
    """
    mean = sum(losses) / len(losses)
    raw = [
        b * (loss / mean if mean > 0 else 1.0) ** alpha / max(norm, 1e-30)
        for norm, loss, b in zip(norms, losses, base, strict=True)
    ]
    return [sum(base) * value / sum(raw) for value in raw]


class TaskWeighting(nn.Module):
    r"""Weights that stay: :math:`L = \sum_t w_t L_t`.

    Each micro-batch brings its part of the sum: what all micro-batches of a step bring adds up to the step's objective,
    whatever they are.

    Args:
        weights: By task.
    """

    changes: ClassVar[bool] = False  # whether weights change from step to step
    measures: ClassVar[bool] = False  # whether it wants each task's gradient at the last shared layer

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.base = dict(weights)

    def objective(self, task: str, loss: TokenLoss, is_squared: bool) -> Tensor:
        """A micro-batch's part of the objective, times the number of the task's targets in the step; shape ().

        Args:
            task: Whose loss it is.
            loss: Summed, with its number of targets.
            is_squared: Whether it is a squared error.
        """
        return self.base[task] * loss.total

    def own_parameters(self) -> dict[str, list[nn.Parameter]]:
        """What is learned for each task."""
        return {name: [] for name in self.base}

    def current(self) -> dict[str, float]:
        """The weight of each task's loss as it now is."""
        return dict(self.base)

    def after_step(self, losses: Mapping[str, float], norms: Mapping[str, float]) -> None:
        """Learn from an optimizer step.

        Args:
            losses: Mean over all targets of the step, of each task that had some.
            norms: Of the gradients of these, if the weighting measures them.
        """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(moves_only(fn), recurse)  # type: ignore[no-untyped-call]


class UncertaintyWeighting(TaskWeighting):
    r"""Weights that are learned: a variance for each task, :math:`s_t = \log \sigma_t^2`, which starts at 0.

    .. math:: L = \sum_t b_t e^{-s_t} L_t + s_t / 2

    and half of the first term for a squared error. Every target brings its share of :math:`s_t / 2`, so that a step
    has it once, however it is cut. The variances do not decay.

    Args:
        weights: :math:`b_t` by task.

    References:
        Kendall, Gal and Cipolla, arXiv 1705.07115, equations 7 and 10.
    """

    changes = True

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(weights)
        zeros = {name: nn.Parameter(torch.zeros((), dtype=torch.float64)) for name in weights}
        self.log_variances = nn.ParameterDict(zeros)

    def objective(self, task: str, loss: TokenLoss, is_squared: bool) -> Tensor:
        """With the targets' share of the variance."""
        log_variance = self.log_variances[task]
        weight = self.base[task] * (0.5 if is_squared else 1.0) * torch.exp(-log_variance)
        objective: Tensor = weight * loss.total + loss.num_tokens * log_variance / 2
        return objective

    def own_parameters(self) -> dict[str, list[nn.Parameter]]:
        """A variance for each task."""
        return {name: [self.log_variances[name]] for name in self.base}

    def current(self) -> dict[str, float]:
        """By the variances."""
        return {name: weight * math.exp(-self.log_variances[name].item()) for name, weight in self.base.items()}


class GradientNormWeighting(TaskWeighting):
    """Weights under which the tasks' gradients are equally long at the last layer that all share.

    The gradient of each task's loss there is added up over micro-batches and ranks; its norm over the whole step does
    not depend on the cut. Averages of norms and losses over the steps so far make the next step's weights, by
    :func:`balanced_weights`; until every task was seen they are the given ones.

    Args:
        weights: By task: what the products of weight and norm are in proportion to.
        alpha: As in :func:`balanced_weights`.
        decay: Of the averages, a step.

    Raises:
        ValueError: For a decay outside 0..1, or a negative alpha.
    """

    changes = measures = True
    norms: Tensor  # of each task, 0 before the first
    losses: Tensor
    first_losses: Tensor
    weights: Tensor

    def __init__(self, weights: Mapping[str, float], alpha: float = 0.0, decay: float = 0.9) -> None:
        super().__init__(weights)
        if not 0 <= decay < 1 or not alpha >= 0:
            raise ValueError(f"`decay` must lie in 0..1 and `alpha` be 0 or more, but got {decay} and {alpha}.")
        self.alpha = alpha
        self.decay = decay
        self.names = list(weights)
        base = torch.tensor(list(weights.values()), dtype=torch.float64)
        for name in ("norms", "losses", "first_losses"):
            self.register_buffer(name, torch.zeros_like(base))
        self.register_buffer("weights", base)

    def objective(self, task: str, loss: TokenLoss, is_squared: bool) -> Tensor:
        """By the weights of the steps before."""
        return self.weights[self.names.index(task)].to(loss.total) * loss.total

    def current(self) -> dict[str, float]:
        """By the norms of the steps before."""
        return dict(zip(self.names, self.weights.tolist(), strict=True))

    @torch.no_grad()
    def after_step(self, losses: Mapping[str, float], norms: Mapping[str, float]) -> None:
        """Average, and weigh anew."""
        for index, name in enumerate(self.names):
            if name not in losses:
                continue
            if not self.norms[index]:
                self.norms[index], self.losses[index] = norms[name], losses[name]
                self.first_losses[index] = losses[name]
            self.norms[index] = self.decay * self.norms[index] + (1 - self.decay) * norms[name]
            self.losses[index] = self.decay * self.losses[index] + (1 - self.decay) * losses[name]
        if bool((self.norms > 0).all()):
            left = (self.losses / self.first_losses.clamp(min=1e-30)).tolist()
            new = balanced_weights(self.norms.tolist(), left, list(self.base.values()), self.alpha)
            self.weights.copy_(self.weights.new_tensor(new))


WEIGHTINGS: dict[str, Callable[..., TaskWeighting]] = {
    "fixed": TaskWeighting,
    "uncertainty": UncertaintyWeighting,
    "gradient_norm": GradientNormWeighting,
}


def make_weighting(name: str, weights: Mapping[str, float], options: Mapping[str, Any] | None) -> TaskWeighting:
    """A weighting by name.

    Raises:
        ValueError: For another name, or options that it does not take.
    """
    if name not in WEIGHTINGS:
        raise ValueError(f"`weighting` must be one of {', '.join(WEIGHTINGS)}, but got {name!r}.")
    try:
        return WEIGHTINGS[name](weights, **(options or {}))
    except TypeError as error:
        raise ValueError(
            f"`weighting_options` of 'gradient_norm' are alpha and decay, the others have none, but {name!r} got "
            f"{options}."
        ) from error
