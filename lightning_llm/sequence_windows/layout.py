"""Where the windows of a sequence lie, and which keys the tokens in them may see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_llm.document_masks import document_ids
from lightning_llm.isolation import check_mask


class Segment(NamedTuple):
    """Queries of a window that belong to one document: position q sees the keys from ``first_key`` to q.

    Attributes:
        rows: Rows of the batch.
        begin: Position of the first query in the sequence.
        end: One past the last query.
        first_key: Position at which the document starts.
    """

    rows: slice
    begin: int
    end: int
    first_key: int


@dataclass(frozen=True)
class Window:
    """Tokens ``begin`` to ``end`` of each row.

    Attributes:
        index: Number of the window, from 0.
        begin: Position of its first token.
        end: One past its last token.
        segments: Its tokens, document by document.
    """

    index: int
    begin: int
    end: int
    segments: tuple[Segment, ...]

    def first_key(self, sliding_window: int | None = None) -> int:
        """Position of the first key that any of its tokens may see.

        Args:
            sliding_window: Number of keys that a token sees at most, itself among them; None for no limit.

        Example:
            >>> make_windows([0, 4, 8], None)[1].first_key(3)
            2
        """
        if sliding_window is None:
            return self._first_document
        return max(self._first_document, self.begin - sliding_window + 1)

    @cached_property
    def _first_document(self) -> int:
        return min(segment.first_key for segment in self.segments)


def window_edges(length: int, window: int, *, min_last: int = 1) -> list[int]:
    """Edges of windows of ``window`` tokens; what is left over makes a shorter last one.

    Args:
        length: Tokens in a row.
        window: Tokens in a window.
        min_last: A last window of fewer tokens is joined with the one before.

    Returns:
        From 0 to ``length``, one more than there are windows.

    Example:
        >>> window_edges(10, 4), window_edges(9, 4, min_last=2)
        ([0, 4, 8, 10], [0, 4, 9])
    """
    edges = [*range(0, length, window), length]
    if len(edges) > 2 and edges[-1] - edges[-2] < min_last:
        del edges[-2]
    return edges


def even_edges(length: int, num_windows: int) -> list[int]:
    """Edges of a given number of windows, equal but for one token.

    Example:
        >>> even_edges(10, 3)
        [0, 3, 6, 10]
    """
    return [length * index // num_windows for index in range(num_windows + 1)]


def make_windows(edges: list[int], starts: list[list[int]] | None) -> list[Window]:
    """Cut the rows' documents along the windows.

    Args:
        edges: Of the windows.
        starts: For each row the positions at which its documents start, 0 first; None where each row is one document.

    Returns:
        The windows, in order.

    Example:
        >>> [window.segments for window in make_windows([0, 4, 6], [[0, 3]])][1]
        (Segment(rows=slice(0, 1, None), begin=4, end=6, first_key=3),)
    """
    spans = list(zip(edges[:-1], edges[1:], strict=True))
    if starts is None:
        return [Window(i, a, b, (Segment(slice(None), a, b, 0),)) for i, (a, b) in enumerate(spans)]
    segments: list[list[Segment]] = [[] for _ in spans]
    for row, begins in enumerate(starts):
        documents = zip(begins, [*begins[1:], edges[-1]], strict=True)
        index = 0
        for first, last in documents:
            while index < len(spans) and spans[index][0] < last:
                a, b = spans[index]
                segments[index].append(Segment(slice(row, row + 1), max(a, first), min(b, last), first))
                if b > last:
                    break  # the next document begins in this window
                index += 1
    return [Window(i, a, b, tuple(segments[i])) for i, (a, b) in enumerate(spans)]


def document_starts(
    shape: torch.Size, attention_mask: Tensor | None, position_ids: Tensor | None
) -> list[list[int]] | None:
    """Find where documents start: positions that restart, and the end of padding on the left.

    Padding on the right needs no mask: no token sees what comes after it.

    Args:
        shape: (batch, seq) of the tokens.
        attention_mask: (batch, seq), 1 for tokens and 0 for padding at a row's ends, or None.
        position_ids: (batch, seq) or (1, seq), or None.

    Returns:
        For each row the positions at which a document starts, 0 first; None where each row is one document.

    Raises:
        ValueError: For masks and positions of another shape, or padding between tokens.
        PackingLeakError: If positions restart between two tokens of an ``attention_mask``.
    """
    is_start = torch.zeros(shape, dtype=torch.bool)
    if position_ids is not None:
        if position_ids.ndim != 2 or position_ids.shape[1] != shape[1] or position_ids.shape[0] not in (1, shape[0]):
            raise ValueError(f"`position_ids` must have shape {tuple(shape)}, but got {tuple(position_ids.shape)}.")
        position_ids = position_ids.expand(shape)
        is_start[:, 1:] |= document_ids(position_ids).diff(dim=1).bool().cpu()
    if attention_mask is not None:
        mask = _padding_mask(attention_mask, shape)
        if position_ids is not None:
            check_mask({"attention_mask": mask.to(position_ids.device), "position_ids": position_ids})
            is_start[:, 1:] &= mask[:, 1:] & mask[:, :-1]  # positions in padding mean nothing
        is_start[:, 1:] |= mask[:, 1:] & ~mask[:, :-1]
    if not is_start.any():
        return None
    is_start[:, 0] = True
    return [row.nonzero().flatten().tolist() for row in is_start]


def _padding_mask(attention_mask: Tensor, shape: torch.Size) -> Tensor:
    """The mask as (batch, seq) booleans, on the host."""
    if attention_mask.shape != shape:
        raise ValueError(
            f"`attention_mask` must have shape {tuple(shape)}, 1 for tokens and 0 for padding, but got "
            f"{tuple(attention_mask.shape)}. Masks over pairs of tokens cannot be cut into windows."
        )
    mask = attention_mask.bool().cpu()
    begins = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    if bool((begins > 1).any()):
        raise ValueError(
            "`attention_mask` has padding between the tokens of a row. Windows take padding at a row's ends only."
        )
    return mask
