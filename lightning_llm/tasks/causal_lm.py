"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_llm.head_loss import causal_lm_loss, causal_lm_token_nll
from lightning_llm.loss import IGNORE_INDEX, TokenLoss, shift_labels, token_nll
from lightning_llm.metrics import LanguageModelingMetrics
from lightning_llm.tasks.base import Task, num_labels
from lightning_llm.unpacking import sum_rows
from lightning_llm.virtual_tokens import beside_prompt, num_virtual_tokens

# What a decoder takes from a batch; everything else in a batch (row_ids, num_bytes, ...) is for us.
_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
# Where documents begin in a single row, for flash attention; no other attention looks at it.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class CausalLM(Task):
    """Predict each token from those before it, in its own document."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    packs = True
    generates = True

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLoss:
        """Sum the cross-entropy over the batch's label tokens."""
        inputs = {**decoder_inputs(model, batch), "use_cache": False}
        return causal_lm_loss(model, inputs, labels_of(batch), loss_kernel=self.loss_kernel)

    def num_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Labels but each row's first."""
        return num_labels(shift_labels(labels_of(batch)))

    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Score each row: ``nll`` (rows,) in nats and ``num_tokens`` (rows,)."""
        labels = labels_of(batch)
        inputs = {**decoder_inputs(model, batch), "use_cache": False}
        if self.loss_kernel == "plain":
            labels = beside_prompt(model, labels)
            logits = model(**inputs).logits
            nll = token_nll(logits.reshape(*labels.shape, -1), labels)
        else:
            nll = causal_lm_token_nll(model, inputs, labels)
            labels = beside_prompt(model, labels)
        is_target = shift_labels(labels) != IGNORE_INDEX
        return {"nll": sum_rows(nll, batch), "num_tokens": sum_rows(is_target.long(), batch)}

    def metrics(self, source_names: Sequence[str] = ()) -> Metric:
        """Loss, perplexity, bits per byte and per word; of each source too, where sources have names."""
        return LanguageModelingMetrics(source_names)

    def evaluate(self, model: nn.Module, batch: Mapping[str, Any], metrics: Any) -> None:
        """Add a batch, with the bytes, words and sources that it knows of."""
        known = {name: batch[name] for name in ("num_bytes", "num_words") if name in batch}
        if getattr(metrics, "source_names", None) and "source_ids" in batch:
            scores = self.score(model, batch)
            metrics.update(TokenLoss(scores["nll"], scores["num_tokens"]), source_ids=batch["source_ids"], **known)
        else:
            metrics.update(self.loss(model, batch), **known)

    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Logits of shape (batch, seq, vocab).

        ``use_cache=False`` is part of the mathematics: with a cache, transformers does not look at
        ``position_ids`` and packed documents see each other (masking_utils.py).
        """
        shape = batch["input_ids"].shape
        logits: Tensor = model(**decoder_inputs(model, batch), use_cache=False).logits
        return logits[:, num_virtual_tokens(model) :].reshape(*shape, logits.shape[-1])


def decoder_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a decoder's ``forward`` takes of a batch, in the form in which its attention separates documents.

    Flash attention separates documents by restarting ``position_ids`` only in a batch of one row; with more rows
    it silently lets packed documents attend to each other (modeling_flash_attention_utils.py). So packed rows are
    laid end to end for it, (rows, seq) to (1, rows * seq), or go with the boundaries that the batch brings.
    """
    inputs = {key: batch[key] for key in _MODEL_INPUTS if batch.get(key) is not None}
    if num_virtual_tokens(model):  # peft counts positions from the prompt's first
        inputs.pop("position_ids", None)
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    if "flash" not in implementation or "attention_mask" in inputs:
        return inputs
    if len(inputs["input_ids"]) == 1:
        return inputs | {key: batch[key] for key in _BOUNDARIES if batch.get(key) is not None}
    return flatten_rows(inputs) if "position_ids" in inputs else inputs


def flatten_rows(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Lay packed rows end to end, (rows, seq) to (1, rows * seq).

    ``position_ids`` restart at each row's beginning, so documents of different rows stay apart too.
    """
    return {
        key: value.reshape(1, -1) if key in ("input_ids", "position_ids") else value for key, value in inputs.items()
    }


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """The batch's labels, (batch, seq).

    Raises:
        KeyError: If it has none.
        ValueError: If they are not of the tokens.
    """
    if "labels" not in batch:
        raise KeyError(
            f"A causal-lm batch needs `labels` (unshifted, -100 where there is no target), but got the keys "
            f"{sorted(batch)}. With transformers' collators use DataCollatorForLanguageModeling(mlm=False)."
        )
    labels: Tensor = batch["labels"]
    input_ids = batch.get("input_ids")
    if labels.ndim != 2 or (isinstance(input_ids, Tensor) and labels.shape != input_ids.shape):
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(
            f"The `labels` of a causal-lm batch are of its tokens, (batch, seq) as `input_ids`, but got "
            f"{tuple(labels.shape)} beside {shape}. Is it the batch of another task? Then name that: "
            f"LLMModule(task='sequence-classification'), for instance."
        )
    return labels
