"""Keys and values of a whole sequence in host memory; on the device are those of the layer at work, and of the next.

Attention asks for the past in its forward, and again in its backward: in between no graph holds it. What a window's
backward adds to the gradient of the past goes back to host memory at once.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_llm.host_memory import Done, Transfers

_CHUNK_BYTES = 32 * 2**20


class Span(NamedTuple):
    """What a window sees of a layer: keys from ``first``, its own from ``begin`` to ``end``."""

    first: int
    begin: int
    end: int


class HostStore:
    """Keys and values of one layer, and their gradients, in host memory.

    Each is (seq, batch, kv_heads, dim): the past is one piece of memory, and goes over the bus in one copy.

    Args:
        transfers: To and from the device.
        length: Tokens in a row.
        most_past: The most keys before a window that it sees: the gradient has no more than these to remember.
    """

    def __init__(self, transfers: Transfers, length: int, most_past: int) -> None:
        self._transfers, self._length, self._most_past = transfers, length, most_past
        self.states: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self._first = length  # position of the first key that the gradients are of

    def write(self, own: list[Tensor], begin: int) -> None:
        """Put a window's keys and values, (window, batch, kv_heads, dim), at their place."""
        if not self.states:
            self.states = [self._transfers.on_host((self._length, *x.shape[1:]), x.dtype) for x in own]
        own = [x.contiguous() for x in own]
        with self._transfers.apart():
            for host, new in zip(self.states, own, strict=True):
                host[begin : begin + len(new)].copy_(new, non_blocking=True)
        self._transfers.hold(own)

    def later(self, span: Span) -> tuple[list[Tensor], Done]:
        """What later windows have left for the window's own keys and values: for the last ones, if not for all."""
        known = max(span.begin, self._first)
        if known >= span.end:
            return [], None
        hosts = [host[known - self._first : span.end - self._first] for host in self.gradients]
        tensors = [torch.empty_like(host, device=self._transfers.device, pin_memory=False) for host in hosts]
        return tensors, [self._transfers.fetch(*pair) for pair in zip(hosts, tensors, strict=True)][-1]

    def add(self, shares: list[Tensor], span: Span) -> None:
        """Add to the gradient of the past; afterwards it begins at ``span.first``.

        Args:
            shares: Of keys and of values, (begin - first, batch, kv_heads, dim); they are changed.
            span: Of the window.
        """
        if not self.gradients:
            self.gradients = [self._transfers.on_host((self._most_past, *x.shape[1:]), x.dtype) for x in shares]
        with self._transfers.apart():
            for host, share in zip(self.gradients, shares, strict=True):
                self._add(host, share, span)
        self._transfers.hold(shares)
        self._first = span.first

    def _add(self, host: Tensor, share: Tensor, span: Span) -> None:
        step = max(1, _CHUNK_BYTES // share[0].nbytes)
        # Last chunk first: a chunk moves up in the buffer, to where only what has been read already stood.
        for begin in reversed(range(span.first, span.begin, step)):
            end = min(begin + step, span.begin)
            total = share[begin - span.first : end - span.first]
            known = max(begin, self._first)
            if known < end:
                before = host[known - self._first : end - self._first].to(total.device, non_blocking=True)
                total[known - begin :] += before
            host[begin - span.first : end - span.first].copy_(total, non_blocking=True)


class _Copy(NamedTuple):
    """What is on the device of a store, or on its way there: (end - first, batch, kv_heads, dim) of keys and values."""

    store: HostStore
    span: Span
    tensors: list[Tensor]
    done: Done


class DeviceCopies:
    """The past of the layer at work, and of the one that comes next.

    Args:
        transfers: To and from the device.
    """

    def __init__(self, transfers: Transfers) -> None:
        self.transfers = transfers
        self._present: _Copy | None = None
        self._coming: _Copy | None = None

    def take(self, store: HostStore, span: Span) -> list[Tensor]:
        """Keys and values on the device, with room for the window's own at the end; the layer before loses its own."""
        if not _is_of(self._present, store, span):
            self._present = None
            coming = self._arrived()
            if not _is_of(coming, store, span):
                coming = None
                self.expect(store, span)
                coming = self._arrived()
            self._present = coming
        assert self._present is not None
        return self._present.tensors

    def expect(self, store: HostStore, span: Span) -> None:
        """Begin to copy what will be asked for next; if something else will, this has only cost time."""
        if span.begin == span.first or any(_is_of(copy, store, span) for copy in (self._present, self._coming)):
            return
        self._arrived()
        size, past = span.end - span.first, span.begin - span.first
        hosts = [host[span.first : span.begin] for host in store.states]
        tensors = [_on_device(self.transfers, (size, *host.shape[1:]), host.dtype) for host in hosts]
        done = [self.transfers.fetch(host, to[:past]) for host, to in zip(hosts, tensors, strict=True)][-1]
        self._coming = _Copy(store, span, tensors, done)

    def release(self) -> None:
        """Keep nothing on the device."""
        self._present = None
        self._arrived()

    def _arrived(self) -> _Copy | None:
        coming, self._coming = self._coming, None
        if coming is not None:
            self.transfers.wait(coming.done)
        return coming


def _is_of(copy: _Copy | None, store: HostStore, span: Span) -> bool:
    return copy is not None and copy.store is store and copy.span == span


def _on_device(transfers: Transfers, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=transfers.device)


class Upcoming(Protocol):
    """Knows in which order layers attend."""

    def upcoming(self, number: int) -> tuple[HostStore, Span] | None:
        """What the layer that attends after this one will see."""


class Past:
    """What a window sees of one layer before its own keys and values; attention asks for it whenever it needs it.

    Args:
        store: Of the layer.
        span: Of the window.
        copies: On the device.
        order: Says which layer comes next.
        number: Of the layer.
    """

    def __init__(self, store: HostStore, span: Span, copies: DeviceCopies, order: Upcoming, number: int) -> None:
        self._store, self._span, self._copies, self._order, self._number = store, span, copies, order, number

    def write(self, *own: Tensor) -> None:
        """Store the window's own keys and values, (batch, kv_heads, window, dim)."""
        self._store.write([_by_position(states) for states in own], self._span.begin)

    def see(self, *own: Tensor) -> list[Tensor]:
        """Keys and values that the window sees, (batch, kv_heads, end - first, dim), not to be kept after use."""
        first, begin, _ = self._span
        seen = list(own)
        if begin > first:
            tensors = self._copies.take(self._store, self._span)
            for whole, states in zip(tensors, own, strict=True):
                whole[begin - first :].copy_(_by_position(states))
            seen = [whole.permute(1, 2, 0, 3) for whole in tensors]
        following = self._order.upcoming(self._number)
        if following is not None:
            self._copies.expect(*following)
        return seen

    def later(self) -> tuple[list[Tensor], Done]:
        """Ask for what later windows have left, before :meth:`see` asks for the next layer's past."""
        return self._store.later(self._span)

    def hand_over(self, grads: list[Tensor], later: tuple[list[Tensor], Done]) -> list[Tensor]:
        """Add the past's part of a gradient to the store; return the window's own part, with what is there for it.

        Args:
            grads: Of what the window saw; they are changed.
            later: From :meth:`later`.
        """
        first, begin, _ = self._span
        own = [grad[:, :, begin - first :].clone() for grad in grads]  # a view would hold the past's part
        left, done = later
        self._copies.transfers.wait(done)
        for mine, theirs in zip(own, left, strict=bool(left)):
            mine[:, :, mine.shape[2] - len(theirs) :] += theirs.permute(1, 2, 0, 3)
        if begin > first:
            shares = [_by_position(grad[:, :, : begin - first]).contiguous() for grad in grads]
            self._store.add(shares, self._span)
        return own


def _by_position(states: Tensor) -> Tensor:
    """(batch, kv_heads, seq, dim) as (seq, batch, kv_heads, dim)."""
    return states.permute(2, 0, 1, 3)
