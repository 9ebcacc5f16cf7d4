"""Several data modules as one: rows of several tasks in each optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.batches.settings import Batching, BatchSettings
from lightning_llm.datamodules.multi_task.loader import MultiTaskLoader
from lightning_llm.datamodules.multi_task.order import TaskOrder, identity_of, rows_in_block
from lightning_llm.datamodules.multi_task.plan import MultiTaskPlan, TaskByTaskPlan
from lightning_llm.datamodules.multi_task.rows import MultiTaskRows
from lightning_llm.datamodules.row_data_module import RowDataModule, Split
from lightning_llm.datamodules.tokenizer import encoder
from lightning_llm.schedule import Schedule


class MultiTaskDataModule(RowDataModule):
    """Rows of several tasks, each from a data module of its own, for :class:`~lightning_llm.MultiTaskModule`.

    An optimizer step has ``global_batch_size`` rows over all ranks, of each task its share, give or take one. They are
    cut into the micro-batches that the Trainer accumulates, at least as many as there are tasks: a micro-batch holds
    one task, the same on all ranks, and ``batch["task"]`` names it. Tasks whose rows have more tokens get more of them.

    An epoch has as many rows as all tasks together. Each task is gone through entirely, in its own data module's order,
    before any of its rows comes again, whatever its share. A run that is resumed, on any number of ranks, workers or
    micro-batches, trains on the rows that it would have trained on.

    Validation and test go through each task's rows once, one task after the other.

    Args:
        tasks: Data modules of rows by the names of their tasks: ``TextClassificationDataModule``, ``TextDataModule``,
            ... They say what rows are and in which order, and how many an evaluation batch has; their training batches
            are not used. All have the same tokenizer.
        sampling: ``size``: tasks in proportion to their rows, so that an epoch has each row once. ``{"temperature":
            T}``: in proportion to rows^(1/T); the larger T, the more equal. ``{"topic": 0.3, ...}``: the share of each
            task in the rows.
        global_batch_size: Rows in an optimizer step over all ranks and tasks, or a schedule of them.
        batching: ``rows``: a step's rows in their order. ``padded``: rows of like length in a micro-batch.
        drop_last: Leave out an epoch's last step if it is short.
        num_workers: Loader processes.
        pin_memory: Page-lock batches for copies to a GPU; None does so where there is one.

    Raises:
        TypeError: For a data module whose rows cannot be made in any order.
        ValueError: For settings that do not fit each other.
    """

    def __init__(
        self,
        tasks: dict[str, RowDataModule],
        sampling: str | dict[str, float] = "size",
        global_batch_size: int | dict[str, float] | Schedule | str = 32,
        batching: Batching = "rows",
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        _check_parts(tasks)
        if batching == "padding_free":
            raise ValueError(
                "`batching` must be 'rows' or 'padded'; padding-free rows are a matter of each task's own."
            )
        if global_batch_size is None:
            raise ValueError("MultiTaskDataModule needs `global_batch_size`: rows of an optimizer step, of all tasks.")
        super().__init__(
            None,
            BatchSettings(batching, global_batch_size=global_batch_size),
            drop_last=drop_last,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        self.tasks = dict(tasks)
        self.sampling = sampling
        rows_in_block(dict.fromkeys(self.tasks, 1), sampling)  # what is not understood is refused now

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """As each task's data module does."""
        for part in self.tasks.values():
            part.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """As each task's data module does; refuse those that do not fit together."""
        super().setup(stage)
        for part in self.tasks.values():
            part.trainer = self.trainer
            part.setup(stage)
        _check_tokenizers(self.tasks)
        if stage == "fit":
            rank_zero_info(self.summary())

    # ---- what others may ask -------------------------------------------------------------------------------------

    def cut_batch(self, batch: Mapping[str, Any], length: int) -> Mapping[str, Any]:
        """Refused: a step's targets are counted before its rows could be shortened.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Rows of several tasks cannot be cut while they are trained on, for their targets are counted when a step "
            "is made. Choose a shorter `max_length` for the tasks' data modules."
        )

    @property
    def max_length(self) -> int | None:
        """Tokens in a row at most."""
        lengths = [length for part in self.tasks.values() if (length := getattr(part, "max_length", None))]
        return max(lengths, default=None)

    @property
    def shares(self) -> dict[str, float]:
        """The share of each task in the training rows."""
        counts = self._counts()
        return {name: count / sum(counts.values()) for name, count in counts.items()}

    def summary(self) -> str:
        """One line: each task's rows and share."""
        parts = [
            f"{share:.1%} {name} ({len(self.tasks[name]._dataset('train')):,} rows)"
            for name, share in self.shares.items()
        ]
        return "tasks: " + ", ".join(parts)

    # ---- details -------------------------------------------------------------------------------------------------

    @property
    def _has_validation(self) -> bool:
        return any(part._has_validation for part in self.tasks.values())

    def _counts(self) -> dict[str, int]:
        sizes = {name: len(part._dataset("train")) for name, part in self.tasks.items()}
        return rows_in_block(sizes, self.sampling)

    def _dataset(self, split: Split) -> MultiTaskRows:
        if split == "train":
            parts = {name: part._dataset(split) for name, part in self.tasks.items()}
            return MultiTaskRows(parts, shares=list(self._counts().values()))
        there = {name: part for name, part in self.tasks.items() if split == "test" or part._has_validation}
        numbers = [number for number, name in enumerate(self.tasks) if name in there]
        return MultiTaskRows({name: part._dataset(split) for name, part in there.items()}, numbers)

    def _order(self, dataset: Any) -> TaskOrder:
        orders = [part._order(rows) for part, rows in zip(self.tasks.values(), dataset.parts, strict=True)]
        return TaskOrder(orders, list(self._counts().values()))

    def _make_train_loader(self) -> MultiTaskLoader:
        self._check_trainer()
        rows = self._dataset("train")
        lengths = rows.table.row_lengths
        plan = MultiTaskPlan(
            rows.sizes,
            lengths.clip(min=1),
            self._order(rows),
            self.batch_settings.schedule,
            tokens_per_row=rows.table.num_label_tokens / len(rows),
            lengths=lengths if self.batch_settings.batching == "padded" else None,
            drop_last=self.drop_last,
        )
        accumulate = int(self.trainer.accumulate_grad_batches) if self.trainer is not None else len(self.tasks)
        smallest = min(self.batch_settings.schedule.values)
        if accumulate < len(self.tasks) and smallest > 1:
            raise ValueError(
                f"A micro-batch holds one task, and a step rows of all: {len(self.tasks)} tasks need "
                f"Trainer(accumulate_grad_batches={len(self.tasks)}) at least, but it is {accumulate}."
            )
        return MultiTaskLoader(rows, plan, **self._loading(is_training=True))

    def _make_eval_loader(self, split: Split) -> MultiTaskLoader:
        rows = self._dataset(split)
        sizes = [self.tasks[name].eval_micro_batch_size for name in rows.names]
        plan = TaskByTaskPlan(rows.sizes, sizes, rows.numbers)
        return MultiTaskLoader(rows, plan, **self._loading(is_training=False))

    def _training_identity(self) -> dict[str, Any] | None:
        parts = {name: part._training_identity() for name, part in self.tasks.items()}
        identity: dict[str, Any] = {"tasks": list(self.tasks), "sampling": identity_of(self.sampling)}
        for name, part in parts.items():
            if part is None:
                return None
            identity |= {f"{name}: {key}": value for key, value in part.items() if key != "batches"}
        return identity

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        found = [part for part in self.tasks.values() if part._tokenizer is not None]
        return found[0].tokenizer if found else None  # type: ignore[return-value]


