"""Tokens that were hidden, from those around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_llm.loss import IGNORE_INDEX, TokenLoss, accumulation_dtype, class_cross_entropy
from lightning_llm.tasks.head import HeadTask, check_range, model_inputs
from lightning_llm.tasks.metrics import Means, TaskMetrics
from lightning_llm.tasks.target_logits import logits_at_targets, num_right

_FEW = 16  # labels of which each may stand in sight by chance: collators leave one in ten of them


class MaskedLM(HeadTask):
    """Predict hidden tokens; ``labels`` (batch, seq) int64 stand at their own positions, -100 elsewhere.

    With ``loss_kernel="chunked"`` logits are made for labelled tokens only, with ``plain`` for all.
    """

    name = "masked-lm"
    auto_class = "AutoModelForMaskedLM"
    collator = "DataCollatorForLanguageModeling(mlm=True)"

    def check(self, batch: Mapping[str, Any], config: PretrainedConfig) -> None:
        """Refuse labels outside the vocabulary, and batches in which every label stands in sight."""
        super().check(batch, config)
        labels = batch.get("labels")
        if isinstance(labels, Tensor):
            size = config.get_text_config().vocab_size
            check_range(labels, size, batch, "labels", "They are ids of the model's own tokenizer.")
            _check_hidden(labels, batch.get("input_ids"))

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLoss:
        """Sum the cross-entropy over the hidden tokens."""
        return class_cross_entropy(*self._at_targets(model, batch))

    def loss_of(self, output: Any, batch: Mapping[str, Any]) -> TokenLoss:
        """The same of all logits."""
        return class_cross_entropy(output.logits, self.target(batch))

    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``predictions`` (batch, seq); with labels also ``nll`` in nats and ``num_tokens``, (batch,) each."""
        logits = accumulation_dtype(self.outputs(model, batch))
        scores = {"predictions": logits.argmax(-1)}
        if isinstance(batch.get("labels"), Tensor):
            scores |= row_nll(logits, self.target(batch))
        return scores

    def metrics(self, source_names: Sequence[str] = ()) -> TaskMetrics:
        """Loss, perplexity and accuracy over the hidden tokens."""
        return TaskMetrics({"means": Means(["loss", "accuracy"], perplexity=True)})

    def evaluate(self, model: nn.Module, batch: Mapping[str, Any], metrics: TaskMetrics) -> None:
        """Add a batch."""
        logits, targets = self._at_targets(model, batch)
        loss = class_cross_entropy(logits, targets)
        metrics.update(means={"loss": loss, "accuracy": TokenLoss(num_right(logits, targets), loss.num_tokens)})

    def _at_targets(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits (targets, vocab) and targets (targets,)."""
        labels = self.target(batch)
        is_target = labels != IGNORE_INDEX
        if self.loss_kernel == "plain":
            return self.outputs(model, batch).flatten(0, -2), labels.flatten()
        return logits_at_targets(model, model_inputs(model, batch), is_target), labels[is_target]


def _check_hidden(labels: Tensor, input_ids: Any) -> None:
    """Batches for a decoder have labels too, but nothing is hidden in them: a model would learn to copy."""
    if labels.device.type != "cpu" or not isinstance(input_ids, Tensor) or input_ids.shape != labels.shape:
        return
    is_target = labels != IGNORE_INDEX
    if int(is_target.sum()) > _FEW and torch.equal(input_ids[is_target], labels[is_target]):
        raise ValueError(
            "No token is hidden in this masked-lm batch: each label is the token that `input_ids` shows there. "
            "transformers' DataCollatorForLanguageModeling(mlm=True) hides some."
        )


def row_nll(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``nll`` summed in nats and ``num_tokens`` of each row, from logits (batch, seq, vocab) beside labels."""
    nll = torch.nn.functional.cross_entropy(
        accumulation_dtype(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return {"nll": nll.view(labels.shape).sum(1), "num_tokens": (labels != IGNORE_INDEX).sum(1)}
