"""Logits of a large vocabulary, at the positions that have a target and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_llm.head_loss import unwrapped


def logits_at_targets(model: nn.Module, inputs: Mapping[str, Any], is_target: Tensor) -> Tensor:
    """Run a model, but its output head at some positions only: of masked tokens about one in seven.

    A head that is no linear layer over the last dimension of (batch, seq, hidden) runs everywhere, as usual.

    Args:
        model: A transformers model with an output head, or one in PEFT.
        inputs: Keyword arguments of its forward.
        is_target: (batch, seq) bool, beside the head's input.

    Returns:
        (targets, vocab), row by row.
    """
    base = unwrapped(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    chosen: list[Tensor] = []

    def choose(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments or arguments[0].shape[:-1] != is_target.shape:
            return None
        chosen.append(arguments[0])
        return (arguments[0][is_target], *arguments[1:])

    # What an adapter or a quantized layer does with its input is its own affair.
    handle = head.register_forward_pre_hook(choose) if type(head) is nn.Linear else None
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits if chosen else logits[is_target]


def num_right(logits: Tensor, targets: Tensor) -> Tensor:
    """How many targets, (targets,), are the likeliest of their logits, (targets, vocab); shape ()."""
    return (logits.argmax(-1) == targets).sum()
