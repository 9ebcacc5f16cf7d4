"""Run any batch on the memory at hand: in pieces, found and changed at run time, with the same gradient."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import nn

from lightning_llm.callbacks.pieces.cutting import BatchCutter
from lightning_llm.callbacks.pieces.inference import InferencePieces
from lightning_llm.callbacks.pieces.limits import PieceLimits
from lightning_llm.callbacks.pieces.reduction import reduction_of
from lightning_llm.callbacks.pieces.running import Transfer
from lightning_llm.callbacks.pieces.search import NO_ROOM_FOR_OPTIMIZER, WeightsCopy, find_limit
from lightning_llm.callbacks.pieces.sequence_window import WindowLimit
from lightning_llm.callbacks.pieces.training import TrainingPieces
from lightning_llm.callbacks.pieces.whole_batches import ChunkLimit, needs_whole_batches
from lightning_llm.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

Find = Literal["run", "start"]

_FIRST_STEPS = 8  # a gradient scaler may skip some before the optimizer makes its state
_STEPS = ("validation_step", "test_step", "predict_step")


class DynamicBatchScaler(L.Callback):
    """Process each loader batch in the largest pieces that fit in memory; the gradient is that of the whole batch.

    Give the loader the batch that you want. A piece that runs out of memory, in the transfer to the device, in
    forward or in backward, is taken back without a trace and run again in smaller ones; what was learned holds for the
    batches to come, and more is tried again after calm steps. No row is lost, random generators, batch statistics,
    metrics and logs are those of the pieces that succeeded, and ranks communicate once per optimizer step, so that one
    rank may run out of memory without the others. Validation, test and prediction are cut too, with limits of their
    own.

    With :class:`~lightning_llm.callbacks.TokenWeightedAccumulation` pieces are weighted by their label tokens, else by
    their rows; ``training_step`` returns a mean, as it does for Lightning's accumulation.

    A single row that does not fit is tried again in shorter windows along the sequence, if the module has the attribute
    ``sequence_window`` and the method ``shrink_sequence_window(length) -> int | None``, as
    :class:`~lightning_llm.LLMModule` has with ``sequence_window=...``; the gradient does not depend on them.

    A module with the attribute ``needs_whole_batches`` compares the rows of a batch (contrastive losses): its batches
    are not cut. It is told to see fewer of their rows at once, by ``shrink_chunk_size(rows) -> int | None``.

    Args:
        max_piece: Most that is tried at once, in tokens (rows times columns, padding included) or what ``cost_fn``
            counts; None for whole batches.
        find: ``run``: try, and learn from errors. ``start``: also search before the first step, on the longest batch
            with the optimizer's state in memory. FSDP2 searches in any case unless ``max_piece`` is given: there an
            error on one rank cannot be taken back, so memory is measured on small pieces and predicted.
        margin: Share of the memory that the search leaves free (nothing is, where ``split_fn`` cuts).
        grow_every: Batches without an error before a piece less is tried; twice as many after each failure; 0 for
            never.
        trim_padding: Cut off columns that are right padding in all rows of a piece (Hugging Face batches).
        sort_by_length: Put rows of similar length into the same piece, in training; what ``training_step`` returns for
            each row then comes in that order.
        overlap: With DDP, reduce gradients during the backward of a step's last piece, where it is known to fit.
        split_fn: ``(batch, number of pieces) -> pieces``, for batches that are not made of rows.
        cost_fn: ``batch -> cost``, an integer that grows with the memory that a piece takes.
        merge_fn: ``outputs -> output``, joins what ``validation_step``, ``test_step`` or ``predict_step`` returned
            for each piece; by default entries with one row each are joined.
        search_batches: Batches in which the search looks for the longest rows, where the loader has no
            ``longest_batch()`` that tells them.

    Raises:
        ValueError: With manual optimization, strategies other than one device, DDP and FSDP2, DDP with
            ``static_graph``, or SyncBatchNorm.
        CannotSplit: When a batch must be cut and something in it does not say how.
        torch.OutOfMemoryError: If a single row or the optimizer's state does not fit.

    References:
        Lightning issues 8531, 17393, 20994, 9625; Composer's automatic micro-batching.
    """

    def __init__(
        self,
        max_piece: int | None = None,
        find: Find = "run",
        margin: float = 0.1,
        grow_every: int = 100,
        trim_padding: bool = True,
        sort_by_length: bool = False,
        overlap: bool = True,
        split_fn: Callable[[Any, int], Sequence[Any]] | None = None,
        cost_fn: Callable[[Any], int] | None = None,
        merge_fn: Callable[[Sequence[Any]], Any] | None = None,
        search_batches: int = 64,
    ) -> None:
        if max_piece is not None and max_piece < 1:
            raise ValueError(f"`max_piece` must be 1 at least, or None for no bound; got {max_piece}.")
        if find not in get_args(Find):
            raise ValueError(f"`find` must be 'run' or 'start', but got {find!r}.")
        if not 0 <= margin < 1:
            raise ValueError(f"`margin` is a share of the memory, from 0 to below 1, but got {margin}.")
        if grow_every < 0:
            raise ValueError(f"`grow_every` must be 0 (never) or more, but got {grow_every}.")
        self.find = find
        self.margin = margin
        self.overlap = overlap
        self.merge_fn = merge_fn
        self.search_batches = search_batches
        self.limits = PieceLimits(max_piece, grow_every)
        self.inference_limits = PieceLimits(max_piece, grow_every)
        self.window = WindowLimit()
        self.chunk = ChunkLimit()
        self._cutter = BatchCutter(split_fn, cost_fn, trim_padding, sort_by_length)
        self._inference_cutter = BatchCutter(split_fn, cost_fn, trim_padding=False)
        self._training: TrainingPieces | None = None
        self._inference: InferencePieces | None = None
        self._undo: list[Callable[[], None]] = []
        self._transfer: Transfer | None = None
        self._num_steps = 0

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be served; take over the closure and the steps of evaluation."""
        self._restore_trainer()
        _check(self, trainer, pl_module, stage)
        strategy = trainer.strategy
        transfer = Transfer(strategy.batch_to_device, self._cutter, strategy.root_device, self.limits.grow_every)
        self._transfer = transfer
        self._replace(strategy, "batch_to_device", self._batch_to_device(trainer, transfer))
        for name in _STEPS:
            self._replace(strategy, name, self._evaluation_step(trainer, getattr(strategy, name)))
        if stage == "fit":
            self._num_steps = 0
            loop = trainer.fit_loop.epoch_loop.automatic_optimization
            self._replace(loop, "_make_closure", self._closure_maker(trainer, loop._make_closure))
            self._replace(strategy, "optimizer_step", self._optimizer_step(strategy.optimizer_step))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what shows only now; search."""
        _check_model(trainer, pl_module)
        self._begin(pl_module)
        training = self._training_pieces(trainer)
        sharded = not training.reduction.recovers
        wanted = self.find == "start" or (sharded and self.limits.ceiling is None)
        if wanted and not self.limits.buckets and not needs_whole_batches(pl_module):
            find_limit(training, self.margin, self.search_batches)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with the window and the chunks that fitted before."""
        self._begin(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As for validation."""
        self._begin(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As for validation."""
        self._begin(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show what was done."""
        if self._training is None:
            return
        report = self._training.report
        pl_module.log("train/pieces", float(report.num_pieces), prog_bar=True, batch_size=1)
        pl_module.log("train/piece_tokens", float(report.largest), batch_size=1)
        pl_module.log("train/out_of_memory", float(self.limits.num_failed), batch_size=1)
        tokens = self.window.of(pl_module)
        if tokens is not None:
            pl_module.log("train/sequence_window", float(tokens), batch_size=1)
        if self.chunk.rows is not None:
            pl_module.log("train/chunk_size", float(self.chunk.rows), batch_size=1)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the Trainer back what was replaced."""
        self._restore_trainer()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the Trainer back what was replaced."""
        self._restore_trainer()

    def state_dict(self) -> dict[str, Any]:
        """What was learned (by rank 0): a resumed run starts with it."""
        return {
            "training": self.limits.state_dict(),
            "inference": self.inference_limits.state_dict(),
            "sequence_window": self.window.tokens,
            "chunk_size": self.chunk.rows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start with what is known."""
        self.limits.load_state_dict(state_dict["training"])
        self.inference_limits.load_state_dict(state_dict["inference"])
        self.window.tokens = state_dict.get("sequence_window")
        self.chunk.rows = state_dict.get("chunk_size")

    # ---- details -------------------------------------------------------------------------------------------------

    def _begin(self, pl_module: L.LightningModule) -> None:
        self.window.apply(pl_module)
        self.chunk.apply(pl_module)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        before = owner.__dict__.get(name)

        def undo() -> None:
            owner.__dict__.pop(name, None)
            if before is not None:
                owner.__dict__[name] = before

        owner.__dict__[name] = value
        self._undo.append(undo)

    def _restore_trainer(self) -> None:
        while self._undo:
            self._undo.pop()()
        if self._training is not None:
            self._training.guard.remove()
        self._training = self._inference = None

    def _training_pieces(self, trainer: L.Trainer) -> TrainingPieces:
        """Made when first needed, as optimizers come after ``setup``; again if they were made anew."""
        training = self._training
        if training is None or training.guard.optimizer is not trainer.optimizers[0]:
            assert self._transfer is not None
            if training is not None:
                training.guard.remove()
            shared = (self._transfer, self.window, self.chunk)
            parts = (trainer, self._cutter, self.limits, reduction_of(trainer), *shared)
            self._training = training = TrainingPieces(*parts, overlap=self.overlap)
        return training

    def _inference_pieces(self, trainer: L.Trainer) -> InferencePieces:
        if self._inference is None:
            assert self._transfer is not None
            reduction = reduction_of(trainer)
            limits = self.inference_limits if reduction.recovers else self.limits  # what trains can be evaluated
            shared = (self._transfer, self.window, self.chunk, "inference")
            parts = (trainer, self._inference_cutter, limits, reduction, *shared)
            self._inference = InferencePieces(*parts, merge_fn=self.merge_fn)
        return self._inference

    def _batch_to_device(self, trainer: L.Trainer, transfer: Transfer) -> Callable[..., Any]:
        def batch_to_device(batch: Any, *args: Any, **kwargs: Any) -> Any:
            move = transfer.inner if _is_searching(trainer) else transfer
            return move(batch, *args, **kwargs)

        return batch_to_device

    def _closure_maker(self, trainer: L.Trainer, inner: Callable[..., Any]) -> Callable[..., Any]:
        def make_closure(kwargs: OrderedDict[str, Any], optimizer: Any, batch_idx: int) -> Any:
            closure = inner(kwargs, optimizer, batch_idx)
            if _is_searching(trainer) or "batch" not in kwargs:
                return closure
            return self._training_pieces(trainer).closure(closure, kwargs)

        return make_closure

    def _evaluation_step(self, trainer: L.Trainer, inner: Callable[..., Any]) -> Callable[..., Any]:
        def step(batch: Any, *rest: Any, **kwargs: Any) -> Any:
            if _is_searching(trainer) or isinstance(batch, Iterator) or kwargs:
                return inner(batch, *rest, **kwargs)
            return self._inference_pieces(trainer).run(inner, batch, *rest)

        return step

    def _optimizer_step(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def optimizer_step(optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
            plain = getattr(optimizer, "optimizer", optimizer)
            self._num_steps += 1
            if plain.state or self._num_steps > _FIRST_STEPS:
                return inner(optimizer, closure, *args, **kwargs)
            weights = WeightsCopy(plain)
            has_run = False

            def watched() -> Any:
                nonlocal has_run
                result = closure()
                has_run = True
                return result

            try:
                return inner(optimizer, watched, *args, **kwargs)
            except Exception as error:
                if not has_run or not is_out_of_memory(error):
                    raise
                weights.restore()
                raise torch.OutOfMemoryError(NO_ROOM_FOR_OPTIMIZER) from error

        return optimizer_step


def _is_searching(trainer: L.Trainer) -> bool:
    """Lightning's BatchSizeFinder wants to see the errors itself; it empties the list of callbacks."""
    return not trainer.callbacks  # type: ignore[attr-defined]


def _check(scaler: DynamicBatchScaler, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
    if stage == "fit" and not pl_module.automatic_optimization:
        raise ValueError(
            f"DynamicBatchScaler needs automatic optimization, but {type(pl_module).__name__} optimizes manually: it "
            f"calls backward itself, where pieces cannot be put in between. Set `automatic_optimization = True`."
        )
    reduction_of(trainer)
    if stage != "predict" and scaler.limits.ceiling is not None and needs_whole_batches(pl_module):
        raise ValueError(
            f"DynamicBatchScaler(max_piece={scaler.limits.ceiling}) cuts batches, but the loss of "
            f"{type(pl_module).__name__} compares the rows of a batch with each other: cut, it would be another one. "
            f"Leave `max_piece` out; the module sees fewer rows at once where memory is short (`chunk_size`)."
        )
    if any(other is not scaler and isinstance(other, DynamicBatchScaler) for other in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError("Two DynamicBatchScaler would both cut the batches. Keep one.")


def _check_model(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    if getattr(trainer.strategy.model, "static_graph", False):
        raise ValueError(
            "DDPStrategy(static_graph=True) fixes in the first step how often each gradient comes, but the number of "
            "pieces changes. Set static_graph=False."
        )
    for module in pl_module.modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                "SyncBatchNorm communicates in forward, but ranks run different numbers of pieces: they would wait for "
                "each other. Use Trainer(sync_batchnorm=False), or layers without batch statistics."
            )
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in pl_module.modules()):
        log.warning("BatchNorm normalizes by the statistics of each piece, not of the whole batch.")
