"""Two ranks, many cuts of the step: the error of the weights against the big batch, for each."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from support import TINY_GPT2, pad_rows
from token_training import Module, big_batch, rows
from token_weighted import Sharded, whole_weights

from lightning_llm.callbacks import TokenWeightedAccumulation


def main(folder: Path, strategy: str, cuts: list) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    data = rows(48)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 2}
    options |= {"accelerator": "cpu", "enable_model_summary": False, "default_root_dir": folder, "max_epochs": 2}
    errors = {}
    for micro_batch, accumulate, optimizer, clip in cuts:
        global_batch, mine = 2 * micro_batch * accumulate, []
        for begin in range(0, len(data), global_batch):
            share = data[begin : begin + global_batch][rank::2]
            mine += [pad_rows(share[i : i + micro_batch]) for i in range(0, len(share), micro_batch)]
        truth, _ = big_batch(TINY_GPT2, optimizer, clip, data, global_batch=global_batch)
        made = DDPStrategy() if strategy == "ddp" else ModelParallelStrategy(2, 1)
        module = (Module if strategy == "ddp" else Sharded)(TINY_GPT2, optimizer)
        trainer = L.Trainer(
            strategy=made, accumulate_grad_batches=accumulate, gradient_clip_val=clip,
            callbacks=[TokenWeightedAccumulation()], **options,
        )  # fmt: skip
        trainer.fit(module, Shard(mine))
        found = whole_weights(module)
        errors[str((micro_batch, accumulate, optimizer, clip))] = float((found - truth).norm() / truth.norm())
    (folder / f"rank{rank}.json").write_text(json.dumps({"errors": errors}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
