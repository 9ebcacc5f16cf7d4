"""The ranks of a device mesh: which share rows, and over which parameters are sharded."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_SHARING = "tensor_parallel"  # Lightning's name; its ranks get the same batches


def sharing_group(mesh: DeviceMesh | None) -> dist.ProcessGroup:
    """The ranks that share this rank's rows: those that Lightning gives the same batches.

    Args:
        mesh: Of ``ModelParallelStrategy``; None under another strategy.

    Raises:
        ValueError: If there is no second rank to share rows with.
    """
    names = (mesh.mesh_dim_names if mesh is not None else None) or ()
    if mesh is None or _SHARING not in names or mesh[_SHARING].size() < 2:
        raise ValueError(
            "`context_parallel=True` shares each row among the ranks of the mesh's dimension `tensor_parallel`, of "
            "which there is " + ("only one. " if _SHARING in names else "none under this strategy. ") + "Set "
            "Trainer(strategy=ModelParallelStrategy(data_parallel_size=D, tensor_parallel_size=N), devices=...) with N "
            "of 2 at least and D times N devices, or leave `context_parallel` out."
        )
    return mesh[_SHARING].get_group()


def mesh_of_all_ranks(mesh: DeviceMesh) -> DeviceMesh:
    """The same devices in one dimension: ranks that share rows average gradients as those with rows of their own do."""
    return init_device_mesh(mesh.device_type, (dist.get_world_size(),))
