"""Ranks that share rows under a Trainer, sharded by FSDP2, against one process that has the same batches."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from windowed_models import FAMILIES, full_float64

from lightning_llm import LLMModule
from lightning_llm.callbacks import TokenThroughput, TokenWeightedAccumulation

DOCUMENTS = ([4, 13, 1, 19], [30, 7], [37], [9, 9, 9, 10])
OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "max_epochs": 1,
}


class Module(LLMModule):
    """Plain gradient descent, which does not blow up rounding as Adam does where gradients are small."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Numbers(Dataset):
    """What Lightning's own sampler is to share out."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 61, (37,), generator=generator)
        return {"input_ids": ids, "labels": ids, "row_ids": index}


def batch(number: int) -> dict[str, torch.Tensor]:
    """Two rows: packed, or padded on the right; from few label tokens to many."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 61, (2, 37), generator=generator)
    labels = ids.masked_fill(torch.rand(2, 37, generator=generator) < 0.1 + 0.1 * (number % 8), -100)
    made = {"input_ids": ids, "labels": labels, "row_ids": torch.tensor([2 * number, 2 * number + 1])}
    made["num_bytes"] = torch.tensor([50.0 + number, 20.0])
    if number % 4 == 3:
        mask = torch.ones_like(ids)
        mask[0, 20:] = 0
        return made | {"attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    packed = [torch.cat([torch.arange(n) for n in DOCUMENTS[(number + row) % 4]]) for row in (0, 1)]
    return made | {"position_ids": torch.stack(packed)}


def train(folder: Path, context_parallel: bool, batches: list[Any], validation: list[Any], **options: Any) -> Any:
    torch.manual_seed(0)
    model = {**FAMILIES["mistral"], "tie_word_embeddings": True}
    module = Module(model, dtype="float64", context_parallel=context_parallel, gradient_checkpointing=context_parallel)
    callbacks = [TokenWeightedAccumulation(), TokenThroughput()]
    trainer = L.Trainer(callbacks=callbacks, gradient_clip_val=0.3, default_root_dir=folder, **OPTIONS, **options)
    trainer.fit(module, Shard(batches), Shard(validation))
    names = ("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte")
    result: dict[str, Any] = {name: trainer.callback_metrics[name].item() for name in names}
    scores = trainer.predict(module, Shard([batch(1), batch(3)]))
    result["tokens_seen"], result["total_tokens"] = module.tokens_seen, callbacks[1].total_tokens
    result["nll"] = torch.cat([score["nll"] for score in scores]).tolist()
    return trainer, module, result


def shared_out(folder: Path, **options: Any) -> list[int]:
    """The rows that Lightning's sampler gives this rank."""
    seen: list[int] = []

    class Recording(Module):
        def training_step(self, batch, batch_idx):
            seen.extend(batch["row_ids"].tolist())
            return super().training_step(batch, batch_idx)

    module = Recording(FAMILIES["llama"], context_parallel=True)
    trainer = L.Trainer(default_root_dir=folder, **OPTIONS, **options)
    trainer.fit(module, DataLoader(Numbers(), batch_size=2, shuffle=True))
    return seen


def main(folder: Path, groups: int) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    full_float64(SimpleNamespace(setattr=setattr))
    size = world // groups

    def ranks() -> dict[str, Any]:
        strategy = ModelParallelStrategy(
            data_parallel_size=groups, tensor_parallel_size=size, save_distributed_checkpoint=False
        )
        return {"devices": world, "strategy": strategy}

    batches, validation = ([batch(number) for number in numbers] for numbers in (range(8), (20, 23, 22, 27)))
    mine, mine_too = batches[rank // size :: groups], validation[rank // size :: groups]
    accumulate = {"accumulate_grad_batches": 2}
    trainer, module, result = train(folder, True, mine, mine_too, **ranks(), **accumulate)
    trainer.save_checkpoint(folder / "module.ckpt")
    parameters = dict(module.model.named_parameters())
    result["shards"] = sorted({len(p.device_mesh.mesh) for p in parameters.values() if isinstance(p, DTensor)})
    full = {name: p.full_tensor() for name, p in parameters.items()}
    result["rows"] = shared_out(folder, **ranks())
    if rank == 0:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(name, None)
        dist.destroy_process_group()
        accumulate = {"accumulate_grad_batches": 2 * groups}
        _, plain, result["single"] = train(folder, False, batches, validation, devices=1, **accumulate)
        torch.manual_seed(0)
        initial = Module(plain.config, dtype="float64")
        initial.configure_model()
        before = dict(initial.model.named_parameters())
        result["error"] = max(
            float((full[n] - p).norm() / (p - before[n]).norm()) for n, p in plain.model.named_parameters()
        )
        loaded = LLMModule.load_from_checkpoint(folder / "module.ckpt", dtype="float64", context_parallel=False)
        result["checkpoint equal"] = all(torch.equal(full[name], p) for name, p in loaded.model.named_parameters())
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
