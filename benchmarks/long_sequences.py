"""Peak memory and time of one row's forward and backward against its length: windows beside gradient checkpointing.

    python benchmarks/long_sequences.py                                  # 2k to 16k tokens, about an hour on one core
    python benchmarks/long_sequences.py --lengths 2048 4096 --repeat 3   # some minutes
    python benchmarks/long_sequences.py --lengths 4096 8192 --lora       # only adapters are trained
    python benchmarks/long_sequences.py --within 4                       # the longest row in 4 GiB of a process
    python benchmarks/long_sequences.py --plot docs/images/long_sequences.png

The model is a Llama of 21.7 M parameters with random weights (hidden 384, 6 layers, 6 heads on 2 key heads, a tied
vocabulary of 32,000), in float32. ``plain`` and ``checkpointing`` (``gradient_checkpointing_enable()``, not reentrant)
run with transformers' own loss and with ``loss_kernel="chunked"``; ``windowed`` is ``windowed_loss``.

Each case runs in a process of its own; the cases of a length take turns, ``--repeat`` times. Peak memory is the
resident set's high-water mark, less what was resident before the step, so gradients are in it and weights are not (on
a GPU: what torch's allocator handed out). Blocks of 1 MiB and more go back to the system when they are freed, in all
cases. Time on a CPU is the processor time of one thread, which other programs disturb less than the clock. ``--within``
measures the resident set of the whole process, Python and weights included, and lengthens the row until the bound is
passed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from process_memory import memory_bytes, reset_peak
from torch import Tensor

from lightning_llm import windowed_loss
from lightning_llm.head_loss import causal_lm_loss

MIB, GIB = 1 << 20, 1 << 30
CASES = {
    "plain": ("plain", "transformers"),
    "plain, chunked loss": ("plain", "chunked"),
    "checkpointing": ("checkpointing", "transformers"),
    "checkpointing, chunked loss": ("checkpointing", "chunked"),
    "windowed": ("windowed", "chunked"),
}


def make_model(options: argparse.Namespace) -> Any:
    """The reference model, on the device."""
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    if options.lora:
        import peft

        lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    return model.to(options.device, getattr(torch, options.dtype)).train()


def loss_of(case: str, options: argparse.Namespace) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The model and the mean loss of a row, made as the case says."""
    way, kernel = CASES[case]
    model = make_model(options)
    if way == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if options.lora:
            model.enable_input_require_grads()
    if way == "windowed":
        return model, lambda ids: windowed_loss(model, ids, ids, window=options.window).mean
    if kernel == "transformers":
        return model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss

    def chunked(ids: Tensor) -> Tensor:
        return causal_lm_loss(model, {"input_ids": ids, "use_cache": False}, ids, loss_kernel="chunked").mean

    return model, chunked


