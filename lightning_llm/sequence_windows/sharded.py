"""Models sharded by FSDP2, whose collectives every rank must join equally often."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is sharded by FSDP2.

    Raises:
        ValueError: If its parameters are distributed in another way, or only a part of it is sharded.
    """
    if isinstance(model, FSDPModule):
        return True
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "Windows know distributed parameters of FSDP2 only: call `fully_shard` on the model as a whole, and pass "
            "the model. Layers split by tensor parallelism are not supported."
        )
    return False


def most_windows(model: nn.Module, num_windows: int) -> int:
    """The largest number of windows of any rank that shares the model's shards."""
    count = torch.tensor(num_windows, device=next(model.parameters()).device)
    for group in _shard(model).device_mesh.get_all_groups():
        dist.all_reduce(count, dist.ReduceOp.MAX, group=group)
    return int(count)


def _shard(model: nn.Module) -> DTensor:
    """A parameter that is sharded now; after a forward without a backward the outermost ones are whole."""
    for module in model.modules():
        shards = [parameter for parameter in module.parameters() if isinstance(parameter, DTensor)]
        if shards:
            return shards[0]
        if isinstance(module, FSDPModule):
            module.reshard()
    raise ValueError("The model has no parameter that FSDP2 has sharded.")


def reduce_gradients(model: nn.Module, *, is_last: bool) -> None:
    """Reduce and scatter gradients in a sequence's last backward only; until then they are summed on each rank."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)


def pad_to(states: Tensor, length: int, value: int) -> Tensor:
    """(rows, seq) filled up on the right to at least ``length`` tokens."""
    return nn.functional.pad(states, (0, max(0, length - states.shape[1])), value=value)
