"""Fully sharded data parallelism (FSDP2) for a transformers model, without a full copy on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lightning_llm.context_parallel.mesh import mesh_of_all_ranks


def build_sharded(
    build: Callable[[bool], nn.Module],
    mesh: DeviceMesh,
    device: torch.device,
    prepare: Callable[[nn.Module], None],
) -> nn.Module:
    """Build on the meta device, shard, and fill the shards from the one full model that rank 0 holds in host memory.

    The weights are those of an unsharded run with the same seed, random or pretrained: only rank 0 draws or reads
    them.

    Args:
        build: Called with True for the model with its weights, with False for its architecture only.
        mesh: One-dimensional mesh of the data-parallel ranks.
        device: Where this rank's shards live.
        prepare: Changes made to the module tree before sharding, on every rank (gradient checkpointing).

    Returns:
        The model, its parameters DTensors on ``device``.
    """
    is_source = dist.get_rank() == 0
    with torch.device("cpu"):
        full = build(True) if is_source else None
    with torch.device("meta"):
        model = build(False)
    prepare(model)
    shard_layers(model, mesh)
    _to_empty(model, device)
    weights = full.state_dict() if full is not None else {}
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    _broadcast_buffers(model, full)
    return model


@torch.no_grad()
def copy_sharded(
    model: nn.Module, build: Callable[[bool], nn.Module], mesh: DeviceMesh, device: torch.device
) -> nn.Module:
    """Another sharded model with the same weights; each rank copies its own shards, and nothing is sent.

    Args:
        model: As :func:`build_sharded` made it, before it has run.
        build: As there.
        mesh: As there.
        device: As there.
    """
    with torch.device("meta"):
        copy = build(False)
    shard_layers(copy, mesh)
    _to_empty(copy, device)
    mine, theirs = ([*whole.parameters(), *whole.buffers()] for whole in (copy, model))
    for own, other in zip(mine, theirs, strict=True):
        own.copy_(other)
    return copy


def mesh_to_shard(mesh: DeviceMesh, source: Any, shares_rows: bool) -> DeviceMesh:
    """The ranks among which parameters are divided.

    Args:
        mesh: Of the strategy.
        source: What the model is made from.
        shares_rows: Whether the ranks of the mesh's tensor-parallel dimension share rows.

    Raises:
        ValueError: For a built model, and for layers that would have to be split.
    """
    if isinstance(source, nn.Module):
        raise ValueError(
            "A sharded strategy builds the model itself, on the meta device. Pass a hub id, a folder or a "
            "configuration to LLMModule instead of a built model."
        )
    if shares_rows:
        return mesh_of_all_ranks(mesh)
    if mesh.mesh_dim_names and "tensor_parallel" in mesh.mesh_dim_names and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "LLMModule shards parameters over the data-parallel ranks; it does not split layers. Use "
            "ModelParallelStrategy(tensor_parallel_size=1), or share rows: LLMModule(context_parallel=True)."
        )
    return mesh["data_parallel"] if mesh.mesh_dim_names else mesh


def shard_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make each of the model's repeated layers a sharded unit, then the rest of the model one more.

    Embeddings whose weights are an output head's too stay in the rest, with the head.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    places = _places(model)
    for module in model.modules():
        if type(module).__name__ in names:
            inside = set(module.modules())
            if all(inside.issuperset(holder for holder, _ in places[p]) for p in module.parameters()):
                fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _places(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str]]]:
    """Where each parameter is: of a tied one, module and name are several."""
    places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name))
    return places


def _to_empty(model: nn.Module, device: torch.device) -> None:
    """Give a model of the meta device memory; tied weights stay tied, in adapters too, where ``tie_weights`` fails."""
    tied = [several for several in _places(model).values() if len(several) > 1]
    model.to_empty(device=device)
    for (module, name), *others in tied:
        for other, other_name in others:
            setattr(other, other_name, getattr(module, name))


def _broadcast_buffers(model: nn.Module, full: nn.Module | None) -> None:
    """Copy rank 0's buffers; many (rotary frequencies) are computed at construction and in no state dict."""
    source = dict(full.named_buffers()) if full is not None else {}
    for name, buffer in model.named_buffers():
        if full is not None:
            buffer.copy_(source[name])
        tensor: Tensor = buffer.contiguous()
        dist.broadcast(tensor, src=0)
        buffer.copy_(tensor)
