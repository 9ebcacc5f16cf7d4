"""A row that does not fit, in a module that trains in windows along the sequence, is tried in shorter windows."""

from __future__ import annotations

import logging
from typing import Any, Protocol, runtime_checkable

import lightning as L

log = logging.getLogger(__name__)


@runtime_checkable
class TrainsInWindows(Protocol):
    """What a LightningModule has whose gradient does not depend on how its rows are cut into windows.

    Attributes:
        sequence_window: Tokens in a window; None if rows are not cut. May be set during a run.
    """

    sequence_window: int | None

    def shrink_sequence_window(self, length: int) -> int | None:
        """Take windows with which a row of ``length`` tokens needs less memory than it did.

        Returns:
            Tokens in a window from now on; None, and nothing was changed, if they cannot be fewer.
        """


class WindowLimit:
    """The window that memory allows: what a module was shrunk to, kept for a resumed run. It never grows.

    Attributes:
        tokens: In a window; None while nothing has failed.
    """

    def __init__(self) -> None:
        self.tokens: int | None = None

    def of(self, module: L.LightningModule) -> int | None:
        """Tokens in the module's windows; None if it has none."""
        return module.sequence_window if isinstance(module, TrainsInWindows) else None

    def apply(self, module: L.LightningModule) -> None:
        """Begin with what is known, where the module's own window is larger."""
        windowed: Any = module
        tokens = self.of(module)
        if self.tokens is not None and tokens is not None and self.tokens < tokens:
            windowed.sequence_window = self.tokens
            log.warning("The sequence window is %d tokens, was %d: more did not fit before.", self.tokens, tokens)

    def shrink(self, module: L.LightningModule, length: int, name: str, rank: int) -> bool:
        """A row ran out of memory.

        Args:
            module: That was run.
            length: Of the row, in tokens.
            name: Of what was run, for the message.
            rank: Likewise.

        Returns:
            Whether it is worth another try.
        """
        before = self.of(module)
        if before is None or not isinstance(module, TrainsInWindows):
            return False
        tokens = module.shrink_sequence_window(length)
        if tokens is None:
            return False
        self.tokens = tokens
        log.warning(
            "Out of memory in %s on rank %d with a row of %d columns, which cannot be cut along the batch: the "
            "sequence window is %d tokens now, was %d.",
            *(name, rank, length, tokens, before),
        )
        return True