def _check_parts(tasks: Any) -> None:
    if not isinstance(tasks, Mapping) or not tasks:
        raise ValueError(f"`tasks` must be a mapping of names to data modules, one at least, but got {tasks!r}.")
    for name, part in tasks.items():
        if not isinstance(part, RowDataModule):
            raise TypeError(
                f"The task {name!r} needs a data module of rows that can be made in any order, such as "
                f"TextClassificationDataModule or TextDataModule, but got {type(part).__name__}."
            )
        if part.batch_settings.global_batch is not None:
            raise ValueError(
                f"The optimizer step has rows of all tasks, so that MultiTaskDataModule(global_batch_size=...) says "
                f"how many, but the task {name!r} has a global batch of its own. Leave that out."
            )
    if len({id(part) for part in tasks.values()}) < len(tasks):
        raise ValueError("Two tasks have the same data module: make one for each.")


def _check_tokenizers(tasks: Mapping[str, RowDataModule]) -> None:
    found = {
        name: encoder(part.tokenizer, append_eos=False).fingerprint()
        for name, part in tasks.items()
        if part._tokenizer is not None
    }
    for name, other in list(found.items())[1:]:
        first = next(iter(found))
        if other != found[first]:
            raise ValueError(
                f"The tasks {first!r} and {name!r} have different tokenizers, but their rows go into one trunk. Give "
                f"both the same; one that is trained (`bpe`) on each task's own texts differs."
            )
