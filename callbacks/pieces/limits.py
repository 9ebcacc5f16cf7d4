"""How large a piece may be: what fitted, what did not, and when to try more again. Pure Python."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

_CLOSED = 0.95  # of the smallest cost that failed: nothing is left to search below it
_LONGEST_WAIT = 64  # times the shortest


@dataclass
class PieceLimit:
    """The largest piece that is tried, for rows of about one length.

    Halves when a piece fails (or goes back to the largest that fitted, if that is more), bisects upwards after calm
    steps, and waits twice as long after each probe that failed.

    Attributes:
        limit: Largest cost that is tried; None while nothing has failed.
        good: Largest cost that fitted.
        good_beside: Largest cost that fitted while gradients of earlier pieces were in memory.
        bad: Smallest cost that failed since ``limit`` was last set free.
        num_failed: Pieces that failed.
        calm: Limited steps since the last change.
        wait: Calm steps before the next probe.
        is_probe: The limit has grown, and nothing as large has been run yet.
    """

    limit: int | None = None
    good: int = 0
    good_beside: int = 0
    bad: int | None = None
    num_failed: int = 0
    calm: int = 0
    wait: int = 0
    is_probe: bool = False

    def failed(self, cost: int, grow_every: int) -> None:
        """A piece of this cost ran out of memory."""
        self.num_failed += 1
        if 0 < self.good < cost:  # a probe
            self.wait = min(max(2 * self.wait, grow_every), _LONGEST_WAIT * grow_every)
        else:
            self.wait = grow_every
        self.bad = cost if self.bad is None else min(self.bad, cost)
        self.good = self.good if self.good < cost else 0
        self.good_beside = self.good_beside if self.good_beside < cost else 0
        self.limit = max(self.good, cost // 2, 1)
        self.calm = 0
        self.is_probe = False

    def set_free(self, limit: int | None = None) -> None:
        """Pieces need less memory from now on: what failed may fit, up to ``limit``."""
        self.limit, self.bad = limit, None

    def fitted(self, cost: int, beside_gradients: bool) -> None:
        """A piece of this cost was run to the end of backward."""
        if self.is_probe and cost > self.good:
            self.wait, self.is_probe = 0, False  # there is more room than was thought
        self.good = max(self.good, cost)
        if beside_gradients:
            self.good_beside = max(self.good_beside, cost)

    def is_trusted(self, cost: int, beside_gradients: bool) -> bool:
        """Whether as much has fitted before, under the same circumstances."""
        return cost <= (self.good_beside if beside_gradients else max(self.good, self.good_beside))

    def under_pressure(self) -> bool:
        """Memory is tight though nothing failed: take a tenth off. False where nothing has ever been run."""
        if not self.good:
            return False
        self.limit = max(int(0.9 * min(self.limit or self.good, self.good)), 1)
        self.bad = None
        self.calm = 0
        return True

    def step_done(self, grow_every: int, useful: int = 0) -> bool:
        """A batch was cut because of this limit, and nothing failed. True if the limit has grown.

        Args:
            grow_every: Calm steps before more is tried, at least.
            useful: Cost with which there would be a piece less; growing by less changes nothing.
        """
        if self.limit is None or not grow_every:
            return False
        self.calm += 1
        if self.calm < max(self.wait, grow_every):
            return False
        self.calm = 0
        top = max(2 * self.limit if self.bad is None else (self.limit + self.bad) // 2, useful)
        if self.bad is not None and top >= _CLOSED * self.bad:
            self.bad, top = None, max(int(1.1 * self.limit), useful)  # what failed then may fit now
        self.limit = max(top, self.limit + 1)
        self.is_probe = True
        return True


@dataclass
class PieceLimits:
    """A :class:`PieceLimit` for each bucket of row lengths: memory for a token depends on how long its row is.

    Buckets are powers of two. One that has seen nothing starts at what its neighbours know: a shorter row's token
    needs no more memory than a longer one's.

    Args:
        ceiling: Never try more than this.
        grow_every: Calm steps before more is tried; 0 for never.
    """

    ceiling: int | None = None
    grow_every: int = 100
    buckets: dict[int, PieceLimit] = field(default_factory=dict)

    def of(self, length: int) -> PieceLimit:
        """The limit for rows of this length, made where it is missing."""
        bucket = max(length - 1, 0).bit_length()
        if bucket not in self.buckets:
            known = [b for b, limit in self.buckets.items() if limit.limit is not None]
            longer, shorter = [b for b in known if b > bucket], [b for b in known if b < bucket]
            nearest = min(longer) if longer else max(shorter) if shorter else None
            self.buckets[bucket] = PieceLimit(limit=self.buckets[nearest].limit if nearest is not None else None)
        return self.buckets[bucket]

    def cost(self, length: int) -> int | None:
        """Largest cost to try for rows of this length; None for any."""
        limit = self.of(length).limit
        if limit is None or self.ceiling is None:
            return self.ceiling if limit is None else limit
        return min(limit, self.ceiling)

    @property
    def num_failed(self) -> int:
        """Pieces that ran out of memory so far."""
        return sum(limit.num_failed for limit in self.buckets.values())

    def state_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return {str(bucket): asdict(limit) for bucket, limit in self.buckets.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Know what was known."""
        self.buckets = {int(bucket): PieceLimit(**limit) for bucket, limit in state_dict.items()}
