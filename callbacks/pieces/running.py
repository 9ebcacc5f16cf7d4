"""What training and inference share: planning, and what happens after an out-of-memory error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch

from lightning_llm.callbacks.pieces.cutting import BatchCutter, Piece
from lightning_llm.callbacks.pieces.limits import PieceLimits
from lightning_llm.callbacks.pieces.memory import release_memory
from lightning_llm.callbacks.pieces.merging import PieceLogs
from lightning_llm.callbacks.pieces.reduction import LocalReduction
from lightning_llm.callbacks.pieces.rows import CannotSplit
from lightning_llm.callbacks.pieces.sequence_window import WindowLimit
from lightning_llm.callbacks.pieces.undo import StateKeeper
from lightning_llm.callbacks.pieces.whole_batches import ChunkLimit, needs_whole_batches
from lightning_llm.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)


class BatchReport(NamedTuple):
    """How a batch was run: number of pieces, cost of the largest one that fitted, pieces that failed."""

    num_pieces: int
    largest: int
    num_failed: int


class Transfer:
    """Moves batches to the device; one that does not fit stays on the host and is moved piece by piece.

    Args:
        inner: The strategy's ``batch_to_device``.
        retry_every: Batches after which a large one is tried whole again.
    """

    def __init__(self, inner: Callable[..., Any], cutter: BatchCutter, device: torch.device, retry_every: int) -> None:
        self.inner = inner
        self._cutter = cutter
        self._device = device
        self._retry_every = max(retry_every, 1)
        self._too_large: int | None = None
        self._calm = 0
        self._on_host: Any = None
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """As Lightning calls it; returns the batch as it was if it does not fit."""
        self._on_host = None
        self._arguments = (args, kwargs)
        if self._too_large is not None:
            self._calm += 1
            if self._calm < self._retry_every and self._cutter.whole(batch).cost >= self._too_large:
                self._on_host = batch
                return batch
        try:
            return self.inner(batch, *args, **kwargs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release_memory(self._device)
        self._too_large, self._calm = self._cutter.whole(batch).cost, 0
        log.warning(
            "Out of memory while moving a batch to %s: it stays on the host and is moved in pieces.", self._device
        )
        self._on_host = batch
        return batch

    def piece(self, batch: Any) -> Any:
        """Move a piece of the last batch."""
        args, kwargs = self._arguments
        return self.inner(batch, *args, **kwargs)

    def left_on_host(self, batch: Any) -> bool:
        """Whether this batch has to be moved in pieces."""
        return self._on_host is not None and batch is self._on_host


class PieceRunner:
    """What training and inference share: planning, and what happens after an out-of-memory error.

    Args:
        trainer: Set up for a run.
        cutter: Cuts batches.
        limits: How large pieces may be; learns.
        reduction: How ranks meet.
        transfer: Moves pieces of batches that are still on the host.
        window: How long windows along the sequence may be, in modules that have them.
        chunk: How many rows of a batch that is not cut are seen at once.
        name: Of what is run, for messages.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        cutter: BatchCutter,
        limits: PieceLimits,
        reduction: LocalReduction,
        transfer: Transfer,
        window: WindowLimit,
        chunk: ChunkLimit,
        name: str = "training",
    ) -> None:
        assert trainer.strategy.lightning_module is not None
        self.trainer = trainer
        self.module = trainer.strategy.lightning_module
        self.device = trainer.strategy.root_device
        self.cutter = cutter
        self.limits = limits
        self.reduction = reduction
        self.transfer = transfer
        self.window = window
        self.chunk = chunk
        self.name = name
        self.keeper = StateKeeper(self.module, self.device)
        self.report = BatchReport(1, 0, 0)
        self._logs = PieceLogs()

    def plan(self, whole: Piece) -> tuple[list[Piece], int]:
        """Pieces within their limits, as many on each rank where ranks need that; and how many of them are repeats.

        A rank with too few rows repeats its last piece, with a weight of 0.
        """
        if needs_whole_batches(self.module):
            return [whole], 0
        pieces = self.cutter.cut(whole, self.limits.cost)
        number = self.reduction.agree(len(pieces))
        if number > len(pieces):
            pieces = self.cutter.at_least(pieces, number)
        missing = max(number - len(pieces), 0)
        return pieces + pieces[-1:] * missing, missing

    def smaller(self, piece: Piece, error: BaseException, is_retry: bool = False) -> list[Piece]:
        """Learn that a piece failed, and cut it.

        A single row is tried once more as it is, when all memory has been given back, if as much has fitted before.
        What cannot be cut along the batch is tried again in shorter windows along the sequence, where there are some.

        Raises:
            torch.OutOfMemoryError: If nothing is left to cut.
            CannotSplit: Likewise, if the batch does not say how.
        """
        limit = self.limits.of(piece.length)
        has_fitted = not is_retry and any(piece.cost <= known.good for known in self.limits.buckets.values())
        limit.failed(piece.cost, self.limits.grow_every)
        if needs_whole_batches(self.module):
            limit.set_free()
            return [self._with_smaller_chunks(piece, error)]
        try:
            parts = self.cutter.cut(piece, self.limits.cost)
            if len(parts) == 1:
                parts = self.cutter.halve(piece)
        except CannotSplit as reason:
            if not self._shrink_window(piece):
                raise reason from error
            limit.set_free()  # the next batch cannot be cut either
            return [piece]
        if len(parts) == 1 and has_fitted:
            release_memory(self.device)
        elif len(parts) == 1 and self._shrink_window(piece):
            limit.set_free(piece.cost)
            return parts
        elif len(parts) == 1:
            raise torch.OutOfMemoryError(
                f"Out of memory in {self.name} with a single row of {piece.length} columns (cost {piece.cost}) on rank "
                f"{self.trainer.global_rank}: it cannot be cut along the batch{self._and_windows()}. Use "
                f"shorter rows, gradient checkpointing, lower precision, or a smaller or sharded model."
            ) from error
        log.warning(
            "Out of memory in %s on rank %d: a piece of cost %d (%g rows of %d columns) is run again in %s; the limit "
            "is now %d.",
            *(self.name, self.trainer.global_rank, piece.cost, piece.num_rows, piece.length),
            *(f"{len(parts)} pieces" if len(parts) > 1 else "one, as it had fitted before", limit.limit),
        )
        return parts

    def _with_smaller_chunks(self, piece: Piece, error: BaseException) -> Piece:
        rank = self.trainer.global_rank
        if self.chunk.shrink(self.module, round(piece.num_rows), self.name, rank):
            return piece
        raise torch.OutOfMemoryError(
            f"Out of memory in {self.name} with a batch of {piece.num_rows:g} rows of {piece.length} columns on rank "
            f"{rank}. Its loss compares its rows with each other, so that it cannot be cut, and {self._chunks()}. Use "
            f"smaller batches, shorter rows, gradient checkpointing or lower precision."
        ) from error

    def _chunks(self) -> str:
        size = getattr(self.module, "chunk_size", None)
        if size is None:
            return f"{type(self.module).__name__} does not run it in chunks here"
        return f"chunks of {size} rows cannot be smaller here"

    def _and_windows(self) -> str:
        tokens = self.window.of(self.module)
        return "" if tokens is None else f", and its windows of {tokens} tokens cannot be shorter"

    def _shrink_window(self, piece: Piece) -> bool:
        return self.window.shrink(self.module, piece.length, self.name, self.trainer.global_rank)

    def batch_done(self, whole: Piece, lengths: set[int], report: BatchReport) -> None:
        """Let the limit grow after calm batches."""
        self.report = report
        if report.num_failed or not self.reduction.recovers:
            return
        rows = max(round(whole.num_rows), 1)
        useful = -(-rows // max(report.num_pieces - 1, 1)) * -(-whole.cost // rows)
        for limit in {id(limit): limit for limit in map(self.limits.of, lengths)}.values():
            ceiling = min(whole.cost, self.limits.ceiling or whole.cost)
            if limit.limit is not None and limit.limit < ceiling and limit.step_done(self.limits.grow_every, useful):
                log.info("After calm batches, pieces of %s may have cost %d.", self.name, limit.limit)

    def to_device(self, whole: Any, piece: Any) -> Any:
        """Move a piece, if its batch did not fit."""
        return self.transfer.piece(piece) if self.transfer.left_on_host(whole) else piece
