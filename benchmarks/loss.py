"""Time and peak memory of the loss of a large vocabulary: forward and backward, from hidden states to gradients.

    python benchmarks/loss.py                                       # V = 131072, dim 1024, 2048 tokens
    python benchmarks/loss.py --tokens 4096 --dim 2048 --dtype bfloat16 --device cuda

Each case runs in a process of its own. ``transformers``: logits, then the loss that transformers' models make of them.
``logits``: the same logits, then ``token_cross_entropy``. ``chunked``: ``chunked_cross_entropy``; ``per token``:
``chunked_token_nll``; ``frozen``: of a head that needs no gradient. Time on a CPU is the processor time of the process,
so that other processes disturb it less. Peak memory is what a step takes beyond hidden states and weight: on a CPU the
resident set's high-water mark, on a GPU what torch's allocator handed out. The last column is what of it is not the
gradients of hidden states and weight.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
import torch.nn.functional as F
from process_memory import memory_bytes, reset_peak
from torch import Tensor

from lightning_llm.chunked_loss import chunked_cross_entropy, chunked_token_nll
from lightning_llm.loss import token_cross_entropy

MIB = 1 << 20


def by_transformers(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What ``model(..., labels=labels).loss`` does."""
    from transformers.loss.loss_utils import ForCausalLMLoss  # here, as the other cases start faster without it

    return ForCausalLMLoss(F.linear(hidden, weight), labels, vocab_size=len(weight))


def by_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Our loss of the logits."""
    return token_cross_entropy(F.linear(hidden, weight), labels).mean


def by_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """No logits."""
    return chunked_cross_entropy(hidden, weight, labels).mean


def by_token(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """No logits, and no gradient before backward."""
    return chunked_token_nll(hidden, weight, labels).sum() / (labels.numel() - len(labels))


CASES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], bool]] = {
    "transformers": (by_transformers, True),
    "logits": (by_logits, True),
    "chunked": (by_chunks, True),
    "chunked, per token": (by_token, True),
    "transformers, frozen": (by_transformers, False),
    "chunked, frozen": (by_chunks, False),
    "per token, frozen": (by_token, False),
}


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, its peak bytes beyond the inputs, and the bytes of its gradients."""
    loss_of, learns = CASES[name]
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    seq = min(options.seq, options.tokens)
    shape = (options.tokens // seq, seq)
    hidden = torch.randn(*shape, options.dim, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(options.vocab, options.dim, device=device, dtype=dtype).mul_(0.02).requires_grad_(learns)
    labels = torch.randint(options.vocab, shape, device=device)

    def step() -> float:
        hidden.grad = weight.grad = None
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        begin = clock()
        loss_of(hidden, weight, labels).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - begin

    small = torch.zeros(1, 2, 8, device=device, dtype=dtype, requires_grad=True)
    loss_of(small, torch.zeros(4, 8, device=device, dtype=dtype).requires_grad_(learns), labels[:1, :2] % 4).backward()
    before = memory_bytes(device, "VmRSS")
    reset_peak(device)
    times = [step()]
    peak = memory_bytes(device, "VmHWM") - before
    times += [step() for _ in range(options.repeat - 1)]
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in (hidden, weight) if tensor.requires_grad)
    return {"seconds": statistics.median(times), "peak": peak, "gradients": gradients}


def in_own_process(name: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--case", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seq", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3, help="steps timed; the first gives the memory")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--case", choices=list(CASES), help="run this case alone and print what was measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        print(json.dumps(measure(options.case, options)))
        return
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} CPU threads"
    versions = f"torch {torch.__version__}, transformers {version('transformers')}"
    print(f"{device}, Python {platform.python_version()}, {versions}")
    print(f"{options.tokens} tokens, dim {options.dim}, vocabulary {options.vocab}, {options.dtype}")
    print(f"{'':<22}{'s/step':>9}{'ratio':>8}{'peak MiB':>11}{'ratio':>8}{'beyond gradients':>19}")
    base: dict[bool, dict[str, float]] = {}
    for name, (_, learns) in CASES.items():
        if options.only not in name:
            continue
        found = in_own_process(name)
        first = base.setdefault(learns, found)
        print(
            f"{name:<22}{found['seconds']:>9.2f}{found['seconds'] / first['seconds']:>8.2f}"
            f"{found['peak'] / MIB:>11.0f}{found['peak'] / first['peak']:>8.3f}"
            f"{(found['peak'] - found['gradients']) / MIB:>15.0f} MiB"
        )


if __name__ == "__main__":
    main()
