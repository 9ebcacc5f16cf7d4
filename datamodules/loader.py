"""The loader: asks a plan which rows come next, makes the batches, and knows what has been trained on."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_llm.datamodules.batches.budget_plan import BudgetPlan
from lightning_llm.datamodules.batches.global_batch_plan import GlobalBatchPlan
from lightning_llm.datamodules.batches.plan import BatchPlan, Cursor, Layout, RowPlan
from lightning_llm.datamodules.rows import EMPTY_ROW, RowIds
from lightning_llm.datamodules.trainer_position import (
    align_batches,
    announce_length,
    begin_epoch,
    is_fitting,
    is_resuming,
    limited,
    step_back_epoch,
    trained_batches,
)
from lightning_llm.datamodules.windows import Int64Array


class Table(Protocol):
    """What a loader asks of rows before it makes one."""

    @property
    def row_lengths(self) -> Int64Array:
        """(num_rows,) int64, tokens in each row."""

    @property
    def num_label_tokens(self) -> int:
        """Targets in an epoch."""


class Rows(Protocol):
    """Rows by their numbers: ``rows[[3, 17]]`` is the batch of rows 3 and 17; -1 stands for an empty row.

    The loader asks with a :class:`~lightning_llm.datamodules.rows.RowIds`, which also knows the epoch.
    """

    @property
    def table(self) -> Table:
        """Lengths and targets of the rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, row_ids: Sequence[int], /) -> dict[str, Any]: ...


