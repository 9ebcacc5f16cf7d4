"""Two ranks train several tasks, also with one of them out of memory; weights against those of one process."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from multi_task_training import Seen, data, module, trained, weights

from lightning_llm import MultiTaskModule
from lightning_llm.callbacks import DynamicBatchScaler


class Scarce(MultiTaskModule):
    num_failed = 0

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        if self.global_rank == 1 and len(batch["input_ids"]) > 1:
            self.num_failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return output


def main(folder: Path, truth: str) -> None:
    rank = int(os.environ["RANK"])
    expected = torch.load(truth, weights_only=True)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options |= {"enable_model_summary": False, "default_root_dir": folder, "num_sanity_val_steps": 0, "devices": 2}

    def make_trainer(**more):
        return L.Trainer(**{**options, **more}, strategy=DDPStrategy())

    def run(name):
        def error(made):
            moved = expected["truth"][name] - expected["begin"][name]
            return float((weights(made) - expected["truth"][name]).norm() / moved.norm())

        seen, scarce = Seen(), module(Scarce, weighting=name)
        made, _ = trained(folder, make_trainer, 3, [seen], made=module(weighting=name), loaded=data(folder))
        mine = [row for step in seen.steps[: len(seen.steps) // 2] for row in step]
        everyone = [None, None]
        torch.distributed.all_gather_object(everyone, mine)
        rows = [tuple(row) for part in everyone for row in part]
        trained(folder, make_trainer, 3, [DynamicBatchScaler(grow_every=0)], made=scarce, loaded=data(folder))
        return {
            "error": error(made),
            "scarce error": error(scarce),
            "rows once": len(rows) == len(set(rows)) == 39,
            "failed": scarce.num_failed,
        }

    (folder / f"rank{rank}.json").write_text(json.dumps({name: run(name) for name in expected["truth"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    torch.distributed.destroy_process_group()  # before the process ends with its threads
