"""Texts with a class for each token: tags of words, or spans of characters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from lightning_llm.datamodules.document_windows import surrounding_ids
from lightning_llm.datamodules.examples.class_names import ClassNames, check_no_class_is_empty
from lightning_llm.datamodules.examples.dataset import Collate, ExampleDataset, PaddedColumns
from lightning_llm.datamodules.examples.record_windows import RecordWindowsDataModule
from lightning_llm.datamodules.examples.records import UNKNOWN, Record, Records
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
    tags_of_words,
    words_of,
)
from lightning_llm.datamodules.row_data_module import Split
from lightning_llm.datamodules.token_windows import token_windows
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX
from lightning_llm.tasks.metrics import spans_of as spans_of_tags


class TokenClassificationDataModule(RecordWindowsDataModule):
    """Rows of words with tags, or of text with spans, for ``LLMModule(task="token-classification")``.

    Batches have ``input_ids``, ``attention_mask``, ``labels`` (batch, seq), -100 where a token has none, and, where the
    tokenizer makes them, ``token_type_ids``. Words are joined by blanks, so that the model sees a text as ``pipeline``
    shows it one. Spans become tags: ``B-...`` and ``I-...`` of tokens that have a character of them, ``O`` elsewhere.

    With ``long_texts="windows"`` a row is a window of a document, and each token of the document is in one of them a
    target: where it has most context. Batches then also have ``example_ids`` (batch,), the number of the document, -1
    for an empty row, and ``token_positions`` (batch, seq), the place in it of the tokens that the row decides, -1
    elsewhere, by which spans are measured and predicted in whole documents. ``micro_batch_size`` counts windows, and
    there are no ``token_type_ids``, without which a model takes 0.

    Args:
        data: Jsonl, json, csv or parquet files, a data set, or a list of mappings.
        tokenizer: A fast tokenizer, its hub id or local folder, or ``bytes``.
        max_length: Tokens in a row at most, special tokens counted; a warning says how much is cut.
        tokens_column: The column of the words, a list, or a text with blanks between them.
        tags_column: Of their tags, names or numbers, likewise.
        text_column: Instead of words: the column of texts, whose spans stand in ``entities_column``.
        entities_column: Of the spans: a list of ``{"start": ..., "end": ..., "label": ...}``, in characters.
        labels: Names of the tags, in order; of spans, their kinds. None: those of the data set, or all that the
            training rows have.
        label_all_tokens: Label all tokens of a word, and not its first alone; those after it with ``I-...``.
        allow_empty_classes: Whether one of ``labels`` may have no training row.
        long_texts: What becomes of texts longer than ``max_length``: they are ``cut`` there, or read in ``windows``.
        overlap: Tokens that a window shares with the one before it: in the middle of a text, each token sees half as
            many on both sides at least.
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
        long_texts: Literal["cut", "windows"] = "cut",
        overlap: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, max_length, **options)
        if long_texts not in ("cut", "windows"):
            raise ValueError(f"`long_texts` must be 'cut' or 'windows', but got {long_texts!r}.")
        if long_texts == "cut" and overlap:
            raise ValueError(f"`overlap` is for long_texts='windows', but got {long_texts!r}.")
        self.long_texts = long_texts
        self.overlap = overlap
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

    def described(self, example: int, tags: Sequence[str]) -> dict[str, Any]:
        """What the tags of all tokens of a document say of it.

        Args:
            example: Its number, one of a batch's ``example_ids``.
            tags: Of its tokens, special tokens not among them.

        Returns:
            ``tokens`` and ``tags`` of its words, each that of its first token, None where it has none; or, where the
            data are texts, ``entities`` with ``start``, ``end``, ``label`` and ``text``.
        """
        record, row = self.record_of(example)
        if self.text_column is None:
            words = words_of(record, self.tokens_column, row)
            text, places = join_words(words)
            return {
                "tokens": words,
                "tags": tags_of_words(place_of_tokens(self._offsets(text), places), tags, len(words)),
            }
        text = text_of(record, self.text_column, row)
        offsets = self._offsets(text).tolist()
        spans = [(offsets[begin][0], offsets[end - 1][1], kind) for kind, begin, end in spans_of_tags(tags)]
        return {"entities": [{"start": s, "end": e, "label": kind, "text": text[s:e]} for s, e, kind in spans]}

    def _columns(self) -> Mapping[str, str]:
        if self.text_column is None:
            return {"tokens_column": self.tokens_column, "tags_column": self.tags_column}
        return {"text_column": self.text_column, "entities_column": self.entities_column}

    def _target_columns(self) -> Collection[str]:
        return (self._label_column,)

    def _encoding(self) -> Mapping[str, Any]:
        windows = {} if self.long_texts == "cut" else {"long_texts": self.long_texts, "overlap": self.overlap}
        return {"labels": self.label_names, "label_all_tokens": self.label_all_tokens, **windows}

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
        kept = self.max_length if self.long_texts == "cut" else None
        examples: list[list[Example]] = []
        for number, example in enumerate(encode_texts(self.tokenizer, texts, None, kept, offsets=True)):
            labels = label(number, example.pop("offset_mapping"))
            examples.append([{**example, "labels": labels}] if kept else [*self._windows(example["input_ids"], labels)])
        return examples

    def _windows(self, input_ids: Int64Array, labels: Int64Array) -> Sequence[Example]:
        prefix, suffix = self._surrounding
        inner = slice(len(prefix), len(input_ids) - len(suffix))
        shape = (self.max_length, self.overlap)
        return token_windows(input_ids[inner], labels[inner], *shape, prefix_ids=prefix, suffix_ids=suffix)

    def _encode_words(self, records: Sequence[Record], names: Sequence[str]) -> tuple[list[str], Any]:
        classes = self._known_classes()
        texts, places, numbers = [], [], []
        for record, row in zip(records, names, strict=True):
            words = words_of(record, self.tokens_column, row)
            is_known = record.get(self.tags_column) is not UNKNOWN
            tags = tags_of(record, self.tags_column, row, len(words)) if is_known else []
            text, place = join_words(words)
            texts.append(text)
            places.append(place)
            numbers.append([classes.number(tag, row) for tag in tags])

        def label(number: int, offsets: Int64Array) -> Int64Array:
            if not numbers[number]:  # unknown: there is a word at least
                return np.full(len(offsets), IGNORE_INDEX)
            inner = None
            if self.label_all_tokens:
                tags = [classes.names[tag] for tag in numbers[number]]
                inner = [classes.number(inner_tag(tag, classes), names[number]) for tag in tags]
            return label_words(place_of_tokens(offsets, places[number]), numbers[number], inner)

        return texts, label

    def _encode_spans(self, records: Sequence[Record], names: Sequence[str]) -> tuple[list[str], Any]:
        classes = self._known_classes()
        assert self.text_column is not None
        texts, places, tags, knows = [], [], [], []
        for record, row in zip(records, names, strict=True):
            text = text_of(record, self.text_column, row)
            is_known = record.get(self.entities_column) is not UNKNOWN
            spans = spans_of(record, text, self.entities_column, row) if is_known else []
            knows.append(is_known)
            texts.append(text)
            places.append(np.array([span[:2] for span in spans], np.int64).reshape(-1, 2))
            tags.append([[classes.number(f"{mark}-{span.label}", row) for span in spans] for mark in "BI"])

        def label(number: int, offsets: Int64Array) -> Int64Array:
            if not knows[number]:
                return np.full(len(offsets), IGNORE_INDEX)
            labels = label_words(place_of_tokens(offsets, places[number]), *tags[number])
            is_outside = (labels == IGNORE_INDEX) & (offsets[:, 0] < offsets[:, 1])
            labels[is_outside] = classes.number(OUTSIDE, names[number])
            return labels

        return texts, label

    def _empty(self) -> Example:
        example = encode_texts(self.tokenizer, [""], None, self.max_length)[0]
        labels = np.full(len(example["input_ids"]), IGNORE_INDEX)
        if self.long_texts == "cut":
            return {**example, "labels": labels}
        return {"input_ids": example["input_ids"], "labels": labels, "token_positions": np.full_like(labels, -1)}

    def _collate(self) -> Collate:
        return PaddedColumns(self._pad_token_id(), {"token_positions": -1})

    def _make_dataset(self, split: Split, store: ExampleStore, rows: Int64Array) -> ExampleDataset:
        if self.long_texts == "windows":
            return super()._make_dataset(split, store, rows)
        return ExampleDataset(store, rows, self._collate(), self._empty(), self._table(store, rows))

    @property
    def _instead_of_cutting(self) -> str:
        return "Raise `max_length`, where the model allows it, or read them whole with long_texts='windows'."

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

    @cached_property
    def _surrounding(self) -> tuple[list[int], list[int]]:
        """Special tokens before and after each window."""
        return surrounding_ids(self.tokenizer)

    def _offsets(self, text: str) -> Int64Array:
        """(tokens, 2) characters of a text's tokens, special tokens not among them."""
        prefix, suffix = self._surrounding
        offsets: Int64Array = encode_texts(self.tokenizer, [text], None, None, offsets=True)[0]["offset_mapping"]
        return offsets[len(prefix) : len(offsets) - len(suffix)]

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
