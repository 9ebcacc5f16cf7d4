"""The training step itself, run on tensors without data, to see how much memory it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_llm.head_loss import assume_logit_map, call_head
from lightning_llm.logit_tiles import LogitMap, held_dtype, held_like, tile_side
from lightning_llm.planning.live_memory import LiveMemory
from lightning_llm.sequence_windows.attention import WINDOWED_ATTENTION, check_mask_function
from lightning_llm.sequence_windows.head import Head, base_model
from lightning_llm.sequence_windows.layout import make_windows, window_edges
from lightning_llm.sequence_windows.nodes import GradientInForward
from lightning_llm.sequence_windows.passes import Passes, Sequence
from lightning_llm.sequence_windows.requirements import has_linear_layers

_ATTENTION = "lightning_llm_planned"


@dataclass(frozen=True)
class Need:
    """Peak memory of a training step in bytes, and what it consists of at that moment.

    Attributes:
        weights: Parameters and buffers.
        gradients: Of parameters; where windows sum them, both the sum and the parameter's own.
        optimizer_state: AdamW's two averages.
        keys_and_values: Of the whole row, and their gradients; windows only.
        activations: What stands when the model's head is reached, for the backward.
        loss: Logits and their gradient; without logits, the gradient of hidden states and a few tiles.
        transients: What else stands at the worst moment.
        host: Bytes in host memory, with offloading.
    """

    weights: float
    gradients: float
    optimizer_state: float
    keys_and_values: float
    activations: float
    loss: float
    transients: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return float(sum(getattr(self, field.name) for field in fields(self) if field.name != "host"))


@dataclass(frozen=True)
class Step:
    """What a training step is like, apart from its length and the way it is run.

    Attributes:
        rows: In a micro-batch.
        loss_kernel: ``chunked``, or ``plain`` for the loss from logits.
        autocast: Type of autocast, or None.
        optimizer: Whether AdamW's state counts.
        holds_gradients: Whether gradients of a micro-batch before stand when the step begins, as they do in a Trainer.
        shards: Ranks among which FSDP2 divides weights, gradients and optimizer state.
    """

    rows: int = 1
    loss_kernel: str = "chunked"
    autocast: torch.dtype | None = None
    optimizer: bool = True
    holds_gradients: bool = True
    shards: int = 1


def simulate(
    model: nn.Module, step: Step, length: int, *, checkpointing: bool = False, window: int | None = None
) -> Need:
    """Run a step without data and see what it takes.

    Args:
        model: What :func:`~lightning_llm.planning.live_memory.hollow_copy` gave.
        step: What it is like.
        length: Tokens in a row.
        checkpointing: Whether each layer's activations are made again in backward.
        window: Tokens in a window; None for no windows. ``check_model`` says whether the model allows them.
    """
    memory, watch = LiveMemory(model), _Watch()
    _know_head(model)
    with memory, _prepared(model, memory, watch, checkpointing=checkpointing):
        if step.holds_gradients:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
                    memory.mark(parameter.grad, "gradients")
        ids = torch.zeros(step.rows, length, dtype=torch.long)
        with torch.autocast("cpu", step.autocast or torch.bfloat16, enabled=step.autocast is not None):
            of_head = _ChunkedLoss(memory) if step.loss_kernel == "chunked" else None
            if window is None:
                loss = _loss(model, ids, of_head)
            else:
                loss = _windowed_loss(model, ids, window, of_head, memory, watch)
        torch.autograd.backward(loss)
    return _need(model, step, memory.peak, watch, is_windowed=window is not None)


class _Watch:
    """What is seen on the way: bytes when the head is reached, and of the windows' store."""

    def __init__(self) -> None:
        self.at_head = 0
        self.passes: Any = None

    def keys_and_values(self) -> int:
        """Bytes of keys, values and their gradients."""
        if self.passes is None:
            return 0
        stores = [
            store
            for layer in self.passes._cache.windowed
            for store in (getattr(layer, "key_store", None), getattr(layer, "value_store", None))
            if store is not None
        ]
        return sum(t.nbytes for store in stores for t in vars(store).values() if isinstance(t, Tensor))


