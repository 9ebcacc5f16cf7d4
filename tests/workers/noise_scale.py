"""Two ranks with ragged rows: what the noise scale is measured from, against all parts computed plainly."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddp_module import Shard
from noise_truth import Estimates, Recorder, Still, average_of, error, true_estimates
from scarce_memory import Scarce
from support import TINY_GPT2, pad_rows
from token_training import rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_llm import LLMModule
from lightning_llm.callbacks import DynamicBatchScaler, GradientNoiseScale, TokenWeightedAccumulation


class ScarceOnOneRank(Scarce):
    configure_optimizers = Still.configure_optimizers


class Sharded(Still):
    def configure_model(self):
        for block in self.model.transformer.h:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


class SharesBatches(Still):
    def configure_model(self):
        """Both ranks get the same batches, as for tensor parallelism."""


class Hybrid(Still):
    def configure_model(self):
        fully_shard(self.model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))


def of_all_ranks(value):
    values = [None, None]
    dist.all_gather_object(values, value)
    return values


def main(folder: Path, strategy: str) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 2}
    options |= {"accelerator": "cpu", "enable_model_summary": False, "default_root_dir": folder, "max_epochs": 1}
    options |= {"num_sanity_val_steps": 1}

    def batches(size):
        data = rows(37, silent=[1, 3, 5, 7, 20])  # most silent rows are rank 1's, and its last batch is smaller
        share = data[rank::2]
        return Shard([pad_rows(share[i : i + size]) for i in range(0, 18, size)])

    def fit(module, callbacks, size, made=None, **more):
        made = made or (DDPStrategy(**more.pop("ddp", {})) if strategy == "ddp" else ModelParallelStrategy(2, 1))
        L.Trainer(strategy=made, callbacks=callbacks, **more, **options).fit(module, batches(size))

    def measure(size, *others, module=None, **more):
        noise_scale = GradientNoiseScale()
        estimates, recorder = Estimates(noise_scale), Recorder()
        module = module or (Still if strategy == "ddp" else Sharded)(TINY_GPT2)
        fit(module, [recorder, noise_scale, TokenWeightedAccumulation(), *others, estimates], size, **more)
        both = [first + second for first, second in zip(*of_all_ranks(recorder.steps), strict=True)]
        truth = true_estimates(Still(TINY_GPT2), both)
        found = {
            "error": max(error(estimates.of(unit), truth[unit]) for unit in truth),
            "scale": noise_scale.noise_scale_tokens,
            "true scale": average_of(truth["tokens"], 0.99).noise_scale,
            "ranks agree": len({json.dumps(state) for state in of_all_ranks(noise_scale.state_dict())}) == 1,
            "parts": [len(step) for step in recorder.steps],
        }
        alone = true_estimates(Still(TINY_GPT2), recorder.steps)
        return found, error(estimates.of("tokens")[:1], alone["tokens"][:1]) if alone["tokens"] else None

    cases, control = {}, None
    cases["K = 1"], _ = measure(3)
    cases["K = 2"], control = measure(3, accumulate_grad_batches=2, gradient_clip_val=1e-3)
    cases["pieces"], _ = measure(9, DynamicBatchScaler(max_piece=70))
    if strategy == "ddp":
        scarce = ScarceOnOneRank(TINY_GPT2, backward_limit=60, ranks=(1,))
        cases["one rank runs out"], _ = measure(6, DynamicBatchScaler(overlap=False), module=scarce)
        assert (scarce.num_failed > 0) == (rank == 1)
    else:
        pieces = {"accumulate_grad_batches": 2}
        cases["pieces, K = 2"], _ = measure(3, DynamicBatchScaler(max_piece=40), **pieces)
    result = {"cases": cases, "control": control, "refused": {}}
    if strategy == "fsdp2":
        llm = {"lr_schedule": "constant", "warmup": 0}
        for text, module, settings, made in (
            ("in several parts within one backward", LLMModule(TINY_GPT2, sequence_window=8, **llm), {}, (2, 1)),
            ("needs the whole second moment", LLMModule(TINY_GPT2, **llm), {"precondition": True}, (2, 1)),
            ("are split or replicated otherwise", Hybrid(TINY_GPT2), {}, (2, 1)),
            ("needs ranks that hold different batches", SharesBatches(TINY_GPT2), {}, (1, 2)),
        ):
            try:
                fit(module, [GradientNoiseScale(**settings)], 3, made=ModelParallelStrategy(*made))
            except ValueError as refusal:
                result["refused"][text] = str(refusal)
            else:
                result["refused"][text] = "nothing"
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    dist.destroy_process_group()  # its threads must not outlive the interpreter
