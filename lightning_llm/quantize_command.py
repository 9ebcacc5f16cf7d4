"""``lightning-llm quantize``: a model folder in int8."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def run_quantize(arguments: Sequence[str]) -> None:
    """Write a folder with int8 weights; print where, and how large both are.

    Args:
        arguments: Of the command line, after ``quantize``.
    """
    parser = argparse.ArgumentParser(
        "lightning-llm quantize",
        description="Write a Hugging Face model folder with its linear layers in int8, for the CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="model folder, such as HuggingFaceCheckpoint writes")
    parser.add_argument("--output", required=True, help="folder to write; it must not exist")
    parser.add_argument("--activations", choices=["float", "int8"], default="float", help="int8 rounds inputs too")
    parser.add_argument("--skip", nargs="+", default=[], help="regular expressions: linear layers that stay too")
    options = parser.parse_args(list(arguments))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils.logging import disable_progress_bar

    from lightning_llm.int8_export import export_int8

    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        folder = export_int8(options.model, options.output, activations=options.activations, skip=options.skip)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"lightning-llm quantize: error: {error}")
    before, after = _weight_bytes(Path(options.model).expanduser()), _weight_bytes(folder)
    print(f"quantized  {folder}  ({before / 1e6:.1f} MB of weights, now {after / 1e6:.1f} MB)")


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
