"""Next-token prediction in windows along the sequence: the same loss and gradient, in the memory of a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_llm.loss import IGNORE_INDEX, TokenLoss, shift_labels
from lightning_llm.tasks.causal_lm import CausalLM, labels_of
from lightning_llm.unpacking import sum_rows
from lightning_llm.windowed import windowed_loss, windowed_nll


class WindowedCausalLM(CausalLM):
    """:class:`CausalLM`, cut into windows of ``window`` tokens; see :func:`~lightning_llm.windowed.windowed_loss`.

    Args:
        window: Tokens in a window.
        offload: Whether keys, values and their gradients are kept in host memory.
    """

    def __init__(self, window: int, offload: bool = False) -> None:
        super().__init__(loss_kernel="chunked")
        self.window: int = window
        self.offload = offload

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLoss:
        """Sum the cross-entropy over the batch's label tokens; its gradient is made window by window."""
        # A gradient made in forward is not scaled yet, and would lose float16's small numbers.
        when: Any = "backward" if _is_float16(model, batch["input_ids"].device) else "forward"
        return windowed_loss(model, **self._inputs(batch), when=when)

    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Score each row: ``nll`` (rows,) in nats and ``num_tokens`` (rows,)."""
        nll = windowed_nll(model, **self._inputs(batch))
        is_target = shift_labels(labels_of(batch)) != IGNORE_INDEX
        return {"nll": sum_rows(nll, batch), "num_tokens": sum_rows(is_target.long(), batch)}

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "input_ids": batch["input_ids"],
            "labels": labels_of(batch),
            "attention_mask": batch.get("attention_mask"),
            "position_ids": batch.get("position_ids"),
            "window": self.window,
            "offload": self.offload,
        }


def _is_float16(model: nn.Module, device: torch.device) -> bool:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type) == torch.float16
    return any(parameter.dtype == torch.float16 for parameter in model.parameters())
