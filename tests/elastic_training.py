"""Runs that are stopped and go on elsewhere, and what each of their optimizer steps was trained on."""

import json
from pathlib import Path

import lightning as L
import torch
from torch import nn

from lightning_llm.datamodules import TextDataModule

NUM_STEPS = 17
LENGTHS = [3, 40, 7, 30, 15, 22, 4, 9] * 6


class Model(L.LightningModule):
    """A bag of tokens with dropout: order and batches leave their mark on every weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(258, 8, dtype=torch.float64)
        self.head = nn.Linear(8, 258, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        hidden = nn.functional.dropout(self.embedding(batch["input_ids"]), 0.1, self.training)
        labels = batch["labels"].flatten()
        loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels, reduction="sum")
        count = (labels != -100).sum()
        return {"loss": loss / count.clamp(min=1), "num_tokens": count}

    def validation_step(self, batch, batch_idx):
        self.log("val", self.training_step(batch, batch_idx)["loss"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Record(L.Callback):
    """Writes the rows of each optimizer step as it is done, and saves at given micro-batches and step ends."""

    def __init__(self, folder, name, save_steps=(), save_batches=(), kill_at=None, save_folder=None):
        self.path = Path(folder) / f"{name}.jsonl"
        self.folder = Path(save_folder or folder)
        self.save_steps, self.save_batches, self.kill_at = save_steps, save_batches, kill_at
        self.rows, self.step, self.count = [], None, 0

    def on_train_start(self, trainer, pl_module):
        self.step, self.rows = trainer.global_step, []
        self.path.write_text("")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rows = batch["row_ids"].tolist()
        if "cu_seq_lens_q" in batch:  # a row of several documents is named by each of them where they lie end to end
            rows = list(dict.fromkeys(rows))
        self.rows += [row for row in rows if row >= 0]
        self.count += 1
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            entry = {"step": self.step, "epoch": trainer.current_epoch, "rows": self.rows}
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self.rows = []
            if self.step in self.save_steps:
                trainer.save_checkpoint(self.folder / f"step{self.step}.ckpt")
        if self.count in self.save_batches:
            trainer.save_checkpoint(self.folder / f"batch{self.count}.ckpt")
        if self.kill_at is not None and self.step == self.kill_at:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)


def seeded_steps():
    """Dropout that does not depend on what was drawn before, as after a resume."""
    from lightning_llm.callbacks.steps.accumulation_window import seed_window

    class Seed(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seed_window(0, trainer.global_step * 100 + batch_idx, trainer.global_rank)

    return Seed()


def data_module(folder, **options):
    data = Path(folder) / "data.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps({"text": "ab " * n}) + "\n" for n in LENGTHS))
    defaults = {"tokenizer": "bytes", "max_length": 32, "micro_batch_size": 2, "validation_fraction": 0.1, "seed": 3}
    return TextDataModule(str(data), cache_dir=str(Path(folder) / "cache"), **{**defaults, **options})


def run(
    folder, name, *, data=None, resume=None, accumulate=1, steps=NUM_STEPS, record=None, trainer=None, callbacks=()
):
    """Train; the record and the weights."""
    record = Record(folder, name, **(record or {}))
    settings = {"max_steps": steps, "max_epochs": -1, "val_check_interval": 0.5, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "accumulate_grad_batches": accumulate,
            "callbacks": [seeded_steps(), record, *callbacks],
            **settings,
            **(trainer or {}),
        }
    )
    model = Model()
    trainer.fit(model, data_module(folder, **(data or {})), ckpt_path=resume)
    return steps_of(record.path), torch.cat([p.detach().flatten() for p in model.parameters()])


def steps_of(*paths):
    """Rows of each optimizer step over the ranks whose records these are."""
    found = {}
    for path in paths:
        for line in Path(path).read_text().splitlines():
            entry = json.loads(line)
            rows = found.setdefault(entry["step"], (entry["epoch"], []))[1]
            rows += entry["rows"]
    return {step: (epoch, sorted(rows)) for step, (epoch, rows) in found.items()}
