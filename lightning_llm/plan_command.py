"""``lightning-llm plan``: which way of training fits, from the YAML file of ``lightning-llm fit``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_plan(arguments: Sequence[str]) -> None:
    """Print how much memory each way of training takes, and which one is chosen.

    Args:
        arguments: Of the command line, after ``plan``.
    """
    options = _parser().parse_args(list(arguments))
    try:
        print(_plan(options))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"lightning-llm plan: error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-llm plan",
        description="Estimate the memory of a training step before any weight is loaded, and choose how to train.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file of `lightning-llm fit`; its data need not exist")
    parser.add_argument("--memory", help="memory of a device, such as 16GB or 80GiB; what is free here if left out")
    parser.add_argument("--max_length", type=int, help="tokens in a row, in place of data.max_length")
    parser.add_argument("--micro_batch_size", type=int, help="rows in a micro-batch, in place of data.micro_batch_size")
    parser.add_argument("--precision", help="in place of trainer.precision")
    parser.add_argument("--shards", type=int, default=1, help="ranks among which FSDP2 divides the parameters")
    parser.add_argument("--parts", action="store_true", help="show what the memory consists of")
    return parser


def _plan(options: argparse.Namespace) -> str:
    settings = _read(Path(options.config))
    model, data, trainer = (_section(settings, name) for name in ("model", "data", "trainer"))
    data = data.get("init_args") or data
    max_length = options.max_length if options.max_length is not None else data.get("max_length")
    if max_length is None:
        raise ValueError(f"{options.config} has no data.max_length. Add it, or --max_length N.")
    if "model" not in model:
        raise ValueError(f"{options.config} has no model.model: a hub id, a folder, or the fields of a configuration.")

    from lightning_llm.module import LLMModule

    known = ("model", "task", "attn_implementation", "dtype", "trust_remote_code")
    module = LLMModule(**{name: model[name] for name in known if name in model})
    precision = options.precision or trainer.get("precision") or "32-true"
    rows = options.micro_batch_size if options.micro_batch_size is not None else data.get("micro_batch_size", 1)
    plan = module.plan(
        max_length, options.memory, precision=str(precision), micro_batch_size=rows, shards=options.shards
    )
    what = f"{type(module.config).__name__}, rows of {max_length} tokens, {rows} at a time, precision {precision}"
    return "\n".join([what, *([plan.parts(), ""] if options.parts else []), str(plan)])


def _read(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold the sections `model` and `data`, but holds {type(settings).__name__}.")
    return settings


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    section = settings.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"`{name}` must be a mapping, but got {section!r}.")
    return section
