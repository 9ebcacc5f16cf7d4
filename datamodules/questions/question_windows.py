"""Windows of a question's context: what a window is, which of them owns a token, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_llm.datamodules.windows import Int64Array

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


def example_name(example: Mapping[str, Any], index: int) -> str:
    """Return the example's ``id``, or its index if it has none."""
    return str(example.get("id", index))


class EncodedPair(NamedTuple):
    """A question and its whole context as one sequence of tokens, nothing cut.

    Attributes:
        input_ids: (num_tokens,) special tokens counted.
        token_type_ids: (num_tokens,), or None if the tokenizer makes none.
        context_begin: First token of the context.
        context_end: The token after the context.
        offsets: (num_context_tokens, 2) characters [begin, end) of the context that a token stands for.
    """

    input_ids: Int32Array
    token_type_ids: Int32Array | None
    context_begin: int
    context_end: int
    offsets: Int32Array


@dataclass(frozen=True, slots=True)
class QuestionWindow:
    """One input of the model: the question and a window of the context. Windows of an example share its tokens.

    Attributes:
        example: Index of the example.
        pair: The example's tokens.
        start: First context token of the window, counted within the context.
        length: Context tokens in the window.
        can_start: (length,) where an answer may start: tokens with text that this window owns.
        null_position: The token of the input that stands for "no answer".
        start_position: First token of the answer in the input; ``null_position`` if the window does not hold it.
        end_position: Last token of the answer, likewise.
    """

    example: int
    pair: EncodedPair
    start: int
    length: int
    can_start: BoolArray
    null_position: int = 0
    start_position: int = 0
    end_position: int = 0

    def __len__(self) -> int:
        return len(self.pair.input_ids) - (self.pair.context_end - self.pair.context_begin) + self.length

    @property
    def input_ids(self) -> Int32Array:
        """(tokens,), special tokens counted."""
        return self._cut(self.pair.input_ids)

    @property
    def token_type_ids(self) -> Int32Array | None:
        """(tokens,), or None if the tokenizer makes none."""
        types = self.pair.token_type_ids
        return None if types is None else self._cut(types)

    @property
    def characters(self) -> tuple[Int32Array, Int32Array]:
        """(tokens,) each, of the input: the character of the context where a token begins, and that after its last.

        -1 where it is no token of the context; and, of the first, where no answer may start.
        """
        begins, ends = np.full((2, len(self)), -1, np.int32)
        place = slice(self.pair.context_begin, self.pair.context_begin + self.length)
        offsets = self.pair.offsets[self.start : self.start + self.length]
        begins[place] = np.where(self.can_start, offsets[:, 0], -1)
        ends[place] = offsets[:, 1]
        return begins, ends

    def _cut(self, tokens: Int32Array) -> Int32Array:
        begin, end = self.pair.context_begin, self.pair.context_end
        window = slice(begin + self.start, begin + self.start + self.length)
        return np.concatenate([tokens[:begin], tokens[window], tokens[end:]])


def max_context_window(starts: npt.ArrayLike, ends: npt.ArrayLike, length: int) -> Int64Array:
    """Find the window that owns each token: where min(tokens before, tokens after) + 0.01 window length is largest.

    Of equal windows the first owns the token. The rule is BERT's, in whole numbers, so that no rounding decides.

    Args:
        starts: (num_windows,) first token of each window.
        ends: (num_windows,) the token after each window.
        length: Tokens of the context.

    Returns:
        (length,) int64 indices of windows, -1 for a token that no window holds.

    Example:
        >>> max_context_window([0, 3], [6, 9], length=9).tolist()
        [0, 0, 0, 0, 0, 1, 1, 1, 1]
    """
    owner = np.full(length, -1, np.int64)
    best = np.full(length, -1, np.int64)
    for window, (start, end) in enumerate(zip(np.asarray(starts).tolist(), np.asarray(ends).tolist(), strict=True)):
        before = np.arange(end - start)
        score = 100 * np.minimum(before, before[::-1]) + (end - start)
        better = score > best[start:end]
        owner[start:end][better] = window
        best[start:end][better] = score[better]
    return owner


def collate_question_windows(
    windows: Sequence[QuestionWindow], row_ids: Sequence[int], *, pad_token_id: int
) -> dict[str, Tensor]:
    """Make a batch of the windows of these numbers.

    Args:
        windows: All windows.
        row_ids: Which of them to take.
        pad_token_id: Fills the rest of a row, on the right.

    Returns:
        int64 tensors: ``input_ids``, ``attention_mask`` and, where the tokenizer makes them, ``token_type_ids``
        (batch, longest); ``start_positions``, ``end_positions``, ``row_ids`` and ``num_input_tokens`` (batch,).
    """
    rows = [windows[row] for row in row_ids]
    used = np.array([len(window) for window in rows], dtype=np.int64)
    shape = (len(rows), int(used.max(initial=1)))
    batch = {
        "input_ids": np.full(shape, pad_token_id, np.int64),
        "attention_mask": (np.arange(shape[1]) < used[:, None]).astype(np.int64),
        "start_positions": np.array([window.start_position for window in rows], dtype=np.int64),
        "end_positions": np.array([window.end_position for window in rows], dtype=np.int64),
        "row_ids": np.array(row_ids, dtype=np.int64),
        "num_input_tokens": used,
    }
    if any(window.pair.token_type_ids is not None for window in rows):
        batch["token_type_ids"] = np.zeros(shape, np.int64)
    for row, window in enumerate(rows):
        batch["input_ids"][row, : used[row]] = window.input_ids
        if window.token_type_ids is not None:
            batch["token_type_ids"][row, : used[row]] = window.token_type_ids
    return {name: torch.from_numpy(array) for name, array in batch.items()}
