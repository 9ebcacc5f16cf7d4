"""The micro-batches of an optimizer step, as far as their gradients have been added: loss, tokens, and which failed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_llm.loss import TokenLoss, exact_dtype


class MicroBatch(NamedTuple):
    """What the optimizer step has to remember of a micro-batch.

    Attributes:
        batch_idx: Lightning's number of the batch in the epoch.
        row_ids: The batch's rows, (batch,), if it names them.
        loss: Its summed loss and label tokens, detached, still on the device.
        details: Sums and counts of what else is logged, by name, likewise; the same names in each micro-batch.
    """

    batch_idx: int
    row_ids: Any
    loss: TokenLoss
    details: Mapping[str, TokenLoss] = {}


class StepWindow:
    """Collects the micro-batches of an optimizer step without waiting for the device."""

    def __init__(self) -> None:
        self._micro_batches: list[MicroBatch] = []

    def __len__(self) -> int:
        return len(self._micro_batches)

    def add(self, micro_batch: MicroBatch) -> None:
        """Remember a micro-batch."""
        self._micro_batches.append(micro_batch)

    def clear(self) -> None:
        """Forget all: the step is done, or was left unfinished."""
        self._micro_batches.clear()

    def sums(self) -> Tensor:
        """Loss in nats, label tokens, micro-batches whose loss is not finite; sum and count of each of :meth:`names`.

        Of shape (3 + 2 names,), on the device.
        """
        totals = self._totals()
        tokens = torch.stack([micro.loss.num_tokens for micro in self._micro_batches]).to(totals)
        details = [value.to(totals) for name in self.names() for value in self._sum_of(name)]
        return torch.stack([totals.sum(), tokens.sum(), (~totals.isfinite()).to(totals).sum(), *details])

    def names(self) -> list[str]:
        """What is logged beside the loss."""
        return list(self._micro_batches[0].details) if self._micro_batches else []

    def describe_bad(self, where: str, rank: int, model: nn.Module) -> str:
        """Say which micro-batch of this rank is not finite, how the weights are, and what to do.

        Args:
            where: Optimizer step and epoch.
            rank: This rank.
            model: Its weights are looked at (this rank's shards of them).
        """
        which = "on another rank"
        for micro, total in zip(self._micro_batches, self._totals().tolist(), strict=True):
            if not math.isfinite(total):
                ids = micro.row_ids.tolist() if isinstance(micro.row_ids, Tensor) else micro.row_ids
                rows = f"row_ids {ids}" if ids is not None else "no `row_ids` in the batch"
                value = "nan" if math.isnan(total) else "infinite"
                which = f"{value} in batch {micro.batch_idx} of rank {rank} ({rows})"
                break
        return (
            f"The loss is not finite at {where}: {which}. {_describe_weights(model)} Look at those rows; else lower "
            f"the learning rate, lengthen the warm-up, clip gradients (Trainer(gradient_clip_val=1.0)), or use "
            f"bfloat16 instead of float16."
        )

    def _sum_of(self, name: str) -> TokenLoss:
        parts = [micro.details[name] for micro in self._micro_batches]
        exact = exact_dtype(parts[0].total.device)
        return TokenLoss(*(torch.stack(values).to(exact).sum() for values in zip(*parts, strict=True)))

    def _totals(self) -> Tensor:
        totals = torch.stack([micro.loss.total for micro in self._micro_batches])
        return totals.to(exact_dtype(totals.device))


def _describe_weights(model: nn.Module) -> str:
    shards = (getattr(p, "to_local", lambda p=p: p)() for p in model.parameters())
    if all(bool(shard.isfinite().all()) for shard in shards):
        return "The step was not applied: the weights are finite, and so are the checkpoints written before it."
    return (
        "The weights are not finite either: a step before this one had a finite loss but gradients that were not. "
        "Resume from a checkpoint older than the last."
    )
