"""Two FSDP2 ranks with unequal rows: equally many pieces, one reduction per optimizer step, a search that foresees."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from scarce_memory import Scarce
from support import TINY_GPT2, pad_rows
from token_training import big_batch, rows
from token_weighted import whole_weights

from lightning_llm.callbacks import DynamicBatchScaler, TokenWeightedAccumulation
from lightning_llm.callbacks.pieces import search


class Sharded(Scarce):
    def configure_model(self):
        for block in self.model.transformer.h:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        self.log("logged", output["loss"].detach(), sync_dist=True, batch_size=len(batch["labels"]))
        return output

    def validation_step(self, batch, batch_idx):
        self.log(
            "val", super().training_step(batch, batch_idx)["loss"], sync_dist=True, batch_size=len(batch["labels"])
        )


class Communication(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Meter:
    """Pretends that each token takes 100 bytes beside 1000 that are always there, of 20,000."""

    def __init__(self, module):
        self.module, self.begin = module, 0

    def reset(self):
        self.begin = len(self.module.shapes)

    def peak(self):
        return 1000 + 100 * max((rows * columns for rows, columns in self.module.shapes[self.begin :]), default=0)

    def capacity(self):
        return 20_000


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    data = rows(36)  # steps of 16, 16 and 4 rows; the last has one row on rank 1
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 2}
    options |= {"accelerator": "cpu", "enable_model_summary": False, "default_root_dir": folder, "max_epochs": 2}
    options |= {"num_sanity_val_steps": 0}
    result = {}
    for name, accumulate, scaler in [
        ("no pieces", 1, None),
        ("pieces", 1, DynamicBatchScaler(max_piece=70)),
        ("pieces, K = 2", 2, DynamicBatchScaler(max_piece=40)),
        ("search", 1, DynamicBatchScaler(find="start")),
    ]:
        mine = []
        for begin in range(0, len(data), 16):
            share = data[begin : begin + 16]
            share = share[:3] if rank == 0 and len(share) == 4 else share[3:] if len(share) == 4 else share[rank::2]
            size = -(-len(share) // accumulate) if len(share) > 3 else len(share)
            mine += [pad_rows(share[i : i + size]) for i in range(0, len(share), size)]
        module = Sharded(TINY_GPT2, "adamw")
        callbacks = [TokenWeightedAccumulation()] + ([scaler] if scaler else [])
        search.PeakMemory = lambda device, module=module: Meter(module)
        trainer = L.Trainer(
            strategy=ModelParallelStrategy(2, 1), accumulate_grad_batches=accumulate, gradient_clip_val=0.3,
            callbacks=callbacks, **options,
        )  # fmt: skip
        with Communication() as communication:
            trainer.fit(module, Shard(mine), Shard(mine[: 2 - rank] + mine[:rank]))
        truth, _ = big_batch(TINY_GPT2, "adamw", 0.3, data)
        found = whole_weights(module)
        result[name] = {
            "error": float((found - truth).norm() / truth.norm()),
            "steps": trainer.global_step,
            "reductions": sum("reduce_scatter" in name for name in communication.names),
            "gathers": sum("gather" in name for name in communication.names),
            "largest": max(rows * columns for rows, columns in module.shapes),
            "limit": next(iter(scaler.limits.buckets.values())).limit if scaler else None,
            "val": float(trainer.callback_metrics["val"]),
        }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    torch.distributed.destroy_process_group()  # its threads must not outlive the interpreter
