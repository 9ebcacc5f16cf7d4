"""What int8 export gives: size on disk, difference of the logits, and time on the CPU, beside float32.

A Llama of random weights, or a folder of your own (a causal language model), is exported with `export_int8`, loaded by
`from_pretrained`, and run on random tokens: a forward of long rows, and the greedy continuation of one prompt. All
models take turns, and each time is the best of its turns.

    OMP_NUM_THREADS=1 python benchmarks/quantization.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torchao
from command_line import describe_machine
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from lightning_llm import export_int8


def build(options: argparse.Namespace, folder: Path) -> Path:
    """The folder to start from."""
    if options.model:
        return Path(options.model)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=options.vocab_size, hidden_size=options.hidden, intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "float32")
    return folder / "float32"


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@torch.inference_mode()
def measure(options: argparse.Namespace, folders: dict[str, Path]) -> None:
    """Print one line per model."""
    models: dict[str, Any] = {}
    for name, folder in folders.items():
        models[name] = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    vocab_size = models["float32"].config.vocab_size
    ids = torch.randint(0, vocab_size, (options.rows, options.length), generator=torch.Generator().manual_seed(0))
    new = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens, "do_sample": False}
    mask = torch.ones_like(ids[:1, :16])
    forward: dict[str, float] = {}
    generate: dict[str, float] = {}
    logits: dict[str, Tensor] = {}
    for turn in range(options.turns + 1):
        for name, model in models.items():
            logits[name] = model(ids).logits
            if turn:  # the first one warms up
                forward[name] = min(forward.get(name, 1e9), seconds(lambda model=model: model(ids)))
                write = lambda model=model: model.generate(ids[:1, :16], attention_mask=mask, pad_token_id=0, **new)  # noqa: E731
                generate[name] = min(generate.get(name, 1e9), seconds(write))
    whole = logits["float32"]
    for name, folder in folders.items():
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        error = float((logits[name] - whole).norm() / whole.norm())
        agree = float((logits[name].argmax(-1) == whole.argmax(-1)).double().mean())
        print(
            f"{name:<28} {size / 1e6:7.1f} MB   logits {error:.2%} off, {agree:.1%} of the likeliest tokens the same   "
            f"{ids.numel() / forward[name]:7.0f} tokens/s forward, {options.new_tokens / generate[name]:6.1f} written"
        )


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="folder of a causal language model; a random Llama if left out")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    print(f"{describe_machine('cpu')}, torchao {torchao.__version__}")
    with TemporaryDirectory() as name:
        source = build(options, Path(name))
        folders = {"float32": source}
        for activations in ("float", "int8"):
            folders[f"int8, activations {activations}"] = export_int8(
                source, Path(name) / activations, activations=activations
            )
        measure(options, folders)


if __name__ == "__main__":
    main()
