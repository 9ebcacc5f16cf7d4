"""Which weights of a model are pruned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass
class PrunedWeight:
    """A matrix that is pruned.

    Attributes:
        name: Of the parameter in the LightningModule.
        parameter: Whole, or a DTensor.
        pruned: True where it is zero, of this rank's shard.
        dim: Of the layer's inputs.
    """

    name: str
    parameter: nn.Parameter
    pruned: Tensor
    dim: int


def linear_layers(pl_module: nn.Module, patterns: Sequence[str] | None) -> Iterator[tuple[str, Any, int]]:
    """Linear layers whose weights are trained, each weight once, without those that are an embedding's too.

    Args:
        pl_module: The LightningModule.
        patterns: Regular expressions, one of which is found in a layer's name; None for all but a transformers model's
            head: its output embeddings, and what lies outside its base model.

    Returns:
        Name of the weight, the layer, and the dimension of the weight that is the layer's inputs.

    Raises:
        ValueError: For an adapter of peft, unless layers are chosen by name.
    """
    if patterns is None and any(hasattr(module, "adapter_layer_names") for module in pl_module.modules()):
        raise ValueError(
            "The model has an adapter (peft): its own weights are frozen, and zeros in the adapter's matrices are none "
            "in their product. Prune a model that trains itself, or a merged one; `modules` chooses by name."
        )
    embeddings = {id(module.weight) for module in pl_module.modules() if isinstance(module, nn.Embedding)}
    heads = {id(part) for module in pl_module.modules() for part in _head_of(module)} if patterns is None else set()
    seen = embeddings
    for name, module in pl_module.named_modules():
        is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers': (inputs, outputs)
        weight = module._parameters.get("weight")
        if not (isinstance(module, nn.Linear) or is_conv1d) or weight is None or not weight.requires_grad:
            continue
        is_chosen = id(module) not in heads if patterns is None else any(re.search(p, name) for p in patterns)
        if is_chosen and id(weight) not in seen:
            seen.add(id(weight))
            yield f"{name}.weight" if name else "weight", module, 0 if is_conv1d else 1


def _head_of(module: Any) -> Iterator[nn.Module]:
    if not callable(getattr(module, "get_output_embeddings", None)):
        return
    yield module.get_output_embeddings()
    base = getattr(module, "base_model", module)
    if base is not module:
        inside = set(base.modules())
        yield from (part for part in module.modules() if part not in inside)


def check_weights(weights: Sequence[PrunedWeight], structure: tuple[int, int] | None) -> None:
    """Refuse what cannot be pruned.

    Args:
        weights: As they were found.
        structure: n and m of n:m.

    Raises:
        ValueError: Without a weight, for shardings other than over one dimension of ranks, and for an n:m that does not
            fit.
    """
    if not weights:
        raise ValueError(
            "MagnitudePruning finds no weight: no linear layer that is trained has a name that `modules` matches. Look "
            "at the names in `module.named_modules()`."
        )
    sharded = [weight.parameter for weight in weights if isinstance(weight.parameter, DTensor)]
    for parameter in sharded:
        if parameter.device_mesh != sharded[0].device_mesh or [p.is_shard() for p in parameter.placements] != [True]:
            raise ValueError(
                f"MagnitudePruning handles parameters that are sharded over one dimension of ranks, but got "
                f"{parameter.placements} on {parameter.device_mesh}. Use ModelParallelStrategy with "
                f"tensor_parallel_size=1."
            )
    if structure is None:
        return
    if sharded:
        raise ValueError("`structure` needs whole matrices, but parameters are sharded. Use DDPStrategy.")
    for weight in weights:
        inputs = weight.parameter.shape[weight.dim]
        if inputs % structure[1]:
            raise ValueError(
                f"`structure` needs a multiple of {structure[1]} inputs, but {weight.name} has {inputs}. Leave it out "
                f"by `modules`."
            )


def zero_averages(trainer: L.Trainer, weights: Sequence[PrunedWeight]) -> None:
    """Let the averages that Lightning's callbacks keep be zero where weights are, from now on.

    Once they are, they stay so, as what is averaged in is zero too.

    Args:
        trainer: With its callbacks.
        weights: Whose masks have changed.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        average = getattr(callback, "_average_model", None)
        if not isinstance(average, nn.Module):
            continue
        parameters = dict(getattr(average, "module", average).named_parameters())
        for weight in weights:
            averaged = parameters[weight.name].detach()
            averaged.masked_fill_(weight.pruned.to(averaged.device), 0.0)
