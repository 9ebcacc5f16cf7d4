"""The two passes over a sequence: in order without a graph, then in reverse with one window's graph at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_llm.sequence_windows.attention import attention_replaced
from lightning_llm.sequence_windows.cache import WindowCache
from lightning_llm.sequence_windows.head import Aliased, Head, base_model
from lightning_llm.sequence_windows.layout import Window
from lightning_llm.sequence_windows.random_states import RandomState
from lightning_llm.sequence_windows.sharded import reduce_gradients


@dataclass
class Sequence:
    """What is trained on.

    Attributes:
        input_ids: (batch, seq).
        targets: (batch, seq), shifted; -100 for none.
        position_ids: (batch, seq) or (1, seq).
        windows: In order.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor
    windows: list[Window]


class Passes:
    """One sequence's passes through a model.

    Args:
        model: A causal language model.
        sequence: The batch and its windows.
        head: Computes a window's loss.
        keep: Number of windows, from the last, whose graph is kept in the first pass rather than made again.
        parameters: Aliases of the model's parameters by name, in which gradients are summed; empty to use the model's
            own.
        offload: Whether keys, values and their gradients are kept in host memory.
    """

    def __init__(
        self,
        model: nn.Module,
        sequence: Sequence,
        head: Head,
        *,
        keep: int,
        parameters: Mapping[str, Tensor],
        offload: bool = False,
    ) -> None:
        base = base_model(model)
        accepted = inspect.signature(base.forward).parameters
        self._model, self._sequence, self._head = model, sequence, head
        self._caller = Aliased(model, parameters) if parameters else model
        self._takes_positions = "position_ids" in accepted
        self._config: Any = base.config.get_text_config(decoder=True)
        length = sequence.input_ids.shape[1]
        offload_from = sequence.input_ids.device if offload else None
        self._cache = WindowCache(self._config, length, sequence.windows, offload_from)
        self._first_kept = len(sequence.windows) - keep
        self._kept: dict[int, Tensor] = {}
        self._random: dict[int, RandomState] = {}
        self._device = sequence.input_ids.device
        kind = self._device.type
        self._autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def forward(self, *, with_graph: bool, with_loss: bool) -> list[Tensor]:
        """First pass: run the windows in order and store keys and values.

        Args:
            with_graph: Whether a second pass will follow.
            with_loss: Whether the losses are wanted; without them the head is left out where it can be.

        Returns:
            The windows' losses, detached; of those with a loss.
        """
        losses = []
        self._head.measure(self._model, self._sequence.input_ids)
        with self._prepared():
            for window in self._sequence.windows:
                is_kept = with_graph and window.index >= self._first_kept
                if with_graph and not is_kept:
                    self._random[window.index] = RandomState(self._device)
                with torch.set_grad_enabled(is_kept):
                    loss = self._run(window, is_writing=True, skip_head=not (is_kept or with_loss))
                if is_kept:
                    assert loss is not None
                    self._kept[window.index] = loss
                if loss is not None:
                    losses.append(loss.detach())
        self._cache.release()
        return losses

    def backward(self, grad: Tensor) -> list[Tensor]:
        """Second pass: run the windows' backward last to first; gradients are added to the parameters' ``.grad``.

        Args:
            grad: Of the loss: (batch, seq) for a loss per token, else ().

        Returns:
            The windows' losses, detached, in order.
        """
        losses = []
        with self._prepared():
            for window in reversed(self._sequence.windows):
                loss = self._kept.pop(window.index, None)
                if loss is None:
                    with torch.enable_grad(), self._random.pop(window.index).replayed():
                        loss = self._run(window, is_writing=False, skip_head=False)
                assert loss is not None
                losses.append(loss.detach())
                self._cache.seek(window, is_writing=False)  # layers that are checkpointed run once more
                part = grad[:, window.begin : window.end] if grad.ndim else grad
                reduce_gradients(self._model, is_last=window.index == 0)
                self._backward(loss, part.to(loss.dtype))
        return losses[::-1]

    def _backward(self, loss: Tensor, grad: Tensor) -> None:
        """Backward of a window's loss, and of the states that it handed to the next one."""
        roots = [(loss, grad)]
        for layer in self._cache.linear:
            roots += layer.roots()
        with torch.autocast(self._device.type, enabled=False):
            torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
        for layer in self._cache.linear:
            layer.leave()

    def _run(self, window: Window, *, is_writing: bool, skip_head: bool) -> Tensor | None:
        sequence, place = self._sequence, slice(window.begin, window.end)
        self._cache.enter(window, is_writing=is_writing)
        inputs: dict[str, Any] = {
            "input_ids": sequence.input_ids[:, place],
            "past_key_values": self._cache,
            "use_cache": True,
            "sequence_window": self._cache,
        }
        if self._takes_positions:
            inputs["position_ids"] = sequence.position_ids[:, place]

        enabled, dtype = self._autocast
        # No weight cache: a weight cast without a graph in the first pass would have no gradient in the second.
        with torch.autocast(self._device.type, dtype=dtype, enabled=enabled, cache_enabled=False):
            if skip_head:
                self._head.skip(self._caller, inputs)
                loss = None
            else:
                loss = self._head.loss(self._caller, inputs, sequence.targets[:, place])
        self._cache.check_used()
        return loss

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """The model attends by windows, and layers that are checkpointed keep the cache."""
        with ExitStack() as stack:
            stack.enter_context(attention_replaced(self._config))
            for module in self._model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    # Layers would go without the cache; what is around them (GPT-2) would not even hand it on.
                    is_layer = isinstance(module, GradientCheckpointingLayer)
                    name = "_can_checkpoint_with_cache" if is_layer else "gradient_checkpointing"
                    stack.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, is_layer)
            yield
