"""Two ranks under a schedule of lengths: weights, tokens, and resumes after saves inside windows."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from length_training import Module, SaveAt, Seen, data_module, weights

from lightning_llm.callbacks import AccumulationSchedule, SequenceLengthSchedule, TokenWeightedAccumulation

LENGTHS = {"0 tokens": 8, "80 tokens": 13, "600 tokens": 32}
SAVES = [4, 5]  # a boundary, inside a window


def main(folder: Path, corpus: str) -> None:
    rank = int(os.environ["RANK"])
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 2}
    options |= {"accelerator": "cpu", "enable_model_summary": False, "default_root_dir": folder, "limit_val_batches": 0}

    def run(saves=(), checkpoint=None):
        seen, schedule = Seen(), SequenceLengthSchedule(LENGTHS, reserve=checkpoint is not None)
        callbacks = [seen, SaveAt(folder, saves), schedule, TokenWeightedAccumulation(), AccumulationSchedule(2)]
        strategy = DDPStrategy(process_group_backend="gloo")
        trainer = L.Trainer(strategy=strategy, callbacks=callbacks, max_steps=5, max_epochs=-1, **options)
        module = Module(dropout=0.2 * bool(saves or checkpoint))
        trainer.fit(module, data_module(corpus), ckpt_path=checkpoint)
        return weights(module), seen, schedule

    plain, seen, schedule = run()
    targets = torch.tensor(sum(len(batch[-1]) for batch in seen.train if batch[2] < 32))
    dist.all_reduce(targets)
    result = {"weights": plain.tolist(), "widths": [columns for _, _, columns, _ in seen.train]}
    result |= {"tokens": schedule.state_dict()["tokens"], "true tokens": int(targets)}
    whole = run(SAVES)[0]
    result["resumed"] = [torch.equal(run(checkpoint=folder / f"{save}.ckpt")[0], whole) for save in SAVES]
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
