"""One optimizer step on a row of a million tokens, on one GPU: time, peak memory, and the least memory it could take.

    python benchmarks/million_tokens.py step                               # Qwen2.5-0.5B's shape, 1,048,576 tokens
    python benchmarks/million_tokens.py step --model llama-8b-lora --tokens 262144
    python benchmarks/million_tokens.py limit --way checkpointing          # the longest row of checkpointing
    python benchmarks/million_tokens.py check --tokens 8192                # gradient against the uncut row's
    python benchmarks/million_tokens.py check --model tiny --device cpu --tokens 512 --window 64

Weights are random, in bfloat16 unless ``--dtype`` says otherwise; the optimizer is torch's fused AdamW.
``checkpointing`` is ``gradient_checkpointing_enable()`` with the loss that makes no logits. The floor is what no exact
method on one device avoids that keeps keys and values: weights, gradients and optimizer state, and keys and values with
their gradients.

``check`` compares gradients of the same weights: windowed and uncut, each with the uncut one in float32 (float64 on a
CPU).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import transformers
from torch import Tensor

from lightning_llm import windowed_loss
from lightning_llm.head_loss import causal_lm_loss

GIB = 1 << 30
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "llama-8b-lora": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def make_model(options: argparse.Namespace) -> Any:
    """The model with random weights; adapters of rank 16 on all linear layers where the name says so."""
    shape = dict(SHAPES[options.model])
    config = transformers.CONFIG_MAPPING[shape.pop("model_type")](**shape, max_position_embeddings=1 << 21)
    torch.manual_seed(0)
    with torch.device(options.device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    if options.model.endswith("-lora"):
        import peft

        lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    model.train()
    if options.way == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def loss_of(model: Any, ids: Tensor, options: argparse.Namespace, way: str) -> Tensor:
    """Mean loss of a row."""
    if way == "windowed":
        return windowed_loss(model, ids, ids, window=options.window, offload=options.offload).mean
    return causal_lm_loss(model, {"input_ids": ids, "use_cache": False}, ids, loss_kernel="chunked").mean


def make_row(options: argparse.Namespace) -> Tensor:
    """Random tokens, (1, tokens)."""
    vocabulary = SHAPES[options.model]["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (1, options.tokens), generator=generator).to(options.device)


def floor_bytes(model: Any, optimizer: torch.optim.Optimizer, options: argparse.Namespace) -> int:
    """Weights, gradients and optimizer state, keys and values with their gradients."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    token = 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    return weights + gradients + sum(state.nbytes for state in states) + token * options.tokens


def step(options: argparse.Namespace) -> dict[str, float]:
    """Take one optimizer step."""
    model, ids = make_model(options), make_row(options)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    is_cuda = ids.device.type == "cuda"
    loss_of(model, ids[:, : 2 * options.window], options, options.way).backward()  # kernels are loaded
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    loss = loss_of(model, ids, options, options.way)
    loss.backward()
    optimizer.step()
    value = loss.item()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if is_cuda else 0
    return {"loss": value, "seconds": seconds, "peak": peak, "floor": floor_bytes(model, optimizer, options)}


def check(options: argparse.Namespace) -> dict[str, float]:
    """The error of the windowed and of the uncut gradient, relative to the gradient, against a more precise one."""
    model, ids = make_model(options), make_row(options)
    gradients = {}
    for way in ("windowed", "plain"):
        loss_of(model, ids, options, way).backward()
        gradients[way] = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    model.to(torch.float32 if ids.device.type == "cuda" else torch.float64)
    loss_of(model, ids, options, "plain").backward()
    truth = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    norm = sum(float(gradient.square().sum()) for gradient in truth.values()) ** 0.5
    errors = {}
    for way, found in gradients.items():
        errors[way] = sum(float((found[name] - truth[name]).square().sum()) for name in truth) ** 0.5 / norm
    return {**errors, "ratio": errors["windowed"] / max(errors["plain"], 1e-300)}


def limit(options: argparse.Namespace) -> int:
    """The longest row for which a step fits, to an eighth: each length in a process of its own."""
    fits, tokens, fails = 0, options.start, 0
    while not fails or fails - fits > max(256, fits // 8):
        command = [sys.executable, __file__, "step", *sys.argv[2:], "--tokens", str(tokens), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and "OutOfMemoryError" not in done.stderr:
            raise RuntimeError(f"{tokens} tokens failed:\n{done.stderr[-2000:]}")
        if done.returncode:
            fails = tokens
        else:
            fits = tokens
        print(f"{tokens} tokens: {'out of memory' if done.returncode else done.stdout.splitlines()[-1]}", flush=True)
        tokens = (fits + fails) // 2 // 256 * 256 if fails else 2 * tokens
        if fails and tokens in (fits, fails):
            break
    return fits


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["step", "limit", "check"])
    parser.add_argument("--model", choices=list(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--way", choices=["windowed", "checkpointing"], default="windowed")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--window", type=int, default=8192)
    parser.add_argument("--offload", action="store_true", help="keys, values and their gradients in host memory")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--start", type=int, default=16_384, help="of `limit`")
    parser.add_argument("--json", action="store_true", help="print numbers only")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("No GPU is here. With --model tiny --device cpu the script can be tried without one.")
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    if not options.json:
        print(f"{device}, torch {torch.__version__}, transformers {version('transformers')}")
        print(f"{options.model}, {options.dtype}, windows of {options.window}, offload: {options.offload}")
    if options.what == "limit":
        print(f"{options.way}: {limit(options)} tokens")
        return
    found: dict[str, float] = step(options) if options.what == "step" else check(options)
    if options.json:
        print(json.dumps(found))
    elif options.what == "check":
        print(f"error of the gradient at {options.tokens} tokens: windowed {found['windowed']:.2e}, uncut ", end="")
        print(f"{found['plain']:.2e}, ratio {found['ratio']:.2f}")
    else:
        print(f"{options.way}, {options.tokens} tokens: {found['seconds']:.1f} s, loss {found['loss']:.3f}")
        print(f"peak {found['peak'] / GIB:.2f} GiB, floor {found['floor'] / GIB:.2f} GiB")


if __name__ == "__main__":
    main()
