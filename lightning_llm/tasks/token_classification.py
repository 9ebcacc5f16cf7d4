"""A class for each token: names, parts of speech."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_llm.head_loss import LossKernel
from lightning_llm.loss import IGNORE_INDEX, TokenLoss, accumulation_dtype, class_cross_entropy
from lightning_llm.tasks.head import HeadTask, check_range
from lightning_llm.tasks.merging import DocumentSpanMetrics, merged_tokens, name_of
from lightning_llm.tasks.metrics import Means, TaskMetrics, marks_spans

_PLACES = ("example_ids", "token_positions")


class TokenClassification(HeadTask):
    """Classify each token; ``labels`` are (batch, seq) int64, -100 where there is none (special tokens, word ends).

    Rows may be windows of documents that overlap. Then each token is to have its label in one of them, that in which it
    has most context, and spans are those of whole documents if batches say where the tokens belong: ``example_ids``
    (batch,) the document, ``token_positions`` (batch, seq) the place in it, -1 for what another window decides.
    """

    name = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    has_labels = True
    collator = "DataCollatorForTokenClassification"

    def __init__(self, loss_kernel: LossKernel = "chunked") -> None:
        super().__init__(loss_kernel)
        self.tags: list[str] = []
        self._data: Callable[[], Any] = lambda: None  # a function, as for questions

    def configure(
        self,
        config: PretrainedConfig,
        labels: Sequence[str] | int | None = None,
        *,
        datamodule: Any = None,
        is_built: bool = False,
    ) -> None:
        """Write the classes into the configuration."""
        any_config: Any = config
        super().configure(config, labels, datamodule=datamodule, is_built=is_built)
        self.tags = [str(any_config.id2label[index]) for index in range(any_config.num_labels)]
        if datamodule is not None:
            self._data = lambda: datamodule

    def check(self, batch: Mapping[str, Any], config: PretrainedConfig) -> None:
        """Refuse labels for which there is no class."""
        super().check(batch, config)
        labels = batch.get("labels")
        if isinstance(labels, Tensor):
            check_range(labels, len(self.tags), batch, "labels", "Pass LLMModule(labels=...) all names.")

    def loss_of(self, output: Any, batch: Mapping[str, Any]) -> TokenLoss:
        """Sum the cross-entropy over the labelled tokens."""
        return class_cross_entropy(output.logits, self.target(batch))

    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``probabilities`` (batch, seq, num_labels) and ``predictions`` (batch, seq).

        Of windows also ``example_ids`` and ``token_positions``, by which
        :func:`~lightning_llm.tasks.merging.merged_tokens` puts documents together.
        """
        logits = accumulation_dtype(self.outputs(model, batch))
        places = {name: batch[name] for name in _PLACES if name in batch}
        return {"probabilities": logits.softmax(-1), "predictions": logits.argmax(-1), **places}

    def merged(self, outputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """An entry a document: its ``id`` and what the data module's ``described`` makes of it, else its ``tags``."""
        if not all(name in output for name in _PLACES for output in outputs):
            return None
        tokens = []
        for output in outputs:
            places, examples = output["token_positions"], output["example_ids"]
            columns = torch.stack([examples[:, None].expand_as(places), places, output["predictions"]], -1)
            tokens.append(columns[places >= 0])
        examples, places, classes = torch.cat(tokens).unbind(-1)
        data, lines = self._data(), []
        for example, values in merged_tokens(examples, places[:, None], classes[:, None]).items():
            tags = [self.tags[value] for value in values.tolist()]
            described = data.described(example, tags) if hasattr(data, "described") else {"tags": tags}
            lines.append({"id": name_of(data, example), **described})
        return lines

    def metrics(self, source_names: Sequence[str] = ()) -> TaskMetrics:
        """Loss, accuracy and macro F1 of tokens; precision, recall and F1 of spans where classes are tags of spans."""
        from torchmetrics.classification import MulticlassF1Score

        f1 = MulticlassF1Score(max(len(self.tags), 2), average="macro", ignore_index=-100, validate_args=False)
        spans = {"spans": DocumentSpanMetrics(self.tags)} if marks_spans(self.tags) else {}
        return TaskMetrics({"means": Means(["loss", "accuracy"]), "f1": f1, **spans})

    def evaluate(self, model: nn.Module, batch: Mapping[str, Any], metrics: TaskMetrics) -> None:
        """Add a batch."""
        output, labels = self.run(model, batch), self.target(batch)
        loss, preds = self.loss_of(output, batch), output.logits.argmax(-1)
        right = ((preds == labels) & (labels != IGNORE_INDEX)).sum()
        means = {"loss": loss, "accuracy": TokenLoss(right, loss.num_tokens)}
        places = {name: batch[name] for name in _PLACES if name in batch}
        metrics.update(means=means, preds=preds, target=labels, **places)
