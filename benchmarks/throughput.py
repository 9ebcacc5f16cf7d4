"""Useful tokens per second on ragged real text: LLMModule with packed rows, HF Trainer and TRL's SFTTrainer.

    python benchmarks/throughput.py --plot docs/images/throughput.png       # needs trl and matplotlib

Every competitor trains the same Llama from the same weights, on the same documents and tokens (Python's standard
library, a byte-level BPE of 8,192), with the same fused AdamW, schedule, clipping, precision and threads, and with as
many rows in a step. Each has a process of its own and cuts the documents in its own way. They take turns, optimizer
step for optimizer step, so that whatever else the machine does falls on all; only the one whose turn it is works. A
useful token is a label that is trained on: ``labels != -100`` after the shift, counted in the batches that
``training_step`` got.

- ``HF padded``: one document a row, cut to ``max_length``, padded to the longest of the batch.
- ``HF length-grouped``: the same with ``train_sampling_strategy="group_by_length"``. Of both, the measured batches are
  taken at even distances from the epoch's, sorted by width, so that a few show the whole epoch's share of padding.
- ``TRL bfd``, ``TRL bfd_split``, ``TRL wrapped``: ``SFTTrainer(packing=True)``. ``bfd`` cuts documents to
  ``max_length``; ``wrapped`` lets documents see each other. TRL lays the rows of a packed batch end to end, and without
  flash attention pays for a mask over all of them: one row at a time (accumulated to the same step) is its best on a
  CPU and what it runs with; ``--trl_rows`` sets another number.
- ``lightning_llm``: ``TextDataModule(windowing="packed")``, ``LLMModule``, ``TokenWeightedAccumulation``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import lightning as L
import numpy as np
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lightning_llm import LLMModule
from lightning_llm.callbacks import TokenWeightedAccumulation
from lightning_llm.datamodules import TextDataModule

OURS = "lightning_llm"
COMPETITORS = ("HF padded", "HF length-grouped", "TRL bfd", "TRL bfd_split", "TRL wrapped", OURS)
ADAMW = {"learning_rate": 3e-4, "weight_decay": 0.1}


class Turn:
    """This process's side of the turns: counts what a step trains on, reports it, and waits for the next turn."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.useful = self.positions = 0

    def count(self, batch: Any) -> None:
        """Add a micro-batch that is about to be trained on."""
        self.useful += int((batch["labels"][:, 1:] != -100).sum())
        self.positions += batch["labels"].numel()

    def begin(self, kept: float) -> None:
        """Say that training is ready to start, with the share of the corpus's targets in an epoch."""
        self.pipe.send({"kept": kept, "threads": torch.get_num_threads()})
        self._wait()

    def end_step(self) -> None:
        """Report the step."""
        seconds, cpu_seconds = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        scale = 1024 if sys.platform != "darwin" else 1  # kilobytes, but bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
        self.pipe.send(
            {
                "s": seconds,
                "cpu_s": cpu_seconds,
                "useful": self.useful,
                "positions": self.positions,
                "peak_bytes": peak,
            }
        )
        self._wait()

    def _wait(self) -> None:
        self.pipe.recv()
        self.useful = self.positions = 0
        self.started, self.cpu_started = time.perf_counter(), time.process_time()


# ---- the competitors, each in a process of its own -------------------------------------------------------------------


