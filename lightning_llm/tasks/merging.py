"""Predictions of windows become those of the document or question that they are of, over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_llm.answer_scores import exact_match, f1
from lightning_llm.loss import accumulation_dtype
from lightning_llm.tasks.metrics import SpanMetrics, span_rates


def merged_tokens(example_ids: Tensor, token_positions: Tensor, values: Tensor) -> dict[int, Tensor]:
    """Put the tokens of each document in order, wherever its windows stood.

    Args:
        example_ids: (num_windows,) int64, the document of each window.
        token_positions: (num_windows, seq) int64, the place in its document of each token that its window decides; -1
            elsewhere.
        values: (num_windows, seq, ...), for instance predicted classes.

    Returns:
        For each document the values of its tokens, (tokens, ...).

    Example:
        >>> ids, positions = torch.tensor([7, 7]), torch.tensor([[-1, 0, 1, -1], [-1, -1, 2, 3]])
        >>> merged_tokens(ids, positions, torch.tensor([[9, 1, 2, 9], [9, 9, 3, 4]]))
        {7: tensor([1, 2, 3, 4])}
    """
    counts = token_positions >= 0
    examples = example_ids[:, None].expand_as(token_positions)[counts]
    order = torch.argsort(token_positions[counts], stable=True)
    order = order[torch.argsort(examples[order], stable=True)]
    names, sizes = torch.unique_consecutive(examples[order], return_counts=True)
    parts = torch.split(values[counts][order], sizes.tolist())
    return dict(zip(names.tolist(), parts, strict=True))


class DocumentSpanMetrics(SpanMetrics):
    """:class:`SpanMetrics` of documents whose windows lie in any batches of any ranks.

    Args:
        tags: The name of each class.
        **kwargs: As for every torchmetrics metric.
    """

    tokens: list[Tensor]

    def __init__(self, tags: Sequence[str], **kwargs: Any) -> None:
        super().__init__(tags, **kwargs)
        self.add_state("tokens", [], dist_reduce_fx="cat")

    def update(
        self,
        preds: Tensor,
        target: Tensor,
        example_ids: Tensor | None = None,
        token_positions: Tensor | None = None,
    ) -> None:
        """Add rows of classes; with ``example_ids`` and ``token_positions``, of windows of documents."""
        if example_ids is None or token_positions is None:
            super().update(preds, target)
            return
        counts = (token_positions >= 0) & (target >= 0)
        examples = example_ids[:, None].expand_as(target)
        self.tokens.append(torch.stack([column[counts] for column in (examples, token_positions, preds, target)], 1))

    def compute(self) -> dict[str, Tensor]:
        """As for :class:`SpanMetrics`, of whole documents."""
        tokens = torch.cat(self.tokens) if isinstance(self.tokens, list) and self.tokens else self.tokens
        counts = self.counts
        if isinstance(tokens, Tensor) and len(tokens):
            merged = merged_tokens(tokens[:, 0], tokens[:, 1:2], tokens[:, None, 2:])
            counts = counts + sum(self._counted(*classes[None].unbind(-1)) for classes in merged.values())
        return span_rates(counts)


def best_spans(
    start_logits: Tensor,
    end_logits: Tensor,
    char_begins: Tensor,
    char_ends: Tensor,
    n_best: int = 20,
    max_answer_tokens: int = 30,
) -> Tensor:
    """The likeliest answers of each window.

    Args:
        start_logits: (num_windows, seq).
        end_logits: (num_windows, seq).
        char_begins: (num_windows, seq) int64, the character of the context where a token begins at which an answer may
            start; -1 for others: of the question, padding, and what another window of the context decides.
        char_ends: (num_windows, seq) int64, the character after a token of the context; -1 for others.
        n_best: Answers of a window at most.
        max_answer_tokens: Tokens of an answer at most.

    Returns:
        (num_windows, n, 3) float64: score, first character, the character after the last; a score of -inf where a
        window has fewer.

    Example:
        >>> begins, ends = torch.tensor([[-1, 0, 4]]), torch.tensor([[-1, 3, 7]])
        >>> best_spans(torch.tensor([[9.0, 1, 0]]), torch.tensor([[9.0, 0, 2]]), begins, ends, n_best=2).tolist()
        [[[3.0, 0.0, 7.0], [2.0, 4.0, 7.0]]]
    """
    seq = start_logits.shape[1]
    start = accumulation_dtype(start_logits).double().masked_fill(char_begins < 0, -torch.inf)
    end = accumulation_dtype(end_logits).double().masked_fill(char_ends < 0, -torch.inf)
    is_span = torch.ones(seq, seq, dtype=torch.bool, device=start.device).triu().tril(max_answer_tokens - 1)
    scores = (start[:, :, None] + end[:, None, :]).masked_fill(~is_span, -torch.inf).flatten(1)
    best, places = scores.topk(min(n_best, scores.shape[1]))
    begins, ends = char_begins.gather(1, places // seq), char_ends.gather(1, places % seq)
    return torch.stack([best, begins.double(), ends.double()], -1)


def candidate_rows(example_ids: Tensor, spans: Tensor, null_scores: Tensor) -> Tensor:
    """What :func:`best_answers` takes, of the best spans of windows.

    Args:
        example_ids: (num_windows,) int64, the question of each window.
        spans: (num_windows, n, 3), as :func:`best_spans` gives them.
        null_scores: (num_windows,) of "no answer".

    Returns:
        (num_windows * n, 5) float64.
    """
    of_window = [column.double()[:, None, None].expand(-1, spans.shape[1], 1) for column in (example_ids, null_scores)]
    return torch.cat([of_window[0], spans.double(), of_window[1]], -1).flatten(0, 1)


def best_answers(candidates: Tensor, null_score_threshold: float | None = None) -> dict[int, tuple[float, int, int]]:
    """One answer for each question, of all windows of its context.

    Args:
        candidates: (n, 5) float64: example, score, first character, the character after the last, and the score of "no
            answer" in its window.
        null_score_threshold: There is no answer where the score of that, of the window that believes in it least,
            exceeds the best answer's by more than this; None: there always is one.

    Returns:
        For each example score, first character and the character after the last, both 0 for no answer.
    """
    found: dict[int, tuple[float, int, int]] = {}
    nulls: dict[int, float] = {}
    for example, score, begin, end, null in candidates.tolist():
        key = int(example)
        nulls[key] = min(null, nulls.get(key, null))
        span = (score, int(begin), int(end))
        if key not in found or (span[0], -span[1], -span[2]) > (found[key][0], -found[key][1], -found[key][2]):
            found[key] = span
    for key, (score, _, _) in found.items():
        no_span = score == -torch.inf
        if no_span or (null_score_threshold is not None and nulls[key] - score > null_score_threshold):
            found[key] = (nulls[key], 0, 0)
    return found


class AnswerMetrics(Metric):
    """Exact match and F1 of answers, one for each question, whose windows lie in any batches of any ranks.

    Args:
        context_of: The context of an example.
        answers_of: Its right answers; none, or an empty one, if the context has no answer.
        null_score_threshold: As for :func:`best_answers`.
        **kwargs: As for every torchmetrics metric.

    References:
        Rajpurkar et al., SQuAD, 2016, and the evaluation script of its version 1.1.
    """

    full_state_update = False
    candidates: list[Tensor]

    def __init__(
        self,
        context_of: Callable[[int], str],
        answers_of: Callable[[int], Sequence[str]],
        null_score_threshold: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.context_of, self.answers_of = context_of, answers_of
        self.null_score_threshold = null_score_threshold
        self.add_state("candidates", [], dist_reduce_fx="cat")

    def update(
        self, example_ids: Tensor | None = None, spans: Tensor | None = None, null_scores: Tensor | None = None
    ) -> None:
        """Add the best spans of windows, (num_windows, n, 3), and their scores of "no answer", (num_windows,)."""
        if example_ids is None or spans is None or null_scores is None:  # a batch of rows that are no windows
            return
        self.candidates.append(candidate_rows(example_ids, spans, null_scores))

    def compute(self) -> dict[str, Tensor]:
        """``answer_exact_match`` and ``answer_f1``, from 0 to 1; nothing where no window was added."""
        found = self.candidates
        rows = torch.cat(found) if isinstance(found, list) and found else found
        if not isinstance(rows, Tensor) or not len(rows):
            return {}
        answers = best_answers(rows, self.null_score_threshold)
        known = {key: span for key, span in answers.items() if key >= 0}  # below 0: a rank had no row left
        sums = torch.zeros(2, dtype=torch.float64, device=rows.device)
        for example, (_, begin, end) in known.items():
            text, right = self.context_of(example)[begin:end], self.answers_of(example)
            sums += sums.new_tensor([exact_match(text, right), f1(text, right)])
        means = sums / max(len(known), 1)
        return {"answer_exact_match": means[0], "answer_f1": means[1]}


def columns_of(batch: Mapping[str, Any], *names: str) -> list[Tensor] | None:
    """Columns of a batch, or None if it lacks one of them."""
    columns = [batch[name] for name in names if isinstance(batch.get(name), Tensor)]
    return columns if len(columns) == len(names) else None


def name_of(data: Any, example: int) -> str | int:
    """What the data module calls an example; its number, if it has no names."""
    name: str | int = data.name_of(example) if hasattr(data, "name_of") else example
    return name
