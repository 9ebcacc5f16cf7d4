"""A text from a text: translation, summaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PretrainedConfig

from lightning_llm.compatibility import check_length
from lightning_llm.head_loss import LossKernel, unwrapped
from lightning_llm.loss import IGNORE_INDEX, TokenLoss, class_cross_entropy
from lightning_llm.tasks.head import HeadTask, check_range, model_inputs
from lightning_llm.tasks.masked_lm import row_nll
from lightning_llm.tasks.metrics import Means, TaskMetrics
from lightning_llm.tasks.target_logits import logits_at_targets, num_right


class Seq2Seq(HeadTask):
    """Predict a target text from a source: ``labels`` (batch, target_seq) int64, -100 after each text's end.

    The decoder reads the labels one place later, as transformers' models shift them, or the batch's
    ``decoder_input_ids``. With ``loss_kernel="chunked"`` logits are made where there is a label, with ``plain``
    everywhere.

    Args:
        loss_kernel: ``chunked`` or ``plain``.
        generate: Also write texts in validation, test and prediction: arguments of the model's ``generate``, such as
            ``{"max_new_tokens": 64, "num_beams": 4}``, or True for the model's own settings.
        tokenizer: Folder or hub id of what makes words of the texts; the data module's ``tokenizer`` if None.

    Raises:
        ValueError: If ``generate`` asks for anything but one text for each row.
    """

    name = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"
    generates = True
    collator = "DataCollatorForSeq2Seq"

    def __init__(
        self,
        loss_kernel: LossKernel = "chunked",
        *,
        generate: dict[str, Any] | bool = False,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(loss_kernel)
        self.generation = None if generate is False else {} if generate is True else dict(generate)
        for option, value in (self.generation or {}).items():
            if (option == "num_return_sequences" and value != 1) or (option == "return_dict_in_generate" and value):
                raise ValueError(f"Each row gets one text, its token ids: leave {option!r} out of `generate`.")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer) if tokenizer is not None else None

    def configure(
        self,
        config: PretrainedConfig,
        labels: Sequence[str] | int | None = None,
        *,
        datamodule: Any = None,
        is_built: bool = False,
    ) -> None:
        """Remember the tokenizer; let the decoder begin as T5's does where nothing else is said."""
        super().configure(config, labels, datamodule=datamodule, is_built=is_built)
        any_config: Any = config
        if getattr(config, "decoder_start_token_id", None) is None:
            any_config.decoder_start_token_id = config.get_text_config().pad_token_id
        self.tokenizer = self.tokenizer or getattr(datamodule, "tokenizer", None)

    def check(self, batch: Mapping[str, Any], config: PretrainedConfig) -> None:
        """Refuse targets that are too long, or outside the vocabulary."""
        super().check(batch, config)
        labels = batch.get("labels")
        if isinstance(labels, Tensor):
            if labels.ndim != 2:
                raise ValueError(
                    f"The `labels` of a seq2seq batch are the target's tokens, (batch, target_seq), but got "
                    f"{tuple(labels.shape)}. Is it the batch of another task? Then name that: "
                    f"LLMModule(task='sequence-classification'), for instance."
                )
            check_length(config, labels.shape[-1], "a batch of targets")
            size = config.get_text_config().vocab_size
            check_range(labels, size, batch, "labels", "They are ids of the model's own tokenizer.")

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLoss:
        """Sum the cross-entropy over the target tokens."""
        return class_cross_entropy(*self._at_targets(model, batch))

    def loss_of(self, output: Any, batch: Mapping[str, Any]) -> TokenLoss:
        """The same of all logits."""
        return class_cross_entropy(output.logits, self.target(batch))

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Call the model with what its decoder reads."""
        return model(**self._inputs(model, batch))

    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """With labels ``nll`` in nats and ``num_tokens``, (batch,) each; with ``generate`` ``token_ids``, ``texts``."""
        scores: dict[str, Any] = {}
        if isinstance(batch.get("labels"), Tensor):
            scores |= row_nll(self.outputs(model, batch), self.target(batch))
        if self.generation is not None:
            scores["token_ids"] = self._generated(model, batch)
            if self.tokenizer is not None:
                scores["texts"] = self._texts(scores["token_ids"])
        if not scores:
            raise ValueError(
                "A seq2seq batch without `labels` has nothing to score. To write texts, pass "
                "LLMModule(task_options={'generate': {'max_new_tokens': 64}})."
            )
        return scores

    def metrics(self, source_names: Sequence[str] = ()) -> TaskMetrics:
        """Loss, perplexity and accuracy of target tokens; BLEU, chrF and ROUGE of texts, where texts are written."""
        metrics: dict[str, Any] = {"means": Means(["loss", "accuracy"], perplexity=True)}
        if self.generation is not None:
            metrics |= text_metrics()
        return TaskMetrics(metrics)

    def evaluate(self, model: nn.Module, batch: Mapping[str, Any], metrics: TaskMetrics) -> None:
        """Add a batch."""
        logits, targets = self._at_targets(model, batch)
        loss = class_cross_entropy(logits, targets)
        means = {"loss": loss, "accuracy": TokenLoss(num_right(logits, targets), loss.num_tokens)}
        texts: dict[str, Any] = {}
        if self.generation is not None:
            if self.tokenizer is None:
                raise ValueError(
                    "Texts are compared as words, but no tokenizer is known that makes them. Give the data module a "
                    "`tokenizer`, or name one: task_options={'generate': ..., 'tokenizer': 'folder or hub id'}."
                )
            wanted = [[text] for text in self._texts(self.target(batch))]
            texts = {"preds": self._texts(self._generated(model, batch)), "target": wanted}
        metrics.update(means=means, **texts)

    # ---- details -------------------------------------------------------------------------------------------------

    def _inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = model_inputs(model, batch)
        if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
            base, labels = unwrapped(model), self.target(batch)
            if hasattr(base, "prepare_decoder_input_ids_from_labels"):
                inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
            else:
                inputs["labels"] = labels  # it shifts them itself
        return inputs

    def _at_targets(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits (targets, vocab) and targets (targets,)."""
        labels = self.target(batch)
        inputs = self._inputs(model, batch)
        if self.loss_kernel == "plain" or "labels" in inputs:
            return model(**inputs).logits.flatten(0, -2), labels.flatten()
        is_target = labels != IGNORE_INDEX
        return logits_at_targets(model, inputs, is_target), labels[is_target]

    def _generated(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Token ids, (batch, a width that depends on no batch)."""
        options = dict(self.generation or {})
        inputs = {
            k: v for k, v in model_inputs(model, batch).items() if not k.startswith("decoder") and k != "use_cache"
        }
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            options.setdefault("synced_gpus", True)  # a rank that is done goes on for the others' sake
        tokens: Tensor = model.generate(**inputs, **options)
        settings = model.generation_config
        new = options.get("max_new_tokens") or settings.max_new_tokens
        width = new + 1 if new else options.get("max_length") or settings.max_length or tokens.shape[1]
        padding = getattr(settings, "pad_token_id", None) or model.config.get_text_config().pad_token_id or 0
        return torch.nn.functional.pad(tokens, (0, max(width - tokens.shape[1], 0)), value=padding)

    def _texts(self, tokens: Tensor) -> list[str]:
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = tokens.masked_fill(tokens == IGNORE_INDEX, padding)
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts


def text_metrics() -> dict[str, Any]:
    """Metrics of texts against one reference each, which need neither network nor further packages."""
    from torchmetrics.text import CHRFScore, ROUGEScore, SacreBLEUScore

    return {
        "bleu": SacreBLEUScore(),
        "chrf": CHRFScore(),
        "rouge": ROUGEScore(rouge_keys=("rouge1", "rouge2", "rougeL")),
    }
