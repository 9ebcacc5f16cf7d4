"""What the pieces of a batch log and return becomes what the whole batch would have logged and returned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_llm.loss import exact_dtype


class PieceLogs:
    """Holds back what ``self.log`` is given inside pieces, and passes it on once for the batch.

    So a step's value is that of the whole batch, a piece that failed logs nothing, and ``sync_dist`` communicates as
    often on each rank, however many pieces it needed. Means are weighted as the pieces' gradients are, or by the
    ``batch_size`` that was given to ``self.log``; so is a Metric object's value of the step.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, int], _Entry] = {}
        self._current: list[tuple[tuple[str, str, int], Any, dict[str, Any]]] = []

    @contextmanager
    def hold_back(self, results: Any) -> Iterator[None]:
        """Inside, nothing reaches Lightning's results; after it without an error, everything does, once."""
        if results is None:
            yield
            return

        def log(fx: str, name: str, value: Any, **options: Any) -> None:
            if not options.get("enable_graph"):
                value = value.detach() if isinstance(value, Tensor) else value
            number = sum(key[:2] == (fx, name) for key, _, _ in self._current)  # usually the first of its name
            self._current.append(((fx, name, number), value, options))

        self._kept.clear()
        self._current.clear()
        results.__dict__["log"] = log
        try:
            yield
        finally:
            results.__dict__.pop("log", None)
        for (fx, name, _), entry in self._kept.items():
            results.log(fx, name, entry.value(), **entry.options)
        self._kept.clear()

    def keep(self, weight: Any) -> None:
        """A piece is done. ``weight`` is its weight in the gradient, a number or a tensor of shape ()."""
        for key, value, options in self._current:
            self._kept.setdefault(key, _Entry()).add(value, weight, options)
        self._current.clear()

    def discard(self) -> None:
        """A piece failed."""
        self._current.clear()


class _Entry:
    def __init__(self) -> None:
        self.values: list[Any] = []
        self.step_values: list[Any] = []  # of metrics
        self.weights: list[Any] = []
        self.options: dict[str, Any] = {}

    def add(self, value: Any, weight: Any, options: dict[str, Any]) -> None:
        """What a piece logged."""
        given = options.get("batch_size")
        self.values.append(value)
        self.step_values.append(getattr(value, "_forward_cache", None))
        self.weights.append(weight if given is None else given)
        if given is not None:
            options = {**options, "batch_size": given + (self.options.get("batch_size") or 0)}
        self.options = options

    def value(self) -> Any:
        """That of the batch."""
        last = self.values[-1]
        if len(self.values) == 1:
            return last
        if isinstance(last, Metric) and all(isinstance(v, Tensor) and v.ndim == 0 for v in self.step_values):
            last.__dict__["_forward_cache"] = weighted_mean(self.step_values, self.weights)
        if not isinstance(last, Tensor):
            return last
        reduce = self.options.get("reduce_fx", torch.mean)
        name = reduce.lower() if isinstance(reduce, str) else getattr(reduce, "__name__", "mean")
        values = torch.stack(self.values)
        if name in ("sum", "min", "max"):
            return getattr(values, f"a{name}" if name != "sum" else name)(0)
        return weighted_mean(self.values, self.weights)


def weighted_mean(values: Sequence[Tensor], weights: Sequence[Any]) -> Tensor:
    """Mean of values, each of shape (), by weights; a plain mean where no weight is above 0."""
    if len(values) == 1:
        return values[0]
    stacked = torch.stack(list(values))
    exact = exact_dtype(stacked.device)
    scale = torch.stack([torch.as_tensor(weight, device=stacked.device).to(exact) for weight in weights])
    total = scale.sum()
    weighted = torch.where(scale > 0, stacked.to(exact), 0.0) * scale  # what has no weight may be NaN
    mean = torch.where(total > 0, weighted.sum() / total.clamp(min=1e-30), stacked.to(exact).mean())
    return mean.to(stacked.dtype if stacked.is_floating_point() else torch.get_default_dtype())


def merge_outputs(
    outputs: Sequence[Any], rows: Sequence[float], weights: Sequence[Any], strict: bool = False, path: str = "it"
) -> Any:
    """Join what a step returned for each piece.

    Tensors and lists with one entry per row are joined in the order of the pieces; of tensors of shape () integers
    are summed (they count) and others averaged; mappings and tuples are joined entry by entry; what is equal for all
    stays; the rest becomes a list with one entry per piece, or is refused.

    Args:
        outputs: One per piece.
        rows: Rows of each piece.
        weights: Weight of each piece in a mean.
        strict: Refuse what cannot be joined.
        path: What this is, for the message.

    Raises:
        ValueError: If ``strict``, naming what cannot be joined.
    """
    first = outputs[0]
    if len(outputs) == 1 or all(output is None for output in outputs):
        return first
    same_type = all(type(output) is type(first) for output in outputs)
    if same_type and isinstance(first, Tensor):
        if all(output.ndim == 0 for output in outputs):
            counts = not (first.is_floating_point() or first.is_complex())
            return torch.stack(list(outputs)).sum() if counts else weighted_mean(outputs, weights)
        if _is_by_row(outputs, rows) and len({(output.shape[1:], output.device) for output in outputs}) == 1:
            return torch.cat(list(outputs))
    elif same_type and isinstance(first, Mapping) and all(output.keys() == first.keys() for output in outputs):
        items = {
            key: merge_outputs([output[key] for output in outputs], rows, weights, strict, f"{path}[{key!r}]")
            for key in first
        }
        return items if type(first) is dict else _remake(first, items)
    elif same_type and isinstance(first, (list, tuple)):
        is_named = hasattr(first, "_fields")
        by_row = isinstance(first, list) and _is_by_row(outputs, rows)
        by_entry = all(len(output) == len(first) for output in outputs)
        if by_row and not (by_entry and all(_is_by_row(entries, rows) for entries in zip(*outputs, strict=True))):
            return type(first)(entry for output in outputs for entry in output)
        if by_entry and not by_row:  # a list that could be joined in both ways is refused
            merged = [
                merge_outputs(entries, rows, weights, strict, f"{path}[{i}]")
                for i, entries in enumerate(zip(*outputs, strict=True))
            ]
            return type(first)(*merged) if is_named else type(first)(merged)
    elif same_type and isinstance(first, (str, bytes, bool, int, float)) and all(out == first for out in outputs):
        return first
    if strict:
        kinds = [tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__ for out in outputs]
        raise ValueError(
            f"A batch was run in {len(outputs)} pieces of {[int(n) for n in rows]} rows, and {path} cannot be joined: "
            f"{kinds}. Return tensors or lists with one entry per row, or pass DynamicBatchScaler(merge_fn=...)."
        )
    return list(outputs)


def _is_by_row(outputs: Sequence[Any], rows: Sequence[float]) -> bool:
    """Whether each output has as many entries as its piece had rows."""
    return all(
        isinstance(output, (Tensor, list, tuple))
        and not (isinstance(output, Tensor) and output.ndim == 0)
        and len(output) == round(number, 6)
        for output, number in zip(outputs, rows, strict=True)
    )


def _remake(first: Any, items: dict[str, Any]) -> Any:
    try:
        return type(first)(items)
    except TypeError:
        return items
