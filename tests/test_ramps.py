"""Ramps by name are those that were published, and a seesaw saves the steps that its derivation says."""

import math

import pytest
import torch

from lightning_llm import Progress, Schedule, Seesaw, ramp
from lightning_llm.callbacks import AccumulationSchedule
from lightning_llm.datamodules.batches.settings import BatchSettings
from lightning_llm.decay import DECAYS
from lightning_llm.ramps import RAMPS, as_schedule, critical_batch, deepseek_v3, geometric, linear, llama_3, olmo


def at(schedule, tokens):
    return schedule(Progress(tokens=tokens))


def test_published_ramps_have_the_published_figures():
    deepseek, llama, allen = ramp("deepseek-v3"), ramp("llama-3"), ramp("olmo")
    assert [at(deepseek, tokens) for tokens in (0, 469e9, 14.8e12)] == [3072, 15360, 15360]
    assert at(deepseek, 469e9 / 2) == pytest.approx((3072 + 15360) / 2)
    assert [at(llama, tokens) for tokens in (0, 251e6, 252e6, 2.86e12, 2.87e12)] == [4e6, 4e6, 8e6, 8e6, 16e6]
    assert [at(allen, tokens) for tokens in (167e9, 168e9, 503e9)] == [1024, 2048, 4096]


def test_ramps_keep_their_shape_in_a_run_of_any_length_and_unit():
    for make in (deepseek_v3, llama_3):
        whole = make(run="1T tokens", start=1)
        for run, unit in (("2k steps", "steps"), ("3 epochs", "epochs"), ("100%", "run"), ("5k samples", "samples")):
            other, length = make(run=run, start=1), {"2k": 2000, "3": 3, "100%": 1, "5k": 5000}[run.split()[0]]
            for share in (0, 1e-5, 0.01, 0.03, 0.2, 1):
                assert other(Progress(**{unit: share * length})) == pytest.approx(at(whole, share * 1e12))


def test_plain_ramps_go_evenly_or_by_equal_ratios():
    assert [at(linear(2, 10, "8k tokens"), tokens) for tokens in (0, 4000, 8000, 9000)] == [2, 6, 10, 10]
    assert [at(geometric(2, 32, "8k tokens"), tokens) for tokens in (0, 4000, 8000, 9000)] == [2, 8, 32, 32]


def test_the_batch_doubles_when_the_critical_batch_has_doubled():
    measured = {"10B tokens": 2047, "20B tokens": 2048, "30B tokens": 1000, "50B tokens": 9000}
    schedule = critical_batch(measured, start=1024)
    assert [at(schedule, billions * 1e9) for billions in (0, 10, 20, 30, 50, 99)] == [
        1024,
        1024,
        2048,
        2048,
        8192,
        8192,
    ]
    assert critical_batch({"168B tokens": 2048, "503B tokens": 4096}, 1024).milestones == olmo().milestones


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama-4", {}, r"one of linear, .*seesaw, but got 'llama-4'"),
        ("linear", {"start": 2}, r"'linear' needs other options: .*Call lightning_llm\.ramps\.linear"),
        ("llama-3", {"end": 2}, "'llama-3' needs other options"),
        ("critical-batch", {"measured": {}, "start": 2}, "nothing to follow"),
        ("critical-batch", {"measured": {"1B tokens": 900}, "start": 0}, "above 0, but got start=0"),
        ("critical-batch", {"measured": {"1B tokens": float("inf")}, "start": 2}, "finite"),
    ],
)
def test_a_ramp_that_cannot_be_made_says_why(name, options, message):
    with pytest.raises(ValueError, match=message):
        ramp(name, **options)


def test_what_may_stand_for_a_schedule():
    ready = Schedule({0: 2, 10: 4}, "linear")
    assert as_schedule(ready) is ready
    assert as_schedule(ready, "linear") is ready
    assert as_schedule("olmo").values == [1024, 2048, 4096]
    assert as_schedule({0: 2}).values == as_schedule(2).values == [2]
    with pytest.raises(ValueError, match="says itself how to interpolate"):
        as_schedule(ready, "geometric")


def test_ramps_are_taken_by_callback_and_data_module_by_name_and_ready():
    for milestones in ("deepseek-v3", deepseek_v3()):
        assert AccumulationSchedule(milestones, target="sequences").schedule.milestones == deepseek_v3().milestones
        assert BatchSettings(global_batch_size=milestones).schedule.milestones == deepseek_v3().milestones
    with pytest.raises(ValueError, match="whole numbers of micro_batches"):
        AccumulationSchedule(Seesaw(3, "1M tokens", stair=1.5).batch)
    with pytest.raises(ValueError, match=r"'llama-3' gives a global batch.*target='sequences' or 'tokens'"):
        AccumulationSchedule("llama-3")


