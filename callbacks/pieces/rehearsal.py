"""The most memory that a step will need, taken before the first one; nothing but the allocator remembers it."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_llm.callbacks.pieces.cutting import BatchCutter
from lightning_llm.callbacks.pieces.merging import PieceLogs
from lightning_llm.callbacks.pieces.rows import fresh
from lightning_llm.callbacks.pieces.search import WeightsCopy, longest_batch, whole_batch
from lightning_llm.callbacks.pieces.training import run_quietly
from lightning_llm.callbacks.pieces.undo import StateKeeper
from lightning_llm.out_of_memory import is_out_of_memory


def rehearse_step(trainer: L.Trainer, num_batches: int = 64) -> None:
    """An optimizer step on the longest batch, and one more forward and backward beside its state and gradients.

    Afterwards weights, optimizer, gradients (none), random generators, buffers, metrics and logs are what they were;
    the allocator keeps the memory. All ranks call it together.

    Args:
        trainer: In ``on_train_start``, with automatic optimization.
        num_batches: How many are looked at for the longest rows, where the loader has no ``longest_batch()``.

    Raises:
        torch.OutOfMemoryError: If it does not fit, saying what helps; weights and optimizer are as they were.
        ValueError: If the loader can be iterated once only.
    """
    assert trainer.state.fn == TrainerFn.FITTING
    module, strategy, optimizer = trainer.strategy.lightning_module, trainer.strategy, trainer.optimizers[0]
    assert module is not None
    keeper, weights, logs = StateKeeper(module, strategy.root_device), WeightsCopy(optimizer), PieceLogs()
    keeper.note()
    try:
        with logs.hold_back(trainer._results):
            batch = longest_batch(trainer, lambda batch: BatchCutter().whole(batch).cost, num_batches)
            batch = strategy.batch_to_device(whole_batch(trainer, batch), dataloader_idx=0)
            loss = run_quietly(trainer, fresh(batch))
            optimizer.step(lambda: 0.0 if loss is None else float(loss))  # some cannot do without a closure
            run_quietly(trainer, fresh(batch))
            logs.discard()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(
            f"Out of memory with the longest rows, which were tried before the first step on rank "
            f"{trainer.global_rank}; shorter ones may fit, but these would come. Use smaller micro-batches, "
            f"DynamicBatchScaler(find='start') in place of the rehearsal, gradient checkpointing, or lower precision."
        ) from error
    finally:
        weights.restore()
        keeper.restore()
