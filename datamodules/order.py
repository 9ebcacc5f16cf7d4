"""The order of an epoch as a pure function: row i of epoch e, without a shuffled array anywhere."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lightning_llm.datamodules.windows import Int64Array

_ROUNDS = 4


class RowOrder(Protocol):
    """Which rows stand where in an epoch."""

    @property
    def num_rows(self) -> int:
        """Positions in an epoch."""

    def rows(self, positions: Int64Array, epoch: int) -> Int64Array:
        """The rows at positions 0..num_rows - 1 of an epoch, (n,) int64 as the positions."""


class TableOrder(NamedTuple):
    """The order of a table, shuffled anew in each epoch if there is a seed.

    Attributes:
        num_rows: Rows of the table.
        seed: None keeps the table's own order.
    """

    num_rows: int
    seed: int | None = None

    def rows(self, positions: Int64Array, epoch: int) -> Int64Array:
        """Each row stands at one position of each epoch."""
        if self.seed is None or not len(positions):
            return positions
        return shuffled(positions, self.num_rows, self.seed, epoch)


def shuffled(index: npt.ArrayLike, size: int, seed: int, *key: int) -> Int64Array:
    """Where positions of an epoch fall in a pseudo-random permutation of 0..size-1.

    A Feistel network permutes 0..4^k - 1, the smallest such range that holds ``size``; positions that land outside
    are sent through again until they land inside (cycle walking), which keeps it a bijection on 0..size-1.

    Args:
        index: Positions in the epoch, each in 0..size-1, any shape.
        size: Length of the epoch.
        seed: Of the run.
        *key: Each has an order of its own: the epoch, and what else there are many orders of.

    Returns:
        int64 array of the shape of ``index``.

    Example:
        >>> sorted(shuffled(range(5), 5, 0, 1).tolist())
        [0, 1, 2, 3, 4]

    References:
        Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002 (cycle walking).
    """
    values = np.atleast_1d(np.asarray(index, dtype=np.uint64))
    half_bits = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = np.random.SeedSequence([seed, *key]).generate_state(_ROUNDS, np.uint64)

    def permute(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = value >> half_bits, value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        return (left << half_bits) | right

    result = permute(values)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = permute(result[outside])
        outside = outside[result[outside] >= size]
    return result.astype(np.int64).reshape(np.shape(index))


def _mix(value: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """Hash of a half word: two multiply-xorshift rounds."""
    mixed = (value ^ key) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return mixed ^ (mixed >> np.uint64(29))


def selected(index: npt.ArrayLike, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Whether items belong to a random share of all items, decided for each by its index alone.

    Args:
        index: Item numbers, any shape.
        fraction: Expected share, 0..1.
        seed: Another seed selects others.

    Returns:
        bool array of the shape of ``index``.
    """
    return drawn(index, seed) < fraction


def drawn(index: npt.ArrayLike, seed: int) -> npt.NDArray[np.float64]:
    """A random number for each item, 0 to below 1, which follows from its index and the seed alone.

    Args:
        index: Item numbers, any shape.
        seed: Another seed, other numbers.

    Returns:
        Of the shape of ``index``.
    """
    key = np.random.SeedSequence([seed]).generate_state(1, np.uint64)[0]
    hashed = _mix(np.atleast_1d(np.asarray(index, dtype=np.uint64)) + np.uint64(1), key)
    return np.asarray((hashed >> np.uint64(11)) / 2.0**53).reshape(np.shape(index))
