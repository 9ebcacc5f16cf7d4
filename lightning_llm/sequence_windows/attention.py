"""Attention of a window's queries to all keys so far, without a mask in memory, in place of a model's own.

The past is seen whole, the window's own keys causally; both parts are joined by the logarithms of their normalisers.
Packed documents and sliding windows restrict which keys are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface

from lightning_llm.sequence_windows import kernels
from lightning_llm.sequence_windows.kernels import ALL, CAUSAL, Scores, Visible
from lightning_llm.sequence_windows.layout import Window
from lightning_llm.sequence_windows.offload import Past
from lightning_llm.sequence_windows.random_states import RandomState

WINDOWED_ATTENTION = "lightning_llm_windowed"
_WITHOUT_WINDOWS = "Train it without windows: `gradient_checkpointing=True` lowers memory, too."
_BACKWARD_KEYS = 2048  # seen whole, that go backward at once
# What transformers hands on to every attention function, and what changes nothing here.
_HARMLESS_TENSORS = ("position_ids", "cache_position", "position_embeddings")


class UnsupportedModelError(ValueError):
    """The model has something that cannot be cut along the sequence.

    Args:
        reason: What it is, as a sentence.
        remedy: What to do instead, as a sentence; by default what to do without windows.
    """

    def __init__(self, reason: str, remedy: str = _WITHOUT_WINDOWS) -> None:
        super().__init__(f"{reason} {remedy}")


class Part(NamedTuple):
    """Queries and keys that meet, as slices of a window's queries and of the keys that its layer sees."""

    rows: slice
    queries: slice
    keys: slice
    visible: Visible


