"""Texts that belong together, or how similar they are, to train embeddings on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightning_llm.datamodules.examples.data_module import ExampleDataModule
from lightning_llm.datamodules.examples.labels import RowLabels
from lightning_llm.datamodules.examples.records import Record
from lightning_llm.datamodules.examples.store import Example, ExampleStore
from lightning_llm.datamodules.examples.texts import encode_texts, text_of
from lightning_llm.datamodules.row_data_module import Split
from lightning_llm.datamodules.windows import Int64Array


class PairDataModule(ExampleDataModule):
    """Pairs of texts, for ``LLMModule(task="embedding")``.

    Batches have ``anchor_input_ids`` and ``anchor_attention_mask`` (pairs, seq), the same of ``positive`` and of
    negatives (``negative``, or ``negative_1``, ``negative_2``, ... where there are several), further inputs that the
    tokenizer makes, and ``labels`` (pairs,) float where pairs have a score.

    A contrastive loss takes every other positive of a batch for wrong. Of rows with the same positive, a batch may
    hold two, which are then each other's wrong answer; a warning says how many rows there are of these.

    Args:
        data: Jsonl, json, csv or parquet files, a data set, or a list of mappings.
        tokenizer: A tokenizer, its hub id or local folder, or ``bytes``.
        max_length: Tokens of a text at most; a warning says how much is cut.
        anchor_column: The column of the texts to find something for; ``sentence1`` in similarity data.
        positive_column: Of the texts that belong to them; ``sentence2`` in similarity data.
        negative_column: Of texts that do not belong to them, if there are any; one column or several.
        score_column: Of similarities, numbers; for ``task_options={"loss": "cosine"}``.
        anchor_prefix: Stands before each anchor, such as ``"query: "``.
        positive_prefix: Before each positive and negative, such as ``"passage: "``.
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
        anchor_column: str = "anchor",
        positive_column: str = "positive",
        negative_column: str | list[str] | None = None,
        score_column: str | None = None,
        anchor_prefix: str = "",
        positive_prefix: str = "",
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, max_length, **options)
        negatives = [negative_column] if isinstance(negative_column, str) else list(negative_column or [])
        if negatives and score_column is not None:
            raise ValueError(
                f"A score is of a pair, and negatives are of a contrastive loss, but got score_column={score_column!r} "
                f"and negative_column={negative_column!r}. Leave one out."
            )
        self.score_column = score_column
        self.anchor_prefix = anchor_prefix
        self.positive_prefix = positive_prefix
        names = ["negative"] if len(negatives) == 1 else [f"negative_{n}" for n in range(1, len(negatives) + 1)]
        self.text_columns = {
            "anchor": anchor_column,
            "positive": positive_column,
            **dict(zip(names, negatives, strict=True)),
        }
        self._scores = None if score_column is None else RowLabels(score_column, "regression", None)

    def _columns(self) -> Mapping[str, str]:
        columns = {
            f"{name}_column" if name[-1].isalpha() else f"negative_column[{int(name.split('_')[1]) - 1}]": column
            for name, column in self.text_columns.items()
        }
        return columns if self.score_column is None else {**columns, "score_column": self.score_column}

    def _encoding(self) -> Mapping[str, Any]:
        return {"prefixes": [self.anchor_prefix, self.positive_prefix]}

    def _encode(self, records: Sequence[Record], names: Sequence[str]) -> list[list[Example]]:
        examples: list[dict[str, Any]] = [{"_num_cut": 0} for _ in records]
        for name, column in self.text_columns.items():
            prefix = self.anchor_prefix if name == "anchor" else self.positive_prefix
            texts = [prefix + text_of(record, column, row) for record, row in zip(records, names, strict=True)]
            for example, text in zip(examples, encode_texts(self.tokenizer, texts, None, self.max_length), strict=True):
                example["_num_cut"] += text.pop("_num_cut")
                example |= {f"{name}_{key}": value for key, value in text.items()}
        if self._scores is not None:
            for example, record, row in zip(examples, records, names, strict=True):
                example["labels"] = self._scores.encode(record, row)
        return [[example] for example in examples]

    def _empty(self) -> Example:
        text = encode_texts(self.tokenizer, [""], None, self.max_length)[0]
        columns = {f"{name}_{key}": value for name in self.text_columns for key, value in text.items()}
        return columns if self._scores is None else {**columns, "labels": self._scores.empty()}

    def _check_rows(self, split: Split, store: ExampleStore, rows: Int64Array) -> None:
        if split != "train" or self._scores is not None:
            return
        positives = Counter(np.asarray(store[row]["positive_input_ids"]).tobytes() for row in rows.tolist())
        num_shared = sum(number for number in positives.values() if number > 1)
        if num_shared:
            rank_zero_warn(
                f"{num_shared:,} of {len(rows):,} training pairs of {self.records('train').name} have a positive that "
                f"another pair has too. Where two of them share a batch, a contrastive loss takes the one's positive "
                f"for wrong of the other. Leave out such pairs, where there are many for the size of a batch."
            )
