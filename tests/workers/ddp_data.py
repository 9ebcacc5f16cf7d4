"""DDP with TextDataModule: which rows a rank trains on, and a validation loss equal to one process's."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import TINY_GPT2

from lightning_llm import LLMModule
from lightning_llm.datamodules import TextDataModule

MODEL = {**TINY_GPT2, "vocab_size": 258}


class Rows(L.Callback):
    def __init__(self):
        self.rows = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.setdefault(trainer.current_epoch, []).extend(batch["row_ids"].tolist())


def main(folder: Path, data: str, cache: str) -> None:
    rank = int(os.environ["RANK"])
    datamodule = TextDataModule(
        data,
        "bytes",
        max_length=32,
        micro_batch_size=2,
        validation_fraction=0.3,
        cache_dir=cache,
        windowing="packed",
    )
    torch.manual_seed(0)
    module = LLMModule(MODEL, learning_rate=0.0, lr_schedule="constant", warmup=0)
    rows = Rows()
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "precision": "64-true",
    }
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        default_root_dir=folder,
        callbacks=[rows],
        **options,
    )
    trainer.fit(module, datamodule)
    store, table = datamodule.store("validation"), datamodule.table("validation")
    module.val_metrics.reset()
    from lightning_llm.datamodules.rows import RowDataset

    whole = RowDataset(store, table, 0, store.token_bytes)[list(range(len(table)))]
    single = module.task.loss(module.model, whole).mean.item()
    result = {
        "train": rows.rows,
        "num_rows": len(datamodule.table("train")),
        "val/loss": trainer.callback_metrics["val/loss"].item(),
        "single": single,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
