"""How fast a run really is: tokens per second, padding, global batch, FLOP utilisation, peak memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_llm.flops import peak_flops, training_flops_per_token
from lightning_llm.loss import exact_dtype
from lightning_llm.parallel import data_parallel_size


class TokenCount(NamedTuple):
    """Tokens in one micro-batch of one rank; ints, or tensors of shape () that may still be computed.

    Attributes:
        label: Tokens that the loss was taken over.
        real: Tokens that are no padding.
        positions: All positions that the model computed.
    """

    label: int | Tensor
    real: int | Tensor
    positions: int


def count_tokens(batch: Any, outputs: Any) -> TokenCount:
    """Count the tokens of a Hugging Face batch.

    Args:
        batch: A mapping with ``input_ids`` (batch, seq), or with several texts a row (``chosen_input_ids``, ...), which
            are added up. What is real comes from ``num_input_tokens`` (batch,), else from ``attention_mask`` (of each
            text); without either all is.
        outputs: What ``training_step`` returned; ``num_tokens`` in it are the label tokens, else ``labels`` are
            counted, else they are taken to be the real tokens.

    Raises:
        TypeError: If the batch is of another kind.
    """
    texts = _texts_of(batch)
    if not texts:
        got = f"the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise TypeError(
            f"TokenThroughput counts tokens, in batches that are mappings with `input_ids`, or several such columns, "
            f"but got {got}. Leave it out for images and recordings, or pass token_fn=lambda batch, outputs: "
            f"TokenCount(label=..., real=..., positions=...)."
        )
    positions = sum(batch[f"{text}input_ids"].numel() for text in texts)
    real: int | Tensor
    if isinstance(batch.get("num_input_tokens"), Tensor):
        real = batch["num_input_tokens"].sum()
    else:
        columns = [(batch[f"{text}input_ids"], batch.get(f"{text}attention_mask")) for text in texts]
        real = sum(mask.sum() if isinstance(mask, Tensor) else ids.numel() for ids, mask in columns)
    label = real
    if isinstance(outputs, Mapping) and "num_tokens" in outputs:
        label = outputs["num_tokens"]
    elif isinstance(batch.get("labels"), Tensor):
        label = (batch["labels"] != -100).sum()
    return TokenCount(label, real, positions)


def _texts_of(batch: Any) -> list[str]:
    """What stands before ``input_ids`` in the names of a row's texts: nothing, or ``chosen_``, ``anchor_``, ..."""
    if not isinstance(batch, Mapping):
        return []
    if isinstance(batch.get("input_ids"), Tensor):
        return [""]
    names = [key for key, value in batch.items() if isinstance(key, str) and isinstance(value, Tensor)]
    return [key.removesuffix("input_ids") for key in names if key.endswith("_input_ids")]


