"""How rows become micro-batches: what a user asks for, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_llm.datamodules.batches.budget_plan import BudgetPlan
from lightning_llm.datamodules.batches.global_batch_plan import GlobalBatchPlan
from lightning_llm.datamodules.batches.plan import BatchPlan, RowPlan
from lightning_llm.datamodules.collate import Layout
from lightning_llm.datamodules.order import RowOrder, TableOrder
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.ramps import as_schedule
from lightning_llm.schedule import Schedule

Batching = Literal["rows", "padded", "padding_free"]
GlobalBatch = int | Mapping[str, float] | Schedule | str


@dataclass(frozen=True)
class BatchSettings:
    """What the loader's batches hold.

    Attributes:
        batching: ``rows``: a number of rows. ``padded``: as many rows as fit a budget of tokens, padding included.
            ``padding_free``: the same without padding, all documents end to end in one row.
        micro_batch_size: Rows of a rank in a micro-batch.
        micro_batch_tokens: The budget of a micro-batch of one rank.
        global_batch_size: Rows of an optimizer step over all ranks, a number, a schedule, or the name of a ramp.
        global_batch_tokens: Likewise in label tokens.

    Raises:
        ValueError: For settings that do not fit each other, saying which does.
    """

    batching: Batching = "rows"
    micro_batch_size: int = 8
    micro_batch_tokens: int | None = None
    global_batch_size: GlobalBatch | None = None
    global_batch_tokens: GlobalBatch | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.batching not in get_args(Batching):
            raise ValueError(f"`batching` must be 'rows', 'padded' or 'padding_free', but got {self.batching!r}.")
        if self.global_batch_size is not None and self.global_batch_tokens is not None:
            raise ValueError(
                f"The global batch is given in rows or in tokens, but got global_batch_size={self.global_batch_size} "
                f"and global_batch_tokens={self.global_batch_tokens}. Leave one out."
            )
        self._check_global_batch()
        if self.micro_batch_tokens is None:
            if self.batching != "rows" and self.global_batch is None:
                raise ValueError(
                    f"batching={self.batching!r} needs `micro_batch_tokens` (tokens of a micro-batch at most), or "
                    f"`global_batch_tokens` or `global_batch_size` (of an optimizer step), but got none of them."
                )
            return
        if self.batching == "rows":
            raise ValueError(
                f"micro_batch_tokens={self.micro_batch_tokens} needs batching='padded' or 'padding_free'; "
                f"batching='rows' counts rows (`micro_batch_size`)."
            )
        if self.global_batch is not None:
            raise ValueError(
                "A global batch is cut into as many micro-batches as Trainer(accumulate_grad_batches=) says, whatever "
                "they hold: leave `micro_batch_tokens` out. What does not fit in memory, DynamicBatchScaler cuts."
            )

    def _check_global_batch(self) -> None:
        if self.global_batch is None:
            return
        schedule = self.schedule
        name = "global_batch_size" if self.global_batch_tokens is None else "global_batch_tokens"
        if min(schedule.values) < 1:
            raise ValueError(f"`{name}` must be 1 at least, but got {min(schedule.values):g}.")
        if "run" in schedule.units:
            raise ValueError(
                f"Milestones of `{name}` are in samples, tokens, steps or epochs, which the data know, and not in "
                f"shares of the run, but got {schedule!r}."
            )

    @property
    def schedule(self) -> Schedule:
        """The global batch as a schedule."""
        size = self.global_batch
        assert size is not None
        return as_schedule(size)

    @property
    def global_batch(self) -> GlobalBatch | None:
        """The global batch, in rows or tokens; None where the Trainer alone says how long a step is."""
        return self.global_batch_size if self.global_batch_tokens is None else self.global_batch_tokens

    @property
    def counts(self) -> str:
        """What a position in the data counts: rows of the epoch's order, or micro-batches of pools."""
        return "rows" if self.micro_batch_tokens is None else "pools"

    @property
    def layout(self) -> Layout | None:
        """How batches are collated; None: as the rows ask for."""
        return "padding_free" if self.batching == "padding_free" else None

    def plan(
        self,
        order: RowOrder,
        lengths: Int64Array,
        tokens_per_row: float,
        *,
        group: int,
        drop_last: bool = False,
    ) -> BatchPlan:
        """The plan of a training epoch.

        Args:
            order: Of the rows.
            lengths: (num_rows,) tokens in each row.
            tokens_per_row: Label tokens of a row on average, as they are drawn.
            group: Micro-batches of an optimizer step over all ranks.
            drop_last: Leave out what does not fill the last micro-batch or step.

        Raises:
            ValueError: If a row is longer than ``micro_batch_tokens``, or a mixture is to be cut by it.
        """
        if self.global_batch is not None:
            return GlobalBatchPlan(
                order,
                self.schedule,
                tokens_per_row=tokens_per_row,
                counts_tokens=self.global_batch_tokens is not None,
                lengths=lengths if self.batching != "rows" else None,
                padded=self.batching == "padded",
                drop_last=drop_last,
            )
        if self.micro_batch_tokens is None:
            return RowPlan(order, self.micro_batch_size, drop_last)
        if not isinstance(order, TableOrder):
            raise ValueError(
                "A mixture draws rows again before others came once, so it has no pools to cut by "
                "`micro_batch_tokens`. Use `global_batch_tokens` instead."
            )
        return BudgetPlan(
            lengths, self.micro_batch_tokens, padded=self.batching == "padded", group=group, seed=order.seed
        )
