"""``sequence_window="auto"`` on ranks whose devices have unequal memory: what each chose, and its weights."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from scarce_windows import weights_of
from test_planning import LLAMA, Rows

from lightning_llm import LLMModule
from lightning_llm.planning import of_module


def main(folder: Path, memories: list[float]) -> None:
    rank = int(os.environ["RANK"])
    of_module.free_memory = lambda device: memories[rank]
    torch.manual_seed(0)
    module = LLMModule(LLAMA, sequence_window="auto", warmup=0)
    trainer = L.Trainer(
        strategy=DDPStrategy(process_group_backend="gloo"), accelerator="cpu", devices=2, max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, Rows(4096))
    result = {"window": module.sequence_window, "weights": weights_of(module).double().norm().item()}
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
