"""Documents longer than the model, as one thing: the windows of a document stay together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.windows import Int64Array, WindowTable, window_table

log = logging.getLogger(__name__)


def surrounding_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Special tokens that a fast tokenizer puts before and after a text, e.g. ([CLS], [SEP]).

    Raises:
        ValueError: If the tokenizer is a slow one, which does not say which tokens are the text's.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"Expected a fast tokenizer (one with a `tokenizer.json`), but got {type(tokenizer).__name__}."
        )
    encoding = tokenizer(["a"], truncation=False)
    ids, of_text = encoding["input_ids"][0], [sequence is not None for sequence in encoding.sequence_ids(0)]
    begin, end = of_text.index(True), len(ids) - of_text[::-1].index(True)
    return list(ids[:begin]), list(ids[end:])


def document_window_table(
    lengths: npt.ArrayLike, max_length: int, overlap: int = 0, *, num_special: int = 0
) -> WindowTable:
    """Cut every document into windows that leave room for special tokens; every document has one at least.

    A document's last window starts earlier than its turn, so that all windows of a long document are full.

    Args:
        lengths: (num_documents,) tokens in each document, without special tokens.
        max_length: Tokens in a window, special tokens counted.
        overlap: Tokens that a window shares with the one before it.
        num_special: Special tokens around each window.

    Returns:
        A table of the documents' own tokens. An empty document has one window without tokens.

    Raises:
        ValueError: If no token fits, if the overlap leaves no room for new tokens, or if a document is empty and no
            special token would fill its window.

    Example:
        >>> table = document_window_table([7, 0, 2], max_length=6, overlap=1, num_special=2)
        >>> table.document.tolist(), table.start.tolist(), table.length.tolist()
        ([0, 0, 1, 2], [0, 3, 0, 0], [4, 4, 0, 2])
    """
    room = max_length - num_special
    if not 0 <= overlap < room:
        raise ValueError(
            f"`overlap` must leave room for a new token: expected 0 <= overlap < max_length - special tokens, but got "
            f"overlap={overlap}, max_length={max_length}, {num_special} special tokens."
        )
    tokens = np.asarray(lengths, dtype=np.int64)
    empty = np.flatnonzero(tokens == 0)
    if len(empty) and not num_special:
        raise ValueError(
            f"{len(empty)} documents have no token, the first is number {empty[0]}, and no special token would stand "
            "in their windows: leave them out, or give `prefix_ids` or `suffix_ids`."
        )
    table = window_table(tokens, max_length=room, stride=room - overlap)
    at = np.searchsorted(table.document, empty)
    document = np.insert(table.document, at, empty)
    return WindowTable(document, *(np.insert(column, at, 0) for column in table[1:]))


def group_documents(
    num_windows: npt.ArrayLike,
    *,
    max_windows: int | None = None,
    window_lengths: npt.ArrayLike | None = None,
    max_padded_tokens: int | None = None,
    oversized: Literal["error", "alone"] = "error",
) -> list[list[int]]:
    """Group whole documents, in order, into micro-batches within a budget; nothing is dropped or cut.

    Args:
        num_windows: (num_documents,) windows of each document.
        max_windows: Windows in a micro-batch.
        window_lengths: (num_documents,) tokens in each document's longest window, special tokens counted.
        max_padded_tokens: Windows times the longest window of a micro-batch; needs ``window_lengths``.
        oversized: A document that is over the budget by itself stops the planning ("error"), or is a micro-batch of
            its own and a warning says so ("alone").

    Returns:
        The documents of each micro-batch.

    Raises:
        ValueError: If there is no budget, or a document does not fit and ``oversized="error"``.

    Example:
        >>> group_documents([1, 2, 1, 3], max_windows=3)
        [[0, 1], [2], [3]]
        >>> group_documents([1, 2, 1], window_lengths=[4, 9, 3], max_padded_tokens=20)
        [[0], [1], [2]]
    """
    if (max_windows is None and max_padded_tokens is None) or (max_padded_tokens is None) != (window_lengths is None):
        raise ValueError("Expected `max_windows`, or `max_padded_tokens` together with `window_lengths`, or all three.")
    counts = np.asarray(num_windows, dtype=np.int64)
    widths = np.ones_like(counts) if window_lengths is None else np.asarray(window_lengths, dtype=np.int64)
    windows_limit = np.inf if max_windows is None else max_windows
    tokens_limit = np.inf if max_padded_tokens is None else max_padded_tokens
    too_large = np.flatnonzero((counts > windows_limit) | (counts * widths > tokens_limit))
    if len(too_large):
        _report_oversized(too_large, counts, max_windows, max_padded_tokens, oversized)
    groups: list[list[int]] = []
    windows, width = 0, 0  # of the last group
    for document, (count, longest) in enumerate(zip(counts.tolist(), widths.tolist(), strict=True)):
        windows, width = windows + count, max(width, longest)
        if not groups or windows > windows_limit or windows * width > tokens_limit:
            groups.append([])
            windows, width = count, longest
        groups[-1].append(document)
    return groups


def _report_oversized(
    documents: Int64Array, counts: Int64Array, max_windows: int | None, max_padded_tokens: int | None, oversized: str
) -> None:
    text = (
        f"{len(documents)} documents are larger than a micro-batch may be (max_windows={max_windows}, "
        f"max_padded_tokens={max_padded_tokens}); the first is number {documents[0]} with {counts[documents[0]]} "
        "windows, and all windows of a document stand in one micro-batch."
    )
    if oversized == "error":
        raise ValueError(f"{text} Raise the budget, shorten the document, or pass oversized='alone'.")
    log.warning("%s Each of them is a micro-batch of its own.", text)


def collate_documents(
    documents: Sequence[npt.ArrayLike],
    max_length: int,
    overlap: int = 0,
    *,
    pad_token_id: int,
    prefix_ids: Sequence[int] = (),
    suffix_ids: Sequence[int] = (),
    labels: npt.ArrayLike | None = None,
) -> dict[str, Tensor]:
    """Make one batch of all windows of these documents.

    Args:
        documents: Token ids of each document, without special tokens.
        max_length: Tokens in a window, special tokens counted.
        overlap: Tokens that a window shares with the one before it.
        pad_token_id: Fills the rest of a window.
        prefix_ids: Special tokens before each window, see :func:`surrounding_ids`.
        suffix_ids: Special tokens after each window.
        labels: (num_documents, ...) one label or vector for each document.

    Returns:
        ``input_ids`` and ``attention_mask`` (num_windows, longest); ``document_ids`` (num_windows,), which document
        of the batch, ascending; ``new_token_mask`` (num_windows, longest), 1 at each token of a document exactly
        once: not at what an earlier window holds, nor at special tokens (an empty document has its first special
        token instead); ``num_input_tokens`` (num_windows,), without padding; ``labels`` (num_documents, ...) where
        given. All segments are alike, so there are no ``token_type_ids``: without them a model takes 0.

    Raises:
        ValueError: See :func:`document_window_table`; or if there are not as many labels as documents.

    Example:
        >>> batch = collate_documents([[5, 6, 7], [8]], 4, 1, pad_token_id=0, prefix_ids=[1], suffix_ids=[2])
        >>> batch["input_ids"].tolist(), batch["document_ids"].tolist()
        ([[1, 5, 6, 2], [1, 6, 7, 2], [1, 8, 2, 0]], [0, 0, 1])
        >>> batch["new_token_mask"].tolist()
        [[0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
    """
    tokens = [np.asarray(document, dtype=np.int64) for document in documents]
    num_prefix, num_special = len(prefix_ids), len(prefix_ids) + len(suffix_ids)
    table = document_window_table([len(ids) for ids in tokens], max_length, overlap, num_special=num_special)
    used = table.length + num_special
    shape = (len(used), int(used.max(initial=1)))
    input_ids = np.full(shape, pad_token_id, np.int64)
    new_token_mask = np.zeros(shape, np.int64)
    for row, (document, start, length, num_context) in enumerate(zip(*(c.tolist() for c in table), strict=True)):
        end = num_prefix + length
        input_ids[row, :num_prefix] = prefix_ids
        input_ids[row, num_prefix:end] = tokens[document][start : start + length]
        input_ids[row, end : end + len(suffix_ids)] = suffix_ids
        new_token_mask[row, num_prefix + num_context : end] = 1
        if length == 0:
            new_token_mask[row, 0] = 1
    batch = {
        "input_ids": input_ids,
        "attention_mask": (np.arange(shape[1]) < used[:, None]).astype(np.int64),
        "document_ids": table.document,
        "new_token_mask": new_token_mask,
        "num_input_tokens": used,
    }
    if labels is not None:
        batch["labels"] = np.asarray(labels)
        if len(batch["labels"]) != len(tokens):
            raise ValueError(
                f"Expected a label for each of {len(tokens)} documents, but got {len(batch['labels'])} labels."
            )
    return {name: torch.from_numpy(array) for name, array in batch.items()}
