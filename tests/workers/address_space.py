"""Train with an address space that does not hold a whole batch; compare with a run without a limit."""

import json
import resource
import sys
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_llm.callbacks import DynamicBatchScaler
from lightning_llm.out_of_memory import is_out_of_memory

WIDTH, ROWS = 4096, 2048  # one float64 activation of a whole batch: 64 MiB


class WideInForward(torch.autograd.Function):
    """Takes much memory in forward and none in backward."""

    @staticmethod
    def forward(ctx, x):
        (x.repeat(1, 6) * 1.0).sum()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class WideInBackward(WideInForward):
    """The other way round."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        (gradient.repeat(1, 6) * 1.0).sum()
        return gradient


class Wide(L.LightningModule):
    def __init__(self, where):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, WIDTH).double(), nn.Linear(WIDTH, 1).double()
        self.wide = WideInForward if where == "forward" else WideInBackward
        self.failed = {"forward": 0, "backward": 0}

    def training_step(self, batch, batch_idx):
        try:
            hidden = self.wide.apply(torch.tanh(self.first(batch[0])))
        except RuntimeError:
            self.failed["forward"] += 1
            raise
        return self.last(hidden).square().mean()

    def backward(self, loss):
        try:
            loss.backward()
        except RuntimeError:
            self.failed["backward"] += 1
            raise

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def train(folder, where, callbacks):
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(2 * ROWS, 8, dtype=torch.float64))
    module = Wide(where)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, max_epochs=2, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=ROWS))
    return module, trainer


def main(folder: Path, where: str) -> None:
    torch.set_num_threads(1)
    whole, trainer = train(folder, where, [])
    used = int(
        next(line for line in Path("/proc/self/status").read_text().splitlines() if line[:7] == "VmSize:").split()[1]
    )
    limit = used * 1024 + 400 * 2**20  # six activations at once are 384 MiB, and there are others
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        train(folder, where, [])
        fails = False
    except RuntimeError as error:
        fails = is_out_of_memory(error)
    scaler = DynamicBatchScaler(grow_every=0)
    pieces, cut = train(folder, where, [scaler])
    pairs = zip(whole.parameters(), pieces.parameters(), strict=True)
    result = {
        "unlimited fails": fails,
        "difference": max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs),
        "failed": scaler.limits.num_failed,
        "in forward": pieces.failed["forward"],
        "in backward": pieces.failed["backward"],
        "steps": cut.global_step,
        "expected steps": trainer.global_step,
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
