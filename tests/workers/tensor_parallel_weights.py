"""Four ranks, two of which share each batch: the weights of the step against those of the big batch."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_llm.callbacks import TokenWeightedAccumulation


class TwoLayers(L.LightningModule):
    """A small network whose layers are split over two ranks, and whose halves are sharded over the other two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1)).double()

    def configure_model(self):
        if self.device_mesh is None:
            return
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return {"loss": self.net(batch[0]).square().mean(), "num_tokens": len(batch[0])}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(48, 8, generator=generator, dtype=torch.float64)
    cuts = [3, 5, 7, 1, 2, 6, 4, 4, 8, 2, 5, 1]  # micro-batches of unequal size: two to a rank in each step
    micro_batches = list(rows.split(cuts))
    replica = rank // 2
    steps = [micro_batches[i : i + 4] for i in range(0, len(micro_batches), 4)]
    mine = [[part] for step in steps for part in step[replica::2]]

    module = TwoLayers()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 4}
    options |= {"accelerator": "cpu", "enable_model_summary": False, "default_root_dir": folder, "max_epochs": 1}
    trainer = L.Trainer(
        strategy=strategy, accumulate_grad_batches=2, callbacks=[TokenWeightedAccumulation()], **options
    )
    trainer.fit(module, Shard(mine))
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    found = torch.cat([part.detach().flatten() for part in parts])

    truth, losses = TwoLayers(), []
    stepper = truth.configure_optimizers()
    for step in steps:
        stepper.zero_grad()
        loss = truth.training_step([torch.cat(step)], 0)["loss"]
        loss.backward()
        losses.append(float(loss))
        stepper.step()
    wanted = torch.cat([p.detach().flatten() for p in truth.parameters()])
    result = {
        "error": float((found - wanted).norm() / wanted.norm()),
        "loss": float(trainer.callback_metrics["train/loss"]),
        "true loss": losses[-1],
        "sampler": trainer.strategy.distributed_sampler_kwargs,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
