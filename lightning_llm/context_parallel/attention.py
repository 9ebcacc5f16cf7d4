"""Attention of a rank's queries to the keys of the whole row, gathered layer by layer, in place of a model's own.

Keys and values are gathered in forward, used, and let go; backward gathers them again, so that a rank keeps only its
own. Gradients of keys and values are summed over the ranks and go to their owners.

References:
    Llama Team, 2024, The Llama 3 Herd of Models (https://arxiv.org/abs/2407.21783), section 3.3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface

from lightning_llm.context_parallel.collectives import gather, sum_to_owners
from lightning_llm.context_parallel.layout import Share
from lightning_llm.context_parallel.requirements import unsupported
from lightning_llm.sequence_windows.attention import (
    attend,
    attend_backward,
    attention_parts,
    attention_replaced,
    in_autocast_type,
    reason_against_attention,
    reason_against_mask,
    without_autocast,
)
from lightning_llm.sequence_windows.kernels import Scores
from lightning_llm.sequence_windows.layout import Window
from lightning_llm.sequence_windows.random_states import RandomState

CONTEXT_PARALLEL_ATTENTION = "lightning_llm_context_parallel"
_HEADS_SEQ = 2  # the dimension of the sequence in (batch, heads, seq, head_dim)


@dataclass
class Place:
    """Where a rank stands in the rows that it shares; handed through the model's keyword arguments.

    Attributes:
        share: This rank's tokens.
        group: The ranks that share the rows.
        windows: This rank's two chunks, with their documents.
        sliding_windows: Of each layer, None where it has none.
        attended: Numbers of the layers that have attended across ranks.
    """

    share: Share
    group: dist.ProcessGroup
    windows: tuple[Window, Window]
    sliding_windows: list[int | None]
    attended: set[int] = field(default_factory=set)

    def check_used(self) -> None:
        """Make sure that every layer attended across ranks.

        Raises:
            UnsupportedModelError: If one did not: its tokens saw those of their own rank only.
        """
        missed = sorted(set(range(len(self.sliding_windows))) - self.attended)
        if missed:
            raise unsupported(f"Layers {missed} did not attend by way of transformers' attention interface.")


def context_parallel_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    context_parallel: Place | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: (batch, heads, 2 chunk, head_dim) to (batch, 2 chunk, heads, value_dim).

    Args:
        module: The model's attention module.
        query: Of this rank's tokens.
        key: As ``query``, (batch, kv_heads, 2 chunk, head_dim).
        value: As ``key``.
        attention_mask: None; the place says what is seen.
        dropout: Probability that an attention weight is dropped; each rank draws for its own queries.
        scaling: Factor of the scores; 1 / sqrt(head_dim) if None.
        softcap: Soft-capping of the scores, or None.
        context_parallel: The rank's place, handed through the model's keyword arguments.
        **kwargs: What else the model hands on.

    Raises:
        UnsupportedModelError: If the model asks for something else than causal attention.
    """
    place = context_parallel
    name, number = type(module).__name__, getattr(module, "layer_idx", None)
    if place is None:
        raise unsupported(f"The model does not hand keyword arguments on to {name}.")
    if number is None or number >= len(place.sliding_windows) or key.shape[2] != 2 * place.share.chunk:
        raise unsupported(f"{name} does not attend to keys and values of its own (layer {number}).")
    sliding_window = place.sliding_windows[number]
    reason = reason_against_attention(module, attention_mask, sliding_window, kwargs)
    if reason is not None:
        raise unsupported(reason)
    query, key, value = in_autocast_type(query, key, value)
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, dropout)
    out: Tensor = _Attention.apply(query, key, value, scores, place, sliding_window)  # type: ignore[no-untyped-call]
    place.attended.add(number)
    return out.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """Attention to the keys of all ranks; a rank keeps its own states, its output and the normalisers' logarithms."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scores: Scores, place: Place, sliding_window: int | None
    ) -> Tensor:
        """Gather keys and values, and attend chunk by chunk."""
        ctx.random = RandomState(query.device) if scores.dropout else None
        done = []
        with without_autocast(query):
            keys, values = (gather(x, place.share, place.group, _HEADS_SEQ) for x in (key, value))
            for window, chunk in zip(place.windows, torch.split(query, place.share.chunk, _HEADS_SEQ), strict=True):
                seen = _seen(window, sliding_window)
                parts = attention_parts(window, seen.start, sliding_window)
                done.append(attend(chunk, keys[:, :, seen], values[:, :, seen], scores, parts))
        out, log_sum = (torch.cat(states, _HEADS_SEQ) for states in zip(*done, strict=True))
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.scores, ctx.place, ctx.sliding_window = scores, place, sliding_window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gather again; add up what all ranks' queries ask of a key at the rank that owns it."""
        query, key, value, out, log_sum = ctx.saved_tensors
        place: Place = ctx.place
        with without_autocast(grad_out), nullcontext() if ctx.random is None else ctx.random.replayed():
            keys, values = (gather(x, place.share, place.group, _HEADS_SEQ) for x in (key, value))
            of_queries = (grad_out, query, out, log_sum)
            grad_query, grad_keys, grad_values = _gradients(ctx, keys, values, of_queries)
            own = [
                sum_to_owners(grad, place.share, place.group, _HEADS_SEQ) if is_wanted else None
                for grad, is_wanted in zip((grad_keys, grad_values), ctx.needs_input_grad[1:3], strict=True)
            ]
        return grad_query, *own, None, None, None