def _need(model: nn.Module, step: Step, peak: dict[str, int], watch: _Watch, *, is_windowed: bool) -> Need:
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = _bytes([*model.parameters(), *model.buffers()])
    gradients, loss, other = (float(peak.get(kind, 0)) for kind in ("gradients", "loss", "other"))
    keys_and_values = float(min(watch.keys_and_values(), other))
    activations = min(max(watch.at_head - keys_and_values, 0.0), other - keys_and_values)
    transients = other - keys_and_values - activations
    shards = step.shards
    if shards > 1:
        unit = _largest_layer(model)
        transients += 3 * unit + _outermost(model)  # gathered: this layer and the next, a gradient; and the outermost
        # Windows are summed on each rank before they are reduced, once: that sum is not divided.
        held = float(_bytes(trained)) / shards if step.holds_gradients else 0.0
        gradients = float(_bytes(trained)) + held if is_windowed else gradients / shards
    return Need(
        weights=weights / shards,
        gradients=gradients,
        optimizer_state=2.0 * _bytes(trained) / shards if step.optimizer else 0.0,
        keys_and_values=keys_and_values,
        activations=activations,
        loss=loss,
        transients=transients,
    )


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


def _layers(model: nn.Module) -> list[nn.Module]:
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _largest_layer(model: nn.Module) -> int:
    return max((_bytes(list(layer.parameters())) for layer in _layers(model)), default=0)


def _outermost(model: nn.Module) -> int:
    return _bytes(list(model.parameters())) - sum(_bytes(list(layer.parameters())) for layer in _layers(model))


# ---- the step --------------------------------------------------------------------------------------------------------


def _loss(model: nn.Module, ids: Tensor, of_head: Any) -> Tensor:
    inputs = {"input_ids": ids, "use_cache": False}
    total = None if of_head is None else call_head(model, inputs, of_head.of_labels)
    if total is None:
        total = _LogitsLossMemory.apply(model(**inputs).logits)  # type: ignore[no-untyped-call]
    return total


def _windowed_loss(
    model: nn.Module, ids: Tensor, window: int, of_head: Any, memory: LiveMemory, watch: _Watch
) -> Tensor:
    """The last two windows: nowhere else is more of the row in memory."""
    length = ids.shape[1]
    edges = window_edges(length, window, min_last=2 if has_linear_layers(model) else 1)[-3:]
    positions = torch.arange(length)[None]
    sequence = Sequence(ids, ids, positions, make_windows(edges, None))
    run = _WindowsRun(model, sequence, of_head, memory, watch)
    loss: Tensor = GradientInForward.apply(run, *run.trained.values())  # type: ignore[no-untyped-call]
    return loss


class _WindowsRun:
    """As that of :mod:`lightning_llm.windowed`, with a loss that needs no data."""

    def __init__(self, model: nn.Module, sequence: Sequence, of_head: Any, memory: LiveMemory, watch: _Watch) -> None:
        self.model, self.sequence, self.memory, self.watch = model, sequence, memory, watch
        self.head = Head(model, "plain" if of_head is None else of_head, per_token=False)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def aliases(self) -> dict[str, Tensor]:
        """As there; gradients are marked as such."""
        aliases = {name: p.detach().requires_grad_() for name, p in self.trained.items()}
        for alias in aliases.values():
            if alias.dtype.itemsize < 4:
                alias.grad_dtype = torch.float32
            alias.register_post_accumulate_grad_hook(self._mark)  # type: ignore[no-untyped-call]
        return aliases

    def passes(self, aliases: dict[str, Tensor]) -> Passes:
        """As there."""
        self.watch.passes = Passes(self.model, self.sequence, self.head, keep=1, parameters=aliases)
        return self.watch.passes  # type: ignore[no-any-return]

    def collect(self, losses: list[Tensor]) -> Tensor:
        """As there."""
        return torch.stack(losses).sum()

    def _mark(self, alias: Tensor) -> None:
        assert alias.grad is not None
        self.memory.mark(alias.grad, "gradients")


