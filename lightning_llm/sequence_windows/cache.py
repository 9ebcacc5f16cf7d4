"""Keys and values of a whole sequence, written once window by window, and their gradients.

The gradient with respect to a key is the sum over all later queries. Windows go backward last to first; each adds its
share to the gradients of the past, and takes for its own keys what later windows have left there.
"""

from __future__ import annotations

from typing import Any
from weakref import proxy

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from lightning_llm.host_memory import Transfers
from lightning_llm.sequence_windows.attention import UnsupportedModelError, in_autocast_type
from lightning_llm.sequence_windows.layout import Window
from lightning_llm.sequence_windows.linear_states import LinearStateLayer
from lightning_llm.sequence_windows.offload import DeviceCopies, HostStore, Past, Span


class KeyValueStore:
    """Keys, or values, of one layer.

    Attributes:
        states: (batch, kv_heads, seq, head_dim); None before the first window.
        gradient: (batch, kv_heads, span, head_dim), for the positions from ``gradient_first`` that earlier windows will
            ask for: of a layer that sees all, up to the last window; of a sliding one, its span before the present
            window. None before the backward.
        gradient_first: Position at which ``gradient`` begins.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self.states: Tensor | None = None
        self.gradient: Tensor | None = None
        self.gradient_first = 0

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
        own = self._with_later(grad[:, :, begin - first :], begin, end)
        if begin > first:
            self._add(grad[:, :, : begin - first], first, begin)
        return own

    def _with_later(self, own: Tensor, begin: int, end: int) -> Tensor:
        """Add what later windows have left: for all of the window, or only for its last positions."""
        origin = self.gradient_first
        known = max(begin, origin)
        if self.gradient is None or known >= end:
            return own
        later = self.gradient[:, :, known - origin : end - origin]
        if known == begin:
            return own + later
        own = own.clone()
        own[:, :, known - begin :] += later
        return own

    def _add(self, share: Tensor, first: int, begin: int) -> None:
        """Add to the gradients of the positions ``first`` to ``begin``."""
        origin, before = self.gradient_first, self.gradient
        if before is not None and origin <= first:
            before[:, :, first - origin : begin - origin] += share
            return
        # The last window goes first; of a sliding layer each window reaches further back, and needs no more than that.
        self.gradient, self.gradient_first = share.clone(memory_format=torch.contiguous_format), first
        if before is not None and origin < begin:
            self.gradient[:, :, origin - first :] += before[:, :, : begin - origin]


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
        # No cycle: keys and values go with the cache, not with the next garbage collection.
        self._cache: WindowCache = proxy(cache)
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.is_initialized = True
        self.key_store, self.value_store = (KeyValueStore(cache.length) for _ in range(2))
        self.updated_in = self.attended_in = -1

    @property
    def first_key(self) -> int:
        """Position of the first key that the present window's tokens may see."""
        return self.span(self._cache.window).first

    @property
    def num_returned(self) -> int:
        """Number of keys that ``update`` returns for the present window."""
        return self._cache.window.end - self.first_key

    def span(self, window: Window) -> Span:
        """What a window sees: from its earliest document, or the first token in reach of a sliding window."""
        return Span(window.first_key(self.sliding_window), window.begin, window.end)

    def past(self) -> Past | None:
        """Where to get the past, if ``update`` does not return it."""
        return None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the window's keys and values, (batch, kv_heads, window, head_dim); return all that it sees."""
        window = self._cache.window
        key_states, value_states = self._received(key_states, value_states)
        place = (self.first_key, window.begin, self._cache.is_writing)
        keys: Tensor = _SeenStates.apply(key_states, self.key_store, *place)  # type: ignore[no-untyped-call]
        values: Tensor = _SeenStates.apply(value_states, self.value_store, *place)  # type: ignore[no-untyped-call]
        return keys, values

    def _received(self, *states: Tensor) -> tuple[Tensor, ...]:
        """In autocast's type: cast once, and not the past every time."""
        self.updated_in = self._cache.window.index
        return in_autocast_type(*states)

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


class OffloadedLayer(KeyValueLayer):  # type: ignore[no-untyped-call]
    """The same in host memory: the model gets its own window's keys and values back, and attention the past."""

    def __init__(self, cache: WindowCache, sliding_window: int | None, number: int, copies: DeviceCopies) -> None:
        super().__init__(cache, sliding_window)
        spans = [self.span(window) for window in cache.windows]
        most_past = max(span.begin - span.first for span in spans)
        self.store = HostStore(copies.transfers, cache.length, most_past)
        self._number, self._copies = number, copies

    @property
    def num_returned(self) -> int:
        """Number of keys that ``update`` returns for the present window."""
        return self._cache.window.end - self._cache.window.begin

    def past(self) -> Past | None:
        """Of the present window."""
        return Past(self.store, self.span(self._cache.window), self._copies, self._cache, self._number)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the window's keys and values, (batch, kv_heads, window, head_dim), and return them."""
        key_states, value_states = self._received(key_states, value_states)
        return key_states, value_states


class WindowCache(Cache):
    """A transformers cache that holds a whole sequence and stands at one of its windows.

    Args:
        config: The decoder's configuration.
        length: Tokens in a row.
        windows: Of the sequence.
        offload_from: Device whose keys and values are kept in host memory; None to keep them where they are.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        length: int,
        windows: list[Window],
        offload_from: torch.device | None = None,
    ) -> None:
        self.length = length
        self.windows = windows
        self.window = windows[0]
        self.is_writing = True
        self._copies = None if offload_from is None else DeviceCopies(Transfers(offload_from))
        self._step = 1
        likes = DynamicCache(config=config).layers
        self.windowed: list[Any] = [self._make_layer(like, number) for number, like in enumerate(likes)]
        super().__init__(layers=self.windowed)

    def _make_layer(self, like: Any, number: int) -> Any:
        if type(like) is LinearAttentionLayer:
            return LinearStateLayer(self, like.number_of_states)
        if type(like) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModelError(
                f"The model has a layer of kind {type(like).__name__}, which windows do not know."
            )
        sliding_window = like.sliding_window if type(like) is DynamicSlidingWindowLayer else None
        if self._copies is None:
            return KeyValueLayer(self, sliding_window)
        return OffloadedLayer(self, sliding_window, number, self._copies)

    @property
    def linear(self) -> list[LinearStateLayer]:
        """Its layers that hand a state from window to window."""
        return [layer for layer in self.windowed if isinstance(layer, LinearStateLayer)]

    def enter(self, window: Window, *, is_writing: bool) -> None:
        """Stand at a window that the model is about to run."""
        self.seek(window, is_writing=is_writing)
        self._step = 1
        for layer in self.windowed:
            layer.updated_in = layer.attended_in = -1
        for layer in self.linear:
            layer.enter()

    def seek(self, window: Window, *, is_writing: bool) -> None:
        """Stand at a window that goes backward; states are written into the store in the first pass only."""
        self.window, self.is_writing, self._step = window, is_writing, -1

    def upcoming(self, number: int) -> tuple[HostStore, Span] | None:
        """What the offloaded layer that attends after this one will see; None after the last."""
        number += self._step
        while 0 <= number < len(self.windowed):
            layer = self.windowed[number]
            if isinstance(layer, OffloadedLayer) and layer.store.states:
                return layer.store, layer.span(self.window)
            number += self._step
        return None

    def release(self) -> None:
        """Between the passes, keep no copy of what is in host memory."""
        if self._copies is not None:
            self._copies.release()

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
