"""A batch whose rows are compared with each other is not cut; the module may see fewer of them at once instead."""

from __future__ import annotations

import logging
from typing import Any, Protocol, runtime_checkable

import lightning as L

log = logging.getLogger(__name__)


@runtime_checkable
class ComparesRows(Protocol):
    """What a LightningModule has whose loss depends on a batch as a whole, such as one with in-batch negatives.

    Attributes:
        needs_whole_batches: Whether batches must not be cut, in what the Trainer does now.
        chunk_size: Rows that the module's model sees at once; None for all. May be set during a run.
    """

    needs_whole_batches: bool
    chunk_size: int | None

    def shrink_chunk_size(self, rows: int) -> int | None:
        """Take chunks with which a batch of so many rows needs less memory than it did.

        Returns:
            Rows in a chunk from now on; None, and nothing was changed, if they cannot be fewer.
        """


def needs_whole_batches(module: L.LightningModule) -> bool:
    """Whether a module's batches must not be cut now."""
    return bool(getattr(module, "needs_whole_batches", False))


class ChunkLimit:
    """The chunks that memory allows: what a module was shrunk to, kept for a resumed run. It never grows.

    Attributes:
        rows: In a chunk; None while nothing has failed.
    """

    def __init__(self) -> None:
        self.rows: int | None = None

    def apply(self, module: L.LightningModule) -> None:
        """Begin with what is known, where the module's own chunks are larger."""
        if self.rows is None or not isinstance(module, ComparesRows):
            return
        chunked: Any = module
        if chunked.chunk_size is None or chunked.chunk_size > self.rows:
            log.warning("A batch is run %d rows at a time: more did not fit before.", self.rows)
            chunked.chunk_size = self.rows

    def shrink(self, module: L.LightningModule, rows: int, name: str, rank: int) -> bool:
        """A batch ran out of memory.

        Args:
            module: That was run.
            rows: Of the batch.
            name: Of what was run, for the message.
            rank: Likewise.

        Returns:
            Whether it is worth another try.
        """
        size = module.shrink_chunk_size(rows) if isinstance(module, ComparesRows) else None
        if size is None:
            return False
        self.rows = size
        log.warning(
            "Out of memory in %s on rank %d with %d rows, which are compared with each other and not cut: the model "
            "sees %d of them at once now.",
            *(name, rank, rows, size),
        )
        return True
