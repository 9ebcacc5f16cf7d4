"""States of linear-attention layers at the windows' edges: a window's backward begins with the gradient of its last."""

from __future__ import annotations

from typing import Any
from weakref import proxy

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

Key = tuple[str, int]


class LinearStateLayer(LinearAttentionLayer):
    """Convolution and recurrent states before each window, and the gradients that go back through them.

    Args:
        cache: Stands at the present window.
        number_of_states: Of each kind.
    """

    def __init__(self, cache: Any, number_of_states: int) -> None:
        super().__init__(number_of_states=number_of_states)
        self._cache: Any = proxy(cache)
        self._before: dict[tuple[int, Key], Tensor] = {}  # states, without a graph
        self._inputs: dict[tuple[int, Key], Tensor] = {}  # the same as leaves of a window's graph
        self._outputs: dict[tuple[int, Key], Tensor] = {}  # states after a window, in its graph
        self._gradients: dict[Key, Tensor] = {}
        self.updated_in = self.attended_in = -1

    def enter(self) -> None:
        """Show the model the states before the present window."""
        has_past = self._cache.window.index > 0
        for number in range(self.number_of_states):
            self.has_previous_state[number] = has_past
            self.conv_states[number] = self._input(("conv", number)) if has_past else None
            self.recurrent_states[number] = self._input(("recurrent", number)) if has_past else None

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Take the window's inputs of the convolution, (batch, channels, window); return them after the last ones."""
        self.updated_in = self.attended_in = self._cache.window.index
        width = conv_kernel_size or self.conv_kernel_size[state_idx] or conv_states.shape[-1]
        self.conv_kernel_size[state_idx] = width
        past: Any = self.conv_states[state_idx]
        seen = conv_states if past is None else torch.cat([past, conv_states], -1)
        last = seen[..., -width:]
        self._output(("conv", state_idx), F.pad(last, (width - last.shape[-1], 0)))
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Take the state after the window."""
        self.updated_in = self.attended_in = self._cache.window.index
        self._output(("recurrent", state_idx), recurrent_states)
        return recurrent_states

    def roots(self) -> list[tuple[Tensor, Tensor]]:
        """The states after the present window that later ones have left a gradient for, with it."""
        index = self._cache.window.index
        found = [(self._outputs.pop((index, key), None), gradient) for key, gradient in self._gradients.items()]
        return [(state, gradient) for state, gradient in found if state is not None]

    def leave(self) -> None:
        """After the present window's backward, keep the gradients of the states before it."""
        index = self._cache.window.index
        leaves = {key: leaf for (of, key), leaf in self._inputs.items() if of == index}
        for key in leaves:
            del self._inputs[index, key]
        self._gradients = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}

    def _input(self, key: Key) -> Tensor | None:
        index = self._cache.window.index
        state = self._before.get((index, key))
        if state is None or not torch.is_grad_enabled():
            return state
        self._inputs[index, key] = leaf = state.detach().requires_grad_()
        return leaf

    def _output(self, key: Key, state: Tensor) -> None:
        index = self._cache.window.index
        if self._cache.is_writing:
            self._before[index + 1, key] = state.detach().clone()
        if state.requires_grad:
            self._outputs[index, key] = state