def measure(case: str, length: int, options: argparse.Namespace) -> dict[str, float]:
    """One step: peak bytes beyond what was there, of the whole process, seconds, loss and the gradient's norm."""
    device = torch.device(options.device)
    model, loss_of_row = loss_of(case, options)
    ids = torch.randint(32_000, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    loss_of_row(ids[:, : min(128, length)]).backward()  # what is made once: threads, buffers, kernels
    model.zero_grad(set_to_none=True)
    before = memory_bytes(device, "VmRSS")
    reset_peak(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    begin = clock()
    loss = loss_of_row(ids)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - begin
    peak = memory_bytes(device, "VmHWM")
    gradients = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
    norm = torch.stack(gradients).norm().item()
    return {"peak": peak - before, "process": peak, "seconds": seconds, "loss": loss.item(), "norm": norm}


def in_own_process(case: str, length: int, limit: float | None = None) -> dict[str, float] | None:
    """Measure in a fresh process; None if it was out of memory."""
    command = [sys.executable, __file__, *sys.argv[1:], "--case", case, "--length", str(length)]
    # glibc keeps freed blocks of up to 32 MiB for itself, which made the same case take 236 or 635 MiB.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        if limit is not None and (done.returncode < 0 or "can't allocate memory" in done.stderr):
            return None
        raise RuntimeError(f"{case} with {length} tokens failed ({done.returncode}):\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(options: argparse.Namespace) -> dict[str, list[tuple[int, float]]]:
    """Measure all cases at all lengths, and print a table; return (length, peak bytes) for each case."""
    peaks: dict[str, list[tuple[int, float]]] = {case: [] for case in CASES if options.only in case}
    print(f"{'':<30}{'tokens':>8}{'peak MiB':>10}{'s':>9}{'KiB/token':>11}   windowed takes")
    for length in options.lengths:
        runs: dict[str, list[dict[str, float]]] = {case: [] for case in peaks}
        for _ in range(options.repeat):
            for case, found in runs.items():
                result = in_own_process(case, length)
                assert result is not None
                found.append(result)
        first = next(iter(runs.values()))[0]
        for case, found in runs.items():
            for run in found:  # all the same step
                assert abs(run["loss"] - first["loss"]) < 1e-4 * first["loss"], (case, run, first)
                assert abs(run["norm"] - first["norm"]) < 1e-3 * first["norm"], (case, run, first)
        medians = {
            case: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for case, found in runs.items()
        }
        ours = medians.get("windowed")
        for case, median in medians.items():
            peak, seconds = median["peak"], median["seconds"]
            slope = ""
            if peaks[case]:
                before, before_peak = peaks[case][-1]
                slope = f"{(peak - before_peak) / (length - before) / 1024:.1f}"
            peaks[case].append((length, peak))
            beside = ""
            if ours is not None and case != "windowed":
                beside = f"1/{peak / ours['peak']:.1f} of the memory, {ours['seconds'] / seconds:.2f} of the time"
            print(f"{case:<30}{length:>8}{peak / MIB:>10.0f}{seconds:>9.2f}{slope:>11}   {beside}", flush=True)
    return peaks


def longest(options: argparse.Namespace) -> None:
    """Lengthen the row until the process passes the bound; print the longest that stayed within it."""
    bound = options.within * GIB
    print(f"the longest row of a process within {options.within:g} GiB, in steps of an eighth")
    for case in CASES:
        if options.only not in case:
            continue
        done: list[tuple[int, float]] = []
        length = options.start
        while length <= options.most:
            found = in_own_process(case, length, bound)
            if found is None or found["process"] > bound:
                break
            done.append((length, found["process"]))
            length = _next_length(done, bound)
        text = "none" if not done else f"{done[-1][0]:>9} tokens, {done[-1][1] / GIB:.2f} GiB"
        if done and length > options.most:
            text += f"; not tried beyond {options.most}: its slope says {_extrapolate(done, bound)} tokens"
        print(f"{case:<30}{text}", flush=True)


def _extrapolate(done: list[tuple[int, float]], bound: float) -> int:
    (length_a, peak_a), (length_b, peak_b) = done[-2:]
    return int(length_b + (bound - peak_b) / (peak_b - peak_a) * (length_b - length_a))


def _next_length(done: list[tuple[int, float]], bound: float) -> int:
    """Twice as long, or, where that would pass the bound, the next eighth below what the slope promises."""
    last = done[-1][0]
    if len(done) < 2:
        return 2 * last
    promised = _extrapolate(done, bound)
    return 2 * last if promised >= 2 * last else max(promised // 256 * 256, last + max(256, last // 8 // 256 * 256))


def plot(peaks: dict[str, list[tuple[int, float]]], path: str) -> None:
    """Draw peak memory against length."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for case, points in peaks.items():
        lengths, values = zip(*points, strict=True)
        style: Any = {"linewidth": 2.5, "color": "black"} if case == "windowed" else {"linewidth": 1.5}
        axes.plot(lengths, [value / MIB for value in values], marker="o", label=case, **style)
    axes.set(xscale="log", yscale="log", xlabel="tokens in a row", ylabel="peak memory of a step, MiB")
    ticks = [length for length, _ in next(iter(peaks.values()))]
    axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--kv-heads", type=int, default=2, help="6: one for each query head")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 8 only")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1, help="processes of each case; the median counts")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--within", type=float, help="GiB of a whole process: find the longest row instead")
    parser.add_argument("--start", type=int, default=1024, help="length to begin with")
    parser.add_argument("--most", type=int, default=32768, help="length not to go beyond")
    parser.add_argument("--plot", help="file of a picture")
    parser.add_argument("--case", choices=list(CASES), help="run this case alone and print what was measured")
    parser.add_argument("--length", type=int, help="of that case")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    if options.case:
        print(json.dumps(measure(options.case, options.length, options)))
        return
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} CPU threads"
    versions = f"torch {torch.__version__}, transformers {version('transformers')}"
    print(f"{device}, Python {platform.python_version()}, {versions}, {options.dtype}")
    trained = "adapters of rank 8" if options.lora else "all weights"
    print(f"{options.kv_heads} key heads of 6, windows of {options.window}, trained: {trained}")
    if options.within:
        longest(options)
        return
    theory = 4 * options.kv_heads * 64 * 6 * getattr(torch, options.dtype).itemsize / 1024
    print(f"keys, values and their gradients: {theory:.1f} KiB a token")
    peaks = compare(options)
    if options.plot:
        plot(peaks, options.plot)


if __name__ == "__main__":
    main()