class _ChunkedLoss:
    """In place of the chunked loss: allocates what it does, but reads no label."""

    def __init__(self, memory: LiveMemory) -> None:
        self._memory = memory

    def of_labels(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: LogitMap) -> Tensor:
        """As :func:`~lightning_llm.head_loss.call_head` wants it."""
        total: Tensor = _ChunkedLossMemory.apply(hidden, weight, self._memory)  # type: ignore[no-untyped-call]
        return total

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, logits: LogitMap
    ) -> Tensor:
        return self.of_labels(nn.functional.pad(hidden, (0, 0, 0, 1)), weight, bias, logits)


class _ChunkedLossMemory(torch.autograd.Function):
    """The tensors of ``chunked_cross_entropy``, as long as they live there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, memory: LiveMemory) -> Tensor:
        """Make the gradients."""
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        of_hidden = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = held_like(weight)
            memory.mark(of_weight, "gradients")
        if ctx.needs_input_grad[0]:
            of_hidden = torch.empty(hidden.shape, dtype=dtype)
            memory.mark(of_hidden, "loss")
        side = tile_side(weight)
        tiles = torch.empty(2 * side * side + 3 * side * weight.shape[1], dtype=dtype)
        memory.mark(tiles, "loss")
        del tiles
        ctx.gradients = (None if of_hidden is None else of_hidden.to(held_dtype(hidden)), of_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return torch.empty((), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Give them away."""
        gradients, ctx.gradients = ctx.gradients, None
        of_both = [
            None if g is None else g.mul_(grad).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*of_both, None)


class _LogitsLossMemory(torch.autograd.Function):
    """The tensors of ``token_cross_entropy`` that have the size of the logits: these, and their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        """Keep the logits."""
        ctx.save_for_backward(logits)
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Make a gradient of the same size."""
        (logits,) = ctx.saved_tensors
        return torch.empty_like(logits)


# ---- around the step -------------------------------------------------------------------------------------------------


def _know_head(model: nn.Module) -> None:
    """What the model does to its logits is not measured: that needs data, and takes no memory that matters."""
    find: Any = base_model(model).get_output_embeddings
    head = find()
    if head is not None:
        assume_logit_map(head, LogitMap())


@contextmanager
def _prepared(model: nn.Module, memory: LiveMemory, watch: _Watch, *, checkpointing: bool) -> Iterator[None]:
    base = base_model(model)
    config = base.config.get_text_config(decoder=True)
    find: Any = base.get_output_embeddings
    head = find()

    def at_head(*_: Any) -> None:
        watch.at_head = max(watch.at_head, memory.live.get("other", 0))

    handles: list[Any] = [] if head is None else [head.register_forward_pre_hook(at_head)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        hook: Any = parameter.register_post_accumulate_grad_hook
        handles.append(hook(lambda p: memory.mark(p.grad, "gradients")))
    before = config._attn_implementation
    if before != "eager":
        config._attn_implementation = _ATTENTION
    AttentionMaskInterface.register(
        WINDOWED_ATTENTION, _no_mask
    )  # the usual one compares masks, which have no data here
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    try:
        yield
    finally:
        config._attn_implementation = before
        AttentionMaskInterface.register(WINDOWED_ATTENTION, check_mask_function)
        if checkpointing:
            base.gradient_checkpointing_disable()
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)


def _no_mask(**kwargs: Any) -> None:
    """What a model asks for is not looked at."""


class _MaskMemory(torch.autograd.Function):
    """Keeps a mask until backward, as SDPA does."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, mask: Tensor) -> Tensor:
        """The states, unchanged."""
        ctx.save_for_backward(mask)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient, unchanged."""
        return grad, None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA without a mask; for a sliding window, which needs one, with the memory of it."""
    sliding = kwargs.get("sliding_window")
    out, _ = sdpa_attention_forward(module, query, key, value, None, **kwargs)
    if sliding is not None and sliding < query.shape[2]:
        mask = torch.empty(query.shape[0], 1, query.shape[2], key.shape[2], dtype=query.dtype)
        out = _MaskMemory.apply(out, mask)  # type: ignore[no-untyped-call]
    return out, None


AttentionInterface.register(_ATTENTION, _attention)  # and no mask function: whether a row is packed is not looked at
