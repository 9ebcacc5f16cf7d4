"""How well an answer matches those that are right: SQuAD's exact match and F1, which look past case and articles."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """A text in lower case, without punctuation and articles, with single spaces.

    Example:
        >>> normalized("The  Eiffel-Tower!")
        'eiffeltower'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if an answer is one of the right ones, else 0; none are right where there is no answer."""
    return float(any(normalized(answer) == normalized(each) for each in right or [""]))


def f1(answer: str, right: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of words, against the right answer that is nearest.

    Example:
        >>> round(f1("in the old Paris", ["Paris, France", "old Paris"]), 3)
        0.8

    References:
        Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016.
    """
    return max(_f1(normalized(answer).split(), normalized(each).split()) for each in right or [""])


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))
