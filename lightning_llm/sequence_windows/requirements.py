"""What cannot be cut into windows is refused, with what to do instead."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from lightning_llm.sequence_windows.attention import UnsupportedModelError
from lightning_llm.sequence_windows.head import base_model


def check_model(model: nn.Module, length: int, window: int, *, is_packed: bool) -> None:
    """Refuse models whose gradient windows would get wrong.

    Args:
        model: As the user gave it.
        length: Tokens in a row.
        window: Tokens in a window.
        is_packed: Whether rows hold several documents, or padding on the left.

    Raises:
        UnsupportedModelError: With the reason, and what to do instead.
        ValueError: If the model is wrapped, or checkpoints its layers in a way that does not fit.
    """
    check_unwrapped(model, "A windowed loss")
    reason = reason_against_model(model, length) or _reason_of_layers(model, is_packed)
    if reason is not None:
        raise UnsupportedModelError(f"{type(base_model(model)).__name__} cannot be trained in windows: {reason}")
    if window == 1 and has_linear_layers(model):
        raise ValueError("`window` must be at least 2 for layers of linear attention, but got 1.")


def check_unwrapped(model: nn.Module, subject: str) -> None:
    """Refuse a model that is compiled, wrapped, or checkpoints its layers in a reentrant way.

    Args:
        model: As the user gave it.
        subject: What refuses it, as an error message begins.

    Raises:
        ValueError: With what to do instead.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(f"{subject} does not go with torch.compile yet. Pass the model itself, not compiled.")
    if type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
        raise ValueError(
            f"`model` is wrapped in {type(model).__name__}. Wrap a module whose `forward` computes the loss, and pass "
            f"the model inside."
        )
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if options.get("use_reentrant") is not False:
                raise ValueError(
                    f"{subject} needs the gradient checkpointing that is not reentrant. Enable it with "
                    f"`gradient_checkpointing_kwargs={{'use_reentrant': False}}`."
                )


def check_inputs(input_ids: Tensor, labels: Tensor, window: int, keep: int) -> None:
    """Refuse inputs of the wrong shape.

    Raises:
        ValueError: With what was expected and what came.
    """
    check_rows(input_ids, labels)
    if window < 1:
        raise ValueError(f"`window` must be a number of tokens, at least 1, but got {window}.")
    if keep < 0:
        raise ValueError(f"`keep` must be a number of windows, at least 0, but got {keep}.")


def check_rows(input_ids: Tensor, labels: Tensor) -> None:
    """Refuse rows and labels of the wrong shape.

    Raises:
        ValueError: With what was expected and what came.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"`input_ids` must have shape (batch, seq), but got {tuple(input_ids.shape)}.")
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"`labels` must have the shape of `input_ids`, {tuple(input_ids.shape)}, unshifted, but got "
            f"{tuple(labels.shape)}."
        )


def reason_against_model(model: nn.Module, length: int) -> str | None:
    """Why a model cannot be cut along the sequence, whatever its layers are; None if it can.

    Args:
        model: As the user gave it.
        length: Tokens in a row.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "peft puts tokens before the sequence."
    base = base_model(model)
    config: Any = getattr(base, "config", None)
    if config is None or not hasattr(base, "get_output_embeddings"):
        return "it is no causal language model of transformers."
    return _reason_of_kind(base, config) or _reason_of_config(config.get_text_config(decoder=True), length)


def _reason_of_kind(base: Any, config: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder."
    accepted = inspect.signature(base.forward).parameters
    if "past_key_values" not in accepted:
        return "its forward takes no `past_key_values`, as that of encoders, which see a sequence as a whole."
    if base.get_output_embeddings() is None:
        return "it has no language modelling head."
    if not getattr(base, "_supports_attention_backend", False) and not has_linear_layers(base):
        return "it does not attend by way of transformers' attention interface."
    return None


def _reason_of_config(config: Any, length: int) -> str | None:
    if getattr(config, "output_router_logits", False):
        return (
            "its auxiliary loss for the balance of experts is no sum over tokens. Set `output_router_logits=False` to "
            "do without."
        )
    return _reason_of_rotary(config, length)


def has_linear_layers(model: nn.Module) -> bool:
    """Whether a decoder has layers that hand a state on, rather than keys and values."""
    kinds = getattr(base_model(model).config.get_text_config(decoder=True), "layer_types", None) or ()
    return any(kind in ("linear_attention", "conv") for kind in kinds)


def _reason_of_layers(model: nn.Module, is_packed: bool) -> str | None:
    if getattr(base_model(model).config.get_text_config(decoder=True), "kv_lora_rank", None):
        return "its latent attention (MLA) expands the whole past again in each window."
    if not has_linear_layers(model):
        return None
    if is_packed:
        return "its layers of linear attention hand their state from one packed document, or from padding, to the next."
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "its layers of linear attention cannot be checkpointed within windows. Turn gradient checkpointing off."
    return None


def _reason_of_rotary(config: Any, length: int) -> str | None:
    """Rotary frequencies that depend on the length of the input would differ between windows."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for parameters in kinds:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
            if length > original:
                return (
                    f"its rotary frequencies ({parameters['rope_type']}) change with the length beyond {original} "
                    f"positions, and the sequence has {length} tokens."
                )
    return None
