"""Models of several tasks on one trunk: shared parameters are there once, in memory, in gradients and in files."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class MultiTaskModel(nn.Module):
    """A transformers model for each task; their base models are one.

    A base model's layers (its children by name: embeddings, encoder, ...) are those of the task whose base model has
    the most of them. What only some tasks have, as BERT's pooler for classification, only those share. Heads are each
    task's own; one that is tied to the embeddings stays tied. ``state_dict`` holds each parameter once: the shared ones
    under ``trunk``, the others under ``tasks.<name>``.

    Args:
        models: By name, all of one architecture with the same sizes.

    Attributes:
        trunk: The base model.
        tasks: The models, each to be called as usual.

    Raises:
        ValueError: If base models differ, or a model is not made of a base model and a head.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification
        >>> config = BertConfig(
        ...     vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        ... )
        >>> model = MultiTaskModel({"lm": BertForMaskedLM(config), "spans": BertForTokenClassification(config)})
        >>> model.tasks["lm"].bert.encoder is model.tasks["spans"].bert.encoder
        True
    """

    def __init__(self, models: Mapping[str, Any]) -> None:
        super().__init__()
        self.trunk = share_trunk(models)
        self.tasks = nn.ModuleDict(models)
        self.config = next(iter(models.values())).config
        self.register_state_dict_post_hook(_leave_out_doubles)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_doubles)  # type: ignore[no-untyped-call]

    def forward(self, task: str, **inputs: Any) -> Any:
        """Call the model of a task."""
        return self.tasks[task](**inputs)

    @property
    def subfolders(self) -> list[str]:
        """What :meth:`save_pretrained` writes, a model each."""
        return list(self.tasks)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write each task's whole model into a folder of its own, for ``from_pretrained`` and ``pipeline``.

        Args:
            folder: Its parent.
            **options: As in transformers.
        """
        for name, model in self.tasks.items():
            any_model: Any = model
            any_model.save_pretrained(str(Path(folder) / name), **options)

    def own_parameters(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that a single task has, by its name."""
        users: dict[nn.Parameter, list[str]] = {}
        for name, model in self.tasks.items():
            for parameter in model.parameters():
                users.setdefault(parameter, []).append(name)
        own: dict[str, list[nn.Parameter]] = {name: [] for name in self.tasks}
        for parameter, names in users.items():
            if len(names) == 1:
                own[names[0]].append(parameter)
        return own

    def last_shared_matrix(self) -> nn.Parameter:
        """The last weight matrix that all tasks use, embeddings aside.

        Raises:
            ValueError: If there is none that is trained.
        """
        shared = set.intersection(*({id(p) for p in model.parameters()} for model in self.tasks.values()))
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        found = [p for p in self.trunk.parameters() if p.ndim == 2 and p.requires_grad and id(p) in shared - tables]
        if not found:
            raise ValueError(
                "The tasks share no weight matrix that is trained, so no gradient of theirs can be compared."
            )
        return found[-1]


def share_trunk(models: Mapping[str, Any]) -> nn.Module:
    """Let the base models of several models have the same layers.

    Args:
        models: By name; changed in place.

    Returns:
        The base model that had the most parameters, of which the others now have theirs.

    Raises:
        ValueError: If they differ, naming two and where.
    """
    bases: dict[str, nn.Module] = {}
    for name, model in models.items():
        bases[name] = getattr(model, "base_model", model)
        if bases[name] is model:
            raise ValueError(
                f"{type(model).__name__} of the task {name!r} is not made of a base model and a head, so that nothing "
                f"could be shared. Choose an architecture that has a model of each task on one base model."
            )
    main = max(bases, key=lambda name: sum(p.numel() for p in bases[name].parameters()))
    trunk = bases[main]
    for name, base in bases.items():
        if type(base) is not type(trunk):
            raise ValueError(
                f"The task {name!r} builds on {type(base).__name__}, {main!r} on {type(trunk).__name__}: they cannot "
                f"share it."
            )
        _share(base, trunk, f"The base models of {name!r} and {main!r}")
        models[name].tie_weights()
    return trunk


def _share(base: nn.Module, trunk: nn.Module, which: str) -> None:
    if base is trunk:
        return
    for child, own in base.named_children():
        shared = getattr(trunk, child, None)
        if not isinstance(shared, nn.Module) or _shapes(shared) != _shapes(own):
            raise ValueError(f"{which} differ in `{child}`: one configuration must fit all tasks.")
        setattr(base, child, shared)
    for kind in (base._parameters, base._buffers):
        for name in kind:
            setattr(base, name, getattr(trunk, name))


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def _doubles(module: nn.Module) -> dict[str, str]:
    """Names under which a tensor is there again, each with the name that it has first."""
    first: dict[Tensor, str] = {}
    again: dict[str, str] = {}
    everything = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    for name, tensor in chain(*everything):
        if first.setdefault(tensor, name) != name:
            again[name] = first[tensor]
    return again


def _leave_out_doubles(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _doubles(module):
        state.pop(prefix + name, None)


def _add_doubles(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, first in _doubles(module).items():
        if prefix + first in state:
            state[prefix + name] = state[prefix + first]
