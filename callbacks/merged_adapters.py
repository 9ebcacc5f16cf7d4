"""Adapters of peft on their way to a folder: alone beside the name of their base, or merged into its weights."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def has_adapter(model: Any) -> bool:
    """Whether peft has wrapped a model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def reason_against_merging(model: Any) -> str | None:
    """Why an adapter cannot become part of its base's weights; None if it can, or if there is none.

    Args:
        model: Of transformers, or of peft around one.
    """
    if not has_adapter(model):
        return None
    if model.active_peft_config.is_prompt_learning:
        return "a prompt is no change of weights"
    if not hasattr(model, "merge_and_unload"):
        return f"peft does not merge {model.active_peft_config.peft_type.value}"
    if getattr(model.get_base_model(), "is_quantized", False):
        return "the weights are quantised, and would be rounded again"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "the weights are sharded over ranks"
    return None


def merged_copy(model: Any) -> Any:
    """A model of transformers with the adapter in its weights, in host memory; the given one stays as it is.

    Args:
        model: Of peft, without a :func:`reason_against_merging`.
    """
    on_host: dict[int, Any] = {}  # deepcopy takes these for what it has copied already
    for parameter in model.parameters():
        held = parameter.detach().to("cpu", copy=True)
        on_host[id(parameter)] = nn.Parameter(held, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        on_host[id(buffer)] = buffer.detach().to("cpu", copy=True)
    copied = copy.deepcopy(model, on_host).eval()
    with torch.no_grad():
        _untie_adapted(copied)
        return copied.merge_and_unload()


def _untie_adapted(model: Any) -> None:
    """Give an adapted layer a weight of its own: what is merged into a tied one would be in all of them."""
    holders = Counter(parameter for module in model.modules() for parameter in module._parameters.values())
    for layer in model.modules():
        if not hasattr(layer, "get_base_layer") or hasattr(layer, "trainable_tokens_delta"):  # those are tied too
            continue
        base = layer.get_base_layer()
        if holders[base._parameters.get("weight")] > 1:
            base.weight = nn.Parameter(base.weight.clone(), requires_grad=False)
            config = model.get_base_model().config
            for one in (config, config.get_text_config()):
                one.tie_word_embeddings = False