@contextmanager
def attention_replaced(config: Any, implementation: str = WINDOWED_ATTENTION) -> Iterator[None]:
    """Inside, models of this configuration attend by another function.

    Args:
        config: The decoder's transformers configuration.
        implementation: Its name in transformers' interface.
    """
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def windowed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sequence_window: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: (batch, heads, window, head_dim) to (batch, window, heads, value_dim).

    Args:
        module: The model's attention module.
        query: Of the window's tokens.
        key: What the layer's cache returned: (batch, kv_heads, past + window, head_dim).
        value: As ``key``.
        attention_mask: None; the window says what is seen.
        dropout: Probability that an attention weight is dropped.
        scaling: Factor of the scores; 1 / sqrt(head_dim) if None.
        softcap: Soft-capping of the scores, or None.
        sequence_window: The cache's place, handed through the model's keyword arguments.
        **kwargs: What else the model hands on.

    Raises:
        UnsupportedModelError: If the model asks for something else than causal attention.
    """
    layer = _layer_of(module, sequence_window, attention_mask, key, kwargs)
    query, key, value = in_autocast_type(query, key, value)
    window: Window = sequence_window.window
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, dropout)
    parts = attention_parts(window, layer.first_key, layer.sliding_window)
    past = layer.past()
    if past is None:
        out: Tensor = _Attention.apply(query, key, value, scores, parts)  # type: ignore[no-untyped-call]
    else:
        out = _OffloadedAttention.apply(query, key, value, past, sequence_window.is_writing, scores, parts)  # type: ignore[no-untyped-call]
    layer.attended_in = window.index
    return out.transpose(1, 2).contiguous(), None


def attention_parts(window: Window, first_key: int, sliding_window: int | None) -> list[Part]:
    """Which of a window's queries meet which keys: for each document its past, seen whole, and its causal diagonal.

    Args:
        window: With its documents.
        first_key: Position of the first key that the layer shows.
        sliding_window: Number of keys that a query sees at most, itself among them; None for no limit.

    Returns:
        The parts; those with the same queries stand one after the other.

    Example:
        >>> from lightning_llm.sequence_windows.layout import make_windows
        >>> window = make_windows([0, 4, 6], None)[1]
        >>> [(part.keys.start, part.keys.stop, part.visible.diagonal) for part in attention_parts(window, 0, None)]
        [(0, 4, None), (4, 6, 0)]
    """
    parts = []
    for rows, begin, end, document in window.segments:
        first = max(document, first_key)
        queries = slice(begin - window.begin, end - window.begin)
        past, diagonal = slice(first - first_key, begin - first_key), slice(begin - first_key, end - first_key)
        if sliding_window is not None and sliding_window < end - first:  # it hides keys from some query
            band = Visible(begin - first, sliding_window)
            parts.append(Part(rows, queries, slice(past.start, diagonal.stop), band))
            continue
        if first < begin:
            parts.append(Part(rows, queries, past, ALL))
        parts.append(Part(rows, queries, diagonal, CAUSAL))
    return parts


class _Attention(torch.autograd.Function):
    """Attention by parts; the backward draws the same dropout again, part by part."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scores: Scores, parts: list[Part]) -> Tensor:
        """Attend, and keep the output and the logarithm of the normaliser."""
        ctx.random = RandomState(query.device) if scores.dropout else None
        with without_autocast(query):
            out, log_sum = attend(query, key, value, scores, parts)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.scores, ctx.parts = scores, parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Make the weights again from the scores."""
        query, key, value, out, log_sum = ctx.saved_tensors
        with without_autocast(grad_out), nullcontext() if ctx.random is None else ctx.random.replayed():
            grads = attend_backward(grad_out, query, key, value, out, log_sum, ctx.scores, ctx.parts)
        return *grads, None, None


class _OffloadedAttention(torch.autograd.Function):
    """The same where the past is in host memory: it is fetched again for the backward, and no graph holds it."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past: Past,
        is_writing: bool,
        scores: Scores,
        parts: list[Part],
    ) -> Tensor:
        """Store the window's own keys and values, and attend to these and the past."""
        ctx.random = RandomState(query.device) if scores.dropout else None
        if is_writing:
            past.write(key, value)
        with without_autocast(query):
            keys, values = past.see(key, value)
            out, log_sum = attend(query, keys, values, scores, parts)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.past, ctx.scores, ctx.parts = past, scores, parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Fetch the past, and leave its gradient to earlier windows."""
        query, key, value, out, log_sum = ctx.saved_tensors
        later = ctx.past.later()
        with without_autocast(grad_out), nullcontext() if ctx.random is None else ctx.random.replayed():
            keys, values = ctx.past.see(key, value)
            grad_query, *grads = attend_backward(grad_out, query, keys, values, out, log_sum, ctx.scores, ctx.parts)
            return grad_query, *ctx.past.hand_over(grads, later), None, None, None, None


def attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores, parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Attend by parts; return the output (batch, heads, queries, value_dim) and the logarithm of the normaliser.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim).
        value: (batch, kv_heads, keys, value_dim).
        scores: How scores are made.
        parts: Of :func:`attention_parts`; each query is in one at least, each key in one at most of a query's.
    """
    done: list[tuple[Part, Tensor, Tensor]] = []
    for part in parts:
        q, k, v = query[part.rows, :, part.queries], key[part.rows, :, part.keys], value[part.rows, :, part.keys]
        out, log_sum = kernels.forward(q, k, v, scores, part.visible)
        if done and done[-1][0][:2] == part[:2]:
            out, log_sum = kernels.join(*done.pop()[1:], out, log_sum)
        done.append((part, out, log_sum))
    if len(done) == 1:
        return done[0][1:]
    whole = query.new_empty(*query.shape[:3], value.shape[-1])
    whole_log = done[0][2].new_empty(query.shape[:3])
    for part, out, log_sum in done:
        whole[part.rows, :, part.queries], whole_log[part.rows, :, part.queries] = out, log_sum
    return whole, whole_log


def attend_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    scores: Scores,
    parts: list[Part],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; ``out`` and ``log_sum`` are what :func:`attend` returned."""
    grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for rows, queries, keys, visible in _in_blocks(parts, scores):
        g, q, o = grad_out[rows, :, queries], query[rows, :, queries], out[rows, :, queries]
        k, v = key[rows, :, keys], value[rows, :, keys]
        by_part = kernels.backward(g, q, k, v, o, log_sum[rows, :, queries], scores, visible)
        grad_query[rows, :, queries] += by_part[0]
        grad_key[rows, :, keys], grad_value[rows, :, keys] = by_part[1:]  # no key is in two parts
    return grad_query, grad_key, grad_value


def _in_blocks(parts: list[Part], scores: Scores) -> Iterator[Part]:
    """The same with a long past in blocks of keys: their gradients stand in memory once, not twice.

    Dropout is drawn part by part, so that with it parts stay whole.
    """
    for part in parts:
        if part.visible != ALL or scores.dropout:
            yield part
            continue
        for begin in range(part.keys.start, part.keys.stop, _BACKWARD_KEYS):
            yield part._replace(keys=slice(begin, min(begin + _BACKWARD_KEYS, part.keys.stop)))


def _layer_of(module: nn.Module, place: Any, mask: Tensor | None, key: Tensor, kwargs: dict[str, Any]) -> Any:
    """The cache's layer of an attention module, after a look at whether the model asks for anything unknown."""
    name = type(module).__name__
    if place is None:
        raise UnsupportedModelError(f"The model does not hand keyword arguments on to {name}, which windows need.")
    layer_idx = getattr(module, "layer_idx", None)
    layers = place.layers
    if layer_idx is None or layer_idx >= len(layers) or not hasattr(layers[layer_idx], "attended_in"):
        raise UnsupportedModelError(f"{name} has no keys and values of its own in the cache (layer {layer_idx}).")
    layer = layers[layer_idx]
    reason = reason_against_attention(module, mask, layer.sliding_window, kwargs)
    if reason is not None:
        raise UnsupportedModelError(reason)
    if key.shape[2] != layer.num_returned:
        raise UnsupportedModelError(f"{name} does not attend to what its cache returned ({key.shape[2]} keys).")
    return layer


