"""DDP: unequal rows per rank in validation, one training step; rank 0 writes what it saw."""

import json
import sys
from pathlib import Path

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import TINY_GPT2, pad_rows, ragged_rows

from lightning_llm import LLMModule


class Shard:
    """Rank r's batches; a plain iterable, so that Lightning puts no sampler in."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def main(folder: Path) -> None:
    rank = int(__import__("os").environ["RANK"])
    rows = ragged_rows(9, seed=3)
    validation = Shard(
        [pad_rows(rows[:2]), pad_rows(rows[2:3])] if rank == 0 else [pad_rows(rows[3:6]), pad_rows(rows[6:])]
    )
    torch.manual_seed(0)
    module = LLMModule(TINY_GPT2, lr_schedule="constant", warmup=0)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        precision="64-true",
        max_steps=1,
        default_root_dir=folder,
        **options,
    )
    trainer.validate(module, validation, verbose=False)
    result = {"val/loss": trainer.callback_metrics["val/loss"].item()}

    parts = [pad_rows(rows[:2]), pad_rows(rows[2:8])]
    before = [module.task.loss(module.model, part) for part in parts]
    result["true_train_loss"] = (sum(x.total for x in before) / sum(x.num_tokens for x in before)).item()
    result["true_tokens"] = sum(int(x.num_tokens) for x in before)
    trainer.fit(module, Shard([parts[rank]]))
    result["train/loss"] = trainer.callback_metrics["train/loss"].item()
    result["tokens_seen"] = module.tokens_seen
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
