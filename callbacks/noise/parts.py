"""A step's gradient and the parts that it is the mean of: micro-batches, pieces of them, ranks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Part:
    """A micro-batch, or a piece of one.

    Attributes:
        sizes: In each unit, numbers or tensors of shape (); NaN where it cannot be counted.
        weight: By which its mean gradient enters the step's, shape (), once its backward has begun.
        squares: Squared norm of what it adds to the step's gradient, (groups,), once its backward is done.
    """

    def __init__(self, loss: Tensor, sizes: tuple[Any, ...]) -> None:
        self.sizes = tuple(math.nan if size is None else size for size in sizes)
        self.weight: Tensor | None = None
        self.squares: Tensor | None = None
        if loss.requires_grad:
            loss.register_hook(self._keep_weight)  # type: ignore[no-untyped-call]

    def _keep_weight(self, gradient: Tensor) -> None:
        """The gradient at the loss: all that Lightning, gradient scalers and weighting callbacks multiply it by."""
        self.weight = gradient.detach().reshape(())


class PartSums(NamedTuple):
    """What the parts of a step add up to, over micro-batches and ranks; see :func:`sum_parts`.

    Attributes:
        number: Parts with a weight.
        weight: Sum of their weights.
        squares: Sum of weight times squared norm of the mean gradient, (groups,).
        inverse: Sum of weight / size, (units,).
        inverse_squared: Sum of weight squared / size, (units,).
    """

    number: Tensor
    weight: Tensor
    squares: Tensor
    inverse: Tensor
    inverse_squared: Tensor


def sum_parts(weights: Tensor, sizes: Tensor, squares: Tensor) -> PartSums:
    """Sum over parts whose gradients entered the step as weight times mean gradient.

    A part without a weight counts for nothing, whatever its size.

    Args:
        weights: (parts,).
        sizes: (parts, units); NaN where unknown.
        squares: Squared norm of what each part has added to the gradient, (parts, groups).

    Example:
        >>> two = sum_parts(torch.tensor([0.5, 0.5]), torch.tensor([[4.0], [4.0]]), torch.tensor([[1.0], [0.5]]))
        >>> two.squares.item(), two.inverse.item(), two.inverse_squared.item()
        (3.0, 0.25, 0.125)
    """
    is_in = weights != 0
    column, mask = weights[:, None], is_in[:, None]
    return PartSums(
        is_in.sum().to(weights),
        weights.sum(),
        torch.where(mask, squares / column, 0.0).sum(0),
        torch.where(mask, column / sizes, 0.0).sum(0),
        torch.where(mask, column.square() / sizes, 0.0).sum(0),
    )


def sums_of(parts: list[Part], num_units: int, like: Tensor) -> PartSums:
    """The sums of this rank's parts.

    Args:
        parts: With weight and squares.
        num_units: Units in which sizes are counted.
        like: (groups,), of the type and on the device of the result.
    """
    if not parts:
        zero, units = like.new_zeros(()), like.new_zeros(num_units)
        return PartSums(zero, zero, torch.zeros_like(like), units, units)
    weights = torch.stack([part.weight for part in parts if part.weight is not None])
    squares = torch.stack([part.squares for part in parts if part.squares is not None])
    sizes = [[torch.as_tensor(size).to(like) for size in part.sizes] for part in parts]
    return sum_parts(weights.to(like), torch.stack([torch.stack(row) for row in sizes]), squares)


class MeasuredStep(NamedTuple):
    """A step over all ranks, the weights of its parts brought to a sum of 1.

    Attributes:
        number: Parts.
        mean_of_squares: Of their gradients' squared norms, by group.
        square_of_mean: Squared norm of their mean gradient, by group.
        inverse: Mean of 1 / size, by unit.
        inverse_squared: Sum of weight squared / size, by unit.
        total_weight: That of the gradient which the optimizer is given.
    """

    number: int
    mean_of_squares: list[float]
    square_of_mean: list[float]
    inverse: list[float]
    inverse_squared: list[float]
    total_weight: float


def pair_up(first: MeasuredStep, second: MeasuredStep, products: list[float]) -> MeasuredStep | None:
    """Two steps of one part each as the parts of one, in proportion to their sizes.

    Args:
        first: A step of one part.
        second: The next one.
        products: Inner products of the gradients that the optimizer was given, by group.

    Returns:
        The step; None if their sizes are known in no unit.
    """
    inverses = list(zip(first.inverse, second.inverse, strict=True))
    known = [pair for pair in inverses if math.isfinite(sum(pair))]
    if not known:
        return None
    p, q = known[0][1] / sum(known[0]), known[0][0] / sum(known[0])
    squares = list(zip(first.square_of_mean, second.square_of_mean, strict=True))
    both = [product / (first.total_weight * second.total_weight) for product in products]
    return MeasuredStep(
        2,
        [p * a + q * b for a, b in squares],
        [p * p * a + q * q * b + 2 * p * q * c for (a, b), c in zip(squares, both, strict=True)],
        [p * a + q * b for a, b in inverses],
        [p * p * a + q * q * b for a, b in inverses],
        1.0,
    )
