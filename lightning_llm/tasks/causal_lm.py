"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_llm.loss import IGNORE_INDEX, TokenLoss, shift_labels, token_cross_entropy, token_nll
from lightning_llm.metrics import LanguageModelingMetrics
from lightning_llm.tasks.base import Task

# What a decoder takes from a batch; everything else in a batch (row_ids, num_bytes, ...) is for us.
_MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


class CausalLM(Task):
    """Predict each token from those before it, in its own document."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLoss:
        """Sum the cross-entropy over the batch's label tokens."""
        return token_cross_entropy(self._logits(model, batch), _labels(batch))

    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Score each row: ``nll`` (batch,) in nats and ``num_tokens`` (batch,)."""
        labels = _labels(batch)
        nll = token_nll(self._logits(model, batch), labels)
        return {"nll": nll.sum(1), "num_tokens": (shift_labels(labels) != IGNORE_INDEX).sum(1)}

    def packing_leak(self, model: nn.Module, device: torch.device) -> float:
        """Change the first of two packed documents; compare the change in the second's logits with that in its own."""
        vocab_size = int(model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
        first, other, second = (torch.arange(8) * step % vocab_size for step in (1, 3, 5))
        rows = torch.stack([torch.cat([first, second]), torch.cat([other, second])]).to(device)
        positions = torch.arange(8, device=device).repeat(2).expand(2, -1)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                logits = self._logits(model, {"input_ids": rows, "position_ids": positions}).float()
        finally:
            model.train(was_training)
        change = (logits[0] - logits[1]).abs().amax(-1)  # (seq,)
        return float(change[8:].max() / change[:8].max().clamp(min=1e-12))

    def metrics(self) -> Metric:
        """Loss, perplexity and bits per byte."""
        return LanguageModelingMetrics()

    @staticmethod
    def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Logits of shape (batch, seq, vocab).

        ``use_cache=False`` is part of the mathematics: with a cache, transformers does not look at
        ``position_ids`` and packed documents see each other (masking_utils.py).
        """
        inputs = {key: batch[key] for key in _MODEL_INPUTS if batch.get(key) is not None}
        shape = inputs["input_ids"].shape
        implementation = getattr(model.config, "_attn_implementation", None) or ""
        if "flash" in implementation and "position_ids" in inputs and "attention_mask" not in inputs:
            inputs = flatten_rows(inputs)
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits.view(*shape, logits.shape[-1])


def flatten_rows(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Lay packed rows end to end, (batch, seq) to (1, batch * seq).

    Flash attention separates documents by restarting ``position_ids`` only in a batch of one row; with more rows
    it silently lets packed documents attend to each other (modeling_flash_attention_utils.py).
    """
    return {
        key: value.reshape(1, -1) if key in ("input_ids", "position_ids") else value for key, value in inputs.items()
    }


def _labels(batch: Mapping[str, Any]) -> Tensor:
    if "labels" not in batch:
        raise KeyError(
            f"A causal-lm batch needs `labels` (unshifted, -100 where there is no target), but got the keys "
            f"{sorted(batch)}. With transformers' collators use DataCollatorForLanguageModeling(mlm=False)."
        )
    labels: Tensor = batch["labels"]
    return labels
