"""DDP: a mixture whose second rank has no row of the last source; each rank writes what validation logged."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from support import TINY_GPT2
from test_metrics import Mixture

from lightning_llm import LLMModule


class Sharded(Mixture):
    """Rank 0 has all rows of the last source and no others."""

    def val_dataloader(self):
        rank = int(os.environ["RANK"])
        rows = [row for row in self.rows if (row["source_ids"] == 2) == (rank == 0)]
        return Shard([self.collate(rows[:1]), self.collate(rows[1:])])


def main(folder: Path) -> None:
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        precision="64-true",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    (values,) = trainer.validate(LLMModule(TINY_GPT2), Sharded(), verbose=False)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
