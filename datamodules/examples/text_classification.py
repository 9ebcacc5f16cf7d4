"""Texts, or pairs of them, each with a class, several classes, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_llm.datamodules.examples.data_module import ExampleDataModule
from lightning_llm.datamodules.examples.labels import ProblemType, RowLabels
from lightning_llm.datamodules.examples.records import Record, Records
from lightning_llm.datamodules.examples.store import Example, ExampleStore
from lightning_llm.datamodules.examples.texts import encode_texts, text_of
from lightning_llm.datamodules.row_data_module import Split
from lightning_llm.datamodules.windows import Int64Array


class TextClassificationDataModule(ExampleDataModule):
    """Rows of text with labels, for ``LLMModule(task="sequence-classification")``.

    Batches have ``input_ids``, ``attention_mask``, ``labels`` and, where the tokenizer makes them,
    ``token_type_ids``.

    Args:
        data: Jsonl, json, csv or parquet files, a data set, or a list of mappings.
        tokenizer: A tokenizer, its hub id or local folder, or ``bytes``.
        max_length: Tokens in a row at most; a warning says how much is cut.
        text_column: The column of the texts.
        text_pair_column: Of second texts, for pairs (entailment, similarity).
        label_column: Of the labels: a class's name or number; for several classes a list of them, or a text with
            ``label_separator`` between them; a number for regression. Several columns: 0 or 1 for each class, or a
            number each.
        labels: Names of the classes, in order. None: those of the data set, or all that the training rows have.
        problem_type: ``single_label_classification``, ``multi_label_classification`` or ``regression``.
        label_separator: Between the classes of a row in one column of text.
        allow_empty_classes: Whether one of ``labels`` may have no training row.
        **options: Of :class:`~lightning_llm.datamodules.examples.data_module.ExampleDataModule`: splits, batches,
            order, cache.

    Raises:
        ValueError: For settings that do not fit each other, and for rows that cannot be used, naming the row.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: str | Any,
        max_length: int = 512,
        *,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str | list[str] = "label",
        labels: list[str] | None = None,
        problem_type: ProblemType = "single_label_classification",
        label_separator: str = ",",
        allow_empty_classes: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, max_length, **options)
        self.text_column = text_column
        self.text_pair_column = text_pair_column
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

    def _columns(self) -> Mapping[str, str]:
        pair = {} if self.text_pair_column is None else {"text_pair_column": self.text_pair_column}
        labels = self._labels.columns
        return {
            "text_column": self.text_column,
            **pair,
            **{"label_column" if not number else f"label_column[{number}]": c for number, c in enumerate(labels)},
        }

    def _encoding(self) -> Mapping[str, Any]:
        return {"problem_type": self.problem_type, "labels": self.label_names, "separator": self._labels.separator}

    def _learn(self, records: Records) -> None:
        self._labels.learn(records)

    def _encode(self, records: Sequence[Record], names: Sequence[str]) -> list[list[Example]]:
        rows = list(zip(records, names, strict=True))
        texts = [text_of(record, self.text_column, row) for record, row in rows]
        pairs = None
        if self.text_pair_column is not None:
            pairs = [text_of(record, self.text_pair_column, row) for record, row in rows]
        encoded = encode_texts(self.tokenizer, texts, pairs, self.max_length)
        labels = [self._labels.encode(record, row) for record, row in rows]
        return [[{**example, "labels": label}] for example, label in zip(encoded, labels, strict=True)]

    def _empty(self) -> Example:
        return {**encode_texts(self.tokenizer, [""], None, self.max_length)[0], "labels": self._labels.empty()}

    def _check_rows(self, split: Split, store: ExampleStore, rows: Int64Array) -> None:
        if split == "train":
            self._labels.check(store, rows, self.records("train").name)
