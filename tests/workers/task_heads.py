"""Two ranks with unequal shares of the targets: weights and metrics of both against those of one process."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from task_models import CASES, batch_of

from lightning_llm.callbacks import TokenWeightedAccumulation
from lightning_llm.optimizers import make_adamw

GLOBAL_BATCH = 7


def weights_of(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.model.parameters()])


def main(folder: Path, names: list[str]) -> None:
    rank = int(os.environ["RANK"])
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options |= {"enable_model_summary": False, "default_root_dir": folder, "max_epochs": 1, "num_sanity_val_steps": 0}
    result = {}
    for name in names:
        case = CASES[name]
        whole = batch_of(case.rows(3 * GLOBAL_BATCH))

        def cut(rows, whole=whole):
            return {key: value[rows] for key, value in whole.items()}

        steps = [list(range(a, a + GLOBAL_BATCH)) for a in range(0, 3 * GLOBAL_BATCH, GLOBAL_BATCH)]
        mine = [cut(step[:2] if rank == 0 else step[2:]) for step in steps]

        def run(callbacks, batches=mine, case=case):
            module = case.module(learning_rate=1e-2, eps=1e-3)
            ddp = DDPStrategy(find_unused_parameters=True)
            trainer = L.Trainer(callbacks=callbacks, strategy=ddp, devices=2, **options)
            trainer.fit(module, Shard(batches), Shard(batches))
            found = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
            return weights_of(module), found

        truth, true_metrics = run_alone(case, [cut(step) for step in steps])
        start = weights_of(case.module())
        found, metrics = run([TokenWeightedAccumulation()])
        plain, _ = run([]) if name in names[:2] else (start, None)  # the control takes its time
        moved = (truth - start).norm()
        result[name] = {
            "error": float((found - truth).norm() / moved),
            "without": float((plain - truth).norm() / moved),
            "metrics": metrics,
            "true metrics": {f"val/{key}": value for key, value in true_metrics.items()},
        }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


def run_alone(case, batches):
    """A bare loop."""
    module = case.module(learning_rate=1e-2, eps=1e-3)
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
    return weights_of(module), {key: value.item() for key, value in metrics.compute().items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    torch.distributed.destroy_process_group()  # before the process ends with its threads
