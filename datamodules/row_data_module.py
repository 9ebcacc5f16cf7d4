"""What data modules of rows share: loaders that know what was trained, and the optimizer step's global batch."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_llm.datamodules.batches.plan import RowPlan
from lightning_llm.datamodules.batches.settings import BatchSettings
from lightning_llm.datamodules.cache import default_cache_dir
from lightning_llm.datamodules.loader import RowLoader
from lightning_llm.datamodules.order import RowOrder, TableOrder
from lightning_llm.datamodules.resumable import ResumableDataModule
from lightning_llm.datamodules.text_settings import check_numbers
from lightning_llm.schedule import Progress

Split = Literal["train", "validation", "test"]

STAGE_SPLITS: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}


class RowDataModule(ResumableDataModule):
    """A data module over rows that can be made in any order, each by its number.

    Every rank yields equally many batches and every row counts once. A run that is resumed, on any number of ranks,
    workers or micro-batches, trains on the rows that it would have trained on.

    Args:
        tokenizer: As for every data module of tokens.
        batch_settings: What a training batch holds.
        eval_micro_batch_size: Rows in a validation, test or predict batch of one rank; as in training if None.
        shuffle: A new order of the training rows each epoch.
        seed: Of that order.
        drop_last: Leave out the last training batch of an epoch if it is short.
        num_workers: Loader processes.
        pin_memory: Page-lock batches for copies to a GPU; None does so where there is one.
        cache_dir: Where tokens are kept; ``$LIGHTNING_LLM_CACHE`` or ``~/.cache/lightning_llm`` if None.
    """

    def __init__(
        self,
        tokenizer: Any,
        batch_settings: BatchSettings,
        *,
        eval_micro_batch_size: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(tokenizer, pin_memory)
        check_numbers(
            micro_batch_size=batch_settings.micro_batch_size,
            micro_batch_tokens=batch_settings.micro_batch_tokens,
            eval_micro_batch_size=eval_micro_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.batch_settings = batch_settings
        self.eval_micro_batch_size = eval_micro_batch_size or batch_settings.micro_batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def train_dataloader(self) -> RowLoader:
        """Rows of the training documents, in a new order each epoch; from the loaded position, if there is one."""
        if self._train_loader is not None and not self._train_loader.is_fresh:  # loaders are made anew within a run
            self._loaded_state = self._train_loader.state_dict()
        loader: RowLoader = self._resumed(self._make_train_loader())
        return loader

    def val_dataloader(self) -> RowLoader | list[Any]:
        """Rows of the validation documents; nothing where there are none."""
        return self._make_eval_loader("validation") if self._has_validation else []

    def test_dataloader(self) -> RowLoader:
        """Rows of the test documents."""
        return self._make_eval_loader("test")

    def predict_dataloader(self) -> RowLoader:
        """Rows of the test documents, to be scored."""
        return self._make_eval_loader("test")

    # ---- what others may ask -------------------------------------------------------------------------------------

    @property
    def global_batch(self) -> float | None:
        """The optimizer step's global batch as it now is, in its :attr:`global_batch_unit`; None without one.

        Between two steps it is that of the next one; whole rows, so not always quite what was asked for.
        """
        if self._train_loader is None and self.batch_settings.global_batch is not None:
            return self.batch_settings.schedule(Progress(samples=0))
        return None if self._train_loader is None else self._train_loader.global_batch

    @property
    def global_batch_unit(self) -> Literal["sequences", "tokens"] | None:
        """What the global batch counts: rows, or label tokens; None without one."""
        if self.batch_settings.global_batch is None:
            return None
        return "sequences" if self.batch_settings.global_batch_tokens is None else "tokens"

    def set_global_batch(self, size: float) -> None:
        """Let each optimizer step from the next one on hold so many rows, or label tokens if it was given in tokens.

        For callbacks; call it on every rank with the same number. The number is in the checkpoint.

        Raises:
            TypeError: Without ``global_batch_size`` or ``global_batch_tokens``.
            RuntimeError: Outside of training.
        """
        if self._train_loader is None:
            raise RuntimeError("There is no training loader yet, and so no global batch: call this during training.")
        self._train_loader.set_global_batch(size)

    # ---- what a data module says of its rows ---------------------------------------------------------------------

    @property
    @abstractmethod
    def _has_validation(self) -> bool:
        """Whether there is anything to validate on."""

    @abstractmethod
    def _dataset(self, split: Split) -> Any:
        """The rows of a split."""

    def _order(self, dataset: Any) -> RowOrder:
        """The order of the training rows."""
        trainer: Any = self.trainer
        overfits = trainer is not None and trainer.overfit_batches > 0  # the same few batches again and again
        return TableOrder(len(dataset), self.seed if self.shuffle and not overfits else None)

    # ---- details -------------------------------------------------------------------------------------------------

    def _make_train_loader(self) -> RowLoader:
        self._check_trainer()
        dataset = self._dataset("train")
        accumulate = int(self.trainer.accumulate_grad_batches) if self.trainer is not None else 1
        plan = self.batch_settings.plan(
            self._order(dataset),
            dataset.table.row_lengths,
            dataset.table.num_label_tokens / len(dataset),
            group=accumulate * self._ranks()[1],
            drop_last=self.drop_last,
        )
        return RowLoader(dataset, plan, **self._loading(is_training=True))

    def _make_eval_loader(self, split: Split) -> RowLoader:
        dataset = self._dataset(split)
        plan = RowPlan(TableOrder(len(dataset)), self.eval_micro_batch_size)
        return RowLoader(dataset, plan, **self._loading(is_training=False))

    def _loading(self, *, is_training: bool) -> dict[str, Any]:
        """What a loader is told of this rank and its processes, and, in training, of the position that it keeps."""
        rank, num_ranks = self._ranks()
        options: dict[str, Any] = {"rank": rank, "num_ranks": num_ranks}
        options |= {"num_workers": self.num_workers, "pin_memory": self._pins_memory()}
        if is_training:
            options |= {"trainer": self.trainer, "identity": self._training_identity()}
        return options

    def _check_trainer(self) -> None:
        """Refuse two that both decide how much an optimizer step holds."""
        if self.batch_settings.global_batch is None or self.trainer is None:
            return
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            by_windows = hasattr(callback, "count_optimizer_steps") and getattr(callback, "sets_windows", True)
            if isinstance(callback, GradientAccumulationScheduler) or by_windows:
                raise ValueError(
                    f"The data module's global batch and {type(callback).__name__} would both decide what an optimizer "
                    f"step holds. Remove the callback and schedule the global batch, or remove global_batch_size and "
                    f"global_batch_tokens."
                )
