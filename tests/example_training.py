"""Runs over examples: which rows each optimizer step holds, and gradients that no cut may change."""

import lightning as L
import torch
from elastic_training import Record, steps_of
from torch import nn

from lightning_llm.callbacks import TokenWeightedAccumulation
from lightning_llm.datamodules.rows import EMPTY_ROW


class Probe(L.LightningModule):
    """A weight that nothing depends on: what matters is which rows come."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return {"loss": self.weight * 1.0, "num_tokens": torch.tensor(1)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run_steps(folder, name, data, *, resume=None, accumulate=1, steps=12, save_steps=(), save_batches=()):
    """The rows of each optimizer step."""
    record = Record(folder, name, save_steps, save_batches)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        accumulate_grad_batches=accumulate,
        callbacks=[record],
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
    )
    trainer.fit(Probe(), data, ckpt_path=resume)
    return steps_of(record.path)


def on_rank(data, rank, num_ranks):
    """Let a data module serve a rank of several."""
    data._ranks = lambda: (rank, num_ranks)
    return data


def batches_of_ranks(make, num_ranks, split="train"):
    """All batches of each rank."""
    batches = []
    for rank in range(num_ranks):
        data = on_rank(make(), rank, num_ranks)
        data.setup("fit")
        loader = data.train_dataloader() if split == "train" else data.val_dataloader()
        batches.append(list(loader))
    return batches


def row_ids_of(batches):
    """The rows of batches, in order, empty ones left out."""
    return [row for batch in batches for row in batch["row_ids"].tolist() if row != EMPTY_ROW]


class _Keep(L.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {
            name: parameter.grad.clone()
            for name, parameter in pl_module.named_parameters()
            if parameter.grad is not None
        }


def step_gradients(folder, module, data, micro_batches, *, weighted=True):
    """The gradients of the first optimizer step of a run over so many micro-batches."""
    keep = _Keep()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        accumulate_grad_batches=micro_batches,
        callbacks=[*([TokenWeightedAccumulation()] if weighted else []), keep],
        max_steps=1,
        limit_val_batches=0,
        precision="64-true",
    )
    trainer.fit(module, data)
    return keep.gradients


def largest_difference(found, expected):
    """Relative to the largest gradient of all."""
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / scale
