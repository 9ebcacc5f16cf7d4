"""Two ranks whose windows keep keys and values in host memory: DDP and FSDP2, rows of different lengths."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from windowed_models import batch_of, build, full_float64, gradients, uncut, worst_error

from lightning_llm.sharding import shard_layers
from lightning_llm.windowed import windowed_loss

LENGTHS = (37, 9)


class InWindows(nn.Module):
    def __init__(self, model, when):
        super().__init__()
        self.model, self.when = model, when

    def forward(self, ids, labels):
        return windowed_loss(self.model, ids, labels, window=8, when=self.when, offload=True).mean


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    full_float64(SimpleNamespace(setattr=setattr))
    mesh = init_device_mesh("cpu", (2,))
    batches = [batch_of(rows=1, length=length, seed=r) for r, length in enumerate(LENGTHS)]
    both = [uncut(build("gemma3"), *batch)[1] for batch in batches]
    truth = {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}
    errors = {}
    for when in ("forward", "backward"):
        model = build("gemma3")
        wrapped = DistributedDataParallel(InWindows(model, when))
        wrapped(*batches[rank]).backward()
        errors[f"ddp {when}"] = worst_error(gradients(model), truth)
    model = build("gemma3")
    shard_layers(model, mesh)
    windowed_loss(model, *batches[rank], window=4, offload=True).mean.backward()
    errors["fsdp"] = worst_error({name: p.grad.full_tensor() for name, p in model.named_parameters()}, truth)
    (folder / f"rank{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
