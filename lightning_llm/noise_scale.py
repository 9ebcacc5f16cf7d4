r"""The gradient noise scale: how large a batch must be for its gradient to be more signal than noise.

The mean gradient of b tokens (or sequences) is the true gradient and an error whose squared norm is S / b on average.
With :math:`G^2` the squared norm of the true gradient, the noise scale is :math:`S / G^2`, in tokens (or sequences):
far below it twice the batch is worth nearly twice the steps, far above it nearly nothing.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

__all__ = ["NoiseScaleAverage", "noise_and_signal", "student_quantile"]

_LEAST_STEPS = 3  # with fewer a variance is not known well enough for an interval


def noise_and_signal(
    mean_of_squares: float, square_of_mean: float, inverse_part: float, inverse_whole: float
) -> tuple[float, float]:
    r"""Estimate S and :math:`G^2` from one batch whose parts have gradients :math:`g_k` with weights :math:`p_k`.

    .. math::
        E \sum_k p_k |g_k|^2 = G^2 + S \sum_k p_k / b_k, \qquad
        E \, |\sum_k p_k g_k|^2 = G^2 + S \sum_k p_k^2 / b_k

    for parts of :math:`b_k` independent tokens (or sequences) and weights that sum to 1: two equations for two
    unknowns. Both estimates are unbiased for parts of any unequal sizes, and for any weights that do not depend on the
    gradients. With :math:`p_k = b_k / N` the two inverses are K / N and 1 / N.

    Args:
        mean_of_squares: :math:`\sum_k p_k |g_k|^2`.
        square_of_mean: :math:`|\sum_k p_k g_k|^2`.
        inverse_part: :math:`\sum_k p_k / b_k`.
        inverse_whole: :math:`\sum_k p_k^2 / b_k`.

    Returns:
        S and :math:`G^2`; either may be negative, as the estimate of a single batch.

    Raises:
        ValueError: If there is one part only.

    References:
        McCandlish et al., An empirical model of large-batch training (2018), appendix A.1, for parts of equal size.

    Example:
        >>> noise_and_signal(3.0, 2.0, inverse_part=1 / 4, inverse_whole=1 / 8)  # two parts of four tokens
        (8.0, 1.0)
    """
    if not inverse_part > inverse_whole:
        raise ValueError(
            f"Noise shows in the difference between parts: two at least, but got inverse_part={inverse_part}, "
            f"inverse_whole={inverse_whole}."
        )
    noise = (mean_of_squares - square_of_mean) / (inverse_part - inverse_whole)
    return noise, square_of_mean - noise * inverse_whole


class NoiseScaleAverage:
    r"""Exponential averages of noise and signal over steps, and their ratio with a confidence interval.

    Both averages are divided by the sum of their weights, :math:`1 - \beta^t`, and only then by each other: the mean of
    ratios would be biased, and so would be a mean of clamped values.

    Args:
        smoothing: :math:`\beta`; an average over about :math:`(1 + \beta) / (1 - \beta)` steps.

    Example:
        >>> average = NoiseScaleAverage(smoothing=0.9)
        >>> average.update(noise=8.0, signal=1.0)
        >>> average.update(noise=4.0, signal=-0.4)  # no more than an estimate
        >>> round(average.noise_scale, 2)
        22.4
    """

    def __init__(self, smoothing: float) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"`smoothing` is from 0 to below 1, such as 0.99, but got {smoothing!r}.")
        self.smoothing = smoothing
        self.num_steps = 0
        self._weight = 0.0  # sum of the weights of all steps, 1 - smoothing ** num_steps
        self._weight_squared = 0.0  # sum of their squares
        self._sums = [0.0] * 5  # weighted, of S, G2, S * S, S * G2 and G2 * G2

    def update(self, noise: float, signal: float) -> None:
        """Add the estimates of a step."""
        old, new = self.smoothing, 1 - self.smoothing
        values = (noise, signal, noise * noise, noise * signal, signal * signal)
        self.num_steps += 1
        self._weight = old * self._weight + new
        self._weight_squared = old * old * self._weight_squared + new * new
        self._sums = [old * total + new * value for total, value in zip(self._sums, values, strict=True)]

    @property
    def noise(self) -> float | None:
        """S: the trace of the covariance of a single token's (or sequence's) gradient."""
        return self._sums[0] / self._weight if self.num_steps else None

    @property
    def signal(self) -> float | None:
        """G2: the squared norm of the true gradient; below 0 where it is lost in the noise."""
        return self._sums[1] / self._weight if self.num_steps else None

    @property
    def noise_scale(self) -> float | None:
        """S / G2, in tokens (or sequences); infinite where no signal shows, None before the first step."""
        noise, signal = self.noise, self.signal
        if noise is None or signal is None:
            return None
        return max(noise, 0.0) / signal if signal > 0 else math.inf

    def interval(self, confidence: float = 0.9) -> tuple[float, float] | None:
        """Where the ratio of the true means lies, as far as the steps' scatter tells.

        Fieller's interval: all ratios r for which the mean of S - r G2 is no further from 0 than its standard error
        allows. Its upper end is infinite where the signal could be 0. Steps are taken to be independent; what changes
        slowly in training widens it, and it says nothing of how far the average lags behind.

        Args:
            confidence: Share of such intervals that hold the truth.

        Returns:
            Lower and upper end, both infinite where no finite ratio fits; None with fewer than three steps, and where
            the smoothing (1/3 or less) makes the average one over fewer.

        References:
            Fieller, Some problems in interval estimation (1954).
        """
        effective = self._weight**2 / self._weight_squared if self.num_steps else 0.0
        if self.num_steps < _LEAST_STEPS or effective <= 2:
            return None
        noise, signal, *squares = (total / self._weight for total in self._sums)
        products = (noise * noise, noise * signal, signal * signal)
        bound = student_quantile((1 + confidence) / 2, effective - 1) ** 2 / (effective - 1)
        spread = [bound * (square - product) for square, product in zip(squares, products, strict=True)]
        return _fieller(max(noise, 0.0), max(signal, 0.0), *spread)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; the smoothing is a setting and not among them."""
        return {
            "num_steps": self.num_steps,
            "weight": self._weight,
            "weight_squared": self._weight_squared,
            "sums": list(self._sums),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on, bit for bit."""
        self.num_steps = state_dict["num_steps"]
        self._weight = state_dict["weight"]
        self._weight_squared = state_dict["weight_squared"]
        self._sums = list(state_dict["sums"])


def student_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Quantile of Student's t distribution, for two degrees of freedom at least (to 2%; to 0.1% from five on).

    The expansion around the normal quantile in powers of 1 / degrees of freedom.

    References:
        Abramowitz and Stegun, Handbook of mathematical functions, 26.7.5.

    Example:
        >>> round(student_quantile(0.95, 10), 3)
        1.812
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees_of_freedom**power for power, term in enumerate(terms))


def _fieller(
    noise: float, signal: float, noise_spread: float, both_spread: float, signal_spread: float
) -> tuple[float, float]:
    """The r of 0 or more with (noise - r signal)^2 <= noise_spread - 2 r both_spread + r^2 signal_spread."""
    square = signal * signal - signal_spread
    half = noise * signal - both_spread
    rest = noise * noise - noise_spread
    root = math.sqrt(max(half * half - square * rest, 0.0))
    if square > 0:
        return max((half - root) / square, 0.0), max((half + root) / square, 0.0)
    if rest <= 0:  # neither noise nor signal is sure to be there
        return 0.0, math.inf
    # The other root is negative: ratios beyond infinity. In this form it holds for square = 0 too.
    ahead = half + root  # 0 where the signal is 0 in every step: no finite ratio fits
    return (rest / ahead if ahead > 0 else math.inf), math.inf
