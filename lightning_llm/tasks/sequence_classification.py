"""A label for each row: one of several classes, several of them at once, or numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from lightning_llm.head_loss import LossKernel
from lightning_llm.loss import TokenLoss, accumulation_dtype, class_cross_entropy
from lightning_llm.tasks.base import num_labels
from lightning_llm.tasks.documents import (
    WindowPooling,
    attach_attention,
    check_documents,
    check_pooling,
    pooled_logits,
)
from lightning_llm.tasks.head import HeadTask, check_range
from lightning_llm.tasks.metrics import Means, TaskMetrics

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


class SequenceClassification(HeadTask):
    """Classify each row, or give it a number.

    ``labels`` are (batch,) int64 for one class a row, -100 for none; (batch, num_labels) from 0 to 1 for several;
    (batch,) or (batch, num_labels) numbers for regression, NaN for none. The loss is the cross-entropy, the binary
    cross-entropy, or the squared error, and its weight the number of rows or, with several values a row, of values.

    Where a batch has ``document_ids`` (num_windows,), its rows are windows of documents, all windows of each, and
    labels, decisions and metrics are those of documents: the windows' vectors are pooled before the last layer.

    Args:
        loss_kernel: As for every task; there is no large vocabulary here.
        pooling: How windows are pooled: ``mean``, ``token_mean`` (by the tokens that no earlier window holds), ``max``
            of each feature, ``attention`` (a weighted mean, whose weights are trained and saved with the model), or
            the ``first`` alone. If None, as the configuration says, where this wrote it before, else ``mean``.
        problem_type: transformers' word for what the labels are. If None, as the data module or the model's
            configuration says, else ``regression`` for a single label and ``single_label_classification`` for more.

    Raises:
        ValueError: For another word.

    References:
        Pappagari et al., Hierarchical Transformers for Long Document Classification, arXiv 1910.10781; Sun et al., How
        to Fine-Tune BERT for Text Classification, arXiv 1905.05583, section 5.3.1.
    """

    name = "sequence-classification"
    auto_class = "AutoModelForSequenceClassification"
    has_labels = True

    def __init__(
        self,
        loss_kernel: LossKernel = "chunked",
        *,
        problem_type: ProblemType | None = None,
        pooling: WindowPooling | None = None,
    ) -> None:
        if problem_type is not None and problem_type not in get_args(ProblemType):
            raise ValueError(f"`problem_type` must be one of {', '.join(get_args(ProblemType))}, not {problem_type!r}.")
        check_pooling(pooling)
        super().__init__(loss_kernel)
        self.pooling: WindowPooling = pooling or "mean"
        self._given_pooling = pooling
        self._given: str | None = problem_type
        self._of_model: str | None = ""  # not looked at yet
        self.problem_type: str = problem_type or "single_label_classification"
        self.num_labels = 2

    def configure(
        self,
        config: PretrainedConfig,
        labels: Sequence[str] | int | None = None,
        *,
        datamodule: Any = None,
        is_built: bool = False,
    ) -> None:
        """Write classes and problem type into the configuration, for the head and for ``pipeline``."""
        any_config: Any = config
        was_number = any_config.num_labels == 1
        super().configure(config, labels, datamodule=datamodule, is_built=is_built)
        self.num_labels = int(any_config.num_labels)
        if self._of_model == "":  # what is written below is no word of the model's own
            self._of_model = any_config.problem_type
        if was_number != (self.num_labels == 1) and self._of_model != "multi_label_classification":
            self._of_model = None  # said of the head that is replaced: a number became classes, or they a number
        known = self._given or getattr(datamodule, "problem_type", None) or self._of_model
        self.problem_type = known or ("regression" if self.num_labels == 1 else "single_label_classification")
        any_config.problem_type = self.problem_type
        self.pooling = self._given_pooling or getattr(config, "window_pooling", None) or "mean"
        if self._given_pooling is not None:
            any_config.window_pooling = self.pooling
        tokenizer = getattr(datamodule, "tokenizer", None)
        if tokenizer is not None and getattr(config, "pad_token_id", 0) is None:  # decoders look for a row's end
            # One without a padding token, as GPT-2's, has the data module pad with the end of the text.
            pads_with = (tokenizer.pad_token_id, tokenizer.eos_token_id)
            any_config.pad_token_id = next((token for token in pads_with if token is not None), None)

    def check(self, batch: Mapping[str, Any], config: PretrainedConfig) -> None:
        """Refuse labels that are not of the kind and in the range that the model has classes for."""
        super().check(batch, config)
        check_documents(batch)
        labels = batch.get("labels")
        if isinstance(labels, Tensor):
            self._check_kind(labels)
            if self.problem_type == "single_label_classification":
                check_range(labels, self.num_labels, batch, "labels", "Pass LLMModule(labels=...) all names.")
            elif self.problem_type == "multi_label_classification" and labels.device.type == "cpu":
                outside = ((labels < 0) | (labels > 1)).flatten(1).any(1)
                if bool(outside.any()):
                    row = int(outside.nonzero()[0])
                    raise ValueError(
                        f"`labels` of several classes must lie in 0..1, but row {row} of the batch has others."
                    )

    def complete(self, model: nn.Module, source: Any = None) -> nn.Module:
        """Add the attention over windows, where that pools them."""
        if self.pooling == "attention":
            attach_attention(model, self.num_labels, source)
        return model

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Call the model; of documents in windows, with logits of each document."""
        if "document_ids" not in batch and self.pooling != "attention":  # whose weights have a gradient in any case
            return super().run(model, batch)
        return SequenceClassifierOutput(logits=pooled_logits(model, batch, super().run, self.num_labels, self.pooling))

    def loss_of(self, output: Any, batch: Mapping[str, Any]) -> TokenLoss:
        """Sum the loss over rows, or over all their values."""
        logits, labels = output.logits, self.target(batch)
        if self.problem_type == "single_label_classification":
            return class_cross_entropy(logits, labels)
        logits = accumulation_dtype(logits)
        labels = labels.to(logits.dtype).reshape(logits.shape)
        is_target = ~labels.isnan()
        known = torch.where(is_target, labels, 0.0)
        if self.problem_type == "regression":
            losses = (logits - known).square()
        else:
            losses = F.binary_cross_entropy_with_logits(logits, known, reduction="none")
        return TokenLoss(torch.where(is_target, losses, 0.0).sum(), is_target.sum())

    def num_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Rows with a class; else their values, of which any whole number is one."""
        labels = batch["labels"]
        return num_labels(labels if self.problem_type == "single_label_classification" else labels.double())

    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``logits``, ``probabilities`` (batch, num_labels) and ``predictions`` (batch,); ``values`` in regression."""
        logits = accumulation_dtype(self.outputs(model, batch))
        if self.problem_type == "regression":
            return {"values": logits.squeeze(-1) if self.num_labels == 1 else logits}
        if self.problem_type == "multi_label_classification":
            probabilities = logits.sigmoid()
            return {"logits": logits, "probabilities": probabilities, "predictions": (probabilities > 0.5).long()}
        return {"logits": logits, "probabilities": logits.softmax(-1), "predictions": logits.argmax(-1)}

    def metrics(self, source_names: Sequence[str] = ()) -> TaskMetrics:
        """The loss, with accuracy and macro F1; macro F1 and exact match; or squared error and correlations."""
        from torchmetrics import classification as c
        from torchmetrics import regression as r

        number = self.num_labels
        if self.problem_type == "single_label_classification":
            number = max(number, 2)
            return TaskMetrics(
                {
                    "loss": Means(["loss"]),
                    "accuracy": c.MulticlassAccuracy(number, average="micro", ignore_index=-100, validate_args=False),
                    "f1": c.MulticlassF1Score(number, average="macro", ignore_index=-100, validate_args=False),
                }
            )
        if self.problem_type == "multi_label_classification":
            return TaskMetrics(
                {
                    "loss": Means(["loss"]),
                    "exact_match": c.MultilabelExactMatch(number, validate_args=False),
                    "f1": c.MultilabelF1Score(number, average="macro", validate_args=False),
                }
            )
        correlations = {"pearson": r.PearsonCorrCoef(number), "spearman": r.SpearmanCorrCoef(number)}
        return TaskMetrics({"loss": Means(["loss"]), "mse": r.MeanSquaredError(num_outputs=1), **correlations})

    def evaluate(self, model: nn.Module, batch: Mapping[str, Any], metrics: TaskMetrics) -> None:
        """Add a batch."""
        output, labels = self.run(model, batch), self.target(batch)
        logits = output.logits
        if self.problem_type == "single_label_classification":
            shown = {"preds": logits.argmax(-1), "target": labels.view(-1)}
        elif self.problem_type == "multi_label_classification":
            shown = {"preds": (logits > 0).long(), "target": (labels > 0.5).long()}
        else:
            logits = accumulation_dtype(logits)
            shape = logits.shape[:1] if self.num_labels == 1 else logits.shape
            shown = {"preds": logits.reshape(shape), "target": labels.to(logits.dtype).reshape(shape)}
        if labels.is_floating_point():  # rows that lack a value count in the loss alone, by those that they have
            is_whole = ~labels.isnan().flatten(1).any(1) if labels.ndim > 1 else ~labels.isnan()
            shown = {name: values[is_whole] for name, values in shown.items()}
        metrics.update(means={"loss": self.loss_of(output, batch)}, **shown)

    def _check_kind(self, labels: Tensor) -> None:
        is_single = self.problem_type == "single_label_classification"
        if is_single and (labels.is_floating_point() or labels.ndim != 1):
            several = labels.ndim == 2 and labels.shape[1] == self.num_labels
            kind = "multi_label_classification" if several else "regression"
            advice = f"For such labels pass LLMModule(task_options={{'problem_type': '{kind}'}})."
            if not several and not labels.is_floating_point():
                advice = "Give each row the number of its class."
            raise ValueError(
                f"`labels` of one class a row are (batch,) int64, but got {tuple(labels.shape)} {labels.dtype}. "
                f"{advice}"
            )
        if not is_single and labels.shape[1:].numel() != self.num_labels:
            raise ValueError(
                f"`labels` of a {self.problem_type} with {self.num_labels} labels have as many values a row, but got "
                f"the shape {tuple(labels.shape)}. Pass LLMModule(labels=...) their number or names."
            )
