"""The batch goes where the noise scale is, by rules that say why, and a resumed run decides what the first one did."""

import math

import lightning as L
import pytest
import torch
from adaptive_training import Planted
from elastic_training import run
from hypothesis import given
from hypothesis import strategies as st
from support import Plain, Positions, pad_rows
from token_training import Module, difference, loader, rows, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_llm import LLMModule
from lightning_llm.callbacks import (
    AccumulationSchedule,
    AdaptiveAccumulation,
    LearningRateScaling,
    TokenWeightedAccumulation,
)
from lightning_llm.callbacks.adaptive_accumulation import next_batch
from lightning_llm.callbacks.steps.gradients import parameters_of

BOUNDS = (10.0, 1000.0)


# ---- the decision ----------------------------------------------------------------------------------------------------


def narrow(noise_scale, spread=1.2):
    return noise_scale / spread, noise_scale * spread


@pytest.mark.parametrize(
    ("batch", "noise_scale", "options", "expected"),
    [
        (100, None, {}, (100, "unknown")),
        (100, math.nan, {}, (100, "unknown")),
        (100, math.inf, {}, (100, "uncertain")),
        (100, 1e6, {"since_change": 9, "min_steps": 10}, (100, "waiting")),
        (100, 160, {}, (160, "grow")),
        (100, 149, {}, (100, "close")),
        (100, 67, {}, (100, "close")),
        (100, 66, {}, (66, "shrink")),
        (100, 900, {}, (200, "grow")),
        (100, 900, {"max_change": 10}, (900, "grow")),
        (100, 900, {"share": 0.2}, (180, "grow")),
        (100, 3, {"max_change": 100}, (10, "shrink")),
        (900, 1e5, {}, (900, "close")),  # the upper bound is near enough
        (600, 1e5, {}, (1000, "grow")),
        (1100, 990, {}, (990, "shrink")),  # from outside the bounds, hysteresis or not
        (4, 11, {}, (8, "grow")),
        (100, 100.2, {"hysteresis": 1}, (100, "close")),
        (10, 900, {"max_change": 1.04}, (11, "grow")),  # 10.4 would be 10 again
        (12, 10.9, {"max_change": 1.04, "hysteresis": 1.05}, (11, "shrink")),
    ],
)
def test_each_rule_decides_where_it_should(batch, noise_scale, options, expected):
    interval = None if noise_scale is None else narrow(noise_scale)
    decision = next_batch(batch, noise_scale, interval, bounds=BOUNDS, **options)
    assert (decision.batch, decision.rule) == expected
    assert decision.reason


@pytest.mark.parametrize("interval", [None, (100.0, 401.0), (0.0, 900.0), (-5.0, 900.0), (300.0, math.inf)])
def test_an_uncertain_noise_scale_moves_nothing(interval):
    assert next_batch(50, 400.0, interval, bounds=BOUNDS).rule == "uncertain"
    assert next_batch(50, 400.0, (200.0, 800.0), bounds=BOUNDS).rule == "grow"


@given(
    batch=st.floats(10, 1000),
    noise_scale=st.floats(1e-3, 1e7),
    hysteresis=st.floats(1, 3),
    max_change=st.floats(1.3, 4),
)
def test_a_change_stays_in_bounds_within_the_limit_and_goes_towards_the_noise_scale(
    batch, noise_scale, hysteresis, max_change
):
    decision = next_batch(
        batch, noise_scale, narrow(noise_scale), bounds=BOUNDS, hysteresis=hysteresis, max_change=max_change
    )
    assert 10 <= decision.batch <= 1000
    assert batch / max_change - 1 <= decision.batch <= batch * max_change + 1  # whole numbers
    target = min(max(noise_scale, 10), 1000)
    assert abs(decision.batch - target) <= abs(batch - target) + 0.5
    if decision.rule == "close":
        assert abs(math.log(target / batch)) <= math.log(hysteresis) + 1 / batch + 1e-9


