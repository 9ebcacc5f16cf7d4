"""Two ranks that prune, with unequal tokens: weights and masks against those of the bare loop."""

import hashlib
import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from pruned_training import EPOCHS, GLOBAL_BATCH, PRUNING, bare_loop
from support import TINY_GPT2, pad_rows
from token_training import Module, rows
from token_weighted import Sharded, whole_weights

from lightning_llm.callbacks import MagnitudePruning, TokenWeightedAccumulation


def main(folder: Path, strategy: str) -> None:
    rank = int(os.environ["RANK"])
    data = rows()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options |= {"enable_model_summary": False, "default_root_dir": folder}
    mine = []
    for begin in range(0, len(data), GLOBAL_BATCH):
        share = data[begin : begin + GLOBAL_BATCH][rank::2]
        mine += [pad_rows(share[i : i + 4]) for i in range(0, len(share), 4)]  # two micro-batches a step

    def fit(scope, max_epochs, ckpt_path=None):
        made = DDPStrategy() if strategy == "ddp" else ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
        module = (Module if strategy == "ddp" else Sharded)(TINY_GPT2)
        pruning = MagnitudePruning(**PRUNING, scope=scope)
        trainer = L.Trainer(
            strategy=made, devices=2, max_epochs=max_epochs, accumulate_grad_batches=2,
            callbacks=[TokenWeightedAccumulation(), pruning], **options,
        )  # fmt: skip
        trainer.fit(module, Shard(mine), ckpt_path=ckpt_path)
        return module, pruning, trainer

    result = {"errors": {}, "zeros": {}, "bits": {}}
    for scope in ("layer", "global"):
        truth, _ = bare_loop(TINY_GPT2, scope=scope)
        module, pruning, _ = fit(scope, EPOCHS)
        found = whole_weights(module)
        result["errors"][scope] = float((found - truth).norm() / truth.norm())
        result["zeros"][scope] = pruning.achieved
        digest = hashlib.sha256(b"".join(pruning._bits[name].numpy().tobytes() for name in sorted(pruning._bits)))
        result["bits"][scope] = digest.hexdigest()

    # a run that two ranks begin and one goes on with
    _, first, trainer = fit("layer", 2)
    trainer.save_checkpoint(folder / "two.ckpt")
    state = first.state_dict()
    torch.distributed.barrier()
    if rank == 0:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(name, None)
        torch.distributed.destroy_process_group()
        single, pruning = Module(TINY_GPT2), MagnitudePruning(**PRUNING)
        trainer = L.Trainer(devices=1, max_epochs=2, callbacks=[TokenWeightedAccumulation(), pruning], **options)
        trainer.fit(single, Shard([pad_rows(data[:2])]), ckpt_path=folder / "two.ckpt")
        same = all(torch.equal(pruning._bits[name], bits) for name, bits in state["masks"].items())
        result["resumed on one rank"] = bool(state["masks"]) and same
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
