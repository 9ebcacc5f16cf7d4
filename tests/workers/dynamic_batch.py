"""Two ranks, one of them short of memory: weights against the big batch, logs, and how often gradients were reduced."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from scarce_memory import Scarce
from support import TINY_GPT2, pad_rows
from token_training import GLOBAL_BATCH, big_batch, rows, weights

from lightning_llm.callbacks import DynamicBatchScaler, TokenWeightedAccumulation


class Watched(Scarce):
    """Logs a row mean with ``sync_dist``, has a buffer that DDP broadcasts, and a parameter that nothing uses."""

    def __init__(self, *args, unused=False, **options):
        super().__init__(*args, **options)
        self.register_buffer("number", torch.zeros(3))
        if unused:
            self.unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.logged, self.shrink_at = [], None

    def training_step(self, batch, batch_idx):
        if self.shrink_at is not None and self.global_step >= self.shrink_at:
            self.backward_limit = 50
        output = super().training_step(batch, batch_idx)
        length = batch["attention_mask"].sum(1).double().mean()
        size = len(batch["input_ids"])
        self.log("length", length, on_step=True, on_epoch=True, sync_dist=True, batch_size=size)
        return output

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logged.append(float(self.trainer.callback_metrics["length_step"]))


def main(folder: Path, cases: list) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    data = rows()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 2}
    options |= {"accelerator": "cpu", "enable_model_summary": False, "default_root_dir": folder, "max_epochs": 2}
    results = []
    for case in cases:
        accumulate, ddp = case["accumulate"], dict(case.get("ddp", {}))
        optimizer = case.get("optimizer", "sgd")
        per_rank = GLOBAL_BATCH // 2 // accumulate
        mine, shares = [], []
        for begin in range(0, len(data), GLOBAL_BATCH):
            step = data[begin : begin + GLOBAL_BATCH]
            for r in range(2):
                share = step[r::2]
                parts = [pad_rows(share[i : i + per_rank]) for i in range(0, len(share), per_rank)]
                mine += parts if r == rank else []
                shares += [(r, part["attention_mask"].sum(1).double().mean().item()) for part in parts]
        if ddp.pop("hook", False):
            ddp["ddp_comm_hook"] = default_hooks.allreduce_hook
        module = Watched(
            TINY_GPT2,
            optimizer,
            case.get("forward"),
            case.get("backward"),
            ranks=(1,),
            unused=case.get("unused", False),
        )
        module.shrink_at = case.get("shrink_at")
        scaler = DynamicBatchScaler(
            grow_every=case.get("grow_every", 2), overlap=case["overlap"], find=case.get("find", "run")
        )
        trainer = L.Trainer(
            strategy=DDPStrategy(**ddp), accumulate_grad_batches=accumulate, gradient_clip_val=0.3,
            callbacks=[TokenWeightedAccumulation(), scaler], **options,
        )  # fmt: skip
        trainer.fit(module, Shard(mine))
        truth, _ = big_batch(TINY_GPT2, optimizer, 0.3)
        found = weights(module)[: len(truth)] if not case.get("unused") else weights(module)[3:]
        first, second = ([length for r, length in shares if r == which] for which in range(2))
        results.append(
            {
                "error": float((found - truth).norm() / truth.norm()),
                "steps": trainer.global_step,
                "failed": module.num_failed,
                "largest": max(s[0] * s[1] for s in module.shapes),
                "pieces": len(module.shapes),
                "logged": module.logged[: len(first)],
                "expected": [(a + b) / 2 for a, b in zip(first, second, strict=True)],
                "limits": {bucket: limit.limit for bucket, limit in scaler.limits.buckets.items() if limit.limit},
                "unused": module.unused.tolist() if case.get("unused") else None,
            }
        )
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    torch.distributed.destroy_process_group()  # its threads must not outlive the interpreter
