"""Next-token prediction with each row's tokens spread over ranks: the same loss and gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lightning_llm.context_parallel.loss import context_parallel_logits, context_parallel_loss, context_parallel_nll
from lightning_llm.head_loss import LossKernel
from lightning_llm.loss import IGNORE_INDEX, TokenLoss, shift_labels
from lightning_llm.tasks.causal_lm import CausalLM, labels_of
from lightning_llm.unpacking import sum_rows


class ContextParallelCausalLM(CausalLM):
    """:class:`CausalLM` on rows that ranks share; see :func:`~lightning_llm.context_parallel_loss`.

    Every rank of ``group`` gets the same values, of the whole rows.

    Args:
        loss_kernel: ``plain`` or ``chunked``.

    Attributes:
        group: The ranks that share a row; None until the Trainer has made its mesh.

    Raises:
        ValueError: For another kernel.
    """

    def __init__(self, loss_kernel: LossKernel = "chunked") -> None:
        if loss_kernel not in ("plain", "chunked"):
            raise ValueError(
                f"`context_parallel=True` goes with loss_kernel 'plain' or 'chunked', not {loss_kernel!r}."
            )
        super().__init__(loss_kernel)
        self.group: dist.ProcessGroup | None = None

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLoss:
        """Sum the cross-entropy over the rows' label tokens, of all ranks that share them."""
        return context_parallel_loss(model, **self._inputs(batch))

    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Score each row: ``nll`` (rows,) in nats and ``num_tokens`` (rows,)."""
        nll = context_parallel_nll(model, **self._inputs(batch))
        is_target = shift_labels(labels_of(batch)) != IGNORE_INDEX
        return {"nll": sum_rows(nll, batch), "num_tokens": sum_rows(is_target.long(), batch)}

    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Logits of shape (batch, seq, vocab), made as training makes them, without a gradient."""
        position_ids = batch.get("position_ids")
        return context_parallel_logits(model, batch["input_ids"], group=self._group(), position_ids=position_ids)

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "input_ids": batch["input_ids"],
            "labels": labels_of(batch),
            "group": self._group(),
            "attention_mask": batch.get("attention_mask"),
            "position_ids": batch.get("position_ids"),
            "loss_kernel": self.loss_kernel,
        }

    def _group(self) -> dist.ProcessGroup:
        if self.group is None:
            raise ValueError(
                "`context_parallel=True` needs a Trainer, whose strategy says which ranks share a row. Load the model "
                "with `context_parallel=False` to run it in one process."
            )
        return self.group
