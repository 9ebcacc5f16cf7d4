"""The loader of virtual streams: one order of rows for any number of ranks, workers and micro-batches.

Row t of stream v stands at position t * V + v of an epoch; where a stream has ended, its positions stay empty. The next
micro-batch over all W ranks holds the next B * W positions, and rank r takes those of its streams, v ≡ r modulo W. So
what an optimizer step holds does not depend on how its rows are split.

Every few micro-batches the ranks tell each other what they have read ahead: which micro-batches hold a row, where the
streams stood, and whether reading failed. So all ranks yield equally many batches, one that has run dry empty ones; a
failure is raised by all at once; and each knows the state of all streams, so that saving needs no communication. All
that can fail, batches made and page-locked included, comes before they speak: no rank waits for one that has stopped.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_llm.datamodules.cache import fingerprint
from lightning_llm.datamodules.loader import check_identity
from lightning_llm.datamodules.streams.position import (
    Progress,
    Report,
    StreamPosition,
    agree_by_torch,
    describe,
    merge,
    raise_for,
)
from lightning_llm.datamodules.streams.virtual_stream import State, StreamRow, StreamSettings, VirtualStream
from lightning_llm.datamodules.trainer_position import align_batches, is_fitting, trained_batches

LOOK_AHEAD = 16  # micro-batches that the ranks agree on at once


class StreamLoader:
    """Iterates over micro-batches of streamed rows; resumes exactly, on any number of ranks and workers.

    It has no length. It is no ``torch.utils.data.DataLoader``, into which Lightning would put a sampler.

    Args:
        settings: Of the streams.
        micro_batch_size: Rows per rank in a batch.
        collate: Makes a batch of rows (None for an empty one) and their positions.
        rank: This rank among the data-parallel ranks.
        num_ranks: Number of data-parallel ranks.
        num_workers: Worker processes of this rank; each reads some of its streams.
        pin_memory: Page-lock batches, for copies to a GPU.
        trainer: Whose position is saved; None outside of one: then all that was delivered counts as trained.
        identity: What the rows are made of, by name; a state of other rows is refused, and so are ranks that differ.
        agree: Hands a rank's report to all and returns those of all; None uses ``torch.distributed``.

    Raises:
        ValueError: If the ranks cannot share the streams evenly.
    """

    def __init__(
        self,
        settings: StreamSettings,
        micro_batch_size: int,
        collate: Callable[[Sequence[StreamRow | None], Sequence[int]], dict[str, Any]],
        *,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        trainer: L.Trainer | None = None,
        identity: dict[str, Any] | None = None,
        agree: Callable[[Report], list[Report]] | None = None,
    ) -> None:
        check_num_streams(settings.num_streams, num_ranks)
        self.settings = settings
        self.micro_batch_size = micro_batch_size
        self.collate = collate
        self.rank = rank
        self.num_ranks = num_ranks
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.trainer = trainer
        self.identity = identity or {}
        self.agree = agree or agree_by_torch
        self.epoch = 0
        self.sampler = self
        self.batch_sampler = None  # Lightning looks for one wherever there is a `sampler`
        self._resume_from: StreamPosition | None = None
        self._progress = Progress(StreamPosition())
        self._must_align = False

    @property
    def batch_size(self) -> int:
        """Rows per rank in a batch, under the name that a ``DataLoader`` has for it."""
        return self.micro_batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's epoch; Lightning's counters follow a position that was loaded."""
        self.epoch = epoch
        # Without a length Lightning has asked for the first batch already, with one (limit_train_batches) not yet.
        start = self._resume_from or (self._progress.start if self._must_align else None)
        if start is not None and is_fitting(self.trainer):
            assert self.trainer is not None
            self._must_align = False
            _follow(self.trainer, self._count_batches(start))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The epoch's batches, from the loaded position if there is one; nothing changes before the first."""
        return self._batches()

    # ---- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """The place up to which rows were trained on, as the trainer counts its optimizer steps; no communication."""
        place = self._resume_from or self._trained()
        # Plain dicts: checkpoints are loaded without running code.
        fields = {name: getattr(place, name) for name in StreamPosition.__dataclass_fields__}
        return {"version": 1, "data": dict(self.identity), "place": fields}

    def load_state_dict(self, state_dict: State) -> None:
        """Let the next iteration go on where the state was saved.

        Raises:
            ValueError: If it was saved over other data or settings, naming what differs.
        """
        check_identity(state_dict, self.identity)
        self._resume_from = StreamPosition(**state_dict["place"])
        self._must_align = True

    def _trained(self) -> StreamPosition:
        progress = self._progress
        if not is_fitting(self.trainer):
            return progress.place(progress.delivered)
        assert self.trainer is not None
        if self._must_align:
            return progress.start  # its counters are those of the checkpoint
        counts: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        if counts.is_last_batch and counts.current.processed == counts.current.ready:
            return StreamPosition(progress.start.epoch + 1)
        return progress.place(trained_batches(self.trainer))

    # ---- iteration -----------------------------------------------------------------------------------------------

    @property
    def _positions_per_batch(self) -> int:
        return self.micro_batch_size * self.num_ranks

    def _begin(self) -> StreamPosition:
        start = self._resume_from or StreamPosition(self.epoch)
        self._resume_from = None
        self._progress = Progress(start, first=self._count_batches(start))
        return start

    def _count_batches(self, place: StreamPosition) -> int:
        """Batches of the present size before a place, in whole accumulation windows: a new one begins there."""
        window = int(self.trainer.accumulate_grad_batches) if is_fitting(self.trainer) else 1  # type: ignore[union-attr]
        return -(-place.slots // (self._positions_per_batch * window)) * window

    def _batches(self) -> Iterator[dict[str, Any]]:
        start = self._begin()
        progress, data = self._progress, fingerprint([repr(sorted(self.identity.items()))])
        slots = _Slots(self, start)
        at, num_slots = start.position, start.slots
        while True:
            begin = at
            window, cursors, error = self._read_ahead(slots, at)
            is_filled = [has_row for has_row, _ in window]
            reports = self.agree(Report(is_filled, cursors, slots.have_ended, describe(error), data))
            raise_for(error, reports)
            progress.add_round(begin, merge(reports, self.settings.num_streams))
            for number in range(len(window)):
                at += self._positions_per_batch
                _, batch = window.pop(0)  # not held any longer than its turn
                if any(report.is_filled[number] for report in reports):
                    num_slots += self._positions_per_batch
                    progress.deliver(at, num_slots, self._count_trained())
                    yield batch
            if all(report.has_ended for report in reports):
                break
        if not num_slots:
            raise _no_row(self.settings)

    def _read_ahead(
        self, slots: _Slots, at: int
    ) -> tuple[list[tuple[bool, dict[str, Any]]], dict[int, State | None], Exception | None]:
        """The next micro-batches and whether they hold a row, where the streams stood before, and what went wrong."""
        cursors = slots.cursors
        try:
            slots.skip_to(at)
            cursors = dict(slots.cursors)
            taken = (slots.take(at + number * self._positions_per_batch) for number in range(LOOK_AHEAD))
            return [(any(rows), self._make_batch(rows, positions)) for rows, positions in taken], cursors, None
        except Exception as error:
            return [], cursors, error

    def _make_batch(self, rows: Sequence[StreamRow | None], positions: Sequence[int]) -> dict[str, Any]:
        batch = self.collate(rows, positions)
        if self.pin_memory:
            return {name: x.pin_memory() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        return batch

    def _count_trained(self) -> int:
        if not is_fitting(self.trainer):
            return self._progress.delivered
        assert self.trainer is not None
        return trained_batches(self.trainer)


_Batch = tuple[list[StreamRow | None], list[int]]  # rows and their positions


class _Slots:
    """A rank's positions in order, each with its row: read here or by worker processes."""

    def __init__(self, loader: StreamLoader, start: StreamPosition) -> None:
        self.rank, self.num_ranks = loader.rank, loader.num_ranks
        self.num_streams = loader.settings.num_streams
        self.micro_batch_size = loader.micro_batch_size
        mine = range(self.rank, self.num_streams, self.num_ranks)
        self.cursors: dict[int, State | None] = {v: start.cursors[v] if start.cursors else None for v in mine}
        self._at = start.cursors_at + (self.rank - start.cursors_at) % self.num_ranks
        self._stream_rows = _StreamRows(loader.settings, start.epoch, self._at, self.num_ranks, self.cursors)
        self._num_workers = loader.num_workers

    @cached_property
    def _rows(self) -> Iterator[tuple[int, StreamRow | None, State]]:
        # Begun with the first row and not before: workers that do not start are an error that all ranks hear of.
        return _in_workers(self._stream_rows, self._num_workers, len(self.cursors), self.micro_batch_size)

    @property
    def have_ended(self) -> bool:
        """Whether all of the rank's streams have ended."""
        return all(state is not None and state["has_ended"] for state in self.cursors.values())

    def take(self, begin: int) -> _Batch:
        """The rank's rows of the micro-batch that begins at a position of all ranks."""
        end = begin + self.micro_batch_size * self.num_ranks
        positions = list(range(self._at, end, self.num_ranks))
        return [self._next() for _ in positions], positions

    def skip_to(self, position: int) -> None:
        """Pass over what was trained on already."""
        while self._at < position:
            self._next()

    def _next(self) -> StreamRow | None:
        stream, row, state = next(self._rows)
        self.cursors[stream] = state
        self._at += self.num_ranks
        return row


class _StreamRows(IterableDataset[tuple[int, StreamRow | None, State]]):
    """(stream, row, state behind it) of every ``step``-th position; worker w of n serves every n-th of these.

    It goes on for ever: a stream that has ended gives None.
    """

    def __init__(
        self, settings: StreamSettings, epoch: int, begin: int, step: int, cursors: dict[int, State | None]
    ) -> None:
        self.settings = settings
        self.epoch = epoch
        self.begin = begin
        self.step = step
        self.cursors = dict(cursors)

    def __iter__(self) -> Iterator[tuple[int, StreamRow | None, State]]:
        worker = get_worker_info()
        number, of = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        streams: dict[int, VirtualStream] = {}
        for position in itertools.count(self.begin + number * self.step, of * self.step):
            stream = position % self.settings.num_streams
            if stream not in streams:
                streams[stream] = VirtualStream(self.settings, stream, self.epoch, self.cursors[stream])
            row = streams[stream].next_row()
            yield stream, row, streams[stream].state


def _in_workers(
    rows: _StreamRows, num_workers: int, num_streams: int, micro_batch_size: int
) -> Iterator[tuple[int, StreamRow | None, State]]:
    """Read in worker processes; their number must divide that of the rank's streams, so that each has its own."""
    num_workers = max((n for n in range(1, num_workers + 1) if num_streams % n == 0), default=0)
    if not num_workers:
        return iter(rows)
    ahead = max(2, -(-LOOK_AHEAD * micro_batch_size // num_workers))
    options: dict[str, Any] = {"prefetch_factor": ahead, "collate_fn": _as_is, "worker_init_fn": _begin_worker}
    return iter(DataLoader(rows, batch_size=None, num_workers=num_workers, **options))


def _begin_worker(worker: int) -> None:
    """Encode in this one thread; end when the process that it reads for was killed.

    The tokenizer's threads do not come along into a forked process, and waiting for them would last for ever. PyTorch's
    workers notice that their parent is gone, and then wait for ever until somebody reads the rows that they have made.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check_num_streams(num_streams: int, num_ranks: int) -> None:
    """Refuse ranks that cannot share the streams evenly.

    Raises:
        ValueError: Naming numbers that would do.
    """
    if num_streams % num_ranks:
        below, above = num_streams // num_ranks * num_ranks, -(-num_streams // num_ranks) * num_ranks
        good = " or ".join(str(number) for number in (below, above) if number)
        raise ValueError(
            f"`num_streams` must be a multiple of the number of data-parallel ranks, but got num_streams={num_streams} "
            f"and {num_ranks} ranks. Pass num_streams={good}. A run keeps its num_streams when it is resumed: choose "
            f"one that every number of ranks divides that it may run on, 48 say."
        )


def _no_row(settings: StreamSettings) -> ValueError:
    names = ", ".join(source.name for source in settings.sources)
    return ValueError(
        f"There is nothing to train or validate on: {names} gave no row in a whole epoch. All texts are empty or "
        f"shorter than min_length={settings.min_length} tokens, or unreadable and left out by skip_corrupt=True, or a "
        f"filter of the data set leaves none. Check the data and these settings."
    )


def _follow(trainer: L.Trainer, batches: int) -> None:
    """Let Lightning's counters say what the loader does: so many batches of the epoch are done."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    if batches or not progress.is_last_batch:
        align_batches(trainer, batches)
        return
    # Saved at an epoch's end: this is the next one. Lightning would take it for done, since it has no length to go by.
    progress.is_last_batch = False
    processed = progress.current.processed
    for name in ("ready", "started", "processed", "completed"):
        setattr(progress.current, name, getattr(progress.current, name) - processed)


def _as_is(item: Any) -> Any:
    return item
