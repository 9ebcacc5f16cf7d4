"""Texts with a class for each token: tags of words, or spans of characters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_llm.datamodules.examples.class_names import ClassNames, check_no_class_is_empty
from lightning_llm.datamodules.examples.data_module import ExampleDataModule
from lightning_llm.datamodules.examples.records import Record, Records
from lightning_llm.datamodules.examples.store import Example, ExampleStore
from lightning_llm.datamodules.examples.texts import check_fast, encode_texts, text_of
from lightning_llm.datamodules.examples.token_labels import (
    OUTSIDE,
    inner_tag,
    join_words,
    label_words,
    place_of_tokens,
    spans_of,
    tag_order,
    tags_of,
    tags_of_kinds,
    words_of,
)
from lightning_llm.datamodules.row_data_module import Split
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX


class TokenClassificationDataModule(ExampleDataModule):
    """Rows of words with tags, or of text with spans, for ``LLMModule(task="token-classification")``.

    Batches have ``input_ids``, ``attention_mask``, ``labels`` (batch, seq), -100 where a token has none, and, where the
    tokenizer makes them, ``token_type_ids``. Words are joined by blanks, so that the model sees a text as ``pipeline``
    shows it one. Spans become tags: ``B-...`` and ``I-...`` of tokens that have a character of them, ``O`` elsewhere.

    Args:
        data: Jsonl, json, csv or parquet files, a data set, or a list of mappings.
        tokenizer: A fast tokenizer, its hub id or local folder, or ``bytes``.
        max_length: Tokens in a row at most; a warning says how much is cut.
        tokens_column: The column of the words, a list, or a text with blanks between them.
        tags_column: Of their tags, names or numbers, likewise.
        text_column: Instead of words: the column of texts, whose spans stand in ``entities_column``.
        entities_column: Of the spans: a list of ``{"start": ..., "end": ..., "label": ...}``, in characters.
        labels: Names of the tags, in order; of spans, their kinds. None: those of the data set, or all that the
            training rows have.
        label_all_tokens: Label all tokens of a word, and not its first alone; those after it with ``I-...``.
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
        tokens_column: str = "tokens",
        tags_column: str = "ner_tags",
        text_column: str | None = None,
        entities_column: str = "entities",
        labels: list[str] | None = None,
        label_all_tokens: bool = False,
        allow_empty_classes: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, max_length, **options)
        self.tokens_column = tokens_column
        self.tags_column = tags_column
        self.text_column = text_column
        self.entities_column = entities_column
        self.label_all_tokens = label_all_tokens
        self.allow_empty_classes = allow_empty_classes
        self._classes: ClassNames | None = None
        if labels is not None:
            self._classes = ClassNames(self._tags(labels), self._label_column)

    @property
    def label_names(self) -> list[str]:
        """Names of the tags, in the order of their numbers."""
        return self._known_classes().names

    def _columns(self) -> Mapping[str, str]:
        if self.text_column is None:
            return {"tokens_column": self.tokens_column, "tags_column": self.tags_column}
        return {"text_column": self.text_column, "entities_column": self.entities_column}

    def _encoding(self) -> Mapping[str, Any]:
        return {"labels": self.label_names, "label_all_tokens": self.label_all_tokens}

    def _learn(self, records: Records) -> None:
        if self._classes is not None:
            return
        names = records.class_names(self._label_column) if self.text_column is None else None
        if names is not None:
            self._classes = ClassNames(names, self._label_column, stores_numbers=True)
            return
        found = ClassNames.found_in(self._all_labels(records), self._label_column).names
        if OUTSIDE in found:
            found.sort(key=tag_order)
        self._classes = ClassNames(self._tags(found), self._label_column)

    def _encode(self, records: Sequence[Record], names: Sequence[str]) -> list[list[Example]]:
        check_fast(self.tokenizer)
        encode = self._encode_words if self.text_column is None else self._encode_spans
        texts, label = encode(records, names)
        encoded = encode_texts(self.tokenizer, texts, None, self.max_length, offsets=True)
        examples: list[list[Example]] = []
        for number, example in enumerate(encoded):
            offsets = example.pop("offset_mapping")
            examples.append([{**example, "labels": label(number, offsets)}])
        return examples

    def _encode_words(self, records: Sequence[Record], names: Sequence[str]) -> tuple[list[str], Any]:
        classes = self._known_classes()
        texts, places, numbers = [], [], []
        for record, row in zip(records, names, strict=True):
            words = words_of(record, self.tokens_column, row)
            tags = tags_of(record, self.tags_column, row, len(words))
            text, place = join_words(words)
            texts.append(text)
            places.append(place)
            numbers.append([classes.number(tag, row) for tag in tags])

        def label(number: int, offsets: Int64Array) -> Int64Array:
            inner = None
            if self.label_all_tokens:
                tags = [classes.names[tag] for tag in numbers[number]]
                inner = [classes.number(inner_tag(tag, classes), names[number]) for tag in tags]
            return label_words(place_of_tokens(offsets, places[number]), numbers[number], inner)

        return texts, label

    def _encode_spans(self, records: Sequence[Record], names: Sequence[str]) -> tuple[list[str], Any]:
        classes = self._known_classes()
        assert self.text_column is not None
        texts, places, tags = [], [], []
        for record, row in zip(records, names, strict=True):
            text = text_of(record, self.text_column, row)
            spans = spans_of(record, text, self.entities_column, row)
            texts.append(text)
            places.append(np.array([span[:2] for span in spans], np.int64).reshape(-1, 2))
            tags.append([[classes.number(f"{mark}-{span.label}", row) for span in spans] for mark in "BI"])

        def label(number: int, offsets: Int64Array) -> Int64Array:
            labels = label_words(place_of_tokens(offsets, places[number]), *tags[number])
            is_outside = (labels == IGNORE_INDEX) & (offsets[:, 0] < offsets[:, 1])
            labels[is_outside] = classes.number(OUTSIDE, names[number])
            return labels

        return texts, label

    def _empty(self) -> Example:
        example = encode_texts(self.tokenizer, [""], None, self.max_length)[0]
        return {**example, "labels": np.full(len(example["input_ids"]), IGNORE_INDEX)}

    def _check_rows(self, split: Split, store: ExampleStore, rows: Int64Array) -> None:
        """Refuse a kind of tags that no training row has; one of its tags may be rare."""
        if split != "train" or self.allow_empty_classes:
            return
        classes = self._known_classes()
        offsets = store.offsets["labels"]
        is_used = np.zeros(len(store) + 1, bool)
        is_used[rows] = True
        labels = np.asarray(store.values["labels"])[np.repeat(is_used[:-1], np.diff(offsets))]
        kinds = {classes.names[number].split("-", 1)[-1] for number in np.unique(labels).tolist() if number >= 0}
        present = [number for number, name in enumerate(classes.names) if name.split("-", 1)[-1] in kinds]
        check_no_class_is_empty(present, classes, self.records("train").name)

    @property
    def _label_column(self) -> str:
        return self.tags_column if self.text_column is None else self.entities_column

    def _known_classes(self) -> ClassNames:
        if self._classes is None:
            self._learn(self.records("train"))
        assert self._classes is not None
        return self._classes

    def _tags(self, labels: Sequence[str]) -> Sequence[str]:
        """Kinds of spans become tags; tags stay as they are."""
        return labels if self.text_column is None or OUTSIDE in labels else tags_of_kinds(labels)

    def _all_labels(self, records: Records) -> Iterator[tuple[Any, str]]:
        for number in range(len(records)):
            record, row = records[number], records.row_name(number)
            if self.text_column is None:
                yield from ((tag, row) for tag in tags_of(record, self.tags_column, row))
            else:
                text = text_of(record, self.text_column, row)
                yield from ((span.label, row) for span in spans_of(record, text, self.entities_column, row))
