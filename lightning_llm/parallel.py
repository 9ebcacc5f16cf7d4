"""How many ranks hold different batches."""

from __future__ import annotations

import lightning as L


def data_parallel_size(trainer: L.Trainer) -> int:
    """Number of data-parallel ranks; ranks that split a layer among them (tensor parallel) count once.

    A sum that ``strategy.reduce`` takes over all ranks counts each batch ``world_size / data_parallel_size`` times.

    Args:
        trainer: With its strategy set up.

    Returns:
        What the strategy tells a distributed sampler, else the number of all ranks.
    """
    layout = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return int(layout.get("num_replicas", trainer.world_size))


def data_parallel_rank(trainer: L.Trainer) -> int:
    """This rank's number among the data-parallel ranks; ranks that split a layer among them share one.

    Args:
        trainer: With its strategy set up.
    """
    layout = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return int(layout.get("rank", trainer.global_rank))
