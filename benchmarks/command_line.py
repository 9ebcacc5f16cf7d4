"""What the benchmarks of callbacks are asked on the command line, and what they say of the machine."""

from __future__ import annotations

import argparse
import platform

import lightning as L
import torch
import transformers


def make_parser(description: str | None, *, steps: int, warmup: int, micro_batch_size: int) -> argparse.ArgumentParser:
    """Options of a GPT-2, its batches, and how long it is watched; the arguments are defaults.

    Args:
        description: A script's docstring, of which the first line is shown.
        steps: Optimizer steps.
        warmup: How many of them are left out at the start.
        micro_batch_size: Rows.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--warmup", type=int, default=warmup, help="steps left out at the start")
    parser.add_argument("--micro_batch_size", type=int, default=micro_batch_size, help="rows of a loader batch")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", default="", help="run the set-ups whose name holds this")
    return parser


def describe_machine(device: str) -> str:
    """The device and the versions, in one line."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = f"torch {torch.__version__}, lightning {L.__version__}, transformers {transformers.__version__}"
    return f"{name}, Python {platform.python_version()}, {versions}"
