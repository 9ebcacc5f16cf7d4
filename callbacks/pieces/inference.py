"""Validation, test and prediction in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from lightning_llm.callbacks.pieces.cutting import Piece
from lightning_llm.callbacks.pieces.memory import release_memory, without_frames
from lightning_llm.callbacks.pieces.merging import merge_outputs
from lightning_llm.callbacks.pieces.rows import fresh
from lightning_llm.callbacks.pieces.running import BatchReport, PieceRunner
from lightning_llm.out_of_memory import is_out_of_memory


class InferencePieces(PieceRunner):
    """Runs ``validation_step``, ``test_step`` or ``predict_step`` in pieces; rows keep their order and columns.

    Args:
        *args: As for :class:`PieceRunner`.
        merge_fn: ``outputs of the pieces -> output of the batch``.
    """

    def __init__(self, *args: Any, merge_fn: Callable[[Sequence[Any]], Any] | None = None) -> None:
        super().__init__(*args)
        self._merge_fn = merge_fn

    def run(self, step: Callable[..., Any], batch: Any, *rest: Any) -> Any:
        """Call ``step`` for each piece.

        Args:
            step: The strategy's step.
            batch: The whole batch.
            *rest: The step's further arguments.
        """
        whole = self.cutter.whole(fresh(batch))
        pieces, num_repeated = self.plan(whole)
        todo = deque(pieces)
        outputs: list[Any] = []
        done: list[Piece] = []
        num_failed = 0
        retried: Piece | None = None
        with self._logs.hold_back(self.trainer._results), self.reduction.pieces(stepping=False):
            while todo:
                piece = todo.popleft()
                if len(todo) < num_repeated:
                    self.keeper.note()
                    step(piece.batch, *rest)
                    self.keeper.restore()
                    self._logs.discard()
                    continue
                fx = self.module._current_fx_name
                self.keeper.note()
                error: BaseException | None = None
                try:
                    given = batch if piece is whole else fresh(piece.batch)
                    outputs.append(step(self.to_device(batch, given), *rest))
                except Exception as raised:
                    if not is_out_of_memory(raised) or not self.reduction.recovers:
                        raise
                    error = without_frames(raised)
                if error is None:
                    self._logs.keep(piece.num_rows)
                    self.limits.of(piece.length).fitted(piece.cost, False)
                    done.append(piece)
                    continue
                num_failed += 1
                self._logs.discard()
                self.module._current_fx_name = fx
                self.keeper.restore()
                release_memory(self.device, thorough=num_failed > 1)
                parts = self.smaller(piece, error, is_retry=piece is retried)
                retried = piece
                later = (small for other in todo for small in self.cutter.cut(other, self.limits.cost))
                todo = deque([*parts, *later])
        report = BatchReport(len(done), max(piece.cost for piece in done), num_failed)
        self.batch_done(whole, {piece.length for piece in done}, report)
        if len(outputs) > 1 and self._merge_fn is not None:
            return self._merge_fn(outputs)
        rows = [piece.num_rows for piece in done]
        name = getattr(step, "__name__", "the step")
        return merge_outputs(outputs, rows, rows, strict=True, path=f"what `{name}` returned")
