"""Two ranks that contrast with the texts of both, whole or in chunks: weights against those of one process."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from pair_models import rows_of, weights_of
from text_pairs import embedding, texts

from lightning_llm.callbacks import DynamicBatchScaler, TokenWeightedAccumulation
from lightning_llm.optimizers import make_adamw

GLOBAL_BATCH = 7
OPTIONS = {"learning_rate": 1e-2, "eps": 1e-3}
WAYS = {
    "whole": {"across_ranks": True},
    "symmetric": {"across_ranks": True, "symmetric": True},
    "chunks": {"across_ranks": True, "chunk_size": 2},
    "own negatives": {},
}


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options |= {"enable_model_summary": False, "default_root_dir": folder, "max_epochs": 1, "num_sanity_val_steps": 0}
    whole = texts(2 * GLOBAL_BATCH, ("anchor", "positive", "negative"))
    steps = [list(range(GLOBAL_BATCH)), list(range(GLOBAL_BATCH, 2 * GLOBAL_BATCH))]
    mine = Shard([rows_of(whole, step[:3] if rank == 0 else step[3:]) for step in steps])
    result = {}
    for name, task_options in WAYS.items():
        truth, start = run_alone([rows_of(whole, step) for step in steps], symmetric=name == "symmetric")
        module = embedding(task_options=task_options, **OPTIONS)
        callbacks = [TokenWeightedAccumulation(), *([DynamicBatchScaler()] if name == "chunks" else [])]
        trainer = L.Trainer(strategy=DDPStrategy(), devices=2, callbacks=callbacks, **options)
        trainer.fit(module, mine, mine)
        result[name] = float((weights_of(module) - truth).norm() / (truth - start).norm())
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


def run_alone(batches, **task_options):
    """A bare loop."""
    module = embedding(task_options=task_options)
    start = weights_of(module)
    trained = {"learning_rate": 1e-2, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-3}
    optimizer = make_adamw(module.model, **trained)
    for batch in batches:
        optimizer.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
    return weights_of(module), start


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    torch.distributed.destroy_process_group()  # before the process ends with its threads
