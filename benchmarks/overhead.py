"""What the module, the callbacks and the Trainer cost beside a bare PyTorch loop of the same model and batches.

Both train the same GPT-2-shaped model on the same packed rows of the standard library, with the same optimizer,
schedule, clipping and accumulation. The loops take turns, step for step, in one process, so that whatever else the
machine does falls on both; the figure is the ratio of the median times of an optimizer step.

    python benchmarks/overhead.py --steps 40
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable

import lightning as L
import torch
from command_line import describe_machine
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler

from lightning_llm import LLMModule
from lightning_llm.callbacks import TokenThroughput, TokenWeightedAccumulation
from lightning_llm.datamodules import TextDataModule
from lightning_llm.optimizers import decay_groups

CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 4096,
    "n_positions": 256,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class Turns:
    """Lets two loops run one optimizer step each, one after the other, and times the steps."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.times: dict[str, list[float]] = {name: [] for name in names}
        self.active = set(names)
        self.turn = names[0]
        self.condition = threading.Condition()

    def start(self, name: str) -> None:
        """Wait for the turn."""
        with self.condition:
            self.condition.wait_for(lambda: self.turn == name)
        self.begin = time.perf_counter()

    def stop(self, name: str) -> None:
        """Note the time of the step and hand over."""
        self.times[name].append(time.perf_counter() - self.begin)
        self._pass_on(name)

    def finish(self, name: str) -> None:
        """Leave."""
        self.active.discard(name)
        self._pass_on(name)

    def _pass_on(self, name: str) -> None:
        with self.condition:
            others = [other for other in self.names if other != name and other in self.active]
            if others:
                self.turn = others[0]
            self.condition.notify_all()


class TurnTaking(L.Callback):
    """Marks the optimizer steps of the Trainer's loop: from the fetch of a window's first batch to the next."""

    def __init__(self, turns: Turns, name: str) -> None:
        self.turns, self.name, self.steps = turns, name, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the first step."""
        self.turns.start(self.name)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, i: int) -> None:
        """End a step where the next one begins, so that all of the Trainer's own work is in it."""
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            self.turns.stop(self.name)
            self.turns.start(self.name)


def bare_loop(data: TextDataModule, options: argparse.Namespace, turns: Turns, name: str = "bare") -> None:
    """The loop that a PyTorch user writes, with nothing more than it needs."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape(options))).to(device).train()
    optimizer = torch.optim.AdamW(
        decay_groups(model.named_parameters(), 0.1), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=10, num_training_steps=options.steps)
    batches = iter(data.train_dataloader())
    turns.start(name)
    for _ in range(options.steps):
        optimizer.zero_grad()
        for _ in range(options.accumulate):
            batch = {key: value.to(device, non_blocking=True) for key, value in next(batches).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
            (loss / options.accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        turns.stop(name)
        turns.start(name)
    turns.finish(name)


def our_loop(data: TextDataModule, options: argparse.Namespace, turns: Turns, callbacks: list[L.Callback]) -> None:
    """A plain Trainer with LLMModule."""
    torch.manual_seed(0)
    module = LLMModule(shape(options), learning_rate=3e-4, warmup=10)
    trainer = L.Trainer(
        accelerator="auto" if options.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if options.bf16 else "32-true",
        max_steps=options.steps + 1,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=options.progress_bar,
        logger=False,
        callbacks=[*callbacks, TurnTaking(turns, "ours")],
    )
    trainer.fit(module, data)
    turns.finish("ours")


def shape(options: argparse.Namespace) -> dict[str, object]:
    """The model's configuration."""
    return {**CONFIG, "n_embd": options.hidden, "n_layer": options.layers, "n_head": options.hidden // 64}


def compare(
    options: argparse.Namespace, make_callbacks: Callable[[], list[L.Callback]] | None
) -> tuple[float, float, float]:
    """Median seconds of a bare step and of ours, and the median ratio of steps that followed each other.

    Without callbacks (None) the bare loop runs against itself: what the method of measuring adds.
    """
    bare_data, our_data = (
        TextDataModule(vocab_size=4096, max_length=256, micro_batch_size=options.micro_batch_size) for _ in range(2)
    )
    for data in (bare_data, our_data):
        data.prepare_data()
        data.setup("fit")
    turns = Turns(["bare", "ours"])
    thread = threading.Thread(target=bare_loop, args=(bare_data, options, turns), daemon=True)
    thread.start()
    if make_callbacks is None:
        bare_loop(our_data, options, turns, "ours")
    else:
        our_loop(our_data, options, turns, make_callbacks())
    thread.join(timeout=60)
    pairs = list(zip(turns.times["bare"], turns.times["ours"], strict=False))[options.warmup :]
    ratios = [ours / bare for bare, ours in pairs]
    bare, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    return bare, ours, statistics.median(ratios)


def main() -> None:
    """Print one line per set-up."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=5, help="steps left out at the start")
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--micro_batch_size", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--progress_bar", action="store_true")
    parser.add_argument("--only", default="", help="run the set-ups whose name holds this")
    options = parser.parse_args()
    print(describe_machine(options.device))
    model = f"GPT-2 with {options.layers} layers, hidden size {options.hidden}"
    print(f"{model}, {options.micro_batch_size} x 256 tokens, {options.accumulate} micro-batches a step")
    setups: dict[str, Callable[[], list[L.Callback]] | None] = {
        "bare loop (control)": None,
        "LLMModule": list,
        "LLMModule + TokenThroughput": lambda: [TokenThroughput(every_n_steps=10)],
        "LLMModule + TokenWeightedAccumulation": lambda: [TokenWeightedAccumulation()],
    }
    for name, make_callbacks in setups.items():
        if options.only not in name:
            continue
        bare, ours, ratio = compare(options, make_callbacks)
        print(f"{name:<38} bare {bare * 1e3:8.2f} ms   ours {ours * 1e3:8.2f} ms   ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
