"""Which weights are the smallest, exactly so many of them: in one tensor or over several, whole or sharded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def smallest(keys: Sequence[Tensor], number: int) -> list[Tensor]:
    """Mark the smallest entries over all tensors, of equal ones the first.

    The bound is found by bisection on counts, so tensors are neither joined nor sorted, and sharded ones are gathered
    one at a time (every rank takes part and finds the same).

    Args:
        keys: Integers of one type, -1 at least, of any shapes; DTensors are sharded over one dimension of ranks.
        number: How many to mark.

    Returns:
        For each tensor a boolean one of its whole shape, on its device.

    Example:
        >>> smallest([torch.tensor([3, 1, 2]), torch.tensor([[2, 0]])], 3)
        [tensor([False,  True,  True]), tensor([[False,  True]])]
    """
    bound = _kth_smallest(keys, number) if number else -2
    left = number - _count(keys, bound - 1)  # of those equal to the bound
    marked = []
    for key in keys:
        whole = key.full_tensor() if isinstance(key, DTensor) else key
        equal = whole == bound
        first = equal.flatten().cumsum(0).view_as(equal) <= left
        left -= min(left, int(equal.sum()))
        marked.append((whole < bound) | (equal & first))
    return marked


def magnitude_keys(weight: Tensor, pruned: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers in the order of the weight's magnitudes; -1 where it is pruned, so that it stays so.

    Args:
        weight: Of any shape; a DTensor gives one.
        pruned: Boolean, of the shape of the weight, or of this rank's shard.
        dtype: Floating-point type in which magnitudes are compared, no narrower than the weight's.

    Example:
        >>> magnitude_keys(torch.tensor([-2.0, 0.0, 1.0]), torch.tensor([False, False, True]), torch.float32)
        tensor([1073741824,          0,         -1], dtype=torch.int32)
    """
    magnitudes = local_part(weight.detach()).abs().to(dtype)
    keys = magnitudes.view(_INTEGERS[dtype.itemsize]).masked_fill_(pruned, -1)  # abs() has made a copy
    if not isinstance(weight, DTensor):
        return keys
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(keys, mesh, placements, shape=weight.shape, stride=weight.stride())


def keep_largest_of_group(keys: Tensor, keep: int, group: int, dim: int) -> Tensor:
    """Raise the largest keys of each group beyond all others, so that they are never the smallest.

    Args:
        keys: Integers, of a whole matrix.
        keep: How many of each group stay.
        group: Neighbours along ``dim``, whose size is a multiple of it.
        dim: Along which the layer sums: its inputs.

    Example:
        >>> keep_largest_of_group(torch.tensor([[5, 7, 1, 2]]), keep=1, group=2, dim=1).argsort()
        tensor([[2, 0, 1, 3]])
    """
    last = keys.movedim(dim, -1)
    grouped = last.reshape(*last.shape[:-1], -1, group)
    ranks = grouped.argsort(dim=-1, stable=True).argsort(-1)
    raised = grouped.masked_fill(ranks >= group - keep, torch.iinfo(keys.dtype).max)
    return raised.flatten(-2).movedim(-1, dim)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard; a whole tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(weight: Tensor, whole: Tensor) -> Tensor:
    """The part of a whole tensor, equal on all ranks, that belongs to this rank's shard of a weight."""
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None).to_local()


def pack(mask: Tensor) -> Tensor:
    """A boolean mask as bits, eight to a byte, in host memory."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack(bits: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """The mask of a shape that :func:`pack` packed.

    Raises:
        ValueError: If the bits are of another shape.
    """
    number = int(np.prod(shape))
    if len(bits) != (number + 7) // 8:
        raise ValueError(f"Expected {(number + 7) // 8} bytes for a mask of shape {tuple(shape)}, but got {len(bits)}.")
    mask = np.unpackbits(bits.cpu().numpy(), count=number).astype(bool)
    return torch.from_numpy(mask).view(*shape).to(device)


def num_marked(bits: Tensor) -> int:
    """True entries of a packed mask.

    Example:
        >>> num_marked(pack(torch.tensor([True, False, True])))
        2
    """
    return int(np.bitwise_count(bits.numpy()).sum())


def _kth_smallest(keys: Sequence[Tensor], number: int) -> int:
    low, high = -1, torch.iinfo(keys[0].dtype).max
    while low < high:
        middle = (low + high) // 2
        if _count(keys, middle) >= number:
            high = middle
        else:
            low = middle + 1
    return low


def _count(keys: Sequence[Tensor], bound: int) -> int:
    """Entries up to the bound, over all tensors and ranks."""
    counts = {True: 0, False: 0}  # sharded or not
    for key in keys:
        counts[isinstance(key, DTensor)] += int((local_part(key) <= bound).sum())
    sharded = next((key for key in keys if isinstance(key, DTensor)), None)
    if sharded is not None:
        total = torch.tensor(counts[True], device=local_part(sharded).device)
        dist.all_reduce(total, group=sharded.device_mesh.get_group())
        counts[True] = int(total)
    return counts[True] + counts[False]
