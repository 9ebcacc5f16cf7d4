"""Keys and values of a whole sequence, written once window by window, and their gradients.

The gradient with respect to a key is the sum over all later queries. Windows go backward last to first; each adds its
share to the gradients of the past, and takes for its own keys what later windows have left there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from lightning_llm.sequence_windows.attention import UnsupportedModelError
from lightning_llm.sequence_windows.layout import Window
from lightning_llm.sequence_windows.linear_states import LinearStateLayer


class KeyValueStore:
    """Keys, or values, of one layer.

    Attributes:
        states: (batch, kv_heads, seq, head_dim); None before the first window.
        gradient: As ``states``, for the positions before the last window; None before the backward.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self.states: Tensor | None = None
        self.gradient: Tensor | None = None

    def write(self, new: Tensor, begin: int) -> None:
        """Put the window's states at their place."""
        if self.states is None:
            batch, heads, _, dim = new.shape
            self.states = new.new_empty(batch, heads, self._length, dim)
        # `.data`: graphs that are kept hold views of earlier positions, which this does not change.
        self.states.data[:, :, begin : begin + new.shape[2]].copy_(new)

    def hand_over(self, grad: Tensor, first: int, begin: int, end: int) -> Tensor:
        """Add the past's part of a gradient; return the window's own part, with what later windows have left there.

        Args:
            grad: (batch, kv_heads, end - first, head_dim), of what the window saw.
            first: Position of the first key that the window saw.
            begin: Position at which the window begins.
            end: One past its last token.
        """
        assert self.states is not None
        own = grad[:, :, begin - first :]
        if self.gradient is not None and end <= self.gradient.shape[2]:
            own = own + self.gradient[:, :, begin:end]
        if begin > first:
            if self.gradient is None:  # the last window goes first
                shape = (*self.states.shape[:2], begin, self.states.shape[3])
                self.gradient = grad.new_zeros(shape)
            self.gradient[:, :, first:begin] += grad[:, :, : begin - first]
        return own


class _SeenStates(torch.autograd.Function):
    """New states to all that the window sees: a view of the store, which is not copied."""

    @staticmethod
    def forward(ctx: Any, new: Tensor, store: KeyValueStore, first: int, begin: int, is_writing: bool) -> Tensor:
        """Write the new states, and show them after those before."""
        if is_writing:
            store.write(new, begin)
        assert store.states is not None
        end = begin + new.shape[2]
        ctx.store, ctx.span = store, (first, begin, end)
        return store.states.detach()[:, :, first:end]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Leave the past's part to earlier windows."""
        return ctx.store.hand_over(grad, *ctx.span), None, None, None, None


class KeyValueLayer(CacheLayerMixin):
    """One attention layer's keys and values. A sliding layer shows fewer of them, but none is dropped."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, cache: WindowCache, sliding_window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.is_initialized = True
        self.key_store, self.value_store = (KeyValueStore(cache.length) for _ in range(2))
        self.updated_in = self.attended_in = -1

    @property
    def first_key(self) -> int:
        """Position of the first key that the present window's tokens may see."""
        begin = self._cache.window.begin
        return 0 if self.sliding_window is None else max(0, begin - self.sliding_window + 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the window's keys and values, (batch, kv_heads, window, head_dim); return all that it sees."""
        window = self._cache.window
        self.updated_in = window.index
        kind = key_states.device.type
        if torch.is_autocast_enabled(kind) and key_states.dtype != torch.float64:  # once, and not the past every time
            dtype = torch.get_autocast_dtype(kind)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        place = (self.first_key, window.begin, self._cache.is_writing)
        keys: Tensor = _SeenStates.apply(key_states, self.key_store, *place)  # type: ignore[no-untyped-call]
        values: Tensor = _SeenStates.apply(value_states, self.value_store, *place)  # type: ignore[no-untyped-call]
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens before the present window."""
        return self._cache.window.begin

    def get_max_length(self) -> int:
        """-1: no limit but the sequence."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the window sees, and the position of the first."""
        return self._cache.window.begin + query_length - self.first_key, self.first_key

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first window makes the store."""


class WindowCache(Cache):
    """A transformers cache that holds a whole sequence and stands at one of its windows.

    Args:
        config: The decoder's configuration.
        length: Tokens in a row.
        windows: Of the sequence.
    """

    def __init__(self, config: PretrainedConfig, length: int, windows: list[Window]) -> None:
        self.length = length
        self.window = windows[0]
        self.is_writing = True
        self.windowed: list[Any] = [self._make_layer(like) for like in DynamicCache(config=config).layers]
        super().__init__(layers=self.windowed)

    def _make_layer(self, like: Any) -> Any:
        if type(like) is DynamicLayer:
            return KeyValueLayer(self)
        if type(like) is DynamicSlidingWindowLayer:
            return KeyValueLayer(self, like.sliding_window)
        if type(like) is LinearAttentionLayer:
            return LinearStateLayer(self, like.number_of_states)
        raise UnsupportedModelError(f"The model has a layer of kind {type(like).__name__}, which windows do not know.")

    @property
    def linear(self) -> list[LinearStateLayer]:
        """Its layers that hand a state from window to window."""
        return [layer for layer in self.windowed if isinstance(layer, LinearStateLayer)]

    def enter(self, window: Window, *, is_writing: bool) -> None:
        """Stand at a window that the model is about to run."""
        self.seek(window, is_writing=is_writing)
        for layer in self.windowed:
            layer.updated_in = layer.attended_in = -1
        for layer in self.linear:
            layer.enter()

    def seek(self, window: Window, *, is_writing: bool) -> None:
        """Stand at a window; its states are written into the store in the first pass only."""
        self.window, self.is_writing = window, is_writing

    def check_used(self) -> None:
        """Make sure that every layer wrote to the cache and attended to it in the present window.

        Raises:
            UnsupportedModelError: If one did not: its tokens would not see the past, or not be seen.
        """
        index = self.window.index
        missed = [i for i, layer in enumerate(self.windowed) if index != layer.updated_in or index != layer.attended_in]
        if missed:
            raise UnsupportedModelError(
                f"Layers {missed} did not keep their keys and values in the cache, or did not attend by way of "
                f"transformers' attention interface: their windows would not see the past."
            )
