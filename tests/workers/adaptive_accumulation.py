"""Two ranks whose batch follows a planted noise scale: decisions, weights against the big batch, and resumes."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from accumulation_schedule import Watch
from adaptive_training import Planted
from support import TINY_GPT2, Positions, pad_rows
from token_training import Module, rows, weights

from lightning_llm.callbacks import AdaptiveAccumulation, TokenWeightedAccumulation

SAVES = [2, 5]  # a step's end, and inside a window


def curve(measured: int) -> float:
    return 4.0 if measured < 2 else 14.0 if measured < 5 else 5.0


def truth(data, sizes):
    module, begin = Module(TINY_GPT2, "adamw"), 0
    stepper = module.configure_optimizers()
    for size in sizes:
        part = data[begin : begin + 4 * size]
        begin = (begin + 4 * size) % len(data)
        stepper.zero_grad()
        module.training_step(pad_rows(part), 0)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.3)
        stepper.step()
    return weights(module)


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    data = rows(40)
    mine = [pad_rows(data[begin + 2 * rank : begin + 2 * rank + 2]) for begin in range(0, len(data), 4)]
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 2}
    options |= {"accelerator": "cpu", "enable_model_summary": False, "default_root_dir": folder, "max_epochs": 2}

    def run(saves=(), checkpoint=None):
        torch.manual_seed(1)
        module, watch = Module(TINY_GPT2, "adamw"), Watch(folder, saves)
        callback = AdaptiveAccumulation((4, 16), "sequences", min_steps=1)
        callbacks = [watch, TokenWeightedAccumulation(), Planted(curve), callback]
        trainer = L.Trainer(strategy=DDPStrategy(), gradient_clip_val=0.3, callbacks=callbacks, **options)
        trainer.fit(module, Positions(mine), ckpt_path=checkpoint)
        return weights(module), watch, callback

    whole, watch, callback = run(SAVES)
    expected = truth(data, watch.sizes)
    result = {"sizes": watch.sizes, "decisions": [(entry["after"], entry["rule"]) for entry in callback.decisions]}
    result["error"] = float((whole - expected).norm() / expected.norm())
    resumed = [run(checkpoint=folder / f"{save}.ckpt") for save in SAVES]
    result["resumed"] = [
        torch.equal(found, whole) and again.decisions == callback.decisions for found, _, again in resumed
    ]
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
