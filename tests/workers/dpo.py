"""Two ranks with unequal shares of the pairs: weights and metrics of both against those of one process."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from pair_models import batch_of, make_pairs, preferring, rows_of, weights_of

from lightning_llm import LLMModule
from lightning_llm.callbacks import TokenWeightedAccumulation
from lightning_llm.optimizers import make_adamw

GLOBAL_BATCH = 7
OPTIONS = {"learning_rate": 1e-2, "eps": 1e-3, "lr_schedule": "constant", "warmup": 0, "weight_decay": 0.0}


def whole_weights(module):
    gathered = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.model.parameters()]
    return torch.cat([parameter.detach().flatten() for parameter in gathered])


def main(folder: Path, sharded: bool = False) -> None:
    rank = int(os.environ["RANK"])
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options |= {"enable_model_summary": False, "default_root_dir": folder, "max_epochs": 1, "num_sanity_val_steps": 0}
    whole = batch_of(make_pairs(3 * GLOBAL_BATCH))
    steps = [range(a, a + GLOBAL_BATCH) for a in range(0, 3 * GLOBAL_BATCH, GLOBAL_BATCH)]
    mine = [rows_of(whole, list(step[:2] if rank == 0 else step[2:])) for step in steps]
    original = folder / f"original-{rank}"  # before there is a process group, in which only rank 0 would write
    preferring().model.save_pretrained(original)

    def make():
        if not sharded:
            return preferring(**OPTIONS)
        return LLMModule(str(original), "dpo", dtype="float64", **OPTIONS, task_options={"beta": 0.5})

    def run(callbacks):
        module = make()
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else DDPStrategy()
        trainer = L.Trainer(callbacks=callbacks, strategy=strategy, devices=2, **options)
        trainer.fit(module, Shard(mine), Shard(mine))
        found = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        return module, whole_weights(module), found

    truth, true_metrics, start = run_alone(make(), [rows_of(whole, list(step)) for step in steps])
    module, found, metrics = run([TokenWeightedAccumulation()])
    moved = (truth - start).norm()
    result = {
        "error": float((found - truth).norm() / moved),
        "metrics": metrics,
        "true metrics": {f"val/{key}": value for key, value in true_metrics.items()},
    }
    if sharded:
        result["sharded"] = all(isinstance(p, DTensor) for p in module.task.reference._copy.parameters())
    else:
        result["without"] = float((run([])[1] - truth).norm() / moved)
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


def run_alone(module, batches):
    """A bare loop."""
    module.configure_model()
    start = weights_of(module)
    options = {"learning_rate": 1e-2, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-3}
    optimizer = make_adamw(module.model, **options)
    for batch in batches:
        optimizer.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
    module.eval()
    metrics = module.task.metrics()
    with torch.no_grad():
        for batch in batches:
            module.task.evaluate(module.model, batch, metrics)
    return weights_of(module), {key: value.item() for key, value in metrics.compute().items()}, start


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    torch.distributed.destroy_process_group()  # before the process ends with its threads
