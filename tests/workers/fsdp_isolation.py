"""A leaking model under FSDP2: all ranks find out together, and take packed rows apart."""

import json
import os
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from packed_models import CONFIGS, documents, pack

from lightning_llm import LLMModule


class Packed(L.LightningDataModule):
    """Batches of other shapes on each rank, once they are taken apart."""

    packs_documents = True

    def __init__(self, rank: int) -> None:
        super().__init__()
        rows = documents()
        self.batches = [pack(rows[rank:]), pack(rows[: rank + 1]), pack(rows)]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None)


def main(folder: Path, model_type: str) -> None:
    rank = int(os.environ["RANK"])
    model = {"model_type": model_type, **CONFIGS[model_type]}
    module = LLMModule(model, lr_schedule="constant", warmup=0, leaking_packs="unpack")
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, Packed(rank))
    warned = sum("leaking_packs" in str(w.message) for w in caught)
    loss = trainer.callback_metrics["train/loss"].item()
    result = {"loss": loss, "steps": trainer.global_step, "warned": warned}
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
