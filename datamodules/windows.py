"""Cut documents into windows; pure index mathematics, no token is touched."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


class WindowTable(NamedTuple):
    """Windows of documents, in document order; all arrays int64 of shape (num_windows,).

    Attributes:
        document: Which document, an index into ``lengths``.
        start: First token of the window, counted within the document.
        length: Tokens in the window.
        num_context: Leading tokens that an earlier window holds already: context, not targets.
    """

    document: Int64Array
    start: Int64Array
    length: Int64Array
    num_context: Int64Array


def window_table(
    lengths: npt.ArrayLike, max_length: int, stride: int | None = None, *, right_align: bool = True
) -> WindowTable:
    """Cut every document into windows of at most ``max_length`` tokens; each token is new in exactly one window.

    Args:
        lengths: (num_documents,) tokens in each document.
        max_length: Tokens in a window.
        stride: New tokens in each window after a document's first; the other ``max_length - stride`` are context.
            None means ``max_length - 1``: the one token of overlap makes every token but a document's first a
            target, because a window's first token has nothing to be predicted from.
        right_align: Start a document's last window earlier, so that it is full and has the most context.

    Raises:
        ValueError: If ``stride`` is not in 1..max_length.

    Example:
        A document of 10 tokens, windows of 4 with 3 new tokens: 0-3, 3-6, 6-9.

        >>> table = window_table([10, 2], max_length=4)
        >>> list(zip(table.document.tolist(), table.start.tolist(), table.length.tolist()))
        [(0, 0, 4), (0, 3, 4), (0, 6, 4), (1, 0, 2)]
        >>> table.num_context.tolist()
        [0, 1, 1, 0]
    """
    stride = max(max_length - 1, 1) if stride is None else stride
    if not 1 <= stride <= max_length:
        raise ValueError(
            f"`stride` is the number of new tokens in a window and lies in 1..max_length, but got stride={stride}, "
            f"max_length={max_length}."
        )
    tokens = np.asarray(lengths, dtype=np.int64)
    beyond = np.maximum(tokens - max_length, 0)
    num_windows = np.where(tokens > 0, 1 + -(-beyond // stride), 0)
    document = np.repeat(np.arange(len(tokens)), num_windows)
    first_window = np.cumsum(num_windows) - num_windows
    index = np.arange(len(document)) - first_window[document]
    end = np.minimum(max_length + index * stride, tokens[document])
    start = index * stride
    if right_align:
        start = np.minimum(start, np.maximum(end - max_length, 0))
    covered = np.where(index == 0, 0, max_length + (index - 1) * stride)
    return WindowTable(document, start, end - start, covered - start)
