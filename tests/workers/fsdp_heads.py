"""Heads whose parameters are sharded over two ranks (FSDP2): weights after training against a bare loop's; texts."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from task_heads import run_alone
from task_models import CASES, batch_of

from lightning_llm import LLMModule
from lightning_llm.callbacks import TokenWeightedAccumulation


def main(folder: Path, names: list[str]) -> None:
    rank = int(os.environ["RANK"])
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options |= {"enable_model_summary": False, "default_root_dir": folder, "max_epochs": 1, "num_sanity_val_steps": 0}
    result = {}
    for name in names:  # before there is a process group, in which only rank 0 would write
        CASES[name].module().model.save_pretrained(folder / f"{name}-{rank}")
    for name in names:
        case = CASES[name]
        whole = batch_of(case.rows(14))
        steps = [range(7), range(7, 14)]
        batches = [{key: value[list(step)] for key, value in whole.items()} for step in steps]
        truth, _ = run_alone(case, batches)
        before = case.module().model
        several = {"task_options": {"generate": {"max_new_tokens": 9}}} if case.task == "seq2seq" else {}
        fixed = {"lr_schedule": "constant", "warmup": 0, "weight_decay": 0.0, "dtype": "float64"}
        module = LLMModule(str(folder / f"{name}-{rank}"), case.task, learning_rate=1e-2, eps=1e-3, **fixed, **several)
        part = slice(0, 2) if rank == 0 else slice(2, 7)
        mine = Shard([{key: value[part] for key, value in batch.items()} for batch in batches])
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        trainer = L.Trainer(strategy=strategy, devices=2, callbacks=[TokenWeightedAccumulation()], **options)
        trainer.fit(module, mine)
        weights = {key: value.full_tensor() for key, value in module.model.named_parameters()}
        found = torch.cat([weights[key].flatten() for key, _ in before.named_parameters()])
        start = torch.cat([value.detach().flatten() for value in before.parameters()])
        result[name] = {
            "error": float((found - truth).norm() / (truth - start).norm()),
            "sharded": all(isinstance(value, DTensor) for value in module.model.parameters()),
        }
        if case.task == "seq2seq":
            predictions = trainer.predict(module, mine)
            result[name]["written"] = [list(batch["token_ids"].shape) for batch in predictions]
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    torch.distributed.destroy_process_group()  # before the process ends with its threads
