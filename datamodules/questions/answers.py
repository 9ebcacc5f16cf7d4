"""The answer to a question, from the logits of all windows of its context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_llm.datamodules.questions.question_windows import QuestionWindow, example_name
from lightning_llm.datamodules.windows import Int64Array

Float64Array = npt.NDArray[np.float64]
Logits = Sequence[npt.ArrayLike] | npt.NDArray[np.floating[Any]] | Tensor


class Span(NamedTuple):
    """A part of a context: ``text`` is characters begin..end, ``score`` its start logit plus its end logit."""

    text: str
    score: float
    begin: int
    end: int


@dataclass(frozen=True)
class Answer:
    """The answer to one question; ``context[begin:end] == text``.

    Attributes:
        text: Empty if there is no answer.
        score: Of the span, or of "no answer".
        begin: First character.
        end: The character after the last.
        null_score: Score of "no answer": of the window that believes in it least.
        n_best: The best spans, best first, "no answer" not among them.
    """

    text: str
    score: float
    begin: int
    end: int
    null_score: float
    n_best: list[Span]


def best_answers(
    examples: Sequence[Mapping[str, Any]],
    windows: Sequence[QuestionWindow],
    start_logits: Logits,
    end_logits: Logits,
    *,
    n_best: int = 20,
    max_answer_tokens: int = 30,
    null_score_threshold: float | None = None,
) -> dict[str, Answer]:
    """Choose the best span of each context; all spans of all windows compete.

    A span starts at a token that its window owns (so no span counts twice), lies in the context of that window and
    has at most ``max_answer_tokens``. The search is exact: of *all* such spans the ``n_best`` are found. Of equal
    scores the earlier start wins, then the shorter span.

    Args:
        examples: As for :func:`~lightning_llm.datamodules.questions.question_answering.encode_questions`.
        windows: What that made of them, in any order, all of an example.
        start_logits: One row of logits for each window, padding on the right is ignored.
        end_logits: Likewise.
        n_best: Spans to keep of each example; spans of the same characters are kept once.
        max_answer_tokens: Tokens of an answer.
        null_score_threshold: The answer is empty if its null score exceeds the best span's score by more than this
            (SQuAD 2). None: there always is an answer (SQuAD 1), unless a context has no text.

    Returns:
        An answer for each example that has windows, by its ``id`` (else its index, as a string), in order.

    Raises:
        ValueError: If logits are missing, NaN or +inf; if two examples have one id; or if a limit is below 1.

    Example:
        >>> from lightning_llm.datamodules.questions.question_answering import encode_questions
        >>> from lightning_llm.datamodules.tokenizer import byte_tokenizer
        >>> examples = [{"id": "a", "question": "?", "context": "Bob"}]
        >>> windows = encode_questions(examples, byte_tokenizer(), max_length=8, doc_stride=2)
        >>> answers = best_answers(examples, windows, [[0, 1, 5, 3]], [[0, 6, 1, 2]])  # logits of "?", "B", "o", "b"
        >>> answers["a"].text, answers["a"].score, answers["a"].begin, answers["a"].null_score
        ('B', 7.0, 0, 0.0)
    """
    if n_best < 1 or max_answer_tokens < 1:
        raise ValueError(
            f"`n_best` and `max_answer_tokens` are 1 at least, but got n_best={n_best}, "
            f"max_answer_tokens={max_answer_tokens}."
        )
    if not len(windows) == len(start_logits) == len(end_logits):
        raise ValueError(
            f"Expected a row of logits for each of {len(windows)} windows, but got {len(start_logits)} rows of start "
            f"logits and {len(end_logits)} of end logits."
        )
    rows_of: dict[int, list[int]] = {}
    for row, window in enumerate(windows):
        rows_of.setdefault(window.example, []).append(row)
    answers: dict[str, Answer] = {}
    for example in sorted(rows_of):
        name = example_name(examples[example], example)
        if name in answers:
            raise ValueError(f"Two examples have the id {name}: answers are told apart by it.")
        found, null_scores = [], []
        for row in rows_of[example]:
            start, end = _checked(start_logits[row], windows[row], row), _checked(end_logits[row], windows[row], row)
            found.append(best_spans(windows[row], start, end, n_best, max_answer_tokens))
            null_scores.append(float(start[windows[row].null_position] + end[windows[row].null_position]))
        scores, first, last = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.lexsort((last, first, -scores))[:n_best]
        offsets = windows[rows_of[example][0]].pair.offsets
        spans = _with_text(
            examples[example]["context"], scores[order], offsets[first[order], 0], offsets[last[order], 1]
        )
        answers[name] = _choose(spans, min(null_scores), null_score_threshold)
    return answers


def _checked(logits: Any, window: QuestionWindow, row: int) -> Float64Array:
    values: Float64Array = torch.as_tensor(logits).detach().double().cpu().numpy()
    if values.ndim != 1 or len(values) < len(window):
        raise ValueError(
            f"Window {row} has {len(window)} tokens, but its logits have the shape {values.shape}: expected one start "
            "and one end logit for each token, padding on the right."
        )
    values = values[: len(window)]
    if not values.max() < np.inf:  # NaN is not smaller either
        raise ValueError(f"The logits of window {row} are NaN or infinite: no answer can be chosen.")
    return values


def best_spans(
    window: QuestionWindow, start_logits: Float64Array, end_logits: Float64Array, n_best: int, max_answer_tokens: int
) -> tuple[Float64Array, Int64Array, Int64Array]:
    """Find the best spans of one window, exactly.

    Each of the n best spans starts at one of the n starts whose own best span is best: only these are looked at.

    Args:
        window: The window.
        start_logits: (tokens,) of the whole row.
        end_logits: (tokens,) of the whole row.
        n_best: Spans to find at most.
        max_answer_tokens: Tokens of a span.

    Returns:
        Scores, first and last tokens (counted within the context), best first.
    """
    begin, length = window.pair.context_begin, window.length
    reach = min(max_answer_tokens, length)
    if not window.can_start.any():
        return np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)
    starts = np.where(window.can_start, start_logits[begin : begin + length], -np.inf)
    ends = np.concatenate([end_logits[begin : begin + length], np.full(reach - 1, -np.inf)])
    ends_from = np.lib.stride_tricks.sliding_window_view(ends, reach)  # row i: the end logits of tokens i, i + 1, ...
    promising = np.sort(np.argsort(-(starts + ends_from.max(1)), kind="stable")[:n_best])
    scores = starts[promising, None] + ends_from[promising]
    best = np.argsort(-scores, axis=None, kind="stable")[:n_best]
    best = best[scores.flat[best] > -np.inf]
    row, more = np.divmod(best, reach)
    first = window.start + promising[row]
    return scores.flat[best], first, first + more


def _with_text(context: str, scores: Float64Array, begins: npt.NDArray[Any], ends: npt.NDArray[Any]) -> list[Span]:
    """White space at the ends is left out; of spans with the same characters only the best stays."""
    spans: dict[tuple[int, int], Span] = {}
    for score, begin, end in zip(scores.tolist(), begins.tolist(), ends.tolist(), strict=True):
        text = context[begin:end]
        begin += len(text) - len(text.lstrip())
        text = text.strip()
        spans.setdefault((begin, begin + len(text)), Span(text, score, begin, begin + len(text)))
    return list(spans.values())


def _choose(spans: list[Span], null_score: float, threshold: float | None) -> Answer:
    is_null = not spans or (threshold is not None and null_score - spans[0].score > threshold)
    best = Span("", null_score, 0, 0) if is_null else spans[0]
    return Answer(*best, null_score, spans)
