"""Where a run stands in its streams, and how the ranks agree on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lightning_llm.datamodules.streams.shards import ShardError
from lightning_llm.datamodules.streams.virtual_stream import State


@dataclass(frozen=True)
class StreamPosition:
    """A place in an epoch of all streams; the same on every rank.

    Attributes:
        epoch: Which one.
        position: Positions before it.
        slots: Of these, the positions that stood in a micro-batch: those without any row on any rank are passed over.
        cursors: (num_streams,) states of all streams at an earlier place; None at the epoch's beginning.
        cursors_at: That place.
    """

    epoch: int = 0
    position: int = 0
    slots: int = 0
    cursors: list[State | None] | None = None
    cursors_at: int = 0


class Report(NamedTuple):
    """What a rank tells the others of the micro-batches that it has read ahead.

    Attributes:
        is_filled: For each micro-batch whether it holds a row.
        cursors: State of each of the rank's streams before them.
        has_ended: Whether all of its streams have ended.
        error: Why it could not read on.
        data: Fingerprint of the data that it sees.
    """

    is_filled: list[bool]
    cursors: dict[int, State | None]
    has_ended: bool
    error: str | None = None
    data: str = ""


@dataclass
class Progress:
    """Where the run stands after each batch that was delivered and is perhaps not trained yet.

    Attributes:
        start: Where it began.
        first: Batches of the epoch that count as done at the start.
        delivered: Batches of the epoch, these included.
    """

    start: StreamPosition
    first: int = 0
    delivered: int = field(init=False)

    def __post_init__(self) -> None:
        self.delivered = self.first
        self._after = {self.first: (self.start.position, self.start.slots)}
        cursors_at = self.start.cursors_at
        self._rounds: dict[int, list[State | None] | None] = {cursors_at: self.start.cursors}

    def add_round(self, position: int, cursors: list[State | None]) -> None:
        """Remember where all streams stand."""
        self._rounds[position] = cursors

    def deliver(self, position: int, slots: int, num_trained: int) -> None:
        """Count a batch, and forget what lies before those that are trained."""
        self.delivered += 1
        self._after[self.delivered] = (position, slots)
        kept = min(num_trained, self.delivered - 1)
        for number in [number for number in self._after if number < kept]:
            del self._after[number]
        oldest = max(at for at in self._rounds if at <= self._after[min(self._after)][0])
        for at in [at for at in self._rounds if at < oldest]:
            del self._rounds[at]

    def place(self, count: int) -> StreamPosition:
        """Where the run stood after ``count`` batches."""
        known = [number for number in self._after if number <= count]
        position, slots = self._after[max(known, default=min(self._after))]
        cursors_at = max(at for at in self._rounds if at <= position)
        return StreamPosition(self.start.epoch, position, slots, self._rounds[cursors_at], cursors_at)


def agree_by_torch(report: Report) -> list[Report]:
    """Hand a rank's report to all; each gets those of all, in the order of the ranks."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return [report]
    reports: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(reports, report)
    return reports


def describe(error: Exception | None) -> str | None:
    """What to tell the other ranks."""
    return None if error is None else f"{type(error).__name__}: {error}"


def raise_for(error: Exception | None, reports: Sequence[Report]) -> None:
    """Raise this rank's own error, else one that names the rank that has one.

    Raises:
        ShardError: If another rank cannot read on.
        ValueError: If ranks do not see the same data.
    """
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report.error is not None:
            raise ShardError(f"Rank {rank} cannot read on, so all ranks stop. {report.error}")
        if report.data != reports[0].data:
            raise ValueError(
                f"Rank {rank} sees other data or settings than rank 0, so rows would be lost or repeated. Give all "
                f"ranks the same arguments, and files that do not change during the run."
            )


def merge(reports: Sequence[Report], num_streams: int) -> list[State | None]:
    """States of all streams, (num_streams,)."""
    cursors: dict[int, State | None] = {}
    for report in reports:
        cursors.update(report.cursors)
    return [cursors.get(stream) for stream in range(num_streams)]
