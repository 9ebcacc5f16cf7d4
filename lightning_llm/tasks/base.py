"""The interface between ``LLMModule`` and a task: which model class, which loss, which metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_llm.head_loss import LossKernel
from lightning_llm.loss import TokenLoss


class Task(ABC):
    """One kind of training: the module asks it for the loss and the metrics, and knows nothing of heads.

    Attributes:
        name: What users write in ``LLMModule(task=...)``.
        auto_class: The transformers class that builds the model, for instance ``AutoModelForCausalLM``.

    Args:
        loss_kernel: How a task with a large vocabulary computes its loss: ``chunked``, ``plain``, ``liger``, ``cce``.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]

    def __init__(self, loss_kernel: LossKernel = "chunked") -> None:
        self.loss_kernel: LossKernel = loss_kernel

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLoss:
        """Run the model on a batch; return the summed loss and its weight."""

    @abstractmethod
    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the model on a batch; return values per row: ``nll``, summed in nats, and ``num_tokens``.

        Where a batch without padding names its documents one by one, they are its rows.
        """

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Run the model on a batch as training does; return (batch, seq, features), for instance logits.

        The test of a model's isolation calls this: packed with ``position_ids``, separate with ``input_ids`` alone.
        """

    @abstractmethod
    def metrics(self, source_names: Sequence[str] = ()) -> Metric:
        """Make the metric that validation and test fill.

        Its ``update`` takes the loss and, by name, those of ``num_bytes``, ``num_words`` and ``source_ids`` that a
        batch has; the last one only where there are ``source_names``, and with a loss for each row.

        Args:
            source_names: Of a mixture, to be evaluated one by one beside the whole.
        """
