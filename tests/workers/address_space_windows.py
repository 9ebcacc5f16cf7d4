"""Train single rows in windows in an address space that does not hold the first window; compare without a limit."""

import json
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from scarce_windows import make_optimizer, weights_of
from windowed_models import full_float64

from lightning_llm import LLMModule
from lightning_llm.callbacks import DynamicBatchScaler
from lightning_llm.out_of_memory import is_out_of_memory

LENGTH, WINDOW = 640, 512  # one float64 activation of the MLP in such a window: 64 MiB
LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 16384, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
}  # fmt: skip


class Module(LLMModule):
    def configure_optimizers(self):
        return make_optimizer(self)


def train(folder, callbacks):
    torch.manual_seed(0)
    module = Module(LLAMA, sequence_window=WINDOW, lr_schedule="constant", warmup=0)
    ids = torch.randint(0, 96, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, max_epochs=1, callbacks=callbacks, precision="64-true",
    )  # fmt: skip
    trainer.fit(module, DataLoader([{"input_ids": row, "labels": row} for row in ids]))
    return module


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    full_float64(SimpleNamespace(setattr=setattr))
    free = train(folder, [])
    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) for line in status if line.startswith("VmSize:")) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, resource.RLIM_INFINITY))
    try:
        train(folder, [])
        fails = False
    except RuntimeError as error:
        fails = is_out_of_memory(error)
    scaler = DynamicBatchScaler(grow_every=0)
    scarce = train(folder, [scaler])
    truth = weights_of(free)
    result = {
        "fails without": fails,
        "difference": float((weights_of(scarce) - truth).norm() / truth.norm()),
        "failed": scaler.limits.num_failed,
        "first window": WINDOW,
        "window": scarce.sequence_window,
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