class RowLoader:
    """Iterates over the micro-batches that a plan gives one rank; resumes at any of them at once, on any layout.

    All ranks yield equally many batches; where rows run out, a rank gets an empty row (padding only, no target) rather
    than another rank's row again, so that every row counts exactly once, in evaluation too.

    The state is what was *trained* up to the last optimizer step, as the trainer counts it, never what was delivered or
    prepared by workers.

    This is deliberately no ``torch.utils.data.DataLoader``: Lightning replaces the sampler of those, and shuffles
    ordered training data and repeats rows in validation. It delivers the epoch to ``loader.sampler.set_epoch``.

    Args:
        rows: Makes the batches.
        plan: Says which rows they hold.
        rank: This rank among the data-parallel ranks.
        num_ranks: Number of data-parallel ranks.
        trainer: Whose position is saved, and whose ``accumulate_grad_batches`` a global batch is cut by; None outside
            of one: then all that was delivered counts as trained.
        num_workers: Worker processes; 0 is fastest for tokens that lie in a memory-mapped store.
        pin_memory: Page-lock batches, for copies to a GPU.
        identity: What the rows are made of, by name; a state of other rows is refused.
    """

    def __init__(
        self,
        rows: Rows,
        plan: BatchPlan,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        trainer: L.Trainer | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.rows = rows  # under the name `dataset`, Lightning would take this for a DataLoader
        self.plan = plan
        self.rank = rank
        self.num_ranks = num_ranks
        self.trainer = trainer
        self.identity = identity or {}
        self.epoch = 0
        self.batch_sampler = None  # Lightning looks for one wherever there is a `sampler`
        self._after: dict[int, Cursor] = {0: Cursor()}  # where the run stands after so many batches of the epoch
        self._delivered = 0  # batches of the epoch, those before a resume included
        self._is_resumed = False  # and not begun yet
        self._length: tuple[int, int] | None = None  # an epoch that has begun, and its batches
        self._wanted: int | None = None  # a global batch that begins with the next optimizer step
        self._wanted_later = False  # not with the next one, which was begun before a resume
        self._dispatch = _Dispatch(weakref.proxy(self))  # no cycle: workers that a cycle keeps alive end slowly
        self._loader: DataLoader[dict[str, Tensor]] = DataLoader(
            cast("Dataset[dict[str, Tensor]]", rows),
            batch_size=None,
            sampler=self._dispatch,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_as_is,
            persistent_workers=num_workers > 0,
        )

    # ---- what Lightning asks for ---------------------------------------------------------------------------------

    @property
    def sampler(self) -> RowLoader:
        """Lightning tells the epoch to a loader's sampler."""
        return self

    @property
    def _iterator(self) -> Any:
        """The inner loader's, under the name by which Lightning finds worker processes to end them with the run."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's epoch; a loaded position in it is kept, and Lightning's counters follow it.

        Raises:
            ValueError: If the epoch holds no batch at all.
        """
        self.epoch = epoch
        if not is_fitting(self.trainer):
            return
        assert self.trainer is not None
        if is_resuming(self.trainer):
            self._lead_lightning(self.trainer)
        announce_length(self.trainer, len(self))
        if not len(self):
            raise ValueError(
                f"Epoch {self.epoch} holds no batch: drop_last leaves out what does not fill one, and all rows of the "
                f"epoch do not. Make the batch smaller, or set drop_last=False."
            )

    def _lead_lightning(self, trainer: L.Trainer) -> None:
        """Bring Lightning's counters to where the loaded position is on this layout."""
        if not self._is_resumed:
            if trainer.fit_loop.epoch_loop.batch_progress.current.ready:
                rank_zero_warn(
                    "The checkpoint holds no position of this data module: it was saved over other loaders. Lightning "
                    "goes on inside an epoch, but the rows begin at the epoch's start: some are trained on twice."
                )
            return
        cursor, layout = self._after[self._delivered], self._layout
        rest = self.plan.num_batches(cursor, layout)
        first = self.plan.batches_before(cursor, layout)
        if rest:  # a step begins here, and Lightning counts them from the epoch's start
            first = -(-first // layout.micro_batches) * layout.micro_batches
        self._delivered, self._after = first, {first: cursor}
        is_cut = first >= limited(trainer, first + rest)
        if cursor.epoch == self.epoch - 1 and not is_cut:
            step_back_epoch(trainer)
            self.epoch = cursor.epoch
        if cursor.epoch == self.epoch:
            align_batches(trainer, min(first, limited(trainer, first + rest)))
        else:
            announce_length(trainer, len(self))
            begin_epoch(trainer)

    def __len__(self) -> int:
        """Batches of a rank in the epoch, those before a resume included."""
        if self._length is not None and self._length[0] == self.epoch and not self._is_resumed:
            return self._length[1]
        first, cursor = self._beginning()
        return first + self.plan.num_batches(cursor, self._layout)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The epoch's batches, from the loaded position if there is one; nothing changes before the first."""
        return self._batches()

    @property
    def batch_size(self) -> int | None:
        """Rows per rank in a batch, under the name that a ``DataLoader`` has for it; None where it varies."""
        return self.plan.micro_batch_size if isinstance(self.plan, RowPlan) else None

    # ---- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What was trained, and of which rows; the same on every rank."""
        count, cursor = self._trained
        wanted = self._wanted
        if wanted is not None and count == self._delivered:  # between two steps: the next one is of that size
            cursor, wanted = replace(cursor, global_batch=wanted), None
        state = {"version": 1, "data": dict(self.identity), "cursor": cursor.to_state(), "global_batch": wanted}
        if isinstance(self.plan, BudgetPlan):
            state["batches"] = [self.plan.budget, self.plan.group, self.plan.total]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was saved.

        Raises:
            ValueError: If it was saved over other rows, naming what differs, or by something else.
        """
        check_identity(state_dict, self.identity)
        if isinstance(self.plan, BudgetPlan) and state_dict["batches"][:2] == [self.plan.budget, self.plan.group]:
            self.plan.tell_total(state_dict["batches"][2])
        cursor = Cursor.from_state(state_dict["cursor"])
        self.epoch = cursor.epoch
        self._delivered = self.plan.batches_before(cursor, self._layout)
        self._after = {self._delivered: cursor}
        self._wanted = state_dict["global_batch"]
        self._is_resumed = True
        self._wanted_later = self._wanted is not None

    @property
    def is_fresh(self) -> bool:
        """Whether it stands at the beginning of a run."""
        return not self._delivered and not self._is_resumed and self._after[0] == Cursor()

    # ---- what others may ask -------------------------------------------------------------------------------------

    def set_global_batch(self, size: float) -> None:
        """Let each optimizer step from the next one on hold so many rows, or label tokens if the plan counts those.

        Call it on every rank with the same number. Batches that workers have prepared are made again.

        Raises:
            TypeError: If the loader does not know what an optimizer step holds.
            ValueError: For a size below 1.
        """
        if size < 1:
            raise ValueError(f"A global batch must be 1 at least, but got {size}.")
        if not isinstance(self.plan, GlobalBatchPlan):
            raise TypeError(
                "The loader can only change its global batch if it was given one: "
                "the data module's global_batch_size=... or global_batch_tokens=..."
            )
        self._wanted = self.plan.rows_for(size)

    @property
    def global_batch(self) -> float | None:
        """Rows, or label tokens if the plan counts those, of the optimizer step at hand; None where nobody knows.

        Between two steps: of the next one. An epoch's short last step is no other batch.
        """
        if not isinstance(self.plan, GlobalBatchPlan):
            return None
        count, cursor = self._trained
        is_next = self._wanted is not None and not self._wanted_later and count == self._delivered
        rows = self._wanted if is_next and self._wanted is not None else self.plan.step_rows(cursor)
        return rows * self.plan.tokens_per_row if self.plan.counts_tokens else rows

    @property
    def tokens_per_epoch(self) -> int:
        """Label tokens of all ranks in an epoch."""
        return self.rows.table.num_label_tokens

    def epoch_lengths(self, num_epochs: int) -> list[int]:
        """Batches that a rank trains in each epoch of a run; they differ where the global batch follows a schedule."""
        lengths, cursor = [], Cursor()
        for epoch in range(num_epochs):
            number = self.plan.num_batches(cursor, self._layout)
            number = limited(self.trainer, number) if self.trainer is not None else number
            lengths.append(number)
            cursor = self.plan.after(cursor, self._layout, number).next_epoch(epoch + 1)
        return lengths

    def longest_batch(self) -> dict[str, Tensor]:
        """A micro-batch of the longest rows, for whoever wants to know what memory the worst one takes."""
        lengths = self.rows.table.row_lengths
        longest = np.argsort(lengths, kind="stable")[::-1]
        number = self.plan.most_rows(lengths[longest], self._layout)
        return self.rows[longest[: max(number, 1)].tolist()]

    # ---- details -------------------------------------------------------------------------------------------------

    @property
    def _layout(self) -> Layout:
        micro_batches = int(self.trainer.accumulate_grad_batches) if is_fitting(self.trainer) else 1  # type: ignore[union-attr]
        return Layout(self.rank, self.num_ranks, micro_batches)

    def _beginning(self) -> tuple[int, Cursor]:
        """First batch of the coming iteration, and where it stands: what is left of a loaded epoch, or a new one."""
        cursor = self._after[self._delivered]
        if self._is_resumed and cursor.epoch == self.epoch:
            return self._delivered, cursor
        return 0, cursor.next_epoch(self.epoch)

    @property
    def _trained(self) -> tuple[int, Cursor]:
        """Batches of the epoch up to the last optimizer step, and where the run stands there."""
        count = self._delivered
        if is_fitting(self.trainer) and not self._is_resumed:
            assert self.trainer is not None
            count = min(count, trained_batches(self.trainer))
        known = max((number for number in self._after if number <= count), default=min(self._after))
        return known, self._after[known]

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        self._delivered, cursor = self._beginning()
        self._is_resumed = False
        self._after = {self._delivered: cursor}
        self._length = (self.epoch, self._delivered + self.plan.num_batches(cursor, self._layout))
        if self._wanted is not None and not self._wanted_later:
            cursor = self._rebatch(cursor)
        self._wanted_later = False
        while True:
            self._dispatch.start(cursor)
            for number, batch in enumerate(self._loader):
                cursor = self._dispatch.planned.pop(number)
                self._delivered += 1
                self._remember(cursor)
                yield batch
                if self._wanted is not None and self._is_between_steps():
                    break
            else:
                return
            cursor = self._rebatch(cursor)

    def _is_between_steps(self) -> bool:
        return self._delivered % self._layout.micro_batches == 0

    def _rebatch(self, cursor: Cursor) -> Cursor:
        """Begin the wanted global batch at the cursor."""
        cursor = replace(cursor, global_batch=self._wanted)
        self._wanted = None
        self._after[self._delivered] = cursor
        self._length = (self.epoch, self._delivered + self.plan.num_batches(cursor, self._layout))
        if is_fitting(self.trainer):
            assert self.trainer is not None
            announce_length(self.trainer, self._length[1])
        return cursor

    def _remember(self, cursor: Cursor) -> None:
        """Where the run will stand, until that is trained."""
        trained = trained_batches(self.trainer) if is_fitting(self.trainer) else self._delivered - 1  # type: ignore[arg-type]
        self._after[self._delivered] = cursor
        for number in [n for n in self._after if n < min(trained, self._delivered - 1)]:
            del self._after[number]


class _Dispatch(torch.utils.data.Sampler[list[int]]):
    """Runs ahead of the batches, in the main process: hands row ids to workers, notes where each leads."""

    def __init__(self, loader: RowLoader) -> None:
        self.loader = loader
        self.planned: dict[int, Cursor] = {}
        self._cursor = Cursor()

    def start(self, cursor: Cursor) -> None:
        """Begin anew at a cursor."""
        self._cursor = cursor
        self.planned = {}

    def __iter__(self) -> Iterator[list[int]]:
        planned = self.planned
        for number, (rows, after) in enumerate(self.loader.plan.batches(self._cursor, self.loader._layout)):
            planned[number] = after
            yield RowIds(rows.tolist() or [EMPTY_ROW], self._cursor.epoch)


def check_identity(state_dict: dict[str, Any], present: dict[str, Any]) -> None:
    """Refuse to go on over other rows than a state was saved over.

    Args:
        state_dict: What a loader of this package saved.
        present: What its rows are made of now, by name.

    Raises:
        ValueError: Naming what differs, or if the state is none of ours.
    """
    saved = state_dict.get("data")
    if not isinstance(saved, dict) or state_dict.get("version") != 1:
        raise ValueError(
            f"The checkpoint's state of the training data is of another kind (its entries are {sorted(state_dict)}): "
            f"another data module, or another version, saved it. Resume with that one, or start a new run from the "
            f"checkpoint's weights."
        )
    different = [name for name in present if name in saved and saved[name] != present[name]]
    if different:
        changes = "; ".join(f"{name} was {saved[name]!r} and is {present[name]!r}" for name in different)
        raise ValueError(
            f"The checkpoint was saved over other data, and its position means nothing in this: {changes}. Bring the "
            f"data and the settings back, or start a new run from the checkpoint's weights."
        )
    missing = sorted(set(present) - set(saved))
    if missing:
        rank_zero_warn(
            f"The checkpoint does not say what {', '.join(missing)} of its data were; they are taken to fit."
        )


def _as_is(batch: Any) -> Any:
    return batch
