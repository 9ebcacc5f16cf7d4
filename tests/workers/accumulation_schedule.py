"""Two ranks under a ramp: window sizes, weights against the big batch, and resumes after saves inside windows."""

import json
import math
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import TINY_GPT2, Positions, pad_rows
from token_training import Module, rows
from token_weighted import Sharded, whole_weights

from lightning_llm import Progress, Schedule
from lightning_llm.callbacks import AccumulationSchedule, TokenWeightedAccumulation

RAMP = {"0 steps": 1, "2 steps": 3, "4 steps": 2}
SAVES = [2, 3, 4, 5, 12]  # a boundary, inside a window (twice), its end, the second epoch's first window


class Watch(L.Callback):
    """Saves where it is told to; notes the windows and a random number of the first step."""

    def __init__(self, folder, saves):
        self.folder, self.saves = folder, saves
        self.sizes, self.held, self.step, self.count, self.noise = [], 0, 0, 0, None

    def on_before_backward(self, trainer, pl_module, loss):
        if self.noise is None:
            state = torch.get_rng_state()
            self.noise = float(torch.rand(()))
            torch.set_rng_state(state)

    def on_train_batch_end(self, trainer, *_):
        self.held, self.count = self.held + 1, self.count + 1
        if trainer.global_step != self.step:
            self.sizes.append(self.held)
            self.held, self.step = 0, trainer.global_step
        if self.count in self.saves:
            trainer.save_checkpoint(self.folder / f"{self.count}.ckpt")


def truth(data):
    """Weights and window sizes of one process with whole batches: two rows a micro-batch and rank."""
    module, schedule, sizes = Module(TINY_GPT2, "adamw"), Schedule(RAMP), []
    stepper = module.configure_optimizers()
    for _ in range(2):
        begin = 0
        while begin < len(data):
            part = data[begin : begin + 4 * int(schedule(Progress(steps=len(sizes))))]
            begin += len(part)
            sizes.append(math.ceil(len(part) / 4))
            stepper.zero_grad()
            module.training_step(pad_rows(part), 0)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.3)
            stepper.step()
    return whole_weights(module), sizes


def main(folder: Path, strategy: str) -> None:
    rank = int(os.environ["RANK"])
    data = rows(40)
    mine = [pad_rows(data[begin + 2 * rank : begin + 2 * rank + 2]) for begin in range(0, len(data), 4)]
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 2}
    options |= {"accelerator": "cpu", "enable_model_summary": False, "default_root_dir": folder, "max_epochs": 2}

    def run(saves=(), checkpoint=None):
        torch.manual_seed(1)
        made = DDPStrategy() if strategy == "ddp" else ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
        module = (Module if strategy == "ddp" else Sharded)(TINY_GPT2, "adamw")
        watch = Watch(folder / strategy, saves)
        callbacks = [watch, TokenWeightedAccumulation(), AccumulationSchedule(RAMP)]
        trainer = L.Trainer(strategy=made, gradient_clip_val=0.3, callbacks=callbacks, **options)
        trainer.fit(module, Positions(mine), ckpt_path=checkpoint)
        return whole_weights(module), watch

    whole, watch = run(SAVES)
    true_weights, true_sizes = truth(data)
    result = {"sizes": watch.sizes, "true sizes": true_sizes, "noise": watch.noise}
    result["error"] = float((whole - true_weights).norm() / true_weights.norm())
    resumed = [run(checkpoint=folder / strategy / f"{save}.ckpt")[0] for save in SAVES]
    result["resumed"] = [torch.equal(weights, whole) for weights in resumed]
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
