"""Where in a text the answer to a question stands: the position of its first and of its last token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PretrainedConfig

from lightning_llm.head_loss import LossKernel
from lightning_llm.loss import IGNORE_INDEX, TokenLoss, accumulation_dtype, class_cross_entropy
from lightning_llm.tasks.base import num_labels
from lightning_llm.tasks.head import HeadTask
from lightning_llm.tasks.labels import set_labels
from lightning_llm.tasks.merging import (
    AnswerMetrics,
    best_answers,
    best_spans,
    candidate_rows,
    columns_of,
    name_of,
)
from lightning_llm.tasks.metrics import Means, TaskMetrics

LONGEST_ANSWER = 30  # tokens, as in transformers' example of SQuAD


class QuestionAnswering(HeadTask):
    """Find answers: ``start_positions`` and ``end_positions``, (batch,) int64, are places in the row.

    A place at or beyond the row's end is no target, one before its beginning is the first token, as in transformers.
    The loss is the cross-entropy over places, padding among them, summed over starts and ends; its weight is the number
    of starts and ends that are targets, two for a row with its answer in it. The mean is then transformers'
    ``(start_loss + end_loss) / 2`` wherever a batch has as many starts as ends; where a text is cut within an answer,
    every start and every end weighs the same, which holds for all cuts of a batch.

    Rows may be windows of questions. If batches say which, by ``example_ids`` (batch,), and which characters of its
    context a token stands for, by ``char_begins`` and ``char_ends`` (batch, seq), and the data module has
    ``context_of`` and ``answers_of``, answers are those of whole questions. ``null_positions`` (batch,) is the token
    that stands for "no answer"; the first, if left out.

    Args:
        loss_kernel: As for every task.
        null_score_threshold: As for :func:`~lightning_llm.tasks.merging.best_answers`.
    """

    name = "question-answering"
    auto_class = "AutoModelForQuestionAnswering"
    targets = ("start_positions", "end_positions")

    def __init__(self, loss_kernel: LossKernel = "chunked", *, null_score_threshold: float | None = None) -> None:
        super().__init__(loss_kernel)
        self.null_score_threshold = null_score_threshold
        # A function, for a copy of the module, as weight averaging makes one, is not to hold a copy of the data.
        self._data: Callable[[], Any] | None = None

    def configure(
        self,
        config: PretrainedConfig,
        labels: Sequence[str] | int | None = None,
        *,
        datamodule: Any = None,
        is_built: bool = False,
    ) -> None:
        """The head has two outputs a token, of starts and of ends."""
        super().configure(config, labels, datamodule=datamodule, is_built=is_built)
        set_labels(config, 2, is_built=is_built)
        if hasattr(datamodule, "context_of") and hasattr(datamodule, "answers_of"):
            self._data = lambda: datamodule

    def loss_of(self, output: Any, batch: Mapping[str, Any]) -> TokenLoss:
        """Sum the cross-entropy over starts and ends."""
        start, end = self._targets(output, batch)
        losses = class_cross_entropy(output.start_logits, start), class_cross_entropy(output.end_logits, end)
        return TokenLoss(losses[0].total + losses[1].total, losses[0].num_tokens + losses[1].num_tokens)

    def num_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Starts and ends that lie in the row, padding included."""
        start, end = self._places(batch, next(batch[name] for name in self.inputs if name in batch).shape[1])
        return num_labels(start) + num_labels(end)

    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Logits of starts and ends, (batch, seq, 2)."""
        output = self.run(model, batch)
        return torch.stack([output.start_logits, output.end_logits], -1)

    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``start_logits`` and ``end_logits`` (batch, seq); the likeliest answer's ``starts``, ``ends`` and ``scores``.

        An answer lies within a row's tokens and is 30 of them long at most; ``scores`` is its probability, (batch,).
        Of windows of questions also ``example_ids``, ``spans`` (batch, 20, 3), the best spans' scores and characters,
        and ``null_scores``, of which :func:`~lightning_llm.tasks.merging.best_answers` makes one answer a question.
        """
        output = self.run(model, batch)
        start, end = accumulation_dtype(output.start_logits), accumulation_dtype(output.end_logits)
        mask = batch.get("attention_mask")
        is_token = torch.ones_like(start, dtype=torch.bool) if mask is None else mask != 0
        first = start.masked_fill(~is_token, -torch.inf).softmax(-1)
        last = end.masked_fill(~is_token, -torch.inf).softmax(-1)
        pairs = (first[:, :, None] * last[:, None, :]).triu().tril(LONGEST_ANSWER - 1)
        scores, index = pairs.flatten(1).max(-1)
        first_token, last_token = index // start.shape[1], index % start.shape[1]
        logits = {"start_logits": output.start_logits, "end_logits": output.end_logits}
        found = {**logits, "starts": first_token, "ends": last_token, "scores": scores}
        return {**found, **self._windows(output, batch)}

    def merged(self, outputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """An answer a question: ``id``, ``answer`` (empty for none), characters ``begin`` to ``end``, ``score``."""
        if self._data is None or not all("spans" in output for output in outputs):
            return None
        data = self._data()
        rows = [candidate_rows(output["example_ids"], output["spans"], output["null_scores"]) for output in outputs]
        lines = []
        for example, (score, begin, end) in best_answers(torch.cat(rows), self.null_score_threshold).items():
            if example >= 0:  # below 0: a rank had no row left
                text = data.context_of(example)[begin:end]
                begin += len(text) - len(text.lstrip())
                answer = {"answer": text.strip(), "begin": begin, "end": begin + len(text.strip()), "score": score}
                lines.append({"id": name_of(data, example), **answer})
        return lines

    def metrics(self, source_names: Sequence[str] = ()) -> TaskMetrics:
        """The loss; how many starts, ends, and both of a row are right; exact match and F1 of whole questions."""
        found: dict[str, Metric] = {"means": Means(["loss", "start_accuracy", "end_accuracy", "exact_match"])}
        if self._data is not None:
            data = self._data  # functions, as above
            texts = (lambda example: data().context_of(example), lambda example: data().answers_of(example))
            found["answers"] = AnswerMetrics(*texts, self.null_score_threshold)
        return TaskMetrics(found)

    def evaluate(self, model: nn.Module, batch: Mapping[str, Any], metrics: TaskMetrics) -> None:
        """Add a batch."""
        output = self.run(model, batch)
        start, end = self._targets(output, batch)
        right_starts, right_ends = output.start_logits.argmax(-1) == start, output.end_logits.argmax(-1) == end
        has_start, has_end = start != IGNORE_INDEX, end != IGNORE_INDEX
        means = {
            "loss": self.loss_of(output, batch),
            "start_accuracy": TokenLoss(right_starts.sum(), has_start.sum()),
            "end_accuracy": TokenLoss(right_ends.sum(), has_end.sum()),
            "exact_match": TokenLoss((right_starts & right_ends).sum(), (has_start & has_end).sum()),
        }
        windows = {} if self._data is None else self._windows(output, batch)
        metrics.update(means=means, **windows)

    def _windows(self, output: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The best spans of windows of questions; nothing of other rows."""
        columns = columns_of(batch, "example_ids", "char_begins", "char_ends")
        if columns is None:
            return {}
        example_ids, begins, ends = columns
        start, end = output.start_logits, output.end_logits
        spans = best_spans(start, end, begins, ends, max_answer_tokens=LONGEST_ANSWER)
        null = batch.get("null_positions", torch.zeros_like(example_ids))[:, None]
        null_scores = start.gather(1, null).double() + end.gather(1, null).double()
        return {"example_ids": example_ids, "spans": spans, "null_scores": null_scores[:, 0]}

    def _targets(self, output: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Places of starts and ends, (batch,) each, -100 where there is none."""
        return self._places(batch, output.start_logits.shape[1])

    def _places(self, batch: Mapping[str, Any], length: int) -> tuple[Tensor, Tensor]:
        places = [self.target(batch, name).reshape(-1).clamp(min=0) for name in self.targets]
        start, end = (place.masked_fill(place >= length, IGNORE_INDEX) for place in places)
        return start, end