def _gradients(
    ctx: Any, keys: Tensor, values: Tensor, of_queries: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of this rank's queries, and this rank's part of those of all keys and values.

    ``of_queries`` are the output's gradient, the queries, the output, and the normalisers' logarithms.
    """
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    grad_queries = []
    by_chunk = zip(*(torch.split(states, ctx.place.share.chunk, _HEADS_SEQ) for states in of_queries), strict=True)
    for window, (g, q, o, log) in zip(ctx.place.windows, by_chunk, strict=True):
        seen = _seen(window, ctx.sliding_window)
        parts = attention_parts(window, seen.start, ctx.sliding_window)
        grads = attend_backward(g, q, keys[:, :, seen], values[:, :, seen], o, log, ctx.scores, parts)
        grad_queries.append(grads[0])
        grad_keys[:, :, seen] += grads[1]
        grad_values[:, :, seen] += grads[2]
    return torch.cat(grad_queries, _HEADS_SEQ), grad_keys, grad_values


def _seen(window: Window, sliding_window: int | None) -> slice:
    """The keys that some query of a chunk may see."""
    return slice(window.first_key(sliding_window), window.end)


@contextmanager
def attending_across_ranks(model: nn.Module, config: Any) -> Iterator[None]:
    """Inside, the model attends across ranks; layers that are checkpointed also when backward runs them again.

    Args:
        model: As the user gave it.
        config: Its decoder's configuration.
    """
    with ExitStack() as stack:
        stack.enter_context(attention_replaced(config, CONTEXT_PARALLEL_ATTENTION))
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                checkpoint = module._gradient_checkpointing_func
                stack.callback(setattr, module, "_gradient_checkpointing_func", checkpoint)
                module._gradient_checkpointing_func = _remembering(checkpoint, config)
        yield


def _remembering(checkpoint: Any, config: Any) -> Any:
    def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
        def attending(*inputs: Any) -> Any:
            with attention_replaced(config, CONTEXT_PARALLEL_ATTENTION):
                return function(*inputs)

        return checkpoint(attending, *args)

    return checkpointed


def _check_mask_function(
    mask_function: Callable[..., Tensor] | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> None:
    """Make sure that the mask which a model asks for is causal, or causal and sliding; none is built."""
    reason = reason_against_mask(mask_function, local_size, use_vmap, kwargs.get("device", "cpu"))
    if reason is not None:
        raise unsupported(reason)


AttentionInterface.register(CONTEXT_PARALLEL_ATTENTION, context_parallel_attention)
AttentionMaskInterface.register(CONTEXT_PARALLEL_ATTENTION, _check_mask_function)
