"""What measuring the gradient noise scale costs: a Trainer with the callback against the same Trainer without it.

The model, the data and the way of measuring are those of `accumulation.py`: both loops take turns, step for step, in
one process. The callback's own time is that of its hooks, those on parameters during backward included. The peak of
memory is taken in processes of their own, after two steps, beyond what lies there between steps; a copy of the
gradient, which `consecutive=True` keeps, shows what the method sees.

    python benchmarks/noise_scale.py --steps 12
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import accumulation
import lightning as L
import torch
from command_line import describe_machine, make_parser
from process_memory import memory_bytes, reset_peak

from lightning_llm.callbacks import GradientNoiseScale
from lightning_llm.callbacks.noise.watch import GradientWatch

MIB = 2**20
SETUPS: dict[str, Callable[[], list[L.Callback]]] = {
    "nothing (control)": list,
    "GradientNoiseScale": lambda: [GradientNoiseScale()],
    "every_n_steps=10": lambda: [GradientNoiseScale(every_n_steps=10)],
    "precondition=True": lambda: [GradientNoiseScale(precondition=True)],
}
MEMORY: dict[str, Callable[[], list[L.Callback]]] = {
    "nothing": list,
    "GradientNoiseScale": lambda: [GradientNoiseScale()],
    "consecutive=True, K = 1 (control)": lambda: [GradientNoiseScale(consecutive=True)],
}


class Peak(L.Callback):
    """The highest memory of some steps, beyond that between them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before, self.bytes = device, 0, 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, i: int) -> None:
        """After two steps the optimizer has its state."""
        if trainer.global_step == 2 and not self.before:
            trainer.optimizers[0].zero_grad()
            self.before = memory_bytes(self.device, "VmRSS")
            reset_peak(self.device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read it."""
        self.bytes = memory_bytes(self.device, "VmHWM") - self.before


def peak_bytes(options: argparse.Namespace, name: str) -> int:
    """Of two steps, in this process."""
    peak = Peak(torch.device(options.device))
    alone = argparse.Namespace(**{**vars(options), "steps": 4})
    trainer = L.Trainer(
        accelerator=options.device, devices=1, max_steps=5, gradient_clip_val=1.0, logger=False,
        accumulate_grad_batches=1 if "K = 1" in name else options.accumulate, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=[*MEMORY[name](), peak],
    )  # fmt: skip
    trainer.fit(accumulation.Plain(alone), accumulation.ragged_batches(alone))
    return peak.bytes


def compare_times(options: argparse.Namespace) -> None:
    """Print one line per set-up."""
    inner = GradientWatch._on_gradient
    for name, make_callbacks in SETUPS.items():
        if options.only in name:
            callbacks = make_callbacks()
            watch = accumulation.Stopwatch(callbacks)
            GradientWatch._on_gradient = watch._timed(inner)  # type: ignore[method-assign]
            turns = accumulation.Turns(["without", "with"])
            before, after, ratio = accumulation.paired(options, turns, callbacks)
            share = watch.seconds / sum(turns.times["with"])
            print(
                f"{name:<28} without {before * 1e3:8.1f} ms   with {after * 1e3:8.1f} ms   ratio {ratio:.3f}   "
                f"own hooks {share:.2%} of a step",
                flush=True,
            )
            GradientWatch._on_gradient = inner  # type: ignore[method-assign]


def compare_memory(options: argparse.Namespace) -> None:
    """Print one line per set-up, each in a process of its own, where what is freed goes back to the system at once."""
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name in MEMORY:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            print(
                f"{name:<34} peak of a step {pool.submit(peak_bytes, options, name).result() / MIB:8.0f} MiB",
                flush=True,
            )


def main() -> None:
    """Print what was measured."""
    parser = make_parser(__doc__, steps=12, warmup=2, micro_batch_size=2)
    parser.add_argument("--accumulate", type=int, default=2)
    options = parser.parse_args()
    print(describe_machine(options.device))
    size = sum(parameter.numel() for parameter in accumulation.Plain(options).parameters())
    print(
        f"GPT-2 with {size / 1e6:.0f} M parameters, gradient of {4 * size / MIB:.0f} MiB, {options.micro_batch_size} x "
        f"{options.length} tokens, {options.accumulate} micro-batches a step, {options.steps - options.warmup} pairs"
    )
    compare_times(options)
    compare_memory(options)


if __name__ == "__main__":
    main()
