"""Noise and signal from the parts of a batch: unbiased, averaged rightly, and in an interval that holds the truth."""

import itertools
import json
import math

import numpy as np
import pytest

from lightning_llm.noise_scale import NoiseScaleAverage, noise_and_signal, student_quantile

TRUE_GRADIENT = np.array([0.7, -0.3])
SCATTER = np.array([1.5, 0.4])  # each token's gradient is the true one plus or minus this: S is its squared norm
NOISE, SIGNAL = float(SCATTER @ SCATTER), float(TRUE_GRADIENT @ TRUE_GRADIENT)


def moments(sizes, weights, gradients):
    """What the estimate is made of; gradients (parts, dimensions)."""
    sizes, weights = np.asarray(sizes, float), np.asarray(weights, float)
    mean_of_squares = float(weights @ np.square(gradients).sum(1))
    square_of_mean = float(np.square(weights @ gradients).sum())
    return mean_of_squares, square_of_mean, float((weights / sizes).sum()), float((weights**2 / sizes).sum())


def expectation(sizes, weights, estimate=noise_and_signal):
    """The exact mean of an estimate over all equally likely batches: every token's error has one of two signs."""
    total = np.zeros(2)
    for signs in itertools.product((-1, 1), repeat=sum(sizes)):
        parts = np.split(np.array(signs), np.cumsum(sizes)[:-1])
        gradients = np.array([TRUE_GRADIENT + part.mean() * SCATTER for part in parts])
        total += estimate(*moments(sizes, weights, gradients))
    return total / 2 ** sum(sizes)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 3), (1, 5), (1, 2, 4), (2, 1, 1, 3), (1,) * 8])
@pytest.mark.parametrize("weighting", ["by size", "equal", "any"])
def test_estimates_are_unbiased_for_every_cut_and_weighting(sizes, weighting):
    """Parts of one token each are per-example gradients, as in nanoGNS; (3, 3) is AdaptDL's two replicas."""
    weights = {"by size": sizes, "equal": [1] * len(sizes), "any": [1 + i**2 for i in range(len(sizes))]}[weighting]
    weights = np.array(weights) / sum(weights)
    assert expectation(sizes, weights) == pytest.approx([NOISE, SIGNAL], rel=1e-12)


def test_equal_sizes_give_the_published_form():
    mean_of_squares, square_of_mean, small, big = 5.0, 2.0, 8, 32
    noise, signal = noise_and_signal(mean_of_squares, square_of_mean, 1 / small, 1 / big)
    assert noise == pytest.approx((mean_of_squares - square_of_mean) / (1 / small - 1 / big))
    assert signal == pytest.approx((big * square_of_mean - small * mean_of_squares) / (big - small))


def test_control_treating_ragged_parts_as_equal_is_biased():
    """The same enumeration finds a bias where there is one: ragged parts weighted equally, as if of their mean size."""

    def as_if_equal(mean_of_squares, square_of_mean, inverse_part, inverse_whole):
        return noise_and_signal(mean_of_squares, square_of_mean, 2 / 6, 1 / 6)

    assert expectation((1, 5), np.array([1, 1]) / 2, as_if_equal)[0] > 1.2 * NOISE
    assert expectation((1, 5), np.array([1, 5]) / 6, as_if_equal) == pytest.approx([NOISE, SIGNAL])  # weights by size


def test_estimates_predict_the_gradient_norm_of_other_batches():
    """What AdaptDL calls gain: (S + G2) / (S / kappa + G2) steps of one part are worth one step of kappa parts."""
    for kappa in (1, 2, 4):
        signs = itertools.product((-1, 1), repeat=2 * kappa)
        norms = [np.square(TRUE_GRADIENT + np.mean(batch) * SCATTER).sum() for batch in signs]
        noise, signal = expectation((2, 2), np.array([0.5, 0.5]))
        assert np.mean(norms) == pytest.approx(noise / (2 * kappa) + signal, rel=1e-12)


def test_average_divides_two_debiased_averages_and_never_averages_ratios():
    steps = [(8.0, 1.0), (3.0, -0.5), (6.0, 0.9), (1.0, 0.2)]
    average = NoiseScaleAverage(smoothing=0.8)
    for step in steps:
        average.update(*step)
    weights = np.array([0.8**3, 0.8**2, 0.8, 1.0])
    noise, signal = weights @ np.array(steps) / weights.sum()
    assert (average.noise, average.signal) == pytest.approx((noise, signal), rel=1e-14)
    assert average.noise_scale == pytest.approx(noise / signal, rel=1e-14)
    clamped = weights @ [max(n, 0) / max(s, 1e-9) for n, s in steps] / weights.sum()
    assert abs(clamped / average.noise_scale - 1) > 1  # the control: a mean of clamped ratios is elsewhere


def test_constant_input_is_its_own_average_from_the_first_step():
    average = NoiseScaleAverage(smoothing=0.999)
    assert (average.noise, average.signal, average.noise_scale, average.interval()) == (None,) * 4
    for _ in range(5):
        average.update(6.0, 0.5)
        assert average.noise_scale == pytest.approx(12.0, rel=1e-12)


def simulate(rng, *, noise_scale, sizes, num_steps, smoothing, dimensions=64):
    """A run at a fixed point: parts of these sizes, (steps, parts), signal 1, and noise that is larger in some axes."""
    variances = np.geomspace(1, 0.01, dimensions)
    variances *= noise_scale / variances.sum()
    truth = rng.standard_normal(dimensions)
    truth /= np.linalg.norm(truth)
    errors = rng.standard_normal((num_steps, sizes.shape[1], dimensions))
    gradients = truth + errors * np.sqrt(variances) / np.sqrt(sizes)[..., None]
    average = NoiseScaleAverage(smoothing)
    for parts, step in zip(sizes, gradients, strict=True):
        average.update(*noise_and_signal(*moments(parts, parts / parts.sum(), step)))
    return average


