"""What the micro-batches of a run hold: sequences and label tokens, over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from lightning_llm.callbacks.steps.counting import num_samples, num_targets
from lightning_llm.loss import exact_dtype
from lightning_llm.parallel import data_parallel_size

Target = Literal["micro_batches", "sequences", "tokens"]

_MEMORY = 0.9  # of the mean content of a micro-batch: how much of it the next window keeps


def micro_batches_for(target: float, content: float) -> int:
    """Micro-batches that come nearest to a global batch, one at least.

    Args:
        target: Sequences or tokens wanted in an optimizer step, over all ranks.
        content: Sequences or tokens in a micro-batch, over all ranks.

    Example:
        >>> micro_batches_for(target=100, content=16)
        6
    """
    return max(1, round(target / max(content, 1e-9)))


class BatchContent:
    """Counts what micro-batches hold, window by window; what it knows is equal on all ranks.

    Nothing waits for the device before a window ends, and nothing is reduced where nothing is counted.

    Args:
        target: Of what the mean in a micro-batch is to be known; ``micro_batches``: of nothing.
        counts_tokens: Whether tokens are counted in any case.
        token_fn: ``batch -> number of label tokens``; None: as the module counts them,
            or those of Hugging Face's batches.

    Attributes:
        tokens: Label tokens trained on, if they are counted.
        mean: Sequences or tokens (``target``) in a micro-batch of one rank, on average; None before the first.
    """

    def __init__(self, target: Target, counts_tokens: bool, token_fn: Callable[[Any], Any] | None = None) -> None:
        self.target = target
        self.counts_tokens = counts_tokens
        self.token_fn = token_fn
        self.forget()

    @property
    def kinds(self) -> list[str]:
        """What has to be counted in each micro-batch."""
        has_tokens = self.counts_tokens or self.target == "tokens"
        return ["sequences"] * (self.target == "sequences") + ["tokens"] * has_tokens

    def forget(self) -> None:
        """Another run than the last begins."""
        self.tokens = 0.0
        self.mean: float | None = None
        self._window: list[Tensor] = []

    def begin_window(self, trainer: L.Trainer, batch: Any) -> None:
        """Before a window's first micro-batch; the run's very first is measured."""
        self._window = []
        if self.target != "micro_batches" and not self.mean:  # a first one without a token says nothing
            mine = self._count(trainer, batch, self.target)
            self.mean = float(trainer.strategy.reduce(mine, reduce_op="mean"))

    def add(self, trainer: L.Trainer, batch: Any) -> None:
        """A micro-batch of the window, on the device's own time."""
        if self.kinds:
            self._window.append(torch.stack([self._count(trainer, batch, kind) for kind in self.kinds]))

    def end_window(self, trainer: L.Trainer) -> None:
        """Add the window up over all ranks: one all-reduce, where anything is counted."""
        if not self._window:
            return
        counted = torch.stack(self._window)
        # An epoch's last micro-batch may be short: it counts, but says nothing of those to come.
        usual = counted[:-1] if trainer.is_last_batch and len(counted) > 1 else counted
        held = usual.new_tensor([float(len(usual))])
        sums = trainer.strategy.reduce(torch.cat([counted.sum(0), usual.sum(0), held]), reduce_op="sum")
        share = 1 / trainer.world_size  # ranks that split a layer count a batch each
        everything, typical = sums[: len(self.kinds)].tolist(), sums[len(self.kinds) : -1].tolist()
        number = float(sums[-1])
        if "tokens" in self.kinds:
            self.tokens += everything[-1] * share * data_parallel_size(trainer)
        if self.target != "micro_batches":
            mean = typical[self.kinds.index(self.target)] / number
            self.mean = _MEMORY * self.mean + (1 - _MEMORY) * mean if self.mean else mean

    def _count(self, trainer: L.Trainer, batch: Any, kind: str) -> Tensor:
        device = trainer.strategy.root_device
        number = (
            num_samples(batch) if kind == "sequences" else num_targets(trainer.lightning_module, batch, self.token_fn)
        )
        return torch.as_tensor(number, device=device).to(exact_dtype(device))
