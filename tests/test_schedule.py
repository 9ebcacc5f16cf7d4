"""A schedule is a pure function of the run's progress, in the unit that its milestones name."""

import pytest

from lightning_llm import Progress, Schedule


def test_steps_hold_each_value_until_the_next_milestone():
    schedule = Schedule({"0 steps": 1, "3 steps": 2, "5 steps": 3})
    assert [schedule(Progress(steps=step)) for step in range(7)] == [1, 1, 1, 2, 2, 3, 3]


def test_units_may_differ_between_steps_and_the_last_listed_that_is_reached_counts():
    schedule = Schedule({"0 steps": 4, "2M tokens": 8, "1 epoch": 16})
    assert schedule(Progress(steps=10**6, tokens=1.9e6, epochs=0.9)) == 4
    assert schedule(Progress(tokens=2e6, epochs=0.9)) == 8
    assert schedule(Progress(tokens=0, epochs=1)) == 16
    assert schedule.units == {"tokens", "epochs"}


def test_linear_goes_evenly_and_geometric_by_equal_ratios():
    linear = Schedule({"0 tokens": 2, "1k tokens": 32, "2k tokens": 16}, "linear")
    assert [linear(Progress(tokens=tokens)) for tokens in (0, 500, 1000, 1500, 9999)] == [2, 17, 32, 24, 16]
    geometric = Schedule({"0 steps": 2, "1k tokens": 32}, "geometric")  # zero is zero in any unit
    assert [geometric(Progress(tokens=tokens)) for tokens in (0, 250, 500, 1000)] == pytest.approx([2, 4, 8, 32])


def test_shares_of_the_run_need_a_run_with_an_end():
    schedule = Schedule({"0%": 1, "50%": 2})
    assert schedule(Progress(run=0.5)) == 2
    with pytest.raises(ValueError, match="max_steps"):
        schedule(Progress(steps=5))


def test_a_number_is_a_constant_and_bare_ints_count_steps():
    assert Schedule(8)(Progress(steps=100)) == 8
    assert Schedule({0: 1, 10: 2})(Progress(steps=10)) == 2


@pytest.mark.parametrize(
    ("milestones", "interpolation", "message"),
    [
        ({}, "step", "needs milestones"),
        ({"5 steps": 2}, "step", "first milestone is at 0"),
        ({"0 steps": 1, "9 steps": 2, "3 steps": 3}, "step", "rise"),
        ({"0 steps": 1, "0 tokens": 2}, "step", "one milestone at 0"),
        ({"0 steps": "many"}, "step", "finite numbers"),
        ({"0 steps": float("nan")}, "step", "finite numbers"),
        ({"0 steps": True}, "step", "finite numbers"),
        ({"0 steps": 1, "1 year": 2}, "step", "duration"),
        ({"-1 steps": 1}, "step", "duration"),
        ({"0 steps": 1, "2M tokens": 2, "1 epoch": 3}, "linear", "share one unit"),
        ({"0 steps": 0, "1 epoch": 3}, "geometric", "above 0"),
        ({"0 steps": 1}, "cubic", "interpolation"),
    ],
)
def test_what_is_no_schedule_is_refused_with_the_reason(milestones, interpolation, message):
    with pytest.raises(ValueError, match=message):
        Schedule(milestones, interpolation)


def test_the_callers_milestones_stay_as_they_are():
    milestones = {"0 steps": 1, "4 epochs": 2}
    Schedule(milestones)
    assert milestones == {"0 steps": 1, "4 epochs": 2}