@pytest.mark.parametrize(
    ("noise_scale", "parts", "num_steps", "smoothing", "widest"),
    [
        (100.0, "4 of 8", 300, 0.99, 0.4),
        (100.0, "2 of 16", 300, 0.99, 0.7),
        (100.0, "4 ragged", 300, 0.99, 0.45),
        (100.0, "4 of 8", 60, 0.95, 1.0),
        (10.0, "8 of 100", 100, 0.99, 0.05),
        (100.0, "4 of 64", 5, 0.9, 0.7),
        (3000.0, "4 of 8", 200, 0.99, math.inf),  # signal far below noise: half of the intervals have no upper end
    ],
)
def test_interval_holds_the_truth_nine_times_in_ten(noise_scale, parts, num_steps, smoothing, widest):
    rng = np.random.default_rng(0)
    held, widths, estimates = 0, [], []
    for _ in range(300):
        number, kind = int(parts[0]), parts.split()[-1]
        ragged = rng.integers(1, 16, (num_steps, number))
        sizes = ragged if kind == "ragged" else np.full((num_steps, number), int(kind))
        average = simulate(rng, noise_scale=noise_scale, sizes=sizes, num_steps=num_steps, smoothing=smoothing)
        low, high = average.interval(0.9)
        held += low <= noise_scale <= high
        widths.append((high - low) / noise_scale)
        estimates.append(average.noise_scale)
        assert low <= average.noise_scale <= high
    assert 0.86 <= held / 300 <= 0.97  # 90% within what 300 draws leave open; nearly all would mean a vacuous interval
    assert np.median(widths) < widest or widest == math.inf
    if widest < 1:
        assert np.median(estimates) == pytest.approx(noise_scale, rel=0.03)


def test_a_long_average_is_within_five_percent():
    rng = np.random.default_rng(1)
    for sizes in (np.full((400, 4), 32), rng.integers(1, 64, (400, 4))):
        average = simulate(rng, noise_scale=50.0, sizes=sizes, num_steps=400, smoothing=0.999)
        assert average.noise_scale == pytest.approx(50.0, rel=0.05)


def test_interval_has_no_upper_end_without_signal_and_starts_at_zero_without_noise():
    lost, silent, nothing = (NoiseScaleAverage(0.99) for _ in range(3))
    for step in range(100):
        around_zero, other = (-1.0) ** step, (-1.0) ** (step // 2)
        lost.update(100 + other, around_zero)
        silent.update(around_zero, 100 + other)
        nothing.update(other, around_zero)
    low, high = lost.interval()
    assert 100 < low < math.inf
    assert high == math.inf
    low, high = silent.interval()
    assert low == 0
    assert 0 < high < 0.01
    assert nothing.interval() == (0.0, math.inf)
    below = NoiseScaleAverage(0.99)
    for signal in (-1.0, -1.1, -0.9):  # certain, and impossible
        below.update(5.0, signal)
    assert below.noise_scale == math.inf
    assert below.interval()[1] == math.inf


@pytest.mark.parametrize("signal", [-1.0, 0.0])
def test_the_same_step_over_and_over_without_signal_has_no_finite_ratio(signal):
    average = NoiseScaleAverage(0.9)
    for _ in range(5):
        average.update(8.0, signal)
    assert average.noise_scale == math.inf
    assert average.interval() == (math.inf, math.inf)


def test_no_unit_of_measure_matters():
    rng = np.random.default_rng(2)
    plain, scaled, longer = (NoiseScaleAverage(0.9) for _ in range(3))
    for _ in range(30):
        noise, signal = 10 + rng.standard_normal(), 1 + 0.3 * rng.standard_normal()
        plain.update(noise, signal)
        scaled.update(noise * 1e-12, signal * 1e-12)  # gradients a million times smaller
        longer.update(noise * 512, signal)  # in tokens, of rows of 512
    assert scaled.noise_scale == pytest.approx(plain.noise_scale)
    assert scaled.interval() == pytest.approx(plain.interval())
    assert longer.interval() == pytest.approx([512 * end for end in plain.interval()])


def test_state_is_plain_and_goes_on_bitwise():
    rng = np.random.default_rng(3)
    steps = rng.standard_normal((20, 2)) + np.array([5, 1])
    whole, first, second = (NoiseScaleAverage(0.9) for _ in range(3))
    for step in steps:
        whole.update(*step.tolist())
    for step in steps[:7]:
        first.update(*step.tolist())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in steps[7:]:
        second.update(*step.tolist())
    assert second.noise_scale == whole.noise_scale
    assert second.interval() == whole.interval()


@pytest.mark.parametrize(
    ("degrees", "expected"), [(2, 2.920), (3, 2.353), (5, 2.015), (10, 1.8125), (30, 1.6973), (200, 1.6525)]
)
def test_student_quantile_equals_the_tables(degrees, expected):
    assert student_quantile(0.95, degrees) == pytest.approx(expected, rel=0.003)


def test_one_part_and_a_bad_smoothing_are_refused():
    with pytest.raises(ValueError, match="two at least, but got inverse_part=0.25, inverse_whole=0.25"):
        noise_and_signal(1.0, 1.0, 0.25, 0.25)
    with pytest.raises(ValueError, match="from 0 to below 1, such as 0.99, but got 1.0"):
        NoiseScaleAverage(1.0)
    with pytest.raises(ValueError, match="but got nan"):
        NoiseScaleAverage(math.nan)
