"""Several ranks go on from one rank's checkpoint, and save their own."""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from elastic_training import run


def main(folder: Path, folders: dict, settings: dict) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sums = {}
    for name, (data, accumulate) in settings.items():
        home = Path(folders[name])
        own = home / f"world{world_size}"
        own.mkdir(exist_ok=True)
        by_micro_batches = "global_batch_size" not in data and "global_batch_tokens" not in data
        _, weights = run(
            home,
            f"world{world_size}-rank{rank}",
            data={**data, "num_workers": rank % 2},
            accumulate=accumulate // world_size if by_micro_batches else accumulate,
            resume=home / "step6.ckpt",
            record={"save_steps": [10], "save_folder": own},
            trainer={"devices": world_size, "strategy": "ddp"},
        )
        sums[name] = weights.sum().item()
    (folder / f"rank{rank}.json").write_text(json.dumps(sums))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
