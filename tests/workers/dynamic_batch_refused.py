"""DDP with a static graph: what the callback says."""

import json
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import Plain

from lightning_llm.callbacks import DynamicBatchScaler


def main(folder: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, strategy=DDPStrategy(static_graph=True), logger=False, max_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, default_root_dir=folder,
        callbacks=[DynamicBatchScaler()],
    )  # fmt: skip
    try:
        trainer.fit(Plain(), [[torch.zeros(2, 3)]])
    except ValueError as error:
        (folder / "rank0.json").write_text(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