@given(noise_scale=st.floats(5, 5000), batch=st.integers(10, 1000))
def test_a_constant_noise_scale_is_approached_and_then_left_alone(noise_scale, batch):
    for _ in range(12):
        batch = next_batch(batch, noise_scale, narrow(noise_scale), bounds=BOUNDS).batch
    last = next_batch(batch, noise_scale, narrow(noise_scale), bounds=BOUNDS)
    assert last.rule == "close"
    assert 1 / 1.5 - 0.02 <= batch / min(max(noise_scale, 10), 1000) <= 1.5 + 0.02


# ---- micro-batches ---------------------------------------------------------------------------------------------------

CURVE = [2, 4, 4, 9, 16, 16, 12, 5, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]


def curve(measured):
    return float(CURVE[min(measured, len(CURVE)) - 1])


def adaptive(**options):
    return AdaptiveAccumulation(**{"bounds": (2, 12), "unit": "sequences", "min_steps": 2, **options})


def expected_batches(num_steps, start=2, min_steps=2):
    """What the rules make of the curve, step by step."""
    batch, changed, batches = start, 0, []
    for step in range(1, num_steps + 1):
        batches.append(batch)
        value = curve(step)
        decision = next_batch(
            batch, value, narrow(value, 1.5**0.5), bounds=(2, 12), since_change=step - changed, min_steps=min_steps
        )
        if decision.batch != batch:
            batch, changed = decision.batch, step
    return batches


class Watch(L.Callback):
    """Notes rows and learning rate of each optimizer step; saves after given micro-batches."""

    def __init__(self, folder=None, saves=()):
        self.folder, self.saves = folder, saves
        self.sizes, self.rates, self._held, self._step, self._count = [], [], 0, 0, 0

    def on_train_start(self, trainer, pl_module):
        self._step = trainer.global_step
        optimizer = trainer.optimizers[0]
        optimizer.register_step_post_hook(lambda *_: None)
        step = optimizer.step

        def looking(closure=None):
            def look():
                result = closure()
                self.rates.append(optimizer.param_groups[0]["lr"])
                return result

            return step(look)

        optimizer.step = looking

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._held += len(batch["labels"])
        self._count += 1
        if trainer.global_step != self._step:
            self.sizes.append(self._held)
            self._held, self._step = 0, trainer.global_step
        if self._count in self.saves:
            trainer.save_checkpoint(self.folder / f"{self._count}.ckpt")


def big_steps(config, sizes):
    """The truth: each step's rows as one batch; two epochs."""
    module, data = Module(config, "adamw"), rows()
    stepper, begin = module.configure_optimizers(), 0
    for size in sizes:
        part = data[begin : begin + size]
        begin = (begin + size) % len(data)
        stepper.zero_grad()
        module.training_step(pad_rows(part), 0)["loss"].backward()
        nn.utils.clip_grad_norm_(parameters_of(stepper), 0.3)
        stepper.step()
    return weights(module)


