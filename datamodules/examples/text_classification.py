"""Texts, or pairs of them, each with a class, several classes, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from lightning_llm.datamodules.examples.dataset import Collate, ExampleTable
from lightning_llm.datamodules.examples.labelled_rows import LabelledRowsDataModule
from lightning_llm.datamodules.examples.labels import ProblemType
from lightning_llm.datamodules.examples.long_texts import DocumentWindows
from lightning_llm.datamodules.examples.records import Record
from lightning_llm.datamodules.examples.store import Example, ExampleStore
from lightning_llm.datamodules.examples.texts import encode_texts, text_of
from lightning_llm.datamodules.windows import Int64Array


class TextClassificationDataModule(LabelledRowsDataModule):
    """Rows of text with labels, for ``LLMModule(task="sequence-classification")``.

    Batches have ``input_ids``, ``attention_mask``, ``labels`` and, where the tokenizer makes them,
    ``token_type_ids``. With ``long_texts="windows"`` a row is a document of as many windows as it needs, and a batch
    holds all windows of each: ``input_ids``, ``attention_mask`` and ``new_token_mask`` (num_windows, seq),
    ``document_ids`` (num_windows,), ``labels`` and ``row_ids`` for each document. ``micro_batch_size`` counts
    documents, ``micro_batch_tokens`` the tokens of all their windows.

    Args:
        data: Jsonl, json, csv or parquet files, a data set, or a list of mappings.
        tokenizer: A tokenizer, its hub id or local folder, or ``bytes``.
        max_length: Tokens in a row, or a window, at most; a warning says how much is cut.
        text_column: The column of the texts.
        text_pair_column: Of second texts, for pairs (entailment, similarity).
        label_column: Of the labels: a class's name or number; for several classes a list of them, or a text with
            ``label_separator`` between them; a number for regression. Several columns: 0 or 1 for each class, or a
            number each.
        labels: Names of the classes, in order, or how many there are, numbered from 0. None: those of the data set, or
            all that the training rows have.
        problem_type: ``single_label_classification``, ``multi_label_classification`` or ``regression``.
        label_separator: Between the classes of a row in one column of text.
        allow_empty_classes: Whether one of ``labels`` may have no training row.
        long_texts: What becomes of texts longer than ``max_length``: they are ``cut`` there, or read in ``windows``,
            from which ``LLMModule(task_options={"pooling": ...})`` makes one decision. Pairs are cut.
        overlap: Tokens that a window shares with the one before it.
        max_windows: Windows of a text at most, from its beginning; None for all. A warning says how much is cut.
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
        labels: list[str] | int | None = None,
        problem_type: ProblemType = "single_label_classification",
        label_separator: str = ",",
        allow_empty_classes: bool = False,
        long_texts: Literal["cut", "windows"] = "cut",
        overlap: int = 0,
        max_windows: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            data,
            tokenizer,
            max_length,
            label_column=label_column,
            labels=labels,
            problem_type=problem_type,
            label_separator=label_separator,
            allow_empty_classes=allow_empty_classes,
            **options,
        )
        if long_texts not in ("cut", "windows"):
            raise ValueError(f"`long_texts` must be 'cut' or 'windows', but got {long_texts!r}.")
        if long_texts == "cut" and (overlap or max_windows is not None):
            raise ValueError(f"`overlap` and `max_windows` are for long_texts='windows', but got {long_texts!r}.")
        if long_texts == "windows" and text_pair_column is not None:
            raise ValueError(
                "long_texts='windows' reads one text in windows, not pairs, where each window of the first would need "
                "all of the second. Leave out `text_pair_column`, or cut pairs with long_texts='cut'."
            )
        self.long_texts = long_texts
        self.overlap = overlap
        self.max_windows = max_windows
        self.text_column = text_column
        self.text_pair_column = text_pair_column

    def _columns(self) -> Mapping[str, str]:
        pair = {} if self.text_pair_column is None else {"text_pair_column": self.text_pair_column}
        return {
            "text_column": self.text_column,
            **pair,
            **self._label_columns(),
        }

    def _encoding(self) -> Mapping[str, Any]:
        settings = dict(super()._encoding())
        if self._windows is not None:  # the overlap makes no other tokens, but for what `max_windows` cuts
            settings |= {"long_texts": self.long_texts, "max_tokens": self._windows.max_tokens}
        return settings

    def _encode(self, records: Sequence[Record], names: Sequence[str]) -> list[list[Example]]:
        rows = list(zip(records, names, strict=True))
        texts = [text_of(record, self.text_column, row) for record, row in rows]
        if self._windows is not None:
            encoded = self._windows.encode(self.tokenizer, texts)
        else:
            pairs = None
            if self.text_pair_column is not None:
                pairs = [text_of(record, self.text_pair_column, row) for record, row in rows]
            encoded = encode_texts(self.tokenizer, texts, pairs, self.max_length)
        labels = [self._labels.encode(record, row) for record, row in rows]
        return [[{**example, "labels": label}] for example, label in zip(encoded, labels, strict=True)]

    def _empty(self) -> Example:
        if self._windows is not None:
            return {**self._windows.encode(self.tokenizer, [""])[0], "labels": self._labels.empty()}
        return {**encode_texts(self.tokenizer, [""], None, self.max_length)[0], "labels": self._labels.empty()}

    def _collate(self) -> Collate:
        return super()._collate() if self._windows is None else self._windows

    def _table(self, store: ExampleStore, rows: Int64Array) -> ExampleTable:
        table = super()._table(store, rows)
        return (
            table
            if self._windows is None
            else replace(table, row_lengths=self._windows.padded_tokens(table.row_lengths))
        )

    @cached_property
    def _windows(self) -> DocumentWindows | None:
        """How texts are read in windows; None where they are cut."""
        if self.long_texts == "cut":
            return None
        shape = (self.max_length, self.overlap, self.max_windows)
        return DocumentWindows.of(self.tokenizer, *shape, self._pad_token_id())

    @property
    def _instead_of_cutting(self) -> str:
        if self.long_texts == "windows":
            return "Raise `max_windows` to read more of them."
        pairs = "" if self.text_pair_column is not None else ", or read them whole with long_texts='windows'"
        return f"Raise `max_length`, where the model allows it{pairs}."
