"""Two ranks, one of them short of memory: rows cut and windows shortened there alone, under everything else."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

sys.path.insert(0, str(Path(__file__).parents[1]))
from scarce_windows import ScarceInWindows, batches, train, weights_of
from windowed_models import full_float64

from lightning_llm.callbacks import AccumulationSchedule, DynamicBatchScaler
from lightning_llm.tasks import base


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    full_float64(SimpleNamespace(setattr=setattr))
    base.SHORTEST_WINDOW = 4
    # Steps of 1, 1, 2 and 2 micro-batches; each rank has every other row.
    mine = []
    for step, batch in enumerate(batches()):
        share = {name: value[rank::2] for name, value in batch.items()}
        number = 1 if step < 2 else 2
        mine += [{name: value[i::number] for name, value in share.items()} for i in range(number)]
    module, scaler = ScarceInWindows(limit=10, ranks=(1,)), DynamicBatchScaler()
    reductions = []
    trainer = train(
        L.Trainer, module, scaler, data=mine,
        callbacks=[AccumulationSchedule({"0 steps": 1, "2 steps": 2}), Reductions(reductions)],
        strategy=DDPStrategy(process_group_backend="gloo"), accelerator="cpu", devices=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    result = {
        "weights": weights_of(module).tolist(),
        "window": module.sequence_window,
        "failed": module.num_failed,
        "fired": len(reductions) / trainer.global_step,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


class Reductions(L.Callback):
    """Notes each bucket that DDP reduces; the model fits into one."""

    def __init__(self, reductions):
        self.reductions = reductions

    def on_train_start(self, trainer, pl_module):
        def hook(state, bucket):
            if bucket.is_last():
                self.reductions.append(bucket.index())
            return default_hooks.allreduce_hook(state, bucket)

        trainer.strategy.model.register_comm_hook(dist.group.WORLD, hook)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