def test_the_batch_follows_the_noise_scale_with_exact_gradients(tiny_gpt2, quiet_trainer, caplog):
    module, watch, callback, planted = Module(tiny_gpt2), Watch(), adaptive(), Planted(curve)
    callbacks = [watch, TokenWeightedAccumulation(), planted, LearningRateScaling(0.5), callback]
    trainer = quiet_trainer(max_epochs=2, gradient_clip_val=0.3, callbacks=callbacks)
    with caplog.at_level("INFO"):
        trainer.fit(module, loader(rows(), 2))
    batches = expected_batches(len(watch.sizes))
    assert planted.batches == batches
    assert len(set(batches)) >= 4
    assert max(batches) > batches[-1]  # it grew and shrank
    assert sum(watch.sizes) == 2 * len(rows())
    whole = [size for size, batch in zip(watch.sizes, batches, strict=True) if size == 2 * round(batch / 2)]
    assert len(whole) >= len(batches) - 2  # but for the epochs' last ones
    changes = [decision for decision in callback.decisions if decision["rule"] in ("grow", "shrink")]
    assert [decision["after"] for decision in changes] == [
        b for a, b in zip(batches, batches[1:], strict=False) if a != b
    ]
    for change in changes:
        line = f"step {change['step']}: the batch goes from {change['before']:.0f} to {change['after']:.0f} sequences"
        assert any(line in message and change["reason"] in message for message in caplog.messages)
    assert float(trainer.callback_metrics["train/adaptive_batch"]) == batches[-1]
    assert float(trainer.callback_metrics["train/micro_batches"]) == math.ceil(watch.sizes[-1] / 2)
    # The truth, with a learning rate that follows as well.
    plain = Module(tiny_gpt2)
    quiet_trainer(
        max_epochs=2, gradient_clip_val=0.3, callbacks=[TokenWeightedAccumulation(), Planted(curve), adaptive()]
    ).fit(plain, loader(rows(), 2))
    assert difference(plain, big_steps(tiny_gpt2, watch.sizes)) < 1e-12
    assert watch.rates == pytest.approx([1e-3 * (batch / 2) ** 0.5 for batch in batches])


