"""Gradients are reduced over the ranks once per optimizer step, however many pieces each rank needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


class LocalReduction:
    """One device: nothing to reduce."""

    recovers = True  # a rank may run out of memory without the others
    can_overlap = False

    @contextmanager
    def pieces(self, stepping: bool) -> Iterator[None]:
        """Around all pieces of a batch: inside, a rank runs as many as it likes."""
        yield

    def begin_piece(self, is_last: bool) -> None:
        """Before a piece; ``is_last`` of the optimizer step."""

    def overlap(self, loss: Tensor) -> None:
        """Reduce during the backward of this loss."""

    def finish(self, begun: frozenset[nn.Parameter] = frozenset()) -> None:
        """After the last piece of an optimizer step whose reduction is not complete.

        Args:
            begun: Parameters whose gradients are being reduced already.
        """

    def agree(self, number: int) -> int:
        """The largest number on any rank, where all need the same; else this rank's own."""
        return number


class DDPReduction(LocalReduction):
    """DistributedDataParallel: pieces run on the bare module; its own reducer is fired once, hooks and all."""

    can_overlap = True

    def __init__(self, strategy: DDPStrategy) -> None:
        self._strategy = strategy
        self._model: Any = None

    @contextmanager
    def pieces(self, stepping: bool) -> Iterator[None]:
        """Give the strategy the bare module; share rank 0's buffers, as a forward through the wrapper would have."""
        model: Any = self._strategy.model
        if not isinstance(model, DistributedDataParallel):  # validation by itself wraps nothing
            yield
            return
        self._model = model
        if model.will_sync_module_buffers():  # type: ignore[no-untyped-call]
            model._sync_buffers()  # type: ignore[no-untyped-call]
        self._strategy.model = self._strategy.lightning_module
        try:
            yield
        finally:
            self._strategy.model = model
        model.require_forward_param_sync = stepping

    def overlap(self, loss: Tensor) -> None:
        """Let the reducer watch this backward."""
        prepare_for_backward(self._model, loss)

    def finish(self, begun: frozenset[nn.Parameter] = frozenset()) -> None:
        """Fire the reducer's hooks by a backward that adds nothing."""
        parameters = [p for p in self._model.module.parameters() if p.requires_grad and p not in begun]
        if self._model.find_unused_parameters:
            parameters = [p for p in parameters if p.grad is not None]  # the reducer finds that the others are unused
        if not parameters:
            return
        with torch.enable_grad():
            zero: Tensor = _Touch.apply(*parameters)  # type: ignore[no-untyped-call]
            if not begun:
                prepare_for_backward(self._model, zero)
            zero.backward()  # type: ignore[no-untyped-call]


class ShardedReduction(LocalReduction):
    """FSDP2: every forward and backward is a collective, so all ranks run as many pieces; the last one reduces."""

    recovers = False

    def __init__(self, strategy: ModelParallelStrategy) -> None:
        self._strategy = strategy
        self._stepping = True
        self._modules: list[Any] = []

    @contextmanager
    def pieces(self, stepping: bool) -> Iterator[None]:
        """Reduce in the last piece of an optimizer step only."""
        module = self._strategy.lightning_module
        assert module is not None
        self._stepping = stepping
        self._modules = [part for part in module.modules() if isinstance(part, FSDPModule)]
        try:
            yield
        finally:
            self._reduce(True)

    def begin_piece(self, is_last: bool) -> None:
        """Until the last piece each rank keeps its whole gradient."""
        self._reduce(is_last and self._stepping)

    def agree(self, number: int) -> int:
        """One small all-reduce."""
        mine = torch.tensor(number, device=self._strategy.root_device)
        return int(self._strategy.reduce(mine, reduce_op="max"))

    def _reduce(self, value: bool) -> None:
        for part in self._modules:
            part.set_requires_gradient_sync(value, recurse=False)
            part.set_is_last_backward(value)


def reduction_of(trainer: L.Trainer) -> LocalReduction:
    """What the Trainer's strategy needs.

    Raises:
        ValueError: For a strategy whose ranks would wait for one that ran out of memory.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        return ShardedReduction(strategy)
    if isinstance(strategy, DDPStrategy):
        return DDPReduction(strategy)
    if isinstance(strategy, SingleDeviceStrategy):
        return LocalReduction()
    raise ValueError(
        f"DynamicBatchScaler works with one device, DDPStrategy and ModelParallelStrategy (FSDP2), but the Trainer has "
        f"{type(strategy).__name__}, where a rank that runs out of memory leaves the others waiting. Use one of those."
    )


class _Touch(torch.autograd.Function):
    """A zero whose backward visits every parameter without a gradient: hooks are called, nothing is added."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        """Zero, with all parameters behind it."""
        ctx.number = len(parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        """No gradient for any of them."""
        return (None,) * ctx.number
