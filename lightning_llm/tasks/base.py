"""The interface between ``LLMModule`` and a task: which model class, which loss, which metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_llm.loss import TokenLoss


class Task(ABC):
    """One kind of training: the module asks it for the loss and the metrics, and knows nothing of heads.

    Attributes:
        name: What users write in ``LLMModule(task=...)``.
        auto_class: The transformers class that builds the model, for instance ``AutoModelForCausalLM``.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLoss:
        """Run the model on a batch; return the summed loss and its weight."""

    @abstractmethod
    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the model on a batch; return one value or more per row, for prediction."""

    @abstractmethod
    def packing_leak(self, model: nn.Module, device: torch.device) -> float:
        """How much packed documents see of each other; 0 if they are isolated."""

    @abstractmethod
    def metrics(self) -> Metric:
        """Make the metric that validation and test fill with ``update(loss, num_bytes=...)``."""
