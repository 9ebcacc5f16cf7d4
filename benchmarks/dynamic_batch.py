"""What DynamicBatchScaler costs: without an error, after one, and against a micro-batch that was tuned by hand.

    python benchmarks/dynamic_batch.py --steps 20                       # overhead and recovery, any device
    python benchmarks/dynamic_batch.py --device cuda --hidden 1280 --layers 24 --length 1024 --micro_batch_size 512 \
        --bf16 --only beyond                                            # a batch beyond the memory of a GPU

``overhead``: two Trainers take turns, step for step, one with the callback and whole batches that fit; beside the ratio
of the steps' times, the time that the callback's own code takes, as a share of the step. ``recovery``: an error at the
end of a piece's backward; what the step takes longer than one that runs the same pieces without an error, as a multiple
of the time that the failed attempt took. ``beyond`` (CUDA): a batch that does not fit, found from real errors, against
K micro-batches of the largest power of two that fits.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from typing import Any

import lightning as L
import torch
from accumulation import Plain, ragged_batches
from command_line import describe_machine, make_parser
from overhead import Turns, TurnTaking

from lightning_llm.callbacks import DynamicBatchScaler, TokenWeightedAccumulation
from lightning_llm.callbacks.pieces.training import TrainingPieces
from lightning_llm.out_of_memory import is_out_of_memory


class Scarce(Plain):
    """Runs out of memory at the end of the backward of the attempts that are named."""

    fail_at: frozenset[int] = frozenset()
    attempts = 0

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Fail when all the work of the piece has been done."""
        super().backward(loss, *args, **kwargs)
        self.attempts += 1
        if self.attempts - 1 in self.fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")


class Stopwatch:
    """Times whole batches, and attempts at pieces; the rest of a batch is the callback's own code."""

    def __init__(self) -> None:
        self.batches: list[float] = []
        self.attempts: list[list[float]] = []

    def __enter__(self) -> Stopwatch:
        self._saved = TrainingPieces.run, TrainingPieces._forward_backward

        def run(pieces: TrainingPieces, *args: Any) -> Any:
            self.attempts.append([])
            begin = time.perf_counter()
            result = self._saved[0](pieces, *args)
            _wait()
            self.batches.append(time.perf_counter() - begin)
            return result

        def attempt(pieces: TrainingPieces, *args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return self._saved[1](pieces, *args)
            finally:
                _wait()
                self.attempts[-1].append(time.perf_counter() - begin)

        TrainingPieces.run, TrainingPieces._forward_backward = run, attempt  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: Any) -> None:
        TrainingPieces.run, TrainingPieces._forward_backward = self._saved  # type: ignore[method-assign]

    @property
    def own_share(self) -> float:
        """Of the time of a batch."""
        return 1 - sum(map(sum, self.attempts)) / sum(self.batches)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train(
    options: argparse.Namespace, callbacks: list[L.Callback], module: Plain | None = None, accumulate: int = 1
) -> L.Trainer:
    """One run."""
    trainer = L.Trainer(
        accelerator="cuda" if options.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if options.bf16 else "16-mixed" if options.fp16 else "32-true",
        max_steps=options.steps + 1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        callbacks=[TokenWeightedAccumulation(), *callbacks],
    )
    trainer.fit(module or Plain(options), ragged_batches(options))
    return trainer


def overhead(options: argparse.Namespace) -> None:
    """With the callback against without, whole batches that fit."""
    options.accumulate = 1
    for name, make in (("control", list), ("DynamicBatchScaler", lambda: [DynamicBatchScaler()])):
        turns = Turns(["without", "with"])
        without: list[L.Callback] = [TurnTaking(turns, "without")]

        def run(callbacks: list[L.Callback] = without, turns: Turns = turns) -> None:
            train(options, callbacks)
            turns.finish("without")

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        with Stopwatch() as watch:
            train(options, [*make(), TurnTaking(turns, "with")])
            turns.finish("with")
            thread.join(timeout=60)
        pairs = list(zip(turns.times["without"], turns.times["with"], strict=False))[options.warmup :]
        before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(ours / bare for bare, ours in pairs)
        share = f"own code {watch.own_share:.2%} of a step" if watch.batches else ""
        print(
            f"overhead, {name:<20} without {before * 1e3:8.1f} ms   with {after * 1e3:8.1f} ms   ratio {ratio:.3f}   "
            f"{share}",
            flush=True,
        )


