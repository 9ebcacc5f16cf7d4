"""Labels of tokens: from tags of words, or from spans of characters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_llm.datamodules.examples.class_names import ClassNames
from lightning_llm.datamodules.examples.records import Record, RecordError
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX

OUTSIDE = "O"


class Span(NamedTuple):
    """A stretch of a text, characters start..end, and what it is."""

    start: int
    end: int
    label: str


def words_of(record: Record, column: str, row: str) -> list[str]:
    """The words in a column: a list of texts, or a text with white space between them.

    Raises:
        RecordError: If there is none, or something else.
    """
    value = record.get(column)
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not words or not all(isinstance(word, str) for word in words):
        raise RecordError(
            f"{row}: column {column!r} should hold the words of the row, a list of texts with one at least, but holds "
            f"{_shown(value)}."
        )
    return list(words)


def tags_of(record: Record, column: str, row: str, num_words: int | None = None) -> list[Any]:
    """The tags in a column: a list of names or numbers, or a text with white space between them.

    Args:
        record: The row.
        column: Of the tags.
        row: Its name.
        num_words: How many there must be; None takes any number.

    Raises:
        RecordError: If there are none, or not one for each word.
    """
    value = record.get(column)
    tags = value.split() if isinstance(value, str) else value
    if not isinstance(tags, (list, tuple)):
        raise RecordError(f"{row}: column {column!r} should hold a tag for each word, but holds {_shown(value)}.")
    if num_words is not None and len(tags) != num_words:
        raise RecordError(
            f"{row}: column {column!r} should hold a tag for each of {num_words} words, but has {len(tags)}."
        )
    return list(tags)


def spans_of(record: Record, text: str, column: str, row: str) -> list[Span]:
    """The spans in a column, in order: mappings with ``start``, ``end``, ``label``, or lists of the three.

    A list of them may be written as JSON. A ``text`` that a mapping has beside must be what stands there.

    Raises:
        RecordError: If one lies outside the text, holds no character, or begins within another.
    """
    value = record.get(column)
    entries = value
    if isinstance(value, str):
        try:
            entries = json.loads(value)
        except ValueError:
            entries = None
    if not isinstance(entries, (list, tuple)):
        raise RecordError(
            f"{row}: column {column!r} should hold a list of spans, each with `start`, `end` (characters) and `label`, "
            f"but holds {_shown(value)}."
        )
    spans = sorted(_span(entry, text, column, row) for entry in entries)
    for before, after in zip(spans[:-1], spans[1:], strict=True):
        if after.start < before.end:
            raise RecordError(
                f"{row}: the spans {tuple(before)} and {tuple(after)} of column {column!r} share characters, and a "
                f"token has one label. Leave one of them out."
            )
    return spans


def _span(entry: Any, text: str, column: str, row: str) -> Span:
    values = [entry.get(name) for name in Span._fields] if isinstance(entry, Mapping) else entry
    is_span = isinstance(values, (list, tuple)) and len(values) == 3 and isinstance(values[2], str) and values[2]
    if not is_span or not all(isinstance(place, int) for place in values[:2]):
        raise RecordError(
            f"{row}: column {column!r} should hold spans with `start`, `end` (characters) and `label`, but has "
            f"{_shown(entry)}."
        )
    span = Span(*values)
    if not 0 <= span.start < span.end <= len(text):
        raise RecordError(
            f"{row}: the span {tuple(span)} of column {column!r} does not lie in the text, which has {len(text)} "
            f"characters. `start` is the first character, `end` the one after the last."
        )
    found = text[span.start : span.end]
    expected = entry.get("text", found) if isinstance(entry, Mapping) else found
    if expected != found:
        raise RecordError(
            f"{row}: the span {tuple(span)} of column {column!r} should be {expected!r}, but there the text reads "
            f"{found!r}."
        )
    return span


def join_words(words: Sequence[str]) -> tuple[str, Int64Array]:
    """The text of words with a blank between, and (words, 2) where each begins and ends in it.

    Example:
        >>> text, places = join_words(["EU", "rejects"])
        >>> text, places.tolist()
        ('EU rejects', [[0, 2], [3, 10]])
    """
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    begins = ends - np.array([len(word) for word in words], np.int64)
    return " ".join(words), np.stack([begins, ends], 1).astype(np.int64)


def place_of_tokens(offsets: npt.NDArray[Any], places: Int64Array) -> Int64Array:
    """Which place each token is in: the first that it shares a character with, -1 for none.

    Args:
        offsets: (tokens, 2) characters that a token stands for; none for special tokens.
        places: (places, 2) characters, in order, none within another.

    Example:
        >>> place_of_tokens(np.array([[0, 0], [0, 2], [2, 5], [5, 6]]), np.array([[0, 2], [3, 6]])).tolist()
        [-1, 0, 1, 1]
    """
    if not len(places):
        return np.full(len(offsets), -1, np.int64)
    place = np.searchsorted(places[:, 1], offsets[:, 0], side="right")  # the first that ends behind the token's begin
    inside = np.minimum(place, len(places) - 1)
    shares = (place < len(places)) & (places[inside, 0] < offsets[:, 1]) & (offsets[:, 0] < offsets[:, 1])
    shares &= places[inside, 0] < places[inside, 1]
    return np.where(shares, inside, -1)


def label_words(place: Int64Array, numbers: Sequence[int], inner: Sequence[int] | None = None) -> Int64Array:
    """Labels of tokens from those of their words.

    Args:
        place: (tokens,) the word of each token, -1 for none.
        numbers: (words,) the class of each word.
        inner: (words,) the class of a word's tokens after its first; None gives them none.

    Returns:
        (tokens,) int64, -100 where there is none.

    Example:
        >>> label_words(np.array([-1, 0, 0, 1]), [4, 5]).tolist()
        [-100, 4, -100, 5]
    """
    is_first = (place >= 0) & (np.concatenate([[-1], place[:-1]]) != place)
    labels = np.full(len(place), IGNORE_INDEX, np.int64)
    labels[is_first] = np.asarray(numbers, np.int64)[place[is_first]]
    if inner is not None:
        is_inner = (place >= 0) & ~is_first
        labels[is_inner] = np.asarray(inner, np.int64)[place[is_inner]]
    return labels


def tags_of_words(place: Int64Array, tags: Sequence[str], num_words: int) -> list[str | None]:
    """Tags of words from those of tokens: that of the first, None for a word without a token.

    Args:
        place: (tokens,) the word of each token, -1 for none.
        tags: (tokens,) likewise.
        num_words: How many words there are.

    Example:
        >>> tags_of_words(np.array([0, 0, -1, 2]), ["B-PER", "I-PER", "O", "O"], 3)
        ['B-PER', None, 'O']
    """
    of_words: dict[int, str] = {}
    for word, tag in zip(place.tolist(), tags, strict=True):
        of_words.setdefault(word, tag)
    return [of_words.get(word) for word in range(num_words)]


def inner_tag(tag: str, classes: ClassNames) -> str:
    """What tokens of a word after its first are called, where the word is ``B-...`` and there is an ``I-...``."""
    inner = "I-" + tag[2:]
    return inner if tag.startswith("B-") and inner in classes else tag


def tag_order(tag: str) -> tuple[bool, str, str]:
    """By which tags are sorted: ``O`` first, then those of a kind together.

    Example:
        >>> sorted(["B-LOC", "B-PER", "I-LOC", "I-PER", "O"], key=tag_order)
        ['O', 'B-LOC', 'I-LOC', 'B-PER', 'I-PER']
    """
    return tag != OUTSIDE, tag.split("-", 1)[-1], tag


def tags_of_kinds(kinds: Sequence[str]) -> list[str]:
    """The tags of spans of such kinds.

    Example:
        >>> tags_of_kinds(["LOC", "PER"])
        ['O', 'B-LOC', 'I-LOC', 'B-PER', 'I-PER']
    """
    return [OUTSIDE, *(f"{mark}-{kind}" for kind in kinds for mark in "BI")]


def _shown(value: Any) -> str:
    text = repr(value)
    return "nothing" if value is None else text if len(text) < 80 else f"{text[:77]}..."