def test_a_unit_of_tokens_counts_label_tokens(tiny_gpt2, quiet_trainer):
    mean = sum(int((pad_rows([row])["labels"][:, 1:] != -100).sum()) for row in rows()) / len(rows())
    callback = AdaptiveAccumulation((2 * mean, 12 * mean), min_steps=1)
    watch = Watch()
    callbacks = [watch, TokenWeightedAccumulation(), Planted(lambda _: 8 * mean, "tokens"), callback]
    quiet_trainer(max_epochs=2, callbacks=callbacks).fit(Module(tiny_gpt2), loader(rows(), 2))
    assert callback.global_batch == pytest.approx(8 * mean, abs=1)
    assert watch.sizes[0] == 2
    assert 6 <= sorted(watch.sizes)[len(watch.sizes) // 2] <= 10


class WithDropout(Module):
    def __init__(self, config):
        super().__init__({**config, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}, "adamw")


def resumable(config, quiet_trainer, callbacks, checkpoint=None):
    torch.manual_seed(5 if checkpoint is None else 99)
    module = WithDropout(config)
    data = Positions([pad_rows(rows()[i : i + 2]) for i in range(0, len(rows()), 2)])
    trainer = quiet_trainer(max_epochs=2, callbacks=[TokenWeightedAccumulation(), LearningRateScaling(), *callbacks])
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module


def test_resume_around_each_change_is_bitwise_the_uninterrupted_run(tiny_gpt2, quiet_trainer, tmp_path):
    saves = [2, 3, 5, 8, 12, 21, 22, 23]
    first, watch = adaptive(), Watch(tmp_path, saves)
    whole = resumable(tiny_gpt2, quiet_trainer, [Planted(curve), first, watch])
    ends = [sum(watch.sizes[: step + 1]) // 2 for step in range(len(watch.sizes))]
    assert any(save not in ends for save in saves)  # inside windows too
    for save in saves:
        again = adaptive()
        resumed = resumable(tiny_gpt2, quiet_trainer, [Planted(curve), again], tmp_path / f"{save}.ckpt")
        assert torch.equal(weights(resumed), weights(whole)), save
        assert again.decisions == first.decisions, save
    forgetful = resumable(tiny_gpt2, quiet_trainer, [Planted(lambda n: 2.0), adaptive()], tmp_path / "8.ckpt")
    assert not torch.equal(weights(forgetful), weights(whole))  # a run that measures something else ends elsewhere
    state = torch.load(tmp_path / "8.ckpt", weights_only=True)["callbacks"]["AdaptiveAccumulation"]
    assert {"batch", "changed_at", "decisions", "seed"} <= set(state)


def test_two_ranks_decide_and_resume_as_one(run_ranks):
    first, second = run_ranks("adaptive_accumulation", 2, time_limit=120)
    assert first["decisions"] == second["decisions"]
    assert sum(rule in ("grow", "shrink") for _, rule in first["decisions"]) >= 2
    assert first["sizes"] == second["sizes"]
    assert first["error"] < 1e-12
    assert first["resumed"] == second["resumed"] == [True] * 2


# ---- a data module that makes the batches ----------------------------------------------------------------------------


def test_a_data_modules_global_batch_is_driven_and_resumed(tmp_path):
    def callbacks(planted=None):
        options = {"min_steps": 2, "max_change": 3}
        return [
            planted or Planted(lambda n: 6.0 if n < 4 else 14.0 if n < 9 else 5.0),
            AdaptiveAccumulation((4, 20), **options),
        ]

    for workers in (0, 2):
        data, folder = {"global_batch_size": 6, "num_workers": workers}, tmp_path / str(workers)
        folder.mkdir()
        made = callbacks()
        steps, whole = run(
            folder,
            "whole",
            data=data,
            accumulate=2,
            callbacks=made,
            record={"save_steps": range(1, 14), "save_batches": [7, 9, 21]},
        )
        sizes = [len(taken) for _, taken in steps.values()]
        assert sizes[:4] == [6, 6, 6, 6]
        assert 14 in sizes[4:]
        assert sizes[-2] == 5
        epochs = {}
        for epoch, taken in steps.values():
            epochs.setdefault(epoch, []).extend(taken)
        assert sorted(epochs[0]) == list(range(len(epochs[0])))  # nothing lost or repeated at a change
        batches = made[0].batches
        known = [batch for batch, size in zip(batches, sizes, strict=True) if batch == size]
        assert len(known) >= len(sizes) - 2  # an epoch's short last step is no other batch
        for save in ("step4", "step9", "batch9") if workers else ("step3", "step5", "step11", "batch7", "batch21"):
            again = callbacks()
            rest, resumed = run(
                folder, "again", data=data, accumulate=2, callbacks=again, resume=folder / f"{save}.ckpt"
            )
            assert rest == {step: value for step, value in steps.items() if step in rest}, save
            assert torch.equal(resumed, whole), save
            assert again[1].decisions == made[1].decisions, save
            assert again[0].batches == batches[-len(again[0].batches) :], save


def test_the_learning_rate_follows_a_data_modules_batch_by_schedule_and_by_callback(tmp_path):
    for data, callback in (
        ({"global_batch_size": {"0 samples": 4, "20 samples": 16}}, None),
        ({"global_batch_size": 4}, AdaptiveAccumulation((4, 16), min_steps=3, max_change=4)),
        ({"global_batch_tokens": 80}, None),
    ):
        ratios = []

        class Ratios(L.Callback):
            def on_train_batch_end(self, trainer, *_, ratios=ratios):
                ratios.append(float(trainer.callback_metrics["train/global_batch_ratio"]))

        planted = Planted(lambda n: 16.0)
        callbacks = [planted, LearningRateScaling(), Ratios(), *([callback] if callback else [])]
        steps, _ = run(tmp_path, "scaled", data=data, callbacks=callbacks, steps=9)
        sizes = [len(taken) for _, taken in steps.values()]
        expected = [size / sizes[0] for size in sizes]
        whole = [step for step, ratio in enumerate(ratios) if ratio == pytest.approx(expected[step])]
        assert len(whole) >= 8  # an epoch's short last step is no other batch
        assert max(ratios) == (1 if "global_batch_tokens" in data else 4)


# ---- refusals --------------------------------------------------------------------------------------------------------


def batches(num_batches=4):
    return DataLoader(TensorDataset(torch.ones(num_batches, 3)), batch_size=1)


def fit(quiet_trainer, *callbacks, module=None, data=None, **options):
    trainer = quiet_trainer(**{"max_epochs": 1, **options}, callbacks=list(callbacks))
    trainer.fit(module or Plain(), data or batches())
    return trainer


def test_what_cannot_be_served_is_refused_with_the_reason(quiet_trainer, monkeypatch):
    planted = Planted(curve)
    with pytest.raises(
        ValueError, match=r"no callback measures it: .*`noise_scale_tokens`.*Add GradientNoiseScale\(\)"
    ):
        fit(quiet_trainer, AdaptiveAccumulation((2, 4)), planted)  # which measures in sequences
    manual = Plain()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="AdaptiveAccumulation needs automatic optimization"):
        fit(quiet_trainer, adaptive(), planted, module=manual)
    with pytest.raises(ValueError, match="AdaptiveAccumulation sets the number .*Remove the flag"):
        fit(quiet_trainer, adaptive(), planted, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="AdaptiveAccumulation and another AccumulationSchedule would both"):
        fit(quiet_trainer, adaptive(), planted, AccumulationSchedule(2))
    from lightning.pytorch.strategies import SingleDeviceStrategy

    monkeypatch.setattr(SingleDeviceStrategy, "handles_gradient_accumulation", True)
    with pytest.raises(ValueError, match="its own engine"):
        fit(quiet_trainer, adaptive(), planted)


def test_beside_a_data_module_its_unit_and_start_count(tmp_path):
    for options in ({"unit": "tokens"}, {"start": 6}):
        with pytest.raises(ValueError, match="has a global batch, in sequences, with which the run starts"):
            run(
                tmp_path,
                "x",
                data={"global_batch_size": 6},
                callbacks=[Planted(curve), adaptive(**{"unit": None, **options})],
            )
    with pytest.raises(ValueError, match="AdaptiveAccumulation and another AccumulationSchedule"):
        callbacks = [Planted(curve), adaptive(), AccumulationSchedule(2)]
        run(tmp_path, "x", data={"global_batch_size": 6}, callbacks=callbacks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bounds": (4, 2)}, "`bounds` are the smallest and the largest"),
        ({"bounds": (0, 2)}, "1 at least"),
        ({"start": 13}, r"within the bounds \(2, 12\), but got 13"),
        ({"unit": "rows"}, "`unit` must be 'tokens', 'sequences'"),
        ({"hysteresis": 0.9}, "hysteresis >= 1"),
        ({"max_change": 1}, "max_change > 1"),
        ({"share": 0}, "share > 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        adaptive(**options)


def test_a_schedule_that_needs_the_number_of_steps_says_what_to_use_instead(tiny_gpt2, quiet_trainer):
    data = [pad_rows(rows()[i : i + 2]) for i in range(0, 44, 2)]

    def train(max_steps=-1, **options):
        module = LLMModule(tiny_gpt2, warmup=0, learning_rate=1e-3, **options)
        trainer = fit(
            quiet_trainer, adaptive(), Planted(curve), module=module, data=Positions(data), max_steps=max_steps
        )
        return trainer, module

    with pytest.raises(ValueError, match=r"a callback adapts the batch\. Set lr_schedule_length='2B tokens'"):
        train()
    trainer, module = train(lr_schedule="linear", lr_schedule_length="1k tokens")
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * max(0, 1 - module.tokens_seen / 1000))
    assert 0 < module.tokens_seen < 1000
    assert train(lr_schedule="constant")[0].global_step < 11
    trainer, _ = train(lr_schedule="linear", max_steps=5)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_a_second_run_with_the_same_callback_starts_anew(tiny_gpt2, quiet_trainer):
    callback, sizes = adaptive(), []
    for _ in range(2):
        watch = Watch()
        fit(quiet_trainer, Planted(curve), callback, watch, module=Module(tiny_gpt2), data=loader(rows(), 2))
        sizes.append(watch.sizes)
    assert sizes[0] == sizes[1]
    assert len(set(sizes[0])) > 2
