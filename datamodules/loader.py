"""The loader: which rows each rank sees in each micro-batch, as a pure function of seed, epoch and position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_llm.datamodules.order import shuffled
from lightning_llm.datamodules.rows import EMPTY_ROW, RowDataset


class RowLoader:
    """Iterates over micro-batches of rows; the order of the rows does not depend on the number of ranks.

    Micro-batch m over all ranks holds the epoch's positions m * B * W to (m + 1) * B * W; rank r takes its share of
    them. All ranks yield equally many batches; where rows run out, a rank gets an empty row (padding only, no
    target) rather than another rank's row again, so that every row counts exactly once, in evaluation too.

    This is deliberately no ``torch.utils.data.DataLoader``: Lightning replaces the sampler of those, and shuffles
    ordered training data and repeats rows in validation. It delivers the epoch to ``loader.sampler.set_epoch``.

    Args:
        dataset: Makes the batches.
        micro_batch_size: Rows per rank in a batch.
        shuffle: A new order each epoch; False keeps the table's order.
        seed: Of the order.
        rank: This rank among the data-parallel ranks.
        world_size: Number of data-parallel ranks.
        drop_last: Leave out the last batch if it is short.
        num_workers: Worker processes; 0 is fastest for tokens that lie in a memory-mapped store.
        pin_memory: Page-lock batches, for copies to a GPU.
    """

    def __init__(
        self,
        dataset: RowDataset,
        micro_batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.epoch = 0
        self.position = 0  # batches of the current epoch that have been handed out
        self._is_resumed = False
        self.sampler = self
        self.batch_sampler = None  # Lightning looks for one wherever there is a `sampler`
        self._loader: DataLoader[dict[str, Tensor]] = DataLoader(
            dataset,
            batch_size=None,
            sampler=_BatchIndex(self),
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_as_is,
            persistent_workers=num_workers > 0,
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    @property
    def batch_size(self) -> int:
        """Rows per rank in a batch, under the name that a ``DataLoader`` has for it."""
        return self.micro_batch_size

    @property
    def tokens_per_epoch(self) -> int:
        """Label tokens of all ranks in an epoch."""
        return self.dataset.table.num_label_tokens

    def longest_batch(self) -> dict[str, Tensor]:
        """A micro-batch of the longest rows, for whoever wants to know what memory the worst one takes."""
        longest = np.argsort(self.dataset.table.row_lengths, kind="stable")[::-1]
        return self.dataset[longest[: self.micro_batch_size].tolist()]

    def __len__(self) -> int:
        num_rows, global_batch = len(self.dataset), self.micro_batch_size * self.world_size
        return num_rows // global_batch if self.drop_last else -(-num_rows // global_batch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The epoch's batches, from the position that was loaded, if one was; its order is that of the first one."""
        if not self._is_resumed:
            self.position = 0
        self._is_resumed = False
        for batch in self._loader:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the epoch stands, the same on every rank; Lightning puts it into its checkpoints."""
        return {"position": self.position, "global_batch": self.micro_batch_size * self.world_size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start the next iteration where the checkpoint was saved."""
        rows, global_batch = (
            state_dict["position"] * state_dict["global_batch"],
            self.micro_batch_size * self.world_size,
        )
        if rows % global_batch:
            rank_zero_warn(
                f"The checkpoint was saved after {rows} rows of the epoch, which is no multiple of the {global_batch} "
                f"that a micro-batch now holds over all ranks: {rows % global_batch} rows are seen again."
            )
        self.position = rows // global_batch
        self._is_resumed = True

    def row_ids(self, batch_idx: int) -> list[int]:
        """Rows of this rank in a micro-batch of the current epoch."""
        num_rows, global_batch = len(self.dataset), self.micro_batch_size * self.world_size
        begin = batch_idx * global_batch
        positions = np.arange(begin, min(begin + global_batch, num_rows))
        share = np.array_split(positions, self.world_size)[self.rank]
        if not len(share):
            return [EMPTY_ROW]
        rows = shuffled(share, num_rows, self.seed, self.epoch) if self.shuffle else share
        return rows.tolist()  # type: ignore[no-any-return]


class _BatchIndex(torch.utils.data.Sampler[list[int]]):
    def __init__(self, loader: RowLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        return (self.loader.row_ids(batch_idx) for batch_idx in range(self.loader.position, len(self.loader)))

    def __len__(self) -> int:
        return len(self.loader)


def _as_is(batch: Any) -> Any:
    return batch