def reason_against_attention(
    module: nn.Module, mask: Tensor | None, sliding_window: int | None, kwargs: dict[str, Any]
) -> str | None:
    """Why an attention module does not do what these kernels do, as a sentence; None if it does.

    Args:
        module: The attention module.
        mask: What it was given as its attention mask.
        sliding_window: Width that the model's configuration gives this layer, or None.
        kwargs: What else it handed on to its attention function.
    """
    name = type(module).__name__
    unknown = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in _HARMLESS_TENSORS]
    if unknown:
        return f"{name} attends with {', '.join(unknown)}, which is not known here."
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return f"{name} is not causal: a token would see later ones."
    if mask is not None:
        return f"{name} makes an attention mask of its own, of shape {tuple(mask.shape)}."
    sliding = kwargs.get("sliding_window")
    if sliding is not None and sliding != sliding_window:
        return f"{name} has a sliding window of {sliding} tokens, but its layer's cache one of {sliding_window}."
    return None


def in_autocast_type(*states: Tensor) -> tuple[Tensor, ...]:
    """Tensors in autocast's type, as it does with the operands of torch's own attention."""
    kind = states[0].device.type
    if not torch.is_autocast_enabled(kind) or states[0].dtype == torch.float64:
        return states
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in states)


def without_autocast(states: Tensor) -> torch.autocast:
    """A context in which the device of ``states`` has no autocast."""
    return torch.autocast(states.device.type, enabled=False)


# ---- the mask that a model asks for is not built, but looked at ----------------------------------------------------


def check_mask_function(
    mask_function: Callable[..., Tensor] | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> None:
    """Make sure that the mask which a model asks for is the one that windows have: causal, or causal and sliding.

    Args:
        mask_function: From batch, head, query and key indices to True where the key is seen.
        local_size: Width of a sliding window or of chunks.
        use_vmap: Whether the model puts a mask function of its own on top.
        **kwargs: What else transformers hands on.

    Raises:
        UnsupportedModelError: If it is another mask.
    """
    reason = reason_against_mask(mask_function, local_size, use_vmap, kwargs.get("device", "cpu"))
    if reason is not None:
        raise UnsupportedModelError(reason)


def reason_against_mask(
    mask_function: Callable[..., Tensor] | None, local_size: int | None, use_vmap: bool, device: torch.device | str
) -> str | None:
    """Why a mask is neither causal nor causal and sliding, as a sentence; None if it is. Arguments as above."""
    assert mask_function is not None
    reach = 2 * (local_size or 8) + 3
    query = torch.arange(reach + 1).clamp(max=reach)
    steps = torch.tensor([-2, -1, 0, 1, 2, reach])
    near = query[:, None] - steps
    far = query[:, None] - (local_size or 8) - steps
    key = torch.cat([near, far], 1).clamp(min=0)
    query = query[:, None].expand_as(key)
    expected = key <= query
    if local_size is not None:
        expected &= key > query - local_size
    zero = torch.zeros_like(query, device=device)
    try:
        seen = None if use_vmap else mask_function(zero, zero, query.to(device), key.to(device))
    except (IndexError, RuntimeError):
        seen = None
    if not isinstance(seen, Tensor) or not torch.equal(seen.expand(key.shape).cpu(), expected):
        return (
            "The model asks for an attention mask that is neither causal nor a causal sliding window (chunks, "
            "bidirectional attention or prefixes, say)."
        )
    return None


AttentionInterface.register(WINDOWED_ATTENTION, windowed_attention)
AttentionMaskInterface.register(WINDOWED_ATTENTION, check_mask_function)
