"""What data modules share whose rows have a label each: texts, images and recordings to classify."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lightning_llm.datamodules.examples.data_module import ExampleDataModule
from lightning_llm.datamodules.examples.labels import ProblemType, RowLabels
from lightning_llm.datamodules.examples.records import Records
from lightning_llm.datamodules.examples.store import ExampleStore
from lightning_llm.datamodules.row_data_module import Split
from lightning_llm.datamodules.windows import Int64Array


class LabelledRowsDataModule(ExampleDataModule):
    """Rows with a class, several classes, or numbers.

    Args:
        data: As for every data module of examples.
        tokenizer: Likewise; None where rows are no texts.
        max_length: Likewise.
        label_column: Of the labels, or several: then each is a class that a row has or has not, or a number.
        labels: Names of the classes, or how many; None finds them.
        problem_type: transformers' word for what the labels are.
        label_separator: Between the classes of a row in one column of text.
        allow_empty_classes: Whether a class may have no training row.
        **options: Of :class:`ExampleDataModule`.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: Any,
        max_length: int = 512,
        *,
        label_column: str | list[str],
        labels: list[str] | int | None,
        problem_type: ProblemType,
        label_separator: str,
        allow_empty_classes: bool,
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, max_length, **options)
        self.problem_type: ProblemType = problem_type
        self._labels = RowLabels(
            *(label_column, problem_type, labels),
            separator=label_separator,
            allow_empty_classes=allow_empty_classes,
        )

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers; of numbers, the columns'."""
        if self._labels.classes is None:
            self._labels.learn(self.records("train"))
        return self._labels.names

    def _label_columns(self) -> Mapping[str, str]:
        """The columns of labels, by the argument that names them."""
        named = enumerate(self._labels.columns)
        return {"label_column" if not number else f"label_column[{number}]": column for number, column in named}

    def _target_columns(self) -> Collection[str]:
        return self._labels.columns

    def _encoding(self) -> Mapping[str, Any]:
        return {"problem_type": self.problem_type, "labels": self.label_names, "separator": self._labels.separator}

    def _learn(self, records: Records) -> None:
        self._labels.learn(records)

    def _check_rows(self, split: Split, store: ExampleStore, rows: Int64Array) -> None:
        if split == "train":
            self._labels.check(store, rows, self.records("train").name)
