"""Preferences in windows along the sequence: the same loss and gradient, in the memory of a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_llm.tasks.dpo import DPO
from lightning_llm.windowed import windowed_nll


class WindowedDPO(DPO):
    """:class:`DPO`, both answers cut into windows; see :func:`~lightning_llm.windowed.windowed_nll`.

    Args:
        window: Tokens in a window.
        offload: Whether keys, values and their gradients are kept in host memory.
        **options: As for :class:`DPO`.
    """

    def __init__(self, window: int, offload: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.window: int = window
        self.offload = offload

    def token_nll(self, model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
        """Window by window."""
        mask = rows.get("attention_mask")
        inputs = (model, rows["input_ids"], rows["labels"])
        return windowed_nll(*inputs, window=self.window, attention_mask=mask, offload=self.offload)