@pytest.mark.parametrize("name", sorted(RAMPS))
def test_ramps_are_reachable_from_yaml(name):
    from jsonargparse import ArgumentParser

    options = {
        "linear": "{start: 2, end: 8, length: 1M tokens}",
        "geometric": "{start: 2, end: 8, length: 1M tokens}",
        "critical-batch": "{measured: {1M tokens: 9, 3M tokens: 90}, start: 4}",
        "seesaw": "{start: 4, length: 1M tokens, decay: quarter_cosine}",
        "olmo": "{start: 16, doublings: [1M tokens, 2M tokens]}",
    }.get(name, "{start: 8, run: 1M tokens}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AccumulationSchedule, "schedule")
    path = f"lightning_llm.ramps.{RAMPS[name].__name__}"
    parsed = parser.parse_args([f"--schedule.milestones={{class_path: {path}, init_args: {options}}}"])
    made = parser.instantiate_classes(parsed).schedule.schedule
    assert isinstance(made, Schedule)
    assert len(made.values) > 1
    if name in ("deepseek-v3", "llama-3", "olmo"):
        parsed = parser.parse_args([f"--schedule.milestones={name}", "--schedule.target=sequences"])
        assert parser.instantiate_classes(parsed).schedule.schedule.milestones == RAMPS[name]().milestones


# ---- seesaw ----------------------------------------------------------------------------------------------------------

TOKENS, START = 1e9, 1000.0


def run_through(seesaw):
    """Take the steps one by one, until the tokens are used up: their number and (tokens, batch) of each."""
    done, taken = 0.0, []
    while done < TOKENS - 1:
        batch = min(at(seesaw.batch, done), TOKENS - done)
        taken.append((done, batch))
        done += batch
    return taken, done


@pytest.mark.parametrize(
    ("decay", "limit"), [("cosine", 1 / 2), ("quarter_cosine", 1 - 2 / math.pi), ("linear", 1 / 2)]
)
def test_low_stairs_save_the_share_of_steps_that_the_derivation_says(decay, limit):
    assert f"{1 - 2 / math.pi:.1%}" == "36.3%"
    low = Seesaw(START, "1B tokens", decay, stair=1.001, max_growth=1e5)
    assert low.most_saved == pytest.approx(limit)
    assert low.steps_saved == pytest.approx(limit, abs=1e-3)
    saved = [Seesaw(START, "1B tokens", decay, stair=stair, max_growth=1e5).steps_saved for stair in (4, 2, 1.1)]
    assert saved[0] < saved[1] < saved[2] < low.steps_saved < limit  # a staircase is always late
    assert Seesaw(START, "1B tokens", decay, max_growth=1).steps_saved == 0


@pytest.mark.parametrize("decay", sorted(DECAYS))
def test_the_steps_taken_one_by_one_use_the_same_tokens(decay):
    seesaw = Seesaw(START * 100, "1B tokens", decay, stair=1.1, warmup="10%", max_growth=64)
    taken, done = run_through(seesaw)
    assert done == pytest.approx(TOKENS)
    usual = TOKENS / (START * 100)
    assert 1 - len(taken) / usual == pytest.approx(seesaw.steps_saved, abs=2e-3)
    assert seesaw.steps_saved < seesaw.most_saved == pytest.approx(0.9 * (1 - DECAYS[decay].mean))


@pytest.mark.parametrize("decay", sorted(DECAYS))
def test_the_learning_rate_over_the_root_of_the_batch_is_the_usual_one_at_every_token(decay):
    seesaw = Seesaw(START, "1B tokens", decay, warmup="50M tokens", floor=0.1, max_growth=8)
    for share in torch.linspace(0, 1, 101).tolist():
        progress = Progress(tokens=share * TOKENS)
        scaled = seesaw.learning_rate(progress) / (seesaw.batch(progress) / START) ** 0.5
        assert scaled == pytest.approx(seesaw.usual(progress), rel=1e-12)
    assert seesaw.usual(Progress(tokens=25e6)) == 0.5
    assert seesaw.usual(Progress(tokens=2e9)) == pytest.approx(0.1)  # stays, beyond the run's end


def test_at_each_stair_the_rate_has_fallen_by_the_root_of_what_the_batch_has_grown_by():
    """The paper's rule; a control that leaves the batch as it is has fallen by all of it."""
    for stair in (2.0, 1.1):
        seesaw = Seesaw(START, "1B tokens", stair=stair, max_growth=16)
        for moment, batch in seesaw.batch.milestones[1:]:
            growth, progress = batch / START, Progress(tokens=moment.value)
            assert seesaw.learning_rate(progress) == pytest.approx(growth**-0.5, rel=1e-6)
            assert seesaw.usual(progress) == pytest.approx(1 / growth, rel=1e-6)


def test_normalized_sgd_on_a_noisy_quadratic_loses_nothing_by_a_seesaw():
    """With updates normalised by their noise, the expected loss at the end is that of the usual schedule.

    The mean square of x under x <- x - r (h x + noise / sqrt(B)) with r = eta sqrt(B) / sigma, exactly, by recursion.
    The control grows the batch just as much and decays as usual: its loss ends higher than both, for want of progress.
    """
    seesaw = Seesaw(10.0, "100k tokens", "cosine", stair=1.1, max_growth=16)

    def final_loss(batch_of, factor_of):
        done, mean_square, tokens = 0.0, torch.full((3,), 4.0, dtype=torch.float64), 100_000
        curvature = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
        while done < tokens - 1e-6:
            progress = Progress(tokens=done)
            batch = min(batch_of(progress), tokens - done)
            rate = 0.01 * factor_of(progress) * batch**0.5
            mean_square = (1 - rate * curvature) ** 2 * mean_square + rate**2 / batch
            done += batch
        return float((curvature * mean_square).sum())

    usual = final_loss(lambda _: 10.0, seesaw.usual)
    ours = final_loss(seesaw.batch, seesaw.learning_rate)
    naive = final_loss(seesaw.batch, seesaw.usual)
    assert ours == pytest.approx(usual, rel=0.02)
    assert naive > 1.1 * usual


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": "100 steps"}, "`length` is given in tokens, samples or epochs"),
        ({"length": "100%"}, "`length` is given in tokens"),
        ({"decay": "cosin"}, "`decay` must be one of cosine, quarter_cosine, linear"),
        ({"warmup": "10 steps"}, "`warmup` is given in tokens"),
        ({"warmup": "1B tokens"}, "shorter than `length`"),
        ({"stair": 1.0}, "stair > 1"),
        ({"floor": 1.0}, "floor < 1"),
        ({"start": 0}, "start > 0"),
    ],
)
def test_a_seesaw_that_makes_no_plan_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Seesaw(**{"start": 10, "length": "1B tokens", **options})
