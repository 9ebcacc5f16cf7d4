"""A value that changes during a run, as a pure function of how far the run is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from lightning_llm.duration import Duration, Unit

Interpolation = Literal["step", "linear", "geometric"]


@dataclass(frozen=True)
class Progress:
    """How far a run is, in each unit that a :class:`Duration` has.

    Attributes:
        steps: Optimizer steps done.
        tokens: Label tokens trained on, over all ranks.
        epochs: Epochs done, the share of the current one included.
        run: Share of the whole run, 0 to 1; None if the run has no known end.
        samples: Rows trained on, over all ranks; None where nobody counts them.
    """

    steps: float = 0.0
    tokens: float = 0.0
    epochs: float = 0.0
    run: float | None = None
    samples: float | None = None

    def of(self, unit: Unit) -> float:
        """The progress in one unit.

        Raises:
            ValueError: For the share of a run without a known end, and for samples where nobody counts them.
        """
        value = getattr(self, unit)
        if value is None and unit == "samples":
            raise ValueError("Nobody counts samples here. Use milestones in steps, tokens or epochs.")
        if value is None:
            raise ValueError(
                "A share of the run ('50%') needs a run with an end: set Trainer(max_steps= or max_epochs=)."
            )
        return float(value)


class Schedule:
    """A value by milestones.

    ``step`` keeps each milestone's value until the next: the last one listed that has been reached counts, so their
    units may differ. ``linear`` and ``geometric`` go from each value to the next, evenly or by equal ratios; their
    milestones share one unit. After the last milestone the value stays.

    Args:
        milestones: From when (``"0 steps"``, ``"2M tokens"``, ``"1 epoch"``, ``"50%"``; a bare int counts steps) to
            the value from then on. One milestone is at 0. A single number is a constant.
        interpolation: ``step``, ``linear`` or ``geometric``.

    Raises:
        ValueError: If the milestones are empty, none is at 0, one unit does not rise, or units are mixed between which
            nothing can be interpolated.

    Example:
        >>> ramp = Schedule({"0 steps": 2, "100 steps": 32}, interpolation="geometric")
        >>> [ramp(Progress(steps=steps)) for steps in (0, 50, 100, 500)]
        [2.0, 8.0, 32.0, 32.0]
        >>> Schedule({"0 steps": 4, "2M tokens": 8, "1 epoch": 16})(Progress(tokens=3e6))
        8.0
    """

    def __init__(
        self, milestones: Mapping[str, float] | Mapping[int, float] | float, interpolation: Interpolation = "step"
    ) -> None:
        if interpolation not in get_args(Interpolation):
            raise ValueError(f"`interpolation` must be 'step', 'linear' or 'geometric', but got {interpolation!r}.")
        if not isinstance(milestones, Mapping):
            milestones = {0: milestones}
        self.interpolation = interpolation
        self.milestones = [(Duration.parse(at), _number(at, value)) for at, value in milestones.items()]
        self._check()

    @property
    def units(self) -> set[Unit]:
        """Units in which the progress must be known."""
        return {at.unit for at, _ in self.milestones if at.value}

    @property
    def values(self) -> list[float]:
        """The milestones' values, as listed."""
        return [value for _, value in self.milestones]

    def __call__(self, progress: Progress) -> float:
        """The value at this point of the run."""
        reached = [i for i, (at, _) in enumerate(self.milestones) if progress.of(at.unit) >= at.value - 1e-9]
        begin, value = self.milestones[reached[-1]]
        if self.interpolation == "step" or reached[-1] == len(self.milestones) - 1:
            return value
        end, target = self.milestones[reached[-1] + 1]
        share = (progress.of(end.unit) - begin.value) / (end.value - begin.value)
        if self.interpolation == "linear":
            return value + share * (target - value)
        return float(value * (target / value) ** share)

    def is_final(self, progress: Progress) -> bool:
        """Whether every milestone has been reached, so that the value stays."""
        return all(progress.of(at.unit) >= at.value - 1e-9 for at, _ in self.milestones)

    def __repr__(self) -> str:
        milestones = {str(at): value for at, value in self.milestones}
        return f"Schedule({milestones}, interpolation={self.interpolation!r})"

    def _check(self) -> None:
        if not self.milestones:
            raise ValueError("A schedule needs milestones, for instance {'0 steps': 4, '2M tokens': 8}, but got none.")
        if self.milestones[0][0].value:
            raise ValueError(f"A schedule's first milestone is at 0 ('0 steps'), but got '{self.milestones[0][0]}'.")
        for unit in self.units:
            times = [0.0, *(at.value for at, _ in self.milestones if at.unit == unit and at.value)]
            if any(later <= earlier for earlier, later in pairwise(times)):
                raise ValueError(f"A schedule's milestones rise, but in {unit} got {times[1:]}.")
        if sum(not at.value for at, _ in self.milestones) > 1:
            raise ValueError(f"A schedule has one milestone at 0, but got {self!r}.")
        if self.interpolation == "step":
            return
        if len(self.units) > 1:
            raise ValueError(
                f"A {self.interpolation} schedule's milestones share one unit, but got {sorted(self.units)}. Use one, "
                f"or interpolation='step'."
            )
        if self.interpolation == "geometric" and min(self.values) <= 0:
            raise ValueError(f"A geometric schedule's values are above 0, but got {self.values}.")


def _number(at: object, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"A schedule's values are finite numbers, but got {value!r} at {at!r}.")
    return float(value)
