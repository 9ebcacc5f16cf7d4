"""Training under a schedule of lengths on a small corpus: what micro-batches held, and a bare loop beside it."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import torch
from support import TINY_GPT2

from lightning_llm import LLMModule, Progress, Schedule
from lightning_llm.callbacks.sequence_length_schedule import length_at
from lightning_llm.datamodules import TextDataModule

MAX_LENGTH = 32
MODEL = {**TINY_GPT2, "vocab_size": 258, "n_embd": 16, "n_layer": 1}
STEPS = {"0 steps": 8, "2 steps": 13, "4 steps": 32}


def corpus(folder, num_documents=70):
    """Documents of 4 to 90 random letters."""
    path = Path(folder) / "letters.jsonl"
    if not path.exists():
        rng = np.random.default_rng(0)
        texts = ["".join(rng.choice(list("abcdefgh"), int(rng.integers(4, 90)))) for _ in range(num_documents)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def data_module(folder, **options):
    defaults = {"tokenizer": "bytes", "max_length": MAX_LENGTH, "micro_batch_size": 2, "validation_fraction": 0.1}
    return TextDataModule(corpus(folder), cache_dir=str(Path(folder) / "cache"), seed=3, **{**defaults, **options})


class Module(LLMModule):
    """In float64, with an optimizer whose steps are in proportion to the gradient."""

    def __init__(self, dropout=0.0, **options):
        torch.manual_seed(0)
        changes = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        super().__init__({**MODEL, **changes}, dtype="float64", **options)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def difference(module, truth):
    return float((weights(module) - truth).norm() / truth.norm())


class Seen(L.Callback):
    """What callbacks see of each micro-batch: optimizer step, rows, columns, and the targets in order of size."""

    def __init__(self):
        self.train, self.evaluated = [], set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        labels = batch["labels"][:, 1:]
        targets = labels[labels != -100].sort().values.tolist()
        self.train.append((trainer.global_step, *batch["input_ids"].shape, targets))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.evaluated.add(batch["input_ids"].shape[1])

    @property
    def widths(self):
        return {step: columns for step, _, columns, _ in self.train}


class SaveAt(L.Callback):
    """Saves after so many micro-batches."""

    def __init__(self, folder, counts=()):
        self.folder, self.counts, self.count = Path(folder), set(counts), 0

    def on_train_batch_end(self, trainer, *_):
        self.count += 1
        if self.count in self.counts:
            trainer.save_checkpoint(self.folder / f"{self.count}.ckpt")


def bare_loop(folder, milestones=STEPS, accumulate=1, steps=6, epochs=100, **options):
    """Weights after steps on the same rows, each row cut by itself, all of a step's label tokens weighing the same."""
    module, data, schedule = Module(), data_module(folder, **options), Schedule(milestones)
    module.configure_model()
    stepper = module.configure_optimizers()
    data.prepare_data()
    data.setup("fit")
    loader, done = data.train_dataloader(), 0
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        batches = list(loader)
        for begin in range(0, len(batches), accumulate):
            if done == steps:
                return weights(module)
            length = length_at(schedule, Progress(steps=done))
            rows = [
                {key: batch[key][row : row + 1] for key in ("input_ids", "labels", "position_ids")}
                for batch in batches[begin : begin + accumulate]
                for row in range(len(batch["input_ids"]))
            ]
            losses = [module.task.loss(module.model, data.cut_batch(row, length)) for row in rows]
            stepper.zero_grad()
            (sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses)).backward()
            stepper.step()
            done += 1
    raise AssertionError("the data came to an end")
