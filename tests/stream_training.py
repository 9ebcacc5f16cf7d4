"""One training on a stream, on any layout: what each optimizer step held, and the weights at the end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import lightning as L
import numpy as np
import torch
from support import TINY_GPT2

from lightning_llm import LLMModule
from lightning_llm.callbacks import TokenWeightedAccumulation
from lightning_llm.datamodules.streaming_text import StreamingTextDataModule

MODEL = {**TINY_GPT2, "vocab_size": 258, "n_layer": 1, "n_embd": 16}


def write_corpus(folder: Path, num_documents: int = 240, num_files: int = 3, seed: int = 0) -> str:
    """Documents of 20 to 200 bytes in some jsonl files."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    texts = [
        f"{n:05d} " + "".join(rng.choice(list("abcdef "), int(rng.integers(20, 200)))) for n in range(num_documents)
    ]
    for number, part in enumerate(np.array_split(np.array(texts), num_files)):
        lines = "".join(json.dumps({"text": str(text)}) + "\n" for text in part)
        (folder / f"part-{number}.jsonl").write_text(lines)
    return str(folder)


class Steps(L.Callback):
    """Writes what this rank trained on in each optimizer step."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rows = [
            [row_id, int(ids.sum()), int((labels != -100).sum())]
            for row_id, ids, labels in zip(batch["row_ids"].tolist(), batch["input_ids"], batch["labels"], strict=True)
            if row_id >= 0
        ]
        self.rows += rows
        if not trainer.fit_loop._should_accumulate():
            with self.path.open("a") as file:
                file.write(json.dumps([trainer.current_epoch, trainer.global_step, sorted(self.rows)]) + "\n")
            self.rows = []


class Kill(L.Callback):
    """Ends the process at an optimizer step as a machine does that fails."""

    def __init__(self, after: int | None):
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


class SaveEvery(L.Callback):
    """A checkpoint every so many micro-batches: inside accumulation windows too."""

    def __init__(self, folder: Path, micro_batches: int):
        self.folder, self.micro_batches = folder, micro_batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % self.micro_batches == 0:
            trainer.save_checkpoint(self.folder / "last.ckpt")


def train(
    folder: Path,
    data: str,
    name: str,
    *,
    accumulate: int = 1,
    num_workers: int = 0,
    resume: str | None = None,
    kill_after: int | None = None,
    save_every: int | None = None,
    max_epochs: int = 2,
    rows_in_step: int = 8,
    callbacks: tuple | list = (),
    **options,
) -> torch.Tensor:
    """Train on the ranks that are there; returns the weights."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    defaults = {"max_length": 64, "num_streams": 4, "pool_tokens": 600, "num_workers": num_workers}
    rows = rows_in_step // world_size // accumulate
    datamodule = StreamingTextDataModule(data, "bytes", micro_batch_size=rows, **{**defaults, **options})
    torch.manual_seed(0)
    # Biases of keys have a gradient of rounding errors alone, which Adam with its usual eps makes steps of.
    module = LLMModule(MODEL, learning_rate=1e-2, eps=1e-4, lr_schedule="constant", warmup=0)
    callbacks = [Steps(folder / f"{name}-rank{rank}.jsonl"), *callbacks, TokenWeightedAccumulation()]
    if save_every:
        callbacks.append(SaveEvery(folder, save_every))
    callbacks.append(Kill(kill_after))
    trainer = L.Trainer(
        accelerator="cpu", devices=world_size, strategy="ddp" if world_size > 1 else "auto", precision="64-true",
        accumulate_grad_batches=accumulate, max_epochs=max_epochs, callbacks=callbacks, default_root_dir=folder,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule, ckpt_path=resume)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def steps_of(folder: Path, name: str, num_ranks: int = 1) -> dict[tuple[int, int], list]:
    """(epoch, step) to the rows that all ranks trained on in it."""
    merged: dict[tuple[int, int], list] = {}
    for rank in range(num_ranks):
        for line in (folder / f"{name}-rank{rank}.jsonl").read_text().splitlines():
            epoch, step, rows = json.loads(line)
            merged.setdefault((epoch, step), []).extend(rows)
    return {key: sorted(rows) for key, rows in merged.items()}