class TokenThroughput(L.Callback):
    """Log the speed of training, over all ranks and right where ranks hold unequal numbers of tokens.

    Logged every ``every_n_steps`` optimizer steps, as means since the last time: ``train/tokens_per_s`` (label
    tokens), ``train/input_tokens_per_s`` (without padding), ``train/padding`` (share of the positions),
    ``train/global_batch_tokens`` (label tokens in an optimizer step), ``train/mfu`` (see
    :func:`~lightning_llm.flops.training_flops_per_token` for its convention; tokens without padding count),
    ``train/peak_memory_gib`` (since the start; of the device, or of the process on a CPU; the largest of all ranks),
    ``train/total_tokens`` (label tokens of the whole run, resumed ones included).

    Counting stays on the device: there is one synchronisation and one small all-reduce each time it logs, none per
    batch. Validation time does not count.

    Args:
        every_n_steps: Optimizer steps between two entries; the Trainer's ``log_every_n_steps`` if None.
        token_fn: Counts a batch, ``(batch, outputs) -> TokenCount``, where batches are not Hugging Face's.
        flops_per_token: Training FLOPs for one token, where the model is not Hugging Face's.
        peak_flops: Of one device, in FLOP/s, where it is not known by name.
    """

    _counted: Tensor | None  # label and real tokens of this rank since the last entry, on the device
    _counted_at_step: Tensor | None  # the same, at the end of the last optimizer step

    def __init__(
        self,
        every_n_steps: int | None = None,
        token_fn: Callable[[Any, Any], TokenCount] | None = None,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be 1 at least, but got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.token_fn = token_fn or count_tokens
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.total_tokens = 0
        self._trainer: L.Trainer | None = None
        self._paused_at: float | None = None
        self._last_step = self._counted_step = 0
        self._model_flops = 0.0
        self._clear()

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the device's peak, start the clock."""
        self._trainer = trainer
        if self.peak_flops is None:
            self.peak_flops = peak_flops(trainer.strategy.root_device, _compute_dtype(trainer, pl_module))
        self._last_step = self._counted_step = trainer.global_step
        self._flops_of_length: dict[int, float] = {}
        interval = getattr(trainer, "log_every_n_steps", 1)
        if trainer.loggers and self.every_n_steps and interval and self.every_n_steps % interval:
            rank_zero_warn(
                f"TokenThroughput(every_n_steps={self.every_n_steps}) is no multiple of the Trainer's "
                f"log_every_n_steps={interval}: the logger writes at those steps only and misses entries between."
            )
        self._clear()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the micro-batch; log at the end of every n-th optimizer step."""
        count = self.token_fn(batch, outputs)
        self._add(count, trainer.strategy.root_device)
        if self.peak_flops:
            self._model_flops += self._flops_per_token(pl_module, batch) * count.positions
        if trainer.global_step == self._counted_step:
            return  # inside an accumulation window
        self._counted_step = trainer.global_step
        self._counted_at_step = self._counted
        every = self.every_n_steps or max(getattr(trainer, "log_every_n_steps", 1), 1)
        if trainer.global_step > self._last_step and trainer.global_step % every == 0:
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock again."""
        if self._paused_at is not None:
            self._started_at += time.perf_counter() - self._paused_at
        self._paused_at = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count what came after the last entry."""
        self.total_tokens += int(self._sums(trainer, self._counted)[0])
        self._clear()
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        """Label tokens up to the last optimizer step, over all ranks, which all take part in writing a checkpoint."""
        pending = int(self._sums(self._trainer, self._counted_at_step)[0]) if self._trainer is not None else 0
        return {"total_tokens": self.total_tokens + pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.total_tokens = state_dict["total_tokens"]

    # ---- details -------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        self._counted = None
        self._counted_at_step = None
        self._positions = 0
        self._model_flops = 0.0
        self._started_at = time.perf_counter()
        self._paused_at = None

    def _add(self, count: TokenCount, device: torch.device) -> None:
        exact = exact_dtype(device)
        both = [torch.as_tensor(tokens, device=device).to(exact) for tokens in (count.label, count.real)]
        pair = torch.stack(both)
        self._counted = pair if self._counted is None else self._counted + pair
        self._positions += count.positions

    def _sums(self, trainer: L.Trainer, counted: Tensor | None) -> list[float]:
        """Label tokens, real tokens, positions and model FLOPs since the last entry, over all data-parallel ranks."""
        if counted is None:
            counted = torch.zeros(2, device=trainer.strategy.root_device)
        host = counted.new_tensor([float(self._positions), self._model_flops])
        total = trainer.strategy.reduce(torch.cat([counted, host]), reduce_op="sum")
        share = data_parallel_size(trainer) / trainer.world_size  # ranks that split a layer share one batch
        return [value * share for value in total.tolist()]

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        label, real, positions, flops = self._sums(trainer, self._counted)  # waits for the device
        seconds = time.perf_counter() - self._started_at
        steps = trainer.global_step - self._last_step
        self.total_tokens += int(label)
        shown = {"train/tokens_per_s": label / seconds, "train/global_batch_tokens": label / steps}
        values = {
            "train/input_tokens_per_s": real / seconds,
            "train/padding": 1 - real / max(positions, 1),
            "train/peak_memory_gib": _peak_memory_gib(trainer),
            "train/total_tokens": float(self.total_tokens),
        }
        if self.peak_flops and flops:
            useful = flops * real / max(positions, 1)
            values["train/mfu"] = useful / seconds / (self.peak_flops * trainer.world_size)
        pl_module.log_dict(shown, prog_bar=True, batch_size=1)
        pl_module.log_dict(values, batch_size=1)
        self._last_step = trainer.global_step
        self._clear()

    def _flops_per_token(self, pl_module: L.LightningModule, batch: Any) -> float:
        if self.flops_per_token is not None:
            return self.flops_per_token
        seq_len = max((batch[f"{text}input_ids"].shape[-1] for text in _texts_of(batch)), default=0)
        if seq_len not in self._flops_of_length:
            model = getattr(pl_module, "model", pl_module)
            self._flops_of_length[seq_len] = training_flops_per_token(model, seq_len) or 0.0
        return self._flops_of_length[seq_len]


def _compute_dtype(trainer: L.Trainer, pl_module: L.LightningModule) -> torch.dtype:
    precision = str(trainer.precision)
    if "bf16" in precision:
        return torch.bfloat16
    if precision.startswith("16"):
        return torch.float16
    return next((p.dtype for p in pl_module.parameters()), torch.float32)


def _peak_memory_gib(trainer: L.Trainer) -> float:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        num_bytes = float(torch.cuda.max_memory_allocated(device))
    else:
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        num_bytes = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    peak = torch.tensor(num_bytes / 2**30, device=device, dtype=torch.float32)
    return float(trainer.strategy.reduce(peak, reduce_op="max")) if trainer.world_size > 1 else float(peak)
