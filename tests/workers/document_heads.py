"""Documents in windows over two ranks with unequal shares, whole and sharded: against one process."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from document_training import batch_of, documents, module_of, weights_of
from task_heads import run_alone

from lightning_llm import LLMModule
from lightning_llm.callbacks import TokenWeightedAccumulation

STEPS = [slice(0, 7), slice(7, 14)]


class Case:
    """As :func:`run_alone` takes it."""

    def __init__(self, pooling):
        self.pooling = pooling

    def module(self, **options):
        return module_of(pooling=self.pooling, **options)


def main(folder: Path, poolings: list[str]) -> None:
    rank = int(os.environ["RANK"])
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options |= {"enable_model_summary": False, "default_root_dir": folder, "max_epochs": 1, "num_sanity_val_steps": 0}
    for pooling in poolings:  # before there is a process group, in which only rank 0 would write
        module_of(pooling=pooling).model.save_pretrained(folder / f"{pooling}-{rank}")
    some = documents()
    mine = [batch_of(some[step][:2] if rank == 0 else some[step][2:]) for step in STEPS]
    result = {}
    for pooling in poolings:
        truth, true_metrics = run_alone(Case(pooling), [batch_of(some[step]) for step in STEPS])
        start = weights_of(module_of(pooling=pooling))

        def run(callbacks, pooling=pooling):
            module = module_of(pooling=pooling)
            trainer = L.Trainer(callbacks=callbacks, strategy=DDPStrategy(), devices=2, **options)
            trainer.fit(module, Shard(mine), Shard(mine))
            found = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
            return weights_of(module), found

        found, metrics = run([TokenWeightedAccumulation()])
        plain, _ = run([])
        moved = (truth - start).norm()
        fixed = {"lr_schedule": "constant", "warmup": 0, "weight_decay": 0.0, "dtype": "float64", "eps": 1e-3}
        sharded = LLMModule(str(folder / f"{pooling}-{rank}"), "sequence-classification", learning_rate=1e-2, **fixed)
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        L.Trainer(strategy=strategy, devices=2, callbacks=[TokenWeightedAccumulation()], **options).fit(
            sharded, Shard(mine)
        )
        weights = torch.cat([value.full_tensor().flatten() for value in sharded.model.parameters()])
        result[pooling] = {
            "error": float((found - truth).norm() / moved),
            "without": float((plain - truth).norm() / moved),
            "sharded error": float((weights - truth).norm() / moved),
            "metrics": metrics,
            "true metrics": {f"val/{key}": value for key, value in true_metrics.items()},
        }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    torch.distributed.destroy_process_group()  # before the process ends with its threads
