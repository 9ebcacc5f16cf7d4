"""What exact accumulation costs: a Trainer with the callbacks against the same Trainer without them.

A GPT-2 of about 100 M parameters in a plain LightningModule, ragged rows, AdamW, clipping. Both loops take turns, step
for step, in one process; the ratio is the median over steps that followed each other. Noise hides what lies below a few
percent, so the time that the callbacks' own hooks take is measured too, as a share of the step (on a GPU the hooks only
launch: there the ratio alone counts).

    python benchmarks/accumulation.py --steps 20
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from command_line import describe_machine, make_parser
from overhead import CONFIG, Turns, TurnTaking
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm.callbacks import AccumulationSchedule, LearningRateScaling, TokenWeightedAccumulation
from lightning_llm.loss import token_cross_entropy

HOOKS = [
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end"),
]


class Plain(L.LightningModule):
    """Returns the mean loss and the number of tokens, and knows nothing else of us."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape = {"n_embd": options.hidden, "n_layer": options.layers, "n_head": options.hidden // 64}
        config = AutoConfig.for_model(**{**CONFIG, **shape, "vocab_size": options.vocab_size})
        self.model = AutoModelForCausalLM.from_config(config).train()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        """Mean loss and label tokens."""
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        loss = token_cross_entropy(logits, batch["labels"])
        return {"loss": loss.mean, "num_tokens": loss.num_tokens}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Fused AdamW."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)
        optimizer._step_supports_amp_scaling = False
        return optimizer


class Stopwatch:
    """Adds up the time that the hooks of some callbacks take, per optimizer step."""

    def __init__(self, callbacks: list[L.Callback]) -> None:
        self.seconds = 0.0
        for callback in callbacks:
            for name in HOOKS:
                setattr(callback, name, self._timed(getattr(callback, name)))

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


def ragged_batches(options: argparse.Namespace) -> DataLoader[Any]:
    """Rows of random length, half of the longest on average, padded in each batch."""
    generator = torch.Generator().manual_seed(0)
    num_rows = (options.steps + 2) * options.accumulate * options.micro_batch_size
    lengths = torch.randint(options.length // 8, options.length + 1, (num_rows,), generator=generator)
    rows = [torch.randint(0, options.vocab_size, (int(length),), generator=generator) for length in lengths]

    def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([*rows, torch.zeros(options.length, dtype=torch.long)], batch_first=True)
        ids = ids[:-1]  # every batch as wide as the longest row, so that steps cost the same
        mask = torch.arange(options.length) < torch.tensor([[len(row)] for row in rows])
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}

    return DataLoader(rows, batch_size=options.micro_batch_size, collate_fn=collate)


def train(options: argparse.Namespace, turns: Turns, name: str, callbacks: list[L.Callback], accumulate: int) -> None:
    """One of the two loops."""
    trainer = L.Trainer(
        accelerator="cuda" if options.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if options.bf16 else "32-true",
        max_steps=options.steps + 1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        callbacks=[*callbacks, TurnTaking(turns, name)],
    )
    trainer.fit(Plain(options), ragged_batches(options))
    turns.finish(name)


def paired(options: argparse.Namespace, turns: Turns, callbacks: list[L.Callback]) -> tuple[float, float, float]:
    """Median seconds of a step without and with, and the median ratio."""
    sets_factor = any(isinstance(callback, AccumulationSchedule) for callback in callbacks)
    factor = options.accumulate
    thread = threading.Thread(target=train, args=(options, turns, "without", [], factor), daemon=True)
    thread.start()
    train(options, turns, "with", callbacks, 1 if sets_factor else factor)
    thread.join(timeout=60)
    pairs = list(zip(turns.times["without"], turns.times["with"], strict=False))[options.warmup :]
    before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
    return before, after, statistics.median(ours / bare for bare, ours in pairs)


def compare(options: argparse.Namespace, callbacks: list[L.Callback]) -> tuple[float, float, float, float]:
    """Median seconds of a step without and with, the median ratio, and the callbacks' own share of a step."""
    turns = Turns(["without", "with"])
    watch = Stopwatch(callbacks)
    return *paired(options, turns, callbacks), watch.seconds / sum(turns.times["with"])


def main() -> None:
    """Print one line per set-up."""
    parser = make_parser(__doc__, steps=20, warmup=3, micro_batch_size=2)
    parser.add_argument("--accumulate", type=int, default=4)
    options = parser.parse_args()
    print(describe_machine(options.device))
    size = sum(parameter.numel() for parameter in Plain(options).parameters())
    print(
        f"GPT-2 with {size / 1e6:.0f} M parameters, {options.micro_batch_size} x {options.length} tokens, "
        f"{options.accumulate} micro-batches a step, {options.steps - options.warmup} pairs of steps"
    )
    setups: dict[str, Callable[[], list[L.Callback]]] = {
        "nothing (control)": list,
        "TokenWeightedAccumulation": lambda: [TokenWeightedAccumulation()],
        "AccumulationSchedule": lambda: [AccumulationSchedule(options.accumulate)],
        "both + LearningRateScaling": lambda: [
            TokenWeightedAccumulation(),
            AccumulationSchedule(options.accumulate),
            LearningRateScaling(),
        ],
    }
    for name, make_callbacks in setups.items():
        if options.only not in name:
            continue
        before, after, ratio, share = compare(options, make_callbacks())
        print(
            f"{name:<28} without {before * 1e3:8.1f} ms   with {after * 1e3:8.1f} ms   ratio {ratio:.3f}   "
            f"own hooks {share:.2%} of a step",
            flush=True,
        )


if __name__ == "__main__":
    main()
