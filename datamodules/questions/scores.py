"""How well answers match those that are right: SQuAD's exact match and F1, which look past case and articles."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """A text in lower case, without punctuation and articles.

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
    """
    return max(_f1(normalized(answer).split(), normalized(each).split()) for each in right or [""])


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))


def score_answers(answers: Mapping[str, str], right: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The means of both over all questions, 0..1.

    Args:
        answers: Of each question, by its id; empty for "no answer".
        right: The right answers of each question; none where there is no answer.

    Raises:
        ValueError: If a question is not answered.

    References:
        Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016.
    """
    missing = sorted(set(right) - set(answers))
    if missing or not right:
        raise ValueError(
            f"Expected an answer to each of {len(right)} questions, but {len(missing)} have none: {missing[:3]}."
        )
    return {
        "exact_match": sum(exact_match(answers[name], right[name]) for name in right) / len(right),
        "f1": sum(f1(answers[name], right[name]) for name in right) / len(right),
    }
