"""Two ranks with rows of different lengths, so different numbers of windows: DDP by hand and by Lightning, FSDP2."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
import windowed_fsdp
from ddp_module import Shard
from windowed_models import batch_of, build, full_float64, gradients, uncut, worst_error

from lightning_llm.windowed import windowed_loss

LENGTHS = (37, 9)  # of rank 0 and rank 1: 5 windows and 2


class InWindows(nn.Module):
    """DDP prepares its reduction in forward, so the loss is computed there."""

    def __init__(self, model, when):
        super().__init__()
        self.model, self.when = model, when

    def forward(self, ids, labels):
        return windowed_loss(self.model, ids, labels, window=8, when=self.when).mean


class Module(L.LightningModule):
    def __init__(self, when):
        super().__init__()
        self.model, self.when = build("llama_tied"), when
        self.fired = []
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(self.fired.append)

    def training_step(self, batch, batch_idx):
        self.fired.clear()
        window = 8 if self.when else 64  # one window of the whole row: the truth
        return windowed_loss(self.model, *batch, window=window, when=self.when or "forward").mean

    def on_after_backward(self):
        assert len({id(p) for p in self.fired}) == len(self.fired) == len(list(self.model.parameters()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def by_hand(rank: int, **options) -> dict[str, float]:
    ids, labels = batch_of(rows=1, length=LENGTHS[rank], seed=rank)
    both = [uncut(build("llama"), *batch_of(rows=1, length=LENGTHS[r], seed=r))[1] for r in (0, 1)]
    truth = {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}
    errors = {}
    for when in ("forward", "backward"):
        model = build("llama")
        wrapped = DistributedDataParallel(InWindows(model, when), **options)
        for _ in range(2):
            model.zero_grad()
            wrapped(ids, labels).backward()
        errors[f"{when} {options}"] = worst_error(gradients(model), truth)
    return errors


def by_trainer(folder: Path, rank: int, when: str | None) -> torch.Tensor:
    lengths = [37, 9, 30, 20, 12, 37, 25, 8]
    data = [batch_of(rows=1, length=length, seed=i) for i, length in enumerate(lengths)][rank::2]
    module = Module(when)
    trainer = L.Trainer(
        strategy=DDPStrategy(process_group_backend="gloo"), accelerator="cpu", devices=2, max_epochs=2,
        accumulate_grad_batches=2, gradient_clip_val=0.3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, Shard(data))
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def all_errors(folder: Path, rank: int) -> dict[str, float]:
    truth = by_trainer(folder, rank, None)
    errors = {}
    for when in ("forward", "backward"):
        found = by_trainer(folder, rank, when)
        errors[f"trainer {when}"] = float((found - truth).norm() / truth.norm())
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        errors |= by_hand(rank, **options)
    return errors


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    full_float64(SimpleNamespace(setattr=setattr))
    result = {"ddp": all_errors(folder, rank), "fsdp": windowed_fsdp.all_errors(rank)}
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
