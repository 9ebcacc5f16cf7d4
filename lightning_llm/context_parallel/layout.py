"""Which tokens of a row a rank holds: two chunks, so that causal attention is as much work on each.

A row is cut into 2n chunks for n ranks. Chunk c attends to c + 1 chunks, so rank r holds chunks r and 2n - 1 - r, which
attend to 2n + 1 chunks together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_llm.sequence_windows.layout import Window, even_edges, make_windows


@dataclass(frozen=True)
class Share:
    """One rank's share of rows of ``length`` tokens.

    Attributes:
        rank: Among those that share the rows.
        size: Number of ranks that do.
        length: Tokens in a row.

    Example:
        >>> share = Share(rank=0, size=2, length=7)  # filled up to 8 tokens, four chunks of 2
        >>> share.take(torch.arange(1, 8)[None], fill=0)
        tensor([[1, 2, 7, 0]])
    """

    rank: int
    size: int
    length: int

    @property
    def chunk(self) -> int:
        """Tokens in a chunk; the row is filled up to 2n of them."""
        return -(-self.length // (2 * self.size))

    @property
    def padded_length(self) -> int:
        """Tokens in a row that is filled up."""
        return 2 * self.size * self.chunk

    def take(self, rows: Tensor, fill: int) -> Tensor:
        """This rank's tokens, (batch, 2 chunk), of rows (batch, seq); ``fill`` stands behind their end."""
        padded = nn.functional.pad(rows, (0, self.padded_length - self.length), value=fill)
        return self.split(padded, dim=1)[self.rank]

    def split(self, whole: Tensor, dim: int) -> list[Tensor]:
        """Each rank's part of a tensor that is ``padded_length`` long in ``dim``."""
        chunks = torch.split(whole, self.chunk, dim)
        return [torch.cat([chunks[rank], chunks[-1 - rank]], dim) for rank in range(self.size)]

    def join(self, parts: list[Tensor], dim: int) -> Tensor:
        """What :meth:`split` took apart."""
        halves = [torch.split(part, self.chunk, dim) for part in parts]
        return torch.cat([early for early, _ in halves] + [late for _, late in reversed(halves)], dim)

    def windows(self, starts: list[list[int]] | None) -> tuple[Window, Window]:
        """This rank's chunks with the documents in them.

        Args:
            starts: For each row the positions at which its documents start; None where each row is one document.
        """
        chunks = make_windows(even_edges(self.padded_length, 2 * self.size), starts)
        return chunks[self.rank], chunks[-1 - self.rank]
