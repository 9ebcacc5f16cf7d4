"""Durations are read as people write them, and refused with an example."""

import pytest

from lightning_llm import Duration


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("500 steps", 500, "steps"),
        ("1 step", 1, "steps"),
        ("2M tokens", 2e6, "tokens"),
        ("1.5B tokens", 1.5e9, "tokens"),
        ("300k tokens", 3e5, "tokens"),
        ("100 tokens", 100, "tokens"),
        ("1_000 tokens", 1000, "tokens"),
        ("2 epochs", 2, "epochs"),
        ("5%", 0.05, "run"),
        ("5 %", 0.05, "run"),
        ("0.5 run", 0.5, "run"),
        ("100", 100, "steps"),
        (100, 100, "steps"),
        (0.02, 0.02, "run"),
        (0, 0, "steps"),
        (7.0, 7, "steps"),
    ],
)
def test_duration_reads_number_magnitude_and_unit(text, value, unit):
    duration = Duration.parse(text)
    assert (duration.value, duration.unit) == (pytest.approx(value), unit)
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize("bad", ["", "five steps", "5 bananas", "-1 steps", "2M", 1.5, True, None, "tokens"])
def test_unreadable_duration_is_refused_with_an_example(bad):
    with pytest.raises(ValueError, match="Expected a duration such as '500 steps'"):
        Duration.parse(bad)


def test_share_above_one_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        Duration.parse("120%")


def test_negative_number_is_refused():
    with pytest.raises(ValueError, match="zero or more"):
        Duration.parse(-3)
