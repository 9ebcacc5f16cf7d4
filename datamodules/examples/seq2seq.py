"""Texts and what is to be written from them: translations, summaries."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_llm.datamodules.examples.data_module import ExampleDataModule
from lightning_llm.datamodules.examples.dataset import ExampleTable
from lightning_llm.datamodules.examples.records import UNKNOWN, Record, RecordError
from lightning_llm.datamodules.examples.store import Example, ExampleStore
from lightning_llm.datamodules.examples.texts import encode_texts, text_of
from lightning_llm.datamodules.text_settings import check_numbers
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX


class Seq2SeqDataModule(ExampleDataModule):
    """Pairs of source and target texts, for ``LLMModule(task="seq2seq")``.

    Batches have ``input_ids`` and ``attention_mask`` of the sources and ``labels`` (batch, target_seq) of the targets,
    -100 after each one's end. Targets end with the tokenizer's end-of-text token. A budget of tokens
    (``batching="padded"``) counts source and target together.

    Args:
        data: Jsonl, json, csv or parquet files, a data set, or a list of mappings.
        tokenizer: A tokenizer, its hub id or local folder, or ``bytes``.
        max_source_length: Tokens of a source at most, its prefix included; a warning says how much is cut.
        max_target_length: Likewise of a target.
        source_column: The column of the sources; with ``translation_column`` the source's language (``en``).
        target_column: Of the targets; likewise.
        translation_column: Of mappings of languages to texts, ``{"en": ..., "de": ...}``, as data sets of translations
            have them. None: sources and targets stand in columns of their own.
        source_prefix: Stands before each source, for instance ``"translate English to German: "``.
        **options: Of :class:`~lightning_llm.datamodules.examples.data_module.ExampleDataModule`: splits, batches,
            order, cache.

    Raises:
        ValueError: For settings that do not fit each other, and for rows that cannot be used, naming the row.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: str | Any,
        max_source_length: int = 512,
        *,
        max_target_length: int = 128,
        source_column: str = "source",
        target_column: str = "target",
        translation_column: str | None = None,
        source_prefix: str = "",
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, max_source_length, **options)
        check_numbers(max_target_length=max_target_length)
        self.max_target_length = max_target_length
        self.source_column = source_column
        self.target_column = target_column
        self.translation_column = translation_column
        self.source_prefix = source_prefix

    @property
    def _limits(self) -> str:
        return f"max_source_length={self.max_length} or max_target_length={self.max_target_length}"

    def _columns(self) -> Mapping[str, str]:
        if self.translation_column is not None:
            return {"translation_column": self.translation_column}
        return {"source_column": self.source_column, "target_column": self.target_column}

    def _target_columns(self) -> Collection[str]:
        return () if self.translation_column is not None else (self.target_column,)

    def _encoding(self) -> Mapping[str, Any]:
        pair = {"source": self.source_column, "target": self.target_column, "prefix": self.source_prefix}
        return {**pair, "max_target_length": self.max_target_length}

    def _encode(self, records: Sequence[Record], names: Sequence[str]) -> list[list[Example]]:
        rows = [(self._texts(record, row), row) for record, row in zip(records, names, strict=True)]
        sources = [self.source_prefix + text_of(texts, self.source_column, row) for texts, row in rows]
        inputs = encode_texts(self.tokenizer, sources, None, self.max_length)
        if any(texts.get(self.target_column) is UNKNOWN for texts, _ in rows):
            none = {"labels": np.array([IGNORE_INDEX])}
            return [[{"input_ids": each["input_ids"], **none, "_num_cut": each["_num_cut"]}] for each in inputs]
        targets = [text_of(texts, self.target_column, row) for texts, row in rows]
        labels = encode_texts(self.tokenizer, targets, None, self.max_target_length, target=True)
        return [
            [
                {
                    "input_ids": source["input_ids"],
                    "labels": self._ended(target["input_ids"]),
                    "_num_cut": source["_num_cut"] + target["_num_cut"],
                }
            ]
            for source, target in zip(inputs, labels, strict=True)
        ]

    def _empty(self) -> Example:
        source = encode_texts(self.tokenizer, [""], None, self.max_length)[0]
        return {"input_ids": source["input_ids"], "labels": np.array([IGNORE_INDEX])}

    def _table(self, store: ExampleStore, rows: Int64Array) -> ExampleTable:
        lengths = store.lengths("input_ids") + store.lengths("labels")
        return ExampleTable(lengths[rows], store.num_targets()[rows])

    def _texts(self, record: Record, row: str) -> Record:
        if self.translation_column is None:
            return record
        texts = record.get(self.translation_column)
        if not isinstance(texts, Mapping) or not {self.source_column, self.target_column} <= set(texts):
            found = f"the languages {sorted(texts)}" if isinstance(texts, Mapping) else repr(texts)[:80]
            raise RecordError(
                f"{row}: column {self.translation_column!r} should hold texts in {self.source_column!r} and "
                f"{self.target_column!r}, but holds {found}. Name the languages with source_column=..., "
                f"target_column=..."
            )
        return dict(texts)

    def _ended(self, ids: Any) -> Any:
        """With the end-of-text token, which some tokenizers do not add, and without which a model never ends."""
        end = self.tokenizer.eos_token_id
        if end is None or end in ids[-2:]:  # the last may name the language
            return ids
        return np.append(ids[: self.max_target_length - 1], np.int32(end))
