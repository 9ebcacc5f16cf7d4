"""How well the answers to many questions match those that are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_llm.answer_scores import exact_match, f1


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
