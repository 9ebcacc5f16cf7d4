"""Lengths of time in a training run, with their unit: "500 steps", "2M tokens", "10k samples", "1 epoch", "5%"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Unit = Literal["steps", "tokens", "samples", "epochs", "run"]

_UNITS: dict[str, Unit] = {
    "step": "steps",
    "steps": "steps",
    "token": "tokens",
    "tokens": "tokens",
    "sample": "samples",
    "samples": "samples",
    "epoch": "epochs",
    "epochs": "epochs",
    "run": "run",
}
_MAGNITUDES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_PATTERN = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*([kmbgt]?)(?:\s*(%)|\s+([a-z]+))", re.IGNORECASE)


@dataclass(frozen=True)
class Duration:
    """A length of time in a run: a number of optimizer steps, label tokens, samples or epochs, or a share of it.

    Args:
        value: How many units; for the unit ``run`` a share between 0 and 1.
        unit: ``steps`` (optimizer steps), ``tokens`` (label tokens over all ranks), ``samples`` (rows over all ranks),
            ``epochs``, or ``run``.

    Example:
        >>> Duration.parse("2M tokens")
        Duration(value=2000000.0, unit='tokens')
        >>> Duration.parse(500), Duration.parse(0.05) == Duration.parse("5%")
        (Duration(value=500.0, unit='steps'), True)
        >>> str(Duration.parse("1.5k steps"))
        '1500 steps'
    """

    value: float
    unit: Unit

    def __post_init__(self) -> None:
        """Refuse negative values and shares of a run above 1."""
        if not 0 <= self.value < float("inf"):
            raise ValueError(f"A duration is a finite number, zero or more, but got {self.value!r} {self.unit}.")
        if self.unit == "run" and self.value > 1:
            raise ValueError(f"A share of the run lies between 0 and 1 (0% and 100%), but got {self.value!r}.")

    @classmethod
    def parse(cls, value: Duration | str | float) -> Duration:
        """Read a duration: an int counts optimizer steps, a float below 1 is a share of the run.

        Args:
            value: ``"500 steps"``, ``"2M tokens"`` (k, M, B or G, T), ``"10k samples"``, ``"1 epoch"``, ``"5%"``,
                ``500``, ``0.05``.

        Raises:
            ValueError: If the text has another form or names an unknown unit.
        """
        if isinstance(value, Duration):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if float(value).is_integer():
                return cls(float(value), "steps")
            if 0 < value < 1:
                return cls(float(value), "run")
        elif isinstance(value, str):
            match = _PATTERN.fullmatch(value.strip())
            if match:
                number, magnitude, percent, word = match.groups()
                amount = float(number.replace("_", "")) * _MAGNITUDES[magnitude.lower()]
                if percent:
                    return cls(amount / 100, "run")
                if word.lower() in _UNITS:
                    return cls(amount, _UNITS[word.lower()])
            elif value.strip().replace("_", "").isdigit():
                return cls(float(value.replace("_", "")), "steps")
        raise ValueError(
            f"Expected a duration such as '500 steps', '2M tokens', '1 epoch' or '5%' of the run, but got {value!r}."
        )

    def __str__(self) -> str:
        if self.unit == "run":
            return f"{self.value * 100:g}%"
        return f"{self.value:.15g} {self.unit}"
