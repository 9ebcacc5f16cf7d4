"""Documents whose tokens have labels, in windows that overlap: each token is a target in one of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightning_llm.datamodules.document_windows import document_window_table
from lightning_llm.datamodules.questions.question_windows import max_context_window
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX


def token_windows(
    tokens: npt.ArrayLike,
    labels: npt.ArrayLike,
    max_length: int,
    overlap: int = 0,
    *,
    prefix_ids: Sequence[int] = (),
    suffix_ids: Sequence[int] = (),
) -> list[dict[str, Int64Array]]:
    """Cut a document into windows; each token has its label in that where it has most context.

    Args:
        tokens: (num_tokens,) ids, without special tokens.
        labels: (num_tokens,) int, -100 where there is none.
        max_length: Tokens in a window, special tokens counted.
        overlap: Tokens that a window shares with the one before it: each token sees half as many on both sides, if the
            document has them.
        prefix_ids: Special tokens before each window.
        suffix_ids: Special tokens after each window.

    Returns:
        For each window ``input_ids``; ``labels``, -100 at what another window decides; and ``token_positions``, the
        place in the document of each token that this window decides, -1 elsewhere; (window_tokens,) int64 each. Batches
        of them pad with -100 and -1. By their positions and ``example_ids``, one number a window,
        :func:`~lightning_llm.tasks.merging.merged_tokens` puts documents together.

    Raises:
        ValueError: If the overlap leaves no room for new tokens; or if there are not as many labels as tokens.

    Example:
        >>> windows = token_windows([5, 6, 7, 8], [0, 1, 2, 3], 4, 1, prefix_ids=[1])
        >>> [window["input_ids"].tolist() for window in windows], [window["labels"].tolist() for window in windows]
        ([[1, 5, 6, 7], [1, 6, 7, 8]], [[-100, 0, 1, -100], [-100, -100, 2, 3]])
    """
    ids, targets = np.asarray(tokens, np.int64), np.asarray(labels, np.int64)
    if ids.shape != targets.shape:
        raise ValueError(f"Expected a label for each of {len(ids)} tokens, but got {len(targets)} labels.")
    num_special = len(prefix_ids) + len(suffix_ids)
    table = document_window_table([len(ids)], max_length, overlap, num_special=num_special)
    owner = max_context_window(table.start, table.start + table.length, len(ids))
    windows = []
    for number, (start, length) in enumerate(zip(table.start.tolist(), table.length.tolist(), strict=True)):
        part = slice(start, start + length)
        owned = owner[part] == number
        places = np.where(owned, np.arange(start, start + length), -1)
        before, after = np.asarray(prefix_ids, np.int64), np.asarray(suffix_ids, np.int64)
        windows.append(
            {
                "input_ids": np.concatenate([before, ids[part], after]),
                "labels": _padded(np.where(owned, targets[part], IGNORE_INDEX), before, after, IGNORE_INDEX),
                "token_positions": _padded(places, before, after, -1),
            }
        )
    return windows


def _padded(values: Int64Array, before: Int64Array, after: Int64Array, fill: int) -> Int64Array:
    return np.concatenate([np.full_like(before, fill), values, np.full_like(after, fill)])
