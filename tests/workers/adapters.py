"""Adapters on two ranks: what trains after some steps against one process's whole batches; checkpoints of it."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from adapter_models import FIXED, METHODS, distance
from ddp_module import Shard
from support import pad_rows, ragged_rows

from lightning_llm import LLMModule
from lightning_llm.callbacks import AdaLoraAllocation, HuggingFaceCheckpoint, TokenWeightedAccumulation

STEPS = 4
ADA_LORA = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1}


WITH_HEAD = {**METHODS["LoRA"], "modules_to_save": ["lm_head"]}  # tied to the embedding, which stays frozen


def fields_of(method: str) -> dict:
    return {**METHODS, "AdaLoRA": ADA_LORA, "LoRA and head": WITH_HEAD}[method]


def trained(module: LLMModule) -> Tensor:
    parts = [p.detach() for p in module.model.parameters() if p.requires_grad]
    return torch.cat([(part.full_tensor() if isinstance(part, DTensor) else part).flatten() for part in parts])


def build(folder: Path, method: str) -> LLMModule:
    torch.manual_seed(0)
    options = {"learning_rate": 1e-2, "eps": 1e-3, "checkpoint": "trainable", **FIXED}
    return LLMModule(str(folder / "base"), peft=fields_of(method), **options)


def make_strategy(sharded: bool) -> Strategy:
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=False) if sharded else DDPStrategy()


def main(folder: Path, methods: list[str], sharded: bool) -> None:
    rank = int(os.environ["RANK"])
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options |= {"enable_model_summary": False, "default_root_dir": folder, "max_epochs": 1}
    batches = [ragged_rows(5, seed) for seed in range(STEPS)]
    result = {}
    for method in methods:
        extra = [AdaLoraAllocation()] if method == "AdaLoRA" else []
        alone = build(folder, method)
        alone.configure_model()
        start = trained(alone)
        L.Trainer(devices=1, callbacks=[*extra], **options).fit(alone, Shard([pad_rows(rows) for rows in batches]))
        mine = Shard([pad_rows(rows[:2] if rank == 0 else rows[2:]) for rows in batches])
        module = build(folder, method)
        extra = [AdaLoraAllocation()] if method == "AdaLoRA" else []
        export = HuggingFaceCheckpoint(str(folder / f"export-{method}"), monitor=None)
        trainer = L.Trainer(
            strategy=make_strategy(sharded),
            devices=2,
            callbacks=[TokenWeightedAccumulation(), *extra, export],
            **options,
        )
        trainer.fit(module, mine)
        found, truth = trained(module), trained(alone)
        path = folder / f"{method}.ckpt"
        trainer.save_checkpoint(path)
        again = build(folder, method)
        trainer = L.Trainer(strategy=make_strategy(sharded), devices=2, **options)
        trainer.validate(again, mine, ckpt_path=path, verbose=False, weights_only=True)
        result[method] = {
            "error": distance(found - start, truth - start),
            "resumed": torch.equal(trained(again), found),
            "sharded": all(isinstance(value, DTensor) for value in module.model.parameters()),
        }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    torch.distributed.destroy_process_group()  # before the process ends with its threads
