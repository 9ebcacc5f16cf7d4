"""Streamed rows to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_llm.datamodules.collate import Layout, collate_rows
from lightning_llm.datamodules.rows import EMPTY_ROW
from lightning_llm.datamodules.streams.virtual_stream import StreamRow


def collate_stream_rows(
    rows: Sequence[StreamRow | None],
    positions: Sequence[int],
    *,
    pad_token_id: int,
    layout: Layout,
    max_length: int,
    source_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Make a batch of streamed rows.

    Args:
        rows: None for an empty one.
        positions: (rows,) of each in the epoch.
        pad_token_id: Fills the rest of a row.
        layout: As in :func:`collate_rows`.
        max_length: Width of packed rows.
        source_ids: Of each source, to be told row by row; None tells nothing.

    Returns:
        What :func:`collate_rows` makes of them, and int64 tensors (rows,), or (num_segments,) if ``padding_free``:
        ``row_ids``, the positions, -1 for an empty row; ``source_ids`` if given, 0 for an empty row;
        ``num_bytes`` and ``num_words`` where rows know them.
    """
    width = max_length if layout == "packed" else None
    batch = collate_rows(
        [row.segments if row else [] for row in rows], pad_token_id=pad_token_id, layout=layout, width=width
    )
    found = [(row, position) for row, position in zip(rows, positions, strict=True)]
    if layout == "padding_free":  # an entry per segment; one for the padding of a batch of empty rows
        found = [(row, position) for row, position in found if row for _ in row.segments] or [(None, EMPTY_ROW)]
    ids = [position if row else EMPTY_ROW for row, position in found]
    batch["row_ids"] = torch.tensor(ids, dtype=torch.int64)
    if source_ids is not None:
        batch["source_ids"] = torch.tensor([source_ids[row.source] if row else 0 for row, _ in found])
    if any(row is not None and row.counts is not None for row in rows):
        counts = [row.counts if row and row.counts is not None else np.zeros((1, 2), np.int64) for row in rows]
        if layout == "padding_free":
            counted = np.concatenate([x for x, row in zip(counts, rows, strict=True) if row])
        else:
            counted = np.stack([x.sum(0) for x in counts])
        batch["num_bytes"], batch["num_words"] = map(torch.from_numpy, counted.T.copy())
    return batch
