"""What context parallelism cannot serve is refused, with what to do instead."""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lightning_llm.sequence_windows.attention import UnsupportedModelError
from lightning_llm.sequence_windows.head import base_model
from lightning_llm.sequence_windows.requirements import check_unwrapped, reason_against_model


def unsupported(reason: str) -> UnsupportedModelError:
    """The error for a model that cannot be spread over ranks along the sequence."""
    return UnsupportedModelError(reason, "Train it without context parallelism: each rank with rows of its own.")


def check_group(group: Any) -> None:
    """Refuse what is no group of ranks with this one in it.

    Raises:
        TypeError: If it is no process group.
        ValueError: If this rank is not in it.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"`group` must be a process group of torch.distributed, as `mesh['tensor_parallel'].get_group()` or "
            f"`torch.distributed.new_group(ranks)` return it, but got {type(group).__name__}."
        )
    if dist.get_rank(group) < 0:
        raise ValueError("This rank is not in `group`. Each rank passes the group that it belongs to.")


def check_model(model: nn.Module, length: int) -> list[int | None]:
    """Refuse models whose gradient would be wrong; return the width of each layer's sliding window, None for none.

    Args:
        model: As the user gave it.
        length: Tokens in a row.

    Raises:
        UnsupportedModelError: With the reason, and what to do instead.
        ValueError: If the model is wrapped, compiled, or checkpoints its layers in a way that does not fit.
    """
    check_unwrapped(model, "Context parallelism")
    reason = reason_against_model(model, length) or _reason_of_positions(model)
    layers = DynamicCache(config=base_model(model).config.get_text_config(decoder=True)).layers if not reason else []
    unknown = [layer for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)]
    if unknown:
        reason = f"layers of kind {type(unknown[0]).__name__} are unknown: their state runs through the sequence."
    if reason is not None:
        raise unsupported(f"{type(base_model(model)).__name__} cannot be spread over ranks: {reason}")
    return [getattr(layer, "sliding_window", None) for layer in layers]


def _reason_of_positions(model: nn.Module) -> str | None:
    if "position_ids" not in inspect.signature(base_model(model).forward).parameters:
        return "its forward takes no `position_ids`, so that a rank's tokens would be counted from 0."
    return None
