"""Two ranks with ragged rows, some without a label: the weights of the cut run against those of the big batch."""

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
from token_training import GLOBAL_BATCH, Losses, Module, big_batch, rows, weights
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_llm.callbacks import TokenWeightedAccumulation

SILENT = [1, 3, 5, 7, 20, 41]


class Sharded(Module):
    def configure_model(self):
        for block in self.model.transformer.h:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def whole_weights(module):
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([part.detach().flatten() for part in parts])


def main(folder: Path, strategy: str) -> None:
    rank = int(os.environ["RANK"])
    data = rows(silent=SILENT)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 2}
    options |= {"accelerator": "cpu", "enable_model_summary": False, "log_every_n_steps": 1, "default_root_dir": folder}

    def run(optimizer, clip, accumulate, callbacks, **ddp):
        per_rank = GLOBAL_BATCH // 2 // accumulate
        mine = []
        for begin in range(0, len(data), GLOBAL_BATCH):
            step = data[begin : begin + GLOBAL_BATCH]
            share = step[rank::2]  # the silent rows are nearly all of rank 1
            mine += [pad_rows(share[i : i + per_rank]) for i in range(0, len(share), per_rank)]
        made = DDPStrategy(**ddp) if strategy == "ddp" else ModelParallelStrategy(2, 1)
        module = (Module if strategy == "ddp" else Sharded)(TINY_GPT2, optimizer)
        trainer = L.Trainer(
            strategy=made, max_epochs=2, accumulate_grad_batches=accumulate, gradient_clip_val=clip,
            callbacks=callbacks, **options,
        )  # fmt: skip
        trainer.fit(module, Shard(mine))
        return whole_weights(module)

    result = {"cases": {}}
    cases = [("sgd", None, 2, {}), ("adamw", 0.3, 4, {"gradient_as_bucket_view": True}), ("sgd", 0.3, 1, {})]
    for optimizer, clip, accumulate, ddp in cases:
        truth, true_losses = big_batch(TINY_GPT2, optimizer, clip, data)
        losses = Losses()
        found = run(optimizer, clip, accumulate, [losses, TokenWeightedAccumulation()], **ddp)
        result["cases"][f"{optimizer}, clip {clip}, K = {accumulate}"] = float((found - truth).norm() / truth.norm())
    result["losses"] = [float(losses.values[step]) for step in sorted(losses.values) if step]
    result["true losses"] = true_losses
    truth, _ = big_batch(TINY_GPT2, "sgd", None, data)
    result["without"] = float((run("sgd", None, 2, []) - truth).norm() / truth.norm())
    assert len(weights(Module(TINY_GPT2))) == len(truth)
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
