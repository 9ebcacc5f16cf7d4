"""Lightning checkpoints without frozen weights, which are where they came from: a hub id or a folder."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_llm.pretrained import is_fresh
from lightning_llm.tasks.base import Task

_SAMPLE = "frozen_sample"  # in the checkpoint: a few values of each frozen parameter
_CURRENT = "current_model_state"  # there, where Lightning's WeightAveraging keeps the average as `state_dict`


def check_source(checkpoint: str, source: Any) -> None:
    """Refuse checkpoints of trainables alone where nothing could bring the frozen weights back.

    Args:
        checkpoint: ``whole`` or ``trainable``.
        source: What the model is made from.

    Raises:
        ValueError: For random weights, and for another word.
    """
    if checkpoint not in ("whole", "trainable"):
        raise ValueError(f"`checkpoint` must be 'whole' or 'trainable', but got {checkpoint!r}.")
    if checkpoint == "trainable" and isinstance(source, (dict, PretrainedConfig)):
        raise ValueError(
            "checkpoint='trainable' leaves frozen weights out, but those of a model made from a configuration are "
            "random, and are nowhere else. Keep them (checkpoint='whole'), or pass a folder or a hub id as `model`."
        )


def check_strategy(strategy: Any) -> None:
    """Refuse a sharded strategy whose checkpoints are folders of shards: torch loads those as a whole, or not at all.

    Args:
        strategy: A ``ModelParallelStrategy``.

    Raises:
        ValueError: If it does not gather them in a file.
    """
    if getattr(strategy, "_save_distributed_checkpoint", False):
        raise ValueError(
            "checkpoint='trainable' needs checkpoints in one file: ModelParallelStrategy(save_distributed_checkpoint="
            "False). What trains is small."
        )


def keep_trained(checkpoint: dict[str, Any], module: L.LightningModule) -> None:
    """Leave out of ``checkpoint["state_dict"]`` each parameter that is frozen; note a sample of it.

    Buffers stay, and frozen weights that were not in the model's folder but made anew.

    Args:
        checkpoint: That Lightning is about to write; changed in place.
        module: Its LightningModule.
    """
    frozen = {name: parameter for name, parameter in _frozen(module).items() if not is_fresh(parameter)}
    state = checkpoint.get(_CURRENT, checkpoint["state_dict"])
    for name in _states(checkpoint):
        checkpoint[name] = {key: value for key, value in checkpoint[name].items() if not _belongs_to(key, frozen)}
    samples = {name: _sample(state[name]) for name in frozen if name in state}  # whole there, if sharded elsewhere
    checkpoint[_SAMPLE] = {name: sample for name, sample in samples.items() if sample is not None}


def complete(checkpoint: dict[str, Any], module: L.LightningModule) -> None:
    """Put the module's own frozen weights into a checkpoint that was written without them; others are not touched.

    Args:
        checkpoint: That was read; changed in place.
        module: Its LightningModule, with the model built.

    Raises:
        ValueError: If the module's frozen weights are not those that the checkpoint was trained with.
    """
    if _SAMPLE not in checkpoint:
        return
    frozen = _frozen(module)
    for name, saved in checkpoint[_SAMPLE].items():
        own = _sample(frozen[name]) if name in frozen else None
        if own is not None and not _agree(saved, own):
            raise ValueError(
                f"The checkpoint holds what was trained on top of frozen weights, but not on these: {name} has other "
                f"values. Pass the model that it was trained with: load_from_checkpoint(path, model=...)."
            )
    states = _states(checkpoint)  # none where ModelParallelStrategy has loaded them into its shards already
    own_state = module.state_dict() if states else {}
    missing = {key: value for key, value in own_state.items() if _belongs_to(key, frozen)}
    for name in states:
        checkpoint[name] = {**missing, **checkpoint[name]}


def note_classes(hyper_parameters: dict[str, Any], task: Task, config: PretrainedConfig) -> None:
    """Write down what a task found in its data, and no configuration in the checkpoint would tell.

    Args:
        hyper_parameters: Of the module; changed in place.
        task: As it was trained.
        config: Of its model.
    """
    if not task.has_labels:
        return
    any_config: Any = config
    hyper_parameters["labels"] = [any_config.id2label[index] for index in range(any_config.num_labels)]
    problem_type = getattr(task, "problem_type", None)
    if problem_type is not None:
        options = hyper_parameters.get("task_options") or {}
        hyper_parameters["task_options"] = {**options, "problem_type": problem_type}


def _states(checkpoint: dict[str, Any]) -> list[str]:
    return [name for name in ("state_dict", _CURRENT) if name in checkpoint]


def _frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    parameters = module.named_parameters(remove_duplicate=False)  # of tied ones a state dict has each name
    return {name: parameter for name, parameter in parameters if not parameter.requires_grad}


def _belongs_to(key: str, frozen: dict[str, nn.Parameter]) -> bool:
    """Whether an entry is a frozen parameter, or what a quantised one is scaled by (``weight.absmax``)."""
    parts = key.split(".")
    return any(".".join(parts[:length]) in frozen for length in range(1, len(parts) + 1))


def _sample(parameter: Tensor) -> Tensor | None:
    """Its first values, (up to 4,), on the host; None of quantised or sharded ones."""
    is_plain = type(parameter) in (nn.Parameter, Tensor) and type(parameter.data) is Tensor
    if not is_plain or parameter.is_meta or not parameter.is_floating_point():
        return None
    first_row = parameter.detach()[(0,) * (parameter.ndim - 1)] if parameter.numel() else parameter.detach()
    return first_row.reshape(-1)[:4].cpu().clone()


def _agree(saved: Tensor, own: Tensor) -> bool:
    """Equal; or as near as the rounding of another type."""
    if saved.dtype == own.dtype:
        return torch.equal(saved, own)
    return saved.shape == own.shape and torch.allclose(saved.double(), own.double(), rtol=2**-7, atol=1e-6)
