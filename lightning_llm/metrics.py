"""Token-weighted evaluation: sums over tokens on every rank, one division at the end."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_llm.loss import TokenLoss


class LanguageModelingMetrics(Metric):
    r"""Loss, perplexity and bits per byte over a whole data set, independent of how it was cut into batches.

    .. math:: L = \frac{\sum_t \mathrm{nll}_t}{\sum_t 1}, \quad \mathrm{ppl} = e^L, \quad
              \mathrm{bpb} = \frac{\sum_t \mathrm{nll}_t}{\ln 2 \cdot \mathrm{bytes}}

    Sums are kept in float64 (float32 on devices without it) and added over ranks before the division, so ranks
    with unequal numbers of tokens weigh what they hold. Bits per byte compares models with different
    tokenizers; it is reported where the batches say how many bytes of text their label tokens stand for.

    Example:
        >>> metrics = LanguageModelingMetrics()
        >>> metrics.update(TokenLoss(torch.tensor(6.0), torch.tensor(3)), num_bytes=torch.tensor(12.0))
        >>> metrics.update(TokenLoss(torch.tensor(2.0), torch.tensor(1)), num_bytes=torch.tensor(4.0))
        >>> {name: round(value.item(), 4) for name, value in metrics.compute().items()}
        {'loss': 2.0, 'perplexity': 7.3891, 'bits_per_byte': 0.7213}
    """

    full_state_update = False
    total_nats: Tensor
    num_tokens: Tensor
    num_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total_nats", "num_tokens", "num_bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Move to a device, but keep the type: a bfloat16 model takes its modules along, and sums would stop growing.

        Apple's devices have no float64; the sums are float32 there.
        """

        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0)).device
            return (tensor.float() if device.type == "mps" else tensor).to(device)

        return super()._apply(move, *args, **kwargs)

    def update(self, loss: TokenLoss, num_bytes: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            loss: The batch's summed loss in nats and its number of label tokens.
            num_bytes: UTF-8 bytes that the label tokens stand for; any shape, summed.
        """
        self.total_nats += loss.total.detach().to(self.total_nats)
        self.num_tokens += loss.num_tokens.to(self.num_tokens)
        if num_bytes is not None:
            self.num_bytes += num_bytes.sum().to(self.num_bytes)

    def compute(self) -> dict[str, Tensor]:
        """Divide the sums: ``loss`` in nats per token, ``perplexity``, and ``bits_per_byte`` if bytes are known."""
        loss = self.total_nats / self.num_tokens
        values = {"loss": loss, "perplexity": loss.exp()}
        if self.num_bytes > 0:
            values["bits_per_byte"] = self.total_nats / (math.log(2) * self.num_bytes)
        return values
