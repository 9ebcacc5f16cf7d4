"""Training in pieces, inside the closure: try, take back what failed, cut it smaller, make one result of all."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from contextlib import nullcontext
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_llm.callbacks.pieces.cutting import Piece
from lightning_llm.callbacks.pieces.memory import allocation_retries, release_memory, without_frames
from lightning_llm.callbacks.pieces.merging import merge_outputs, weighted_mean
from lightning_llm.callbacks.pieces.rows import fresh, tensors_in
from lightning_llm.callbacks.pieces.running import BatchReport, PieceRunner
from lightning_llm.callbacks.pieces.undo import GradientGuard
from lightning_llm.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)


class TrainingPieces(PieceRunner):
    """Runs ``training_step`` and backward in pieces, inside Lightning's closure.

    Args:
        *args: As for :class:`PieceRunner`.
        overlap: Reduce gradients during the last piece's backward.
    """

    def __init__(self, *args: Any, overlap: bool = True) -> None:
        super().__init__(*args)
        self.overlap = overlap and self.reduction.can_overlap
        self.guard = GradientGuard(self.trainer.optimizers[0])
        self._retries = allocation_retries(self.device)
        self._num_pressed = 0
        self._has_warned = False

    def closure(self, inner: Closure, kwargs: OrderedDict[str, Any]) -> Closure:
        """Lightning's closure, in pieces."""
        return _PieceClosure(self, inner, kwargs)

    def run(self, inner: Closure, kwargs: OrderedDict[str, Any]) -> ClosureResult:
        """Zero the gradients if it is time, add those of all pieces, reduce them if a step follows.

        Args:
            inner: Lightning's closure for the whole batch; its parts are called here.
            kwargs: Arguments of ``training_step``; ``batch`` is replaced by its pieces.
        """
        stepping = not self.trainer.fit_loop._should_accumulate()
        whole = self.cutter.whole(fresh(kwargs["batch"]))
        if inner._zero_grad_fn is not None:
            inner._zero_grad_fn()
        state = _BatchState(whole, stepping, *self.plan(whole))
        # What logs communicate comes after the gradients, on all ranks.
        with self._logs.hold_back(self.trainer._results):
            with self.reduction.pieces(stepping):
                while state.todo:
                    self._run_next(inner, kwargs, state)
            if stepping and not state.is_reduced:
                self.reduction.finish(state.begun)
        done = state.done
        report = BatchReport(len(done), max(d.piece.cost for d in done), state.num_failed)
        self.batch_done(whole, {d.piece.length for d in done}, report)
        self._watch_pressure(whole, state.num_failed)
        return _merge(done)

    def _run_next(self, inner: Closure, kwargs: OrderedDict[str, Any], state: _BatchState) -> None:
        """Try the next piece; if it fails, put smaller ones in its place."""
        task = state.todo.popleft()
        is_last = not state.todo
        self.reduction.begin_piece(is_last)
        if len(state.todo) < state.num_repeated:
            self._repeat(task.piece)
            return
        beside = self.guard.has_gradients
        trusted = self.limits.of(task.piece.length).is_trusted(task.piece.cost, beside)
        overlapped = self.overlap and state.stepping and is_last and trusted and not task.skip and not state.begun
        outcome = self._attempt(inner, kwargs, state, task, trusted, overlapped)
        if isinstance(outcome, _Done):
            state.done.append(outcome)
            self.limits.of(task.piece.length).fitted(task.piece.cost, beside)
            state.is_reduced = overlapped
            return
        state.num_failed += 1
        if overlapped:
            state.begun = outcome.added
        parts = self.smaller(task.piece, outcome.error, task.is_retry)
        skip = task.skip | outcome.added
        self._announce_failure(is_taken_back=not skip)
        if not state.done and not skip:
            plan = self.plan(state.whole)[0]
            if max(piece.cost for piece in plan) < task.piece.cost:
                state.todo = deque(map(_Task, plan))  # as if the limit had been known
                return
        later = [_Task(piece, t.skip) for t in state.todo for piece in self.cutter.cut(t.piece, self.limits.cost)]
        state.todo = deque([*(_Task(part, skip, is_retry=part is task.piece) for part in parts), *later])

    # ---- details -------------------------------------------------------------------------------------------------

    @property
    def _weighting(self) -> Any:
        """The callback that weights each backward, if there is one; it counts pieces as it counts micro-batches."""
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if getattr(c, "normalizes_gradients", False)), None)

    def _announce_failure(self, is_taken_back: bool) -> None:
        """Tell the callbacks that care: a backward that they saw begin has not ended."""
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if hasattr(callback, "on_backward_failed"):
                callback.on_backward_failed(is_taken_back)

    def _attempt(
        self,
        inner: Closure,
        kwargs: OrderedDict[str, Any],
        state: _BatchState,
        task: _Task,
        trusted: bool,
        overlapped: bool,
    ) -> _Done | _Failure:
        """Forward and backward of one piece; after an out-of-memory error everything is as before."""
        piece = task.piece
        aside = bool(state.begun)
        fx = self.module._current_fx_name
        versions = [tensor._version for tensor in tensors_in(piece.batch) if not tensor.is_inference()]
        if self.reduction.recovers:
            self.keeper.note()
            self.guard.begin(trusted, task.skip, is_reduced=overlapped or aside)
        error: BaseException | None = None
        try:
            with self._backward_aside(task.skip) if aside else nullcontext():
                result = self._forward_backward(inner, kwargs, state.whole, piece, overlapped)
        except Exception as raised:
            if not is_out_of_memory(raised):
                raise
            if not self.reduction.recovers:
                raise torch.OutOfMemoryError(
                    f"Out of memory with a piece of cost {piece.cost} on rank {self.trainer.global_rank}, inside a "
                    f"forward or backward that all ranks take part in: it cannot be tried again. Lower "
                    f"DynamicBatchScaler(max_piece=...), or raise its `margin`."
                ) from raised
            error = without_frames(raised)
        if error is None:
            if self.reduction.recovers:
                self.guard.keep()
            weight = self._weight(result, piece)
            self._logs.keep(weight)
            result.closure_loss = None
            result.extra = apply_to_collection(result.extra, Tensor, Tensor.detach)
            return _Done(piece, result, weight)
        if versions != [tensor._version for tensor in tensors_in(piece.batch) if not tensor.is_inference()]:
            raise ValueError(
                "training_step ran out of memory after it had changed the batch in place, so the piece cannot be tried "
                "again. Let it work on a copy: x = batch['x'] * scale in place of batch['x'] *= scale."
            ) from error
        self._logs.discard()
        self.module._current_fx_name = fx
        added = self.guard.take_back()
        self.keeper.restore()
        release_memory(self.device, thorough=state.num_failed > 0)
        return _Failure(error, added)

    def _forward_backward(
        self, inner: Closure, kwargs: OrderedDict[str, Any], whole: Piece, piece: Piece, overlapped: bool
    ) -> ClosureResult:
        # A whole batch is passed on as it is; whoever adds to it will find that again after the step.
        batch = self.to_device(kwargs["batch"], kwargs["batch"] if piece is whole else fresh(piece.batch))
        loop = self.trainer.fit_loop.epoch_loop.automatic_optimization
        result: ClosureResult = loop._make_step_fn(OrderedDict(kwargs, batch=batch))()
        if result.closure_loss is not None:
            if self._weighting is None and piece.num_rows != whole.num_rows:
                self._warn_of_tokens(result)
                result.closure_loss = result.closure_loss * (piece.num_rows / whole.num_rows)
            if overlapped:
                self.reduction.overlap(result.closure_loss)
            if inner._backward_fn is not None:
                inner._backward_fn(result.closure_loss)
        return result

    def _repeat(self, piece: Piece) -> None:
        """Take part in the collectives of the other ranks' pieces; no callback sees it, nothing is added."""
        self.keeper.note()
        run_quietly(self.trainer, fresh(piece.batch), factor=0.0)
        self.keeper.restore()
        self._logs.discard()

    def _weight(self, result: ClosureResult, piece: Piece) -> Any:
        if result.loss is None:
            return 0.0
        weight = getattr(self._weighting, "last_weight", None)
        return piece.num_rows if weight is None else weight

    def _warn_of_tokens(self, result: ClosureResult) -> None:
        if "num_tokens" in result.extra and not self._has_warned:
            self._has_warned = True
            log.warning(
                "training_step returns `num_tokens`, but pieces are weighted by their rows: the gradient is that of "
                "the whole batch only if all rows have equally many. Add TokenWeightedAccumulation() to the callbacks."
            )

    def _backward_aside(self, skip: frozenset[nn.Parameter]) -> Any:
        return _BackwardAside(self.module, [p for p in self.module.parameters() if p.requires_grad and p not in skip])

    def _watch_pressure(self, whole: Piece, num_failed: int) -> None:
        """CUDA's allocator gave back its whole cache in two batches running, to find room: go back a little."""
        retries = allocation_retries(self.device)
        if retries > self._retries and not num_failed:
            self._num_pressed += 1
        else:
            self._num_pressed = 0
        self._retries = retries
        if self._num_pressed >= 2 and self.limits.of(whole.length).under_pressure():
            self._num_pressed = 0
            log.warning(
                "The allocator had to empty its cache in two batches running: pieces may now have cost %d.",
                self.limits.of(whole.length).limit,
            )


