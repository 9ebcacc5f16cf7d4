"""How a learning rate falls from its peak: shapes over the share of the decay that is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Decay(NamedTuple):
    """A shape that falls from 1 to 0.

    Attributes:
        factor: What the peak is multiplied by, as a function of the share of the decay that is done, 0 to 1.
        share_at: The inverse: how much is done where the factor is reached.
        mean: Of the factor over the whole decay.
    """

    factor: Callable[[float], float]
    share_at: Callable[[float], float]
    mean: float


DECAYS: dict[str, Decay] = {
    "cosine": Decay(
        lambda share: (1 + math.cos(math.pi * share)) / 2, lambda factor: math.acos(2 * factor - 1) / math.pi, 1 / 2
    ),
    "quarter_cosine": Decay(
        lambda share: math.cos(math.pi / 2 * share), lambda factor: 2 / math.pi * math.acos(factor), 2 / math.pi
    ),
    "linear": Decay(lambda share: 1 - share, lambda factor: 1 - factor, 1 / 2),
}
