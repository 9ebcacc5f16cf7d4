"""A piece that runs out of memory leaves no trace: gradients, random generators, buffers and metrics are put back."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_llm.callbacks.steps.gradients import parameters_of

_SMALL = 2**16  # elements of a buffer


class GradientGuard:
    """Takes back what a failed backward has added to the gradients.

    There are three cases. Without earlier gradients those of the failed piece are dropped. A piece that may fail is
    run with the earlier ones set aside (no copy), and added to them afterwards. A piece that was trusted and fails all
    the same cannot be taken back: it has added its whole gradient to some parameters, so that its parts must skip
    those.

    Args:
        optimizer: Whose parameters are guarded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._earlier: dict[nn.Parameter, Tensor] | None = None
        self._added: set[nn.Parameter] = set()
        self._is_final = False
        self._handles: dict[nn.Parameter, Any] = {}
        self._masks: list[Any] = []

    @property
    def has_gradients(self) -> bool:
        """Whether earlier pieces or micro-batches have left gradients."""
        return any(parameter.grad is not None for parameter in parameters_of(self.optimizer))

    def begin(self, trusted: bool, skip: frozenset[nn.Parameter], is_reduced: bool) -> None:
        """Before a piece.

        Args:
            trusted: As much has fitted before.
            skip: Parameters that have this piece's gradient already.
            is_reduced: Gradients are sent to other ranks as they come.
        """
        parameters = [parameter for parameter in parameters_of(self.optimizer) if parameter.requires_grad]
        for parameter in parameters:
            if parameter not in self._handles:  # new ones come when layers are unfrozen
                watch: Any = parameter.register_post_accumulate_grad_hook
                self._handles[parameter] = watch(self._added.add)
        self._added.clear()
        self._masks = [parameter.register_hook(_zeros) for parameter in skip]  # type: ignore[no-untyped-call]
        self._is_final = is_reduced or (trusted and self.has_gradients)
        self._earlier = None
        if not self._is_final:
            self._earlier = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
            for parameter in self._earlier:
                parameter.grad = None

    def keep(self) -> None:
        """The piece is done: its gradients stay."""
        self._end()
        if self._earlier is not None:
            _add(self._earlier)
            self._earlier = None

    def take_back(self) -> frozenset[nn.Parameter]:
        """The piece failed. Returns the parameters whose part of its gradient could not be taken back."""
        self._end()
        if self._is_final:
            return frozenset(self._added)
        for parameter in parameters_of(self.optimizer):
            parameter.grad = None
        for parameter, gradient in (self._earlier or {}).items():
            parameter.grad = gradient
        self._earlier = None
        return frozenset()

    def remove(self) -> None:
        """Stop watching."""
        self._end()
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _end(self) -> None:
        for mask in self._masks:
            mask.remove()
        self._masks = []


class StateKeeper:
    """Notes random generators, buffers (batch statistics) and torchmetrics before a piece; puts them back.

    Large buffers, which are masks and tables as a rule, are copied again only where torch noticed a change since the
    last copy. Small ones always are: batch statistics are updated without torch's notice.

    Args:
        module: Its buffers and metrics.
        device: Whose generator is noted, beside the host's.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._metrics = [part for part in module.modules() if isinstance(part, Metric)]
        inside = {id(part) for metric in self._metrics for part in metric.modules()}
        self._buffers = [
            (part._buffers, name) for part in module.modules() if id(part) not in inside for name in part._buffers
        ]
        self._copies: dict[tuple[int, str], tuple[Tensor, int, Tensor]] = {}
        self._noted: dict[tuple[int, str], Tensor | None] = {}
        self._lists: list[tuple[Any, str, list[Any]]] = []
        self._random: tuple[Any, ...] = ()

    def note(self) -> None:
        """Before a piece."""
        self._random = _random_states(self._device)
        self._noted = {(id(holder), name): self._copy(holder, name) for holder, name in self._places()}
        self._lists = [
            (metric.__dict__, name, list(value))
            for metric in self._metrics
            for name, value in metric.metric_state.items()
            if isinstance(value, list)
        ]
        self._counts = [(metric, metric._update_count, metric._computed) for metric in self._metrics]

    @torch.no_grad()
    def restore(self) -> None:
        """After one that failed."""
        _set_random_states(self._random, self._device)
        for holder, name in self._places():
            copy = self._noted[id(holder), name]
            current = holder[name]
            if copy is None or current is None:
                holder[name] = copy
            elif (current.shape, current.dtype) == (copy.shape, copy.dtype) and not current.is_inference():
                current.copy_(copy)
            else:
                holder[name] = copy.clone()
        for attributes, name, value in self._lists:
            attributes[name] = value
        for metric, count, computed in self._counts:
            metric._update_count, metric._computed = count, computed

    def _places(self) -> Iterable[tuple[dict[str, Any], str]]:
        yield from self._buffers
        for metric in self._metrics:
            for name, value in metric.metric_state.items():
                if isinstance(value, Tensor):
                    yield metric.__dict__, name

    @torch.no_grad()
    def _copy(self, holder: dict[str, Any], name: str) -> Tensor | None:
        value: Tensor | None = holder[name]
        if value is None:
            return None
        if value.is_inference():  # has no version
            return value.clone()
        source, version, copy = self._copies.get((id(holder), name), (None, -1, None))
        if copy is None or value is not source or copy.shape != value.shape or copy.dtype != value.dtype:
            copy = value.detach().clone()
        elif value.numel() <= _SMALL or value._version != version:
            copy.copy_(value)
        self._copies[id(holder), name] = (value, value._version, copy)
        return copy


def _zeros(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else torch.zeros_like(gradient)


@torch.no_grad()
def _add(earlier: dict[nn.Parameter, Tensor]) -> None:
    """Add the new gradients to the earlier ones, in place and in as few kernels as possible."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for parameter, old in earlier.items():
        new = parameter.grad
        if new is not None and (new.is_sparse or old.is_sparse):
            parameter.grad = old + new
            continue
        if new is not None:
            both = groups.setdefault((old.device, old.dtype, new.dtype), ([], []))
            both[0].append(old)
            both[1].append(new)
        parameter.grad = old
    for olds, news in groups.values():
        torch._foreach_add_(olds, news)


def _random_states(device: torch.device) -> tuple[Any, ...]:
    on_device = None
    if device.type in ("cuda", "xpu", "mps"):
        on_device = getattr(torch, device.type).get_rng_state()
    return torch.get_rng_state(), random.getstate(), np.random.get_state(), on_device  # noqa: NPY002


def _set_random_states(states: tuple[Any, ...], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002 - what user code draws from
    if states[3] is not None:
        getattr(torch, device.type).set_rng_state(states[3])