def run_quietly(trainer: L.Trainer, batch: Any, factor: float = 1.0) -> Tensor | None:
    """Forward and backward of ``training_step`` as the Trainer would, but no callback and no counter notices.

    Args:
        trainer: In a fit.
        batch: On the device.
        factor: Of the loss.

    Returns:
        The loss, shape (), detached; None if there was none.
    """
    module, precision = trainer.strategy.lightning_module, trainer.precision_plugin
    assert module is not None
    fx, module._current_fx_name = module._current_fx_name, "training_step"  # so that it may log
    try:
        with precision.train_step_context(), torch.enable_grad():
            output = module.training_step(batch, 0) if _takes_batch_idx(module) else module.training_step(batch)
        loss = output if isinstance(output, Tensor) or output is None else output["loss"]
        if loss is None:
            return None
        scaler = getattr(precision, "scaler", None)
        loss = loss * factor
        (scaler.scale(loss) if scaler is not None else loss).backward()
        return loss.detach()
    finally:
        module._current_fx_name = fx


def _takes_batch_idx(module: L.LightningModule) -> bool:
    return is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)


class _Task(NamedTuple):
    piece: Piece
    skip: frozenset[nn.Parameter] = frozenset()
    is_retry: bool = False


class _Done(NamedTuple):
    piece: Piece
    result: ClosureResult
    weight: Any


