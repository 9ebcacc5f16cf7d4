"""FSDP2 through ModelParallelStrategy: sharded training, validation, checkpoints, export; one process beside it."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from support import pad_rows, ragged_rows

from lightning_llm import LLMModule
from lightning_llm.callbacks import HuggingFaceCheckpoint, TokenThroughput


def build(model, **options):
    torch.manual_seed(0)
    return LLMModule(model, learning_rate=1e-2, lr_schedule="constant", warmup=0, dtype="float64", **options)


def main(folder: Path, model: dict, weights: str | None = None) -> None:
    rank = int(os.environ["RANK"])
    source = weights or model
    rows = ragged_rows(12, seed=3)
    # every row has as many label tokens as the other rank's, so that the plain mean of means is exact
    for row in rows:
        row["input_ids"] = torch.arange(12) * 7 % 97 + len(row["input_ids"]) % 5
        row["labels"] = row["input_ids"].clone()
    steps = [(pad_rows(rows[i : i + 2]), pad_rows(rows[i + 2 : i + 4])) for i in (0, 4, 8)]
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "default_root_dir": folder,
    }

    # one epoch, a checkpoint, and a second epoch by a new process's objects that resume from it
    for max_epochs, ckpt_path in ((1, None), (2, folder / "module.ckpt")):
        module = build(source, gradient_checkpointing=True)
        export = HuggingFaceCheckpoint(str(folder / "hf"), monitor="val/loss")
        speed = TokenThroughput(every_n_steps=1)
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        trainer = L.Trainer(
            devices=2,
            strategy=strategy,
            max_epochs=max_epochs,
            gradient_clip_val=1.0,
            callbacks=[export, speed],
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            **options,
        )
        batches = Shard([step[rank] for step in steps])
        trainer.fit(module, batches, Shard([steps[0][rank]]), ckpt_path=ckpt_path)
        trainer.save_checkpoint(folder / "module.ckpt")
    sharded = [name for name, p in module.model.named_parameters() if isinstance(p, DTensor)]
    result = {"sharded": len(sharded), "parameters": len(list(module.model.named_parameters()))}
    result["val/loss"] = trainer.callback_metrics["val/loss"].item()
    result["total_tokens"] = speed.total_tokens
    full = {name: p.full_tensor() for name, p in module.model.named_parameters()}

    if rank == 0:
        # the same run in one process, on the joined batches
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(name, None)
        torch.distributed.destroy_process_group()
        joined = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in steps]
        plain = build(source)
        single = L.Trainer(
            devices=1, max_epochs=2, gradient_clip_val=1.0, enable_checkpointing=False, num_sanity_val_steps=0,
            **options,
        )  # fmt: skip
        single.fit(plain, Shard(joined), Shard(joined[:1]))
        result["single val/loss"] = single.callback_metrics["val/loss"].item()
        result["error"] = max(
            float((full[name] - p).norm() / p.norm().clamp(min=1e-6)) for name, p in plain.model.named_parameters()
        )
        exported = AutoModelForCausalLM.from_pretrained(folder / "hf" / "last", dtype=torch.float64)
        result["export equal"] = all(torch.equal(full[name], p) for name, p in exported.named_parameters())
        loaded = LLMModule.load_from_checkpoint(folder / "module.ckpt", dtype="float64")
        result["checkpoint equal"] = all(torch.equal(full[name], p) for name, p in loaded.model.named_parameters())
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
