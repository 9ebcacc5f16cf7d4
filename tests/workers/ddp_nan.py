"""DDP: the second optimizer step meets a NaN on rank 1 only; both ranks must stop, and neither may hang."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from support import TINY_GPT2, pad_rows, ragged_rows

from lightning_llm import LLMModule
from lightning_llm.loss import NonFiniteLossError


class PoisonedModule(LLMModule):
    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and batch_idx == 1:
            self.model.transformer.ln_f.weight.data[0] = float("nan")
            output = super().training_step(batch, batch_idx)
            self.model.transformer.ln_f.weight.data[0] = 1.0
            return output
        return super().training_step(batch, batch_idx)


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    batches = [{**pad_rows([row]), "row_ids": torch.tensor([index + 6])} for index, row in enumerate(ragged_rows(3))]
    torch.manual_seed(0)
    module = PoisonedModule(TINY_GPT2, lr_schedule="constant", warmup=0)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, default_root_dir=folder, **options)
    error = ""
    try:
        trainer.fit(module, Shard(batches))
    except NonFiniteLossError as caught:
        error = str(caught)
    finite = all(bool(p.isfinite().all()) for p in module.model.parameters())
    result = {"error": error, "steps": trainer.global_step, "finite": finite}
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