class _Failure(NamedTuple):
    error: BaseException
    added: frozenset[nn.Parameter]


@dataclass
class _BatchState:
    """Where a batch stands.

    Attributes:
        whole: The batch.
        stepping: An optimizer step follows.
        pieces: As planned.
        num_repeated: The last ones, which only take part in the other ranks' collectives.
        todo: Pieces to come.
        done: Pieces whose gradient is in.
        num_failed: Pieces that failed.
        begun: Parameters that are being reduced, where a piece failed while it was reduced.
        is_reduced: The last piece was reduced in its backward.
    """

    whole: Piece
    stepping: bool
    pieces: InitVar[list[Piece]]
    num_repeated: int
    done: list[_Done] = field(default_factory=list)
    num_failed: int = 0
    begun: frozenset[nn.Parameter] = frozenset()
    is_reduced: bool = False

    def __post_init__(self, pieces: list[Piece]) -> None:
        self.todo = deque(_Task(piece) for piece in pieces)


class _PieceClosure(Closure):
    def __init__(self, runner: TrainingPieces, inner: Closure, kwargs: OrderedDict[str, Any]) -> None:
        super().__init__(inner._step_fn, inner._backward_fn, inner._zero_grad_fn)
        self._runner, self._inner, self._kwargs = runner, inner, kwargs

    @torch.enable_grad()
    def closure(self, *args: Any, **kwargs: Any) -> ClosureResult:
        """In place of Lightning's."""
        return self._runner.run(self._inner, self._kwargs)


class _BackwardAside:
    """Inside, the module's backward adds gradients without calling the hooks of parameters.

    For the parts of a piece that failed while it was being reduced: the reducer waits for the parameters that the
    failed backward did not reach, and must see each of them once, when all parts are in.
    """

    def __init__(self, module: L.LightningModule, parameters: list[nn.Parameter]) -> None:
        self._module, self._parameters = module, parameters

    def __enter__(self) -> None:
        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            """In place of the module's."""
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(self._parameters, gradients, strict=True):
                    if gradient is not None and parameter.grad is not None:
                        parameter.grad += gradient
                    elif gradient is not None:
                        parameter.grad = gradient

        self._module.__dict__["backward"] = backward

    def __exit__(self, *exception: Any) -> None:
        self._module.__dict__.pop("backward", None)


def _merge(done: list[_Done]) -> ClosureResult:
    merged = done[-1].result
    losses = [(d.result.loss, d.weight) for d in done if d.result.loss is not None]
    if losses:
        merged.loss = weighted_mean(*zip(*losses, strict=True))
        merged.closure_loss = merged.loss  # only looked at for None
    keys = {key: None for d in done for key in d.result.extra}  # in order
    extra = {}
    for key in keys:
        holders = [d for d in done if key in d.result.extra]  # not those for which training_step returned None
        rows, weights = [d.piece.num_rows for d in holders], [d.weight for d in holders]
        extra[key] = merge_outputs([d.result.extra[key] for d in holders], rows, weights)
    merged.extra = extra
    return merged