def recovery(options: argparse.Namespace) -> None:
    """An error in the first piece of every third step."""
    options.accumulate = 1
    whole = options.micro_batch_size * options.length
    module = Scarce(options)
    scaler = DynamicBatchScaler(max_piece=whole // 2, grow_every=0, trim_padding=False)
    per_step, fail_at, attempt = [], set(), 0
    for step in range(options.steps + 1):
        fails = step % 3 == 2
        fail_at |= {attempt} if fails else set()
        per_step.append(fails)
        attempt += 2 + fails  # the failed attempt, and then the same two pieces
    module.fail_at = frozenset(fail_at)

    class Forget(L.Callback):
        """The same pieces in each step: what was learned is forgotten; the first piece fails and is tried again."""

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, i: int) -> None:
            scaler.limits.buckets.clear()

    retried = TrainingPieces.smaller
    TrainingPieces.smaller = lambda self, piece, error, is_retry=False: [piece]  # type: ignore[method-assign,assignment]
    try:
        with Stopwatch() as watch:
            train(options, [scaler, Forget()], module)
    finally:
        TrainingPieces.smaller = retried  # type: ignore[method-assign]
    assert all(len(attempts) == 2 + fails for attempts, fails in zip(watch.attempts, per_step, strict=True))
    steps = list(zip(per_step, watch.batches, watch.attempts, strict=True))[options.warmup :]
    calm = statistics.median(seconds for fails, seconds, _ in steps if not fails)
    failed = statistics.median(attempts[0] for fails, _, attempts in steps if fails)
    longer = statistics.median(seconds for fails, seconds, _ in steps if fails) - calm
    own = statistics.median(seconds - sum(attempts) for fails, seconds, attempts in steps if fails)
    calm_own = statistics.median(seconds - sum(attempts) for fails, seconds, attempts in steps if not fails)
    print(
        f"recovery: a step of two pieces {calm * 1e3:.1f} ms, with an error {(calm + longer) * 1e3:.1f} ms: longer by "
        f"{longer / failed:.3f} of the failed attempt ({failed * 1e3:.1f} ms); the callback's own code takes "
        f"{(own - calm_own) / failed:.2%} of it longer"
    )


def beyond(options: argparse.Namespace) -> None:
    """A batch that does not fit, against micro-batches tuned by hand."""
    wanted = options.micro_batch_size

    def throughput(rows: int, accumulate: int, callbacks: list[L.Callback]) -> float:
        options.micro_batch_size, options.accumulate = rows, accumulate
        torch.cuda.empty_cache()
        turns = Turns(["only"])
        train(options, [*callbacks, TurnTaking(turns, "only")], accumulate=accumulate)
        return wanted * options.length / statistics.median(turns.times["only"][options.warmup :])

    rows, tuned = wanted, None
    while tuned is None:
        try:
            tuned = throughput(rows, wanted // rows, [])
        except RuntimeError as error:
            if not is_out_of_memory(error) or rows == 1:
                raise
            rows //= 2
    for find in ("run", "start"):
        scaler = DynamicBatchScaler(find=find)  # type: ignore[arg-type]
        ours = throughput(wanted, 1, [scaler])
        limits = {2**bucket: limit.limit for bucket, limit in scaler.limits.buckets.items() if limit.good}
        print(
            f"beyond, find={find!r}: {wanted} rows of {options.length}: {ours:,.0f} positions/s in pieces of {limits} "
            f"tokens ({scaler.limits.num_failed} errors); by hand {wanted // rows} x {rows} rows: {tuned:,.0f}; ratio "
            f"{ours / tuned:.3f}",
            flush=True,
        )


def main() -> None:
    """Print one line per measurement."""
    parser = make_parser(__doc__, steps=20, warmup=3, micro_batch_size=4)
    parser.add_argument("--fp16", action="store_true")
    options = parser.parse_args()
    options.accumulate = 1
    print(describe_machine(options.device))
    size = sum(parameter.numel() for parameter in Plain(options).parameters())
    print(f"GPT-2 with {size / 1e6:.0f} M parameters, batches of {options.micro_batch_size} x {options.length}")
    if options.only in ("", "overhead"):
        overhead(options)
    if options.only in ("", "recovery"):
        recovery(options)
    if options.only in ("", "beyond") and options.device == "cuda":
        beyond(options)


if __name__ == "__main__":
    main()
