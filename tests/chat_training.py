"""Conversations of many lengths, and short runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_llm import LLMModule
from lightning_llm.callbacks import TokenWeightedAccumulation
from lightning_llm.datamodules import ChatDataModule

GPT2 = {  # computes in float64 throughout, where a Llama's norms are in float32
    "model_type": "gpt2",
    "vocab_size": 258,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 512,
    "initializer_range": 0.2,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}


def conversations(number: int = 23) -> list[dict[str, Any]]:
    """Each different, of one to three turns, some with a system's message."""
    rows = []
    for n in range(number):
        messages = [{"role": "system", "content": f"S{n}"}] if n % 3 == 0 else []
        for turn in range(1 + n % 3):
            messages.append({"role": "user", "content": f"q{n}.{turn} " + "u" * (7 * n % 11)})
            messages.append({"role": "assistant", "content": f"a{n}.{turn} " + "\u00e4" * (5 * n % 13)})
        rows.append({"messages": messages})
    return rows


def chats(folder: Path, rows: Any = None, **options: Any) -> ChatDataModule:
    rows = conversations() if rows is None else rows
    defaults = {"chat_template": "chatml", "max_length": 512, "micro_batch_size": 2, "validation_fraction": 0.0}
    return ChatDataModule(rows, "bytes", cache_dir=str(folder / "cache"), **{**defaults, **options})


class Rows(L.Callback):
    """The rows of each optimizer step, as they are trained on; checkpoints at some of them."""

    def __init__(self, folder: Path, save: tuple[int, ...] = ()) -> None:
        self.folder, self.save = folder, save
        self.steps: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        rows = list(dict.fromkeys(row for row in batch["row_ids"].tolist() if row >= 0))
        self.steps.setdefault(trainer.global_step, []).extend(rows)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        path = self.folder / f"step{trainer.global_step}.ckpt"
        if trainer.global_step in self.save and not path.exists():
            trainer.save_checkpoint(path)


def train(
    folder: Path,
    data: L.LightningDataModule,
    *,
    steps: int = 6,
    accumulate: int = 1,
    resume: Any = None,
    save: tuple[int, ...] = (),
    **module: Any,
) -> tuple[dict[int, list[int]], torch.Tensor]:
    """Rows of each step, and the weights."""
    torch.manual_seed(0)
    rows = Rows(folder, save)
    model = LLMModule(GPT2, optimizer="sgd", learning_rate=0.1, weight_decay=0.0, **module)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        precision="64-true",
        accumulate_grad_batches=accumulate,
        callbacks=[rows, TokenWeightedAccumulation()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, data, ckpt_path=resume)
    return rows.steps, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