def compete(name: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Train as one competitor."""
    torch.set_num_threads(options.threads)
    for library in ("lightning", "lightning.pytorch", "transformers", "trl", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        {"HF": train_hf, "TRL": train_trl}.get(name.split()[0], train_ours)(name, options, Turn(pipe))


def corpus(options: argparse.Namespace) -> TextDataModule:
    """The documents, as tokens: all of them for training."""
    data = TextDataModule(
        vocab_size=options.vocab_size,
        max_length=options.max_length,
        micro_batch_size=options.rows,
        validation_fraction=0.0,
        seed=options.seed,
    )
    data.prepare_data()
    data.setup("fit")
    return data


def documents(data: TextDataModule) -> list[np.ndarray]:
    """Token ids of each document, with its end-of-text token."""
    store = data.train_dataloader().rows.store
    return [document for document in np.split(store.tokens, store.offsets[1:-1]) if len(document) > 1]


def kept_share(row_lengths: Any, texts: list[np.ndarray]) -> float:
    """Targets in an epoch over those of the whole documents; every row or piece loses its first token."""
    return float((np.asarray(row_lengths) - 1).sum() / sum(len(text) - 1 for text in texts))


def shape(options: argparse.Namespace) -> dict[str, Any]:
    """A small Llama."""
    return {
        "model_type": "llama",
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden,
        "intermediate_size": options.hidden * 8 // 3 // 32 * 32,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": options.hidden // 64,
        "max_position_embeddings": options.max_length,
        "tie_word_embeddings": True,
    }


def build(options: argparse.Namespace, data: TextDataModule) -> LlamaForCausalLM:
    """The same weights for everyone."""
    torch.manual_seed(options.seed)
    fields = {name: value for name, value in shape(options).items() if name != "model_type"}
    special = {name: getattr(data.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlamaForCausalLM(LlamaConfig(**fields, **special))


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What HF Trainer and TRL share; everything that only costs time is off."""
    return {
        **ADAMW,
        "output_dir": options.folder,
        "max_steps": options.steps + options.warmup,
        "per_device_train_batch_size": options.rows,
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.95,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": options.bf16,
        "use_cpu": options.device == "cpu",
        "seed": options.seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": options.device != "cpu",
    }


def counted(base: type[Trainer], turn: Turn, choose: Callable[[list[int]], list[int]] | None = None) -> type[Trainer]:
    """A Trainer that counts its micro-batches; ``choose`` picks rows from the epoch's order, all if None."""

    class Counted(base):  # type: ignore[misc, valid-type]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            turn.count(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            sampler = super()._get_train_sampler(*args, **kwargs)
            return sampler if choose is None else choose(list(sampler))

    return Counted


def spread(order: list[int], row_lengths: list[int], options: argparse.Namespace) -> list[int]:
    """Of an epoch's batches, as many as there are steps, evenly spaced from the narrowest to the widest.

    Padded batches differ much in width and fill, and an epoch that is grouped by length goes from long rows to short
    ones: the first few batches would show neither fairly. The warm-up gets the middle one.
    """
    batches = [order[begin : begin + options.rows] for begin in range(0, len(order) - options.rows + 1, options.rows)]
    batches.sort(key=lambda batch: (max(row_lengths[row] for row in batch), sum(row_lengths[row] for row in batch)))
    picked = ((np.arange(options.steps) + 0.5) * len(batches) / options.steps).astype(int)
    np.random.default_rng(options.seed).shuffle(picked)
    chosen = [len(batches) // 2] * options.warmup + picked.tolist()
    return list(itertools.chain.from_iterable(batches[index] for index in chosen))


class HFTurns(transformers.TrainerCallback):
    """A step ends where the optimizer step has ended; fetching the next batch belongs to the next."""

    def __init__(self, turn: Turn, kept: float) -> None:
        self.turn, self.kept = turn, kept

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the first turn."""
        self.turn.begin(self.kept)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Report and wait."""
        self.turn.end_step()


def train_hf(name: str, options: argparse.Namespace, turn: Turn) -> None:
    """One document a row."""
    data = corpus(options)
    texts = documents(data)
    rows = [text[: options.max_length].astype(np.int32) for text in texts]
    lengths = [len(row) for row in rows]
    strategy = "group_by_length" if name == "HF length-grouped" else "random"
    trainer = counted(Trainer, turn, lambda order: spread(order, lengths, options))(
        model=build(options, data),
        args=TrainingArguments(**arguments(options), train_sampling_strategy=strategy),
        train_dataset=Dataset.from_dict({"input_ids": rows, "length": lengths}),
        data_collator=DataCollatorForLanguageModeling(data.tokenizer, mlm=False),
        callbacks=[HFTurns(turn, kept_share(lengths, texts))],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def train_trl(name: str, options: argparse.Namespace, turn: Turn) -> None:
    """Packed by TRL."""
    from trl import SFTConfig, SFTTrainer

    data = corpus(options)
    texts = documents(data)
    strategy = name.split()[1]
    shared = arguments(options)
    rows = options.rows if strategy == "wrapped" else options.trl_rows
    shared.update(per_device_train_batch_size=rows, gradient_accumulation_steps=options.rows // rows)
    trainer = counted(SFTTrainer, turn)(
        model=build(options, data),
        args=SFTConfig(**shared, packing=True, packing_strategy=strategy, max_length=options.max_length),
        train_dataset=Dataset.from_dict({"input_ids": [text.astype(np.int32) for text in texts]}),
        processing_class=data.tokenizer,
    )
    packed = trainer.train_dataset
    if "seq_lengths" in packed.column_names:
        pieces = list(itertools.chain.from_iterable(packed["seq_lengths"]))
    else:
        pieces = [len(row) for row in packed["input_ids"]]
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(HFTurns(turn, min(kept_share(pieces, texts), 1.0)))
    trainer.train()


class OurTurns(L.Callback):
    """The same marks in Lightning's loop."""

    def __init__(self, turn: Turn) -> None:
        self.turn, self.steps = turn, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the first turn."""
        dataset = trainer.datamodule.train_dataloader().rows  # type: ignore[attr-defined]
        targets = np.maximum(dataset.store.lengths - 1, 0).sum()
        self.turn.begin(dataset.table.num_label_tokens / int(targets))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, i: int) -> None:
        """Count."""
        self.turn.count(batch)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Report and wait."""
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            self.turn.end_step()


def train_ours(name: str, options: argparse.Namespace, turn: Turn) -> None:
    """Packed rows, plain Trainer."""
    data = corpus(options)
    module = LLMModule(build(options, data), **ADAMW, warmup=2)
    trainer = L.Trainer(
        accelerator="cpu" if options.device == "cpu" else "auto",
        devices=1,
        precision="bf16-mixed" if options.bf16 else "32-true",
        max_steps=options.steps + options.warmup,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        callbacks=[TokenWeightedAccumulation(), OurTurns(turn)],
    )
    trainer.fit(module, data)


# ---- the parent: turns, table, picture -------------------------------------------------------------------------------


def race(options: argparse.Namespace, names: list[str]) -> dict[str, list[dict[str, float]]]:
    """Let the competitors take turns; per competitor one record a step, warm-up steps left out."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    ready: dict[str, dict[str, float]] = {}
    for name in names:  # one after the other: preparing is not measured
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=compete, args=(name, options, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        ready[name] = pipes[name].recv()
        if ready[name]["threads"] != options.threads:
            raise RuntimeError(
                f"{name} runs with {ready[name]['threads']} threads, but all must have {options.threads}."
            )
    records: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for step in range(options.warmup + options.steps):
        for name in names:
            pipes[name].send("go")
            record = pipes[name].recv()
            if step >= options.warmup:
                records[name].append({**record, "kept": ready[name]["kept"]})
    for name, process in zip(names, processes, strict=True):
        pipes[name].send("finish")
        process.join(timeout=60)
    return records


def summarize(records: list[dict[str, float]]) -> dict[str, float]:
    """Rates over all measured steps, as batches of different lengths count by their time; the median of the steps."""
    seconds, useful, positions = (sum(record[key] for record in records) for key in ("s", "useful", "positions"))
    return {
        "useful_per_s": useful / seconds,
        "positions_per_s": positions / seconds,
        "fill": useful / positions,
        "median_step_s": statistics.median(record["s"] for record in records),
        "median_useful_per_s": statistics.median(record["useful"] / record["s"] for record in records),
        "lost": 1 - records[-1]["kept"],
        "peak_bytes": max(record["peak_bytes"] for record in records),
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = [
        "| | useful tokens/s | (median step) | positions/s | useful share | targets lost | peak memory | ours is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        ratio = f"{results[OURS]['useful_per_s'] / result['useful_per_s']:.2f}x" if OURS in results else ""
        lines.append(
            f"| {name} | {result['useful_per_s']:,.0f} | {result['median_useful_per_s']:,.0f} | "
            f"{result['positions_per_s']:,.0f} | {result['fill']:.1%} | {result['lost']:.1%} | "
            f"{result['peak_bytes'] / 1e9:.2f} GB | {ratio} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict[str, float]], options: argparse.Namespace, conditions: str) -> None:
    """Bars of useful tokens per second, in front of the positions that were computed for them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(results)
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(names) + 1.6), layout="constrained")
    positions = [results[name]["positions_per_s"] for name in names]
    useful = [results[name]["useful_per_s"] for name in names]
    axes.barh(names, positions, color="#d9dde3", label="positions computed (with padding)")
    colors = ["#1f6f8b" if name == OURS else "#8fa3b0" for name in names]
    axes.barh(names, useful, color=colors, label="label tokens trained on")
    for index, name in enumerate(names):
        note = f"{useful[index]:,.0f}"
        if results[name]["lost"] > 0.01:
            note += f"   (an epoch leaves out {results[name]['lost']:.0%} of the targets)"
        if name == "TRL wrapped":
            note += "   (documents see each other)"
        axes.text(max(positions[index], useful[index]) * 1.01, index, note, va="center", fontsize=8.5)
    axes.set_xlim(0, max(positions) * 1.65)
    axes.invert_yaxis()
    axes.set_xlabel("per second")
    axes.set_title(f"Ragged real text, rows of {options.max_length}: label tokens per second", fontsize=11, loc="left")
    figure.legend(loc="outside upper right", ncols=2, fontsize=8.5, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(conditions, fontsize=7, color="#667")
    figure.savefig(options.plot, dpi=150)


def main() -> None:
    """Print the table; draw it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="measured optimizer steps of each competitor")
    parser.add_argument("--warmup", type=int, default=1, help="steps left out at the start")
    parser.add_argument("--rows", type=int, default=4, help="rows in an optimizer step")
    parser.add_argument("--trl_rows", type=int, default=1, help="rows of a micro-batch of TRL's bfd and bfd_split")
    parser.add_argument("--max_length", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", default="", help="competitors whose name holds one of these, separated by commas")
    parser.add_argument("--plot", default="", help="write the picture here")
    parser.add_argument("--json", default="", help="write the records of all steps here")
    options = parser.parse_args()
    names = [name for name in COMPETITORS if any(part in name for part in options.only.split(","))]
    os.environ["HF_HUB_OFFLINE"] = "1"
    data = corpus(options)
    lengths = [len(text) for text in documents(data)]
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} CPU threads"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "transformers", "trl"))
    model = f"Llama, {sum(p.numel() for p in build(options, data).parameters()) / 1e6:.1f} M parameters"
    conditions = f"{machine}, Python {platform.python_version()}, {versions}; {model}"
    print(conditions)
    quantiles = np.quantile(lengths, [0.1, 0.5, 0.9, 1]).astype(int)
    print(
        f"{len(lengths)} documents, {sum(lengths):,} tokens (10% / median / 90% / longest: "
        f"{' / '.join(map(str, quantiles))}); {options.rows} rows of at most {options.max_length} a step, "
        f"{options.steps} steps each",
        flush=True,
    )
    begin = time.perf_counter()
    records = race(options, names)
    results = {name: summarize(steps) for name, steps in records.items()}
    print(f"\n{table(results)}\n\n{time.perf_counter() - begin:.0f} s in all")
    if options.json:
        with open(options.json, "w") as file:  # noqa: PTH123
            json.dump({"conditions": conditions, "options": vars(options), "records": records}, file)
    if options.plot:
        plot(results, options, conditions)


if __name__ == "__main__":
    main()
