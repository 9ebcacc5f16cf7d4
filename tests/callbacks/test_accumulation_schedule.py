"""Each optimizer step holds exactly the micro-batches asked for, whenever that number changes, resumed or not."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from support import Plain, Positions, pad_rows
from token_training import Module, difference, loader, rows, weights
from torch import nn
from torch.utils.data import DataLoader

from lightning_llm import Progress, Schedule
from lightning_llm.callbacks import AccumulationSchedule, TokenThroughput, TokenWeightedAccumulation
from lightning_llm.callbacks.accumulation_schedule import micro_batches_for
from lightning_llm.callbacks.steps.accumulation_window import AccumulationWindow

MICRO_BATCH = 2
RAMP = {"0 steps": 1, "3 steps": 2, "5 steps": 3, "8 steps": 5, "11 steps": 2}


def tokens_in(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def big_steps(config, size, data=None, optimizer="sgd", epochs=2, clip=0.3):
    """The truth: each step's rows as one batch. ``size(step, tokens so far, epochs)`` in micro-batches."""
    module, data = Module(config, optimizer), data or rows()
    stepper, step, tokens, sizes = module.configure_optimizers(), 0, 0, []
    for epoch in range(epochs):
        begin = 0
        while begin < len(data):
            part = data[begin : begin + MICRO_BATCH * size(step, tokens, epoch + begin / len(data))]
            begin, step = begin + len(part), step + 1
            sizes.append(math.ceil(len(part) / MICRO_BATCH))
            batch = pad_rows(part)
            tokens += tokens_in(batch)
            stepper.zero_grad()
            module.training_step(batch, 0)["loss"].backward()
            nn.utils.clip_grad_norm_(module.parameters(), clip)
            stepper.step()
    return weights(module), sizes


class Windows(L.Callback):
    """Counts the micro-batches of each optimizer step."""

    def __init__(self):
        self.sizes, self._held, self._step = [], 0, 0

    def on_train_batch_end(self, trainer, *_):
        self._held += 1
        if trainer.global_step != self._step:
            self.sizes.append(self._held)
            self._held, self._step = 0, trainer.global_step


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_ramp_inside_an_epoch_gives_each_step_its_size_and_its_gradient(tiny_gpt2, quiet_trainer, optimizer):
    schedule = Schedule(RAMP)
    truth, sizes = big_steps(tiny_gpt2, lambda step, *_: int(schedule(Progress(steps=step))), optimizer=optimizer)
    assert sizes[:11] == [1, 1, 1, 2, 2, 3, 3, 3, 5, 1, 5]  # 22 micro-batches an epoch: the last window is short
    module, windows = Module(tiny_gpt2, optimizer), Windows()
    callbacks = [windows, TokenWeightedAccumulation(), AccumulationSchedule(RAMP)]
    trainer = quiet_trainer(max_epochs=2, gradient_clip_val=0.3, callbacks=callbacks)
    trainer.fit(module, loader(rows(), MICRO_BATCH))
    assert windows.sizes == sizes
    assert difference(module, truth) < 1e-12


class Naive(L.Callback):
    """What one would write: set the attribute at the step boundary."""

    def __init__(self):
        self.schedule, self.step = Schedule(RAMP), -1

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            trainer.accumulate_grad_batches = int(self.schedule(Progress(steps=self.step)))


def test_setting_the_trainers_attribute_alone_is_wrong(tiny_gpt2, quiet_trainer):
    schedule = Schedule(RAMP)
    truth, sizes = big_steps(tiny_gpt2, lambda step, *_: int(schedule(Progress(steps=step))))
    module, windows = Module(tiny_gpt2, "sgd"), Windows()
    callbacks = [windows, TokenWeightedAccumulation(), Naive()]
    quiet_trainer(max_epochs=2, gradient_clip_val=0.3, callbacks=callbacks).fit(module, loader(rows(), MICRO_BATCH))
    assert windows.sizes != sizes
    assert difference(module, truth) > 1e-5


class Powers(Plain):
    """The gradient of micro-batch i is 2^i, so that the sum says which ones are in it."""

    def __init__(self, **trainer_options):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.gradients = []

    def training_step(self, batch, batch_idx):
        return self.weight * 2.0**batch_idx

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(float(self.weight.grad))

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.0)


def powers(quiet_trainer, num_batches, callbacks, data=None, **options):
    module = Powers()
    trainer = quiet_trainer(max_epochs=1, callbacks=callbacks, **options)
    trainer.fit(module, DataLoader(range(num_batches), batch_size=1) if data is None else data)
    return module.gradients


def test_a_switch_leaves_no_stale_gradient(quiet_trainer):
    gradients = powers(quiet_trainer, 10, [AccumulationSchedule({"0 steps": 2, "2 steps": 3})])
    assert gradients == pytest.approx([(1 + 2) / 2, (4 + 8) / 2, (16 + 32 + 64) / 3, (128 + 256 + 512) / 3])


@pytest.mark.parametrize("weighted", [True, False])
def test_a_short_last_window_is_the_mean_of_what_it_holds(quiet_trainer, weighted):
    callbacks = [AccumulationSchedule(4)] + [TokenWeightedAccumulation(weight="samples")] * weighted
    assert powers(quiet_trainer, 6, callbacks) == [(1 + 2 + 4 + 8) / 4, (16 + 32) / 2]


@pytest.mark.parametrize("weighted", [True, False])
def test_also_where_the_loader_has_no_length(quiet_trainer, weighted):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(6))

    callbacks = [AccumulationSchedule(4)] + [TokenWeightedAccumulation(weight="samples")] * weighted
    gradients = powers(quiet_trainer, None, callbacks, DataLoader(Endless(), batch_size=1))
    assert gradients == [(1 + 2 + 4 + 8) / 4, (16 + 32) / 2]


def test_lightning_alone_divides_the_short_window_by_the_full_count(quiet_trainer):
    assert powers(quiet_trainer, 5, [], accumulate_grad_batches=4)[-1] == 16 / 4


@pytest.mark.parametrize(
    ("target", "milestones", "reached"),
    [
        ("micro_batches", {"0 tokens": 1, "900 tokens": 8}, 8),
        ("tokens", {"0 tokens": 20, "900 tokens": 160}, 8),
        ("sequences", {"0 tokens": 2, "900 tokens": 16}, 8),
    ],
)
def test_geometric_ramps_by_tokens_are_exact(tiny_gpt2, quiet_trainer, target, milestones, reached):
    schedule, mean = Schedule(milestones, "geometric"), {}

    def size(step, tokens, _):
        wanted = schedule(Progress(tokens=tokens))
        if target == "micro_batches":
            return round(wanted)
        if target == "sequences":
            return max(1, round(wanted / MICRO_BATCH))
        return micro_batches_for(wanted, mean_tokens(step))

    def mean_tokens(step):
        """The mean over windows so far, each 0.1 of the new value; at first that of the first micro-batch."""
        if step == 0:
            mean["value"], mean["next"] = counts[0], 0
        elif mean.get("step") != step:
            begin, held = mean["next"], mean["size"]
            window = [counts[i % len(counts)] for i in range(begin, begin + held)]
            ends_epoch = (begin + held) % len(counts) == 0
            usual = window[:-1] if ends_epoch and held > 1 else window
            mean["value"] = 0.9 * mean["value"] + 0.1 * sum(usual) / len(usual)
            mean["next"] = begin + held
        mean["step"] = step
        left = len(counts) - mean["next"] % len(counts)
        mean["size"] = min(
            left, micro_batches_for(schedule(Progress(tokens=tokens_until(mean["next"]))), mean["value"])
        )
        return mean["value"]

    def tokens_until(position):
        return sum(counts[i % len(counts)] for i in range(position))

    data = rows()
    counts = [tokens_in(pad_rows(data[i : i + MICRO_BATCH])) for i in range(0, len(data), MICRO_BATCH)]
    truth, sizes = big_steps(tiny_gpt2, size, data, epochs=3)
    module, windows = Module(tiny_gpt2, "sgd"), Windows()
    schedule_callback = AccumulationSchedule(milestones, target=target, interpolation="geometric")
    callbacks = [windows, TokenWeightedAccumulation(), schedule_callback]
    trainer = quiet_trainer(max_epochs=3, gradient_clip_val=0.3, callbacks=callbacks)
    trainer.fit(module, loader(data, MICRO_BATCH))
    assert windows.sizes == sizes
    assert max(sizes) == reached
    assert len(set(sizes)) >= 4
    assert difference(module, truth) < 1e-12
    assert schedule_callback.state_dict()["tokens"] == sum(counts) * 3


# ---- resume ----------------------------------------------------------------------------------------------------------


class WithDropout(Module):
    """Random numbers and batch statistics too have to be those of the window's start."""

    def __init__(self, config):
        super().__init__({**config, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}, "adamw")
        self.norm = nn.BatchNorm1d(1, dtype=torch.float64)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.global_step, batch["input_ids"][0, :3].tolist()))
        output = super().training_step(batch, batch_idx)
        noise = self.norm(torch.rand(4, 1, dtype=torch.float64)).square().mean()
        return {**output, "loss": output["loss"] + 0.1 * noise}

    def validation_step(self, batch, batch_idx):
        torch.rand(7)  # validation draws too

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SaveAt(L.Callback):
    def __init__(self, micro_batches, folder):
        self.micro_batches, self.folder, self._count = micro_batches, folder, 0

    def on_train_batch_end(self, trainer, *_):
        self._count += 1
        if self._count in self.micro_batches:
            trainer.save_checkpoint(self.folder / f"{self._count}.ckpt")


RESUMED_RAMP = {"0 steps": 1, "1 steps": 3, "3 steps": 4, "6 steps": 2, "1 epoch": 3, "9 steps": 4}


def resumable(config, quiet_trainer, callbacks, checkpoint=None, validate=False, **options):
    torch.manual_seed(5 if checkpoint is None else 99)
    module = WithDropout(config)
    trainer = quiet_trainer(
        gradient_clip_val=0.3,
        callbacks=callbacks,
        limit_val_batches=1 if validate else 0,
        **({"max_epochs": 2} | options),
    )
    data = Positions([pad_rows(rows()[i : i + MICRO_BATCH]) for i in range(0, len(rows()), MICRO_BATCH)])
    trainer.fit(module, data, loader(rows(), 4) if validate else None, ckpt_path=checkpoint)
    return module, trainer


@pytest.mark.parametrize(
    "options", [{}, {"max_epochs": -1, "max_steps": 13}, {"validate": True, "val_check_interval": 3}]
)
def test_resume_after_a_save_at_any_micro_batch_is_bitwise_the_uninterrupted_run(
    tiny_gpt2, quiet_trainer, tmp_path, options
):
    """Windows 0 | 1 2 3 | 4 5 6 | 7-10 | 11-14 | 15-18 | 19 20 | 21; the second epoch: 22 23 24 | 25 26 27 28 | ..."""
    saves = [1, 2, 3, 4, 8, 9, 10, 11, 21, 22, 23, 24, 25, 26, 29]

    def callbacks():
        return [TokenWeightedAccumulation(), TokenThroughput(), AccumulationSchedule(RESUMED_RAMP)]

    windows = Windows()
    whole, trainer = resumable(tiny_gpt2, quiet_trainer, [*callbacks(), SaveAt(saves, tmp_path), windows], **options)
    assert windows.sizes[:10] == [1, 3, 3, 4, 4, 4, 2, 1, 3, 4]
    counters = (trainer.global_step, trainer.current_epoch, trainer.fit_loop.epoch_loop._batches_that_stepped)
    total = next(c for c in trainer.callbacks if isinstance(c, TokenThroughput))
    for save in saves:
        resumed_callbacks = callbacks()
        resumed, after = resumable(tiny_gpt2, quiet_trainer, resumed_callbacks, tmp_path / f"{save}.ckpt", **options)
        assert torch.equal(weights(resumed), weights(whole)), save
        assert torch.equal(resumed.norm.running_mean, whole.norm.running_mean), save
        assert resumed.seen == whole.seen[-len(resumed.seen) :], save
        found = (after.global_step, after.current_epoch, after.fit_loop.epoch_loop._batches_that_stepped)
        assert found == counters, save
        assert resumed_callbacks[1].total_tokens == total.total_tokens, save


def test_lightning_alone_loses_the_gradients_of_a_window_that_was_saved_inside(tiny_gpt2, quiet_trainer, tmp_path):
    options = {"accumulate_grad_batches": 4}
    whole, _ = resumable(tiny_gpt2, quiet_trainer, [SaveAt([6], tmp_path)], **options)
    resumed, _ = resumable(tiny_gpt2, quiet_trainer, [], tmp_path / "6.ckpt", **options)
    assert resumed.seen[0][1] == whole.seen[6][1]  # the window's first two are never seen again
    assert not torch.equal(weights(resumed), weights(whole))


def test_a_run_that_fails_inside_a_window_is_resumed_from_the_windows_start(tiny_gpt2, quiet_trainer, tmp_path):
    class Failing(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            if trainer.fit_loop.total_batch_idx == 9:
                raise KeyError("the machine is gone")

    whole, _ = resumable(tiny_gpt2, quiet_trainer, [AccumulationSchedule(RESUMED_RAMP)])
    saved = ModelCheckpoint(tmp_path, save_on_exception=True)
    with pytest.raises(KeyError):
        resumable(
            tiny_gpt2,
            quiet_trainer,
            [Failing(), AccumulationSchedule(RESUMED_RAMP), saved],
            enable_checkpointing=True,
        )
    written = list(tmp_path.glob("*.ckpt"))
    assert len(written) == 1
    resumed, _ = resumable(tiny_gpt2, quiet_trainer, [AccumulationSchedule(RESUMED_RAMP)], written[0])
    assert resumed.seen == whole.seen[7:]  # micro-batches 7 to 10 are one window
    assert torch.equal(weights(resumed), weights(whole))


def test_two_ranks_ramp_and_resume_as_one(run_ranks):
    for strategy in ("ddp", "fsdp2"):
        first, second = run_ranks("accumulation_schedule", 2, strategy=strategy, time_limit=200)
        assert first["sizes"] == second["sizes"] == first["true sizes"]
        assert first["error"] < 1e-12
        assert first["resumed"] == second["resumed"] == [True] * 5
        assert first["noise"] != second["noise"]  # each rank has random numbers of its own


# ---- on an epoch schedule, what Lightning's own scheduler promises --------------------------------------------------


class Cadence(Plain):
    """Counts what the optimizer is asked to do in each epoch."""

    def __init__(self):
        super().__init__()
        self.steps, self.zeroed = [], []

    def on_train_epoch_start(self):
        self.steps.append(0)
        self.zeroed.append(0)

    def configure_optimizers(self):
        module = self

        class Counting(torch.optim.SGD):
            def step(self, closure=None):
                module.steps[-1] += 1
                return super().step(closure)

            def zero_grad(self, set_to_none=True):
                module.zeroed[-1] += 1
                super().zero_grad(set_to_none)

        return Counting(self.parameters(), lr=0.01)


def batches(num_batches):
    return DataLoader(torch.utils.data.TensorDataset(torch.ones(num_batches, 3)), batch_size=1)


def test_steps_and_zeroed_gradients_follow_an_epoch_schedule(quiet_trainer):
    module = Cadence()
    schedule = AccumulationSchedule({"0 epochs": 1, "1 epoch": 2, "3 epochs": 4})
    trainer = quiet_trainer(max_epochs=5, limit_train_batches=10, callbacks=[schedule])
    trainer.fit(module, batches(12))
    assert module.steps == module.zeroed == [10, 5, 5, 3, 3]
    assert trainer.accumulate_grad_batches == 1  # the Trainer has its flag back
    assert type(trainer.accumulate_grad_batches) is int


def test_half_an_epoch_is_a_milestone_too(quiet_trainer):
    module = Cadence()
    quiet_trainer(max_epochs=1, callbacks=[AccumulationSchedule({"0 epochs": 1, "0.5 epochs": 5})]).fit(
        module, batches(10)
    )
    assert module.steps == [5 + 1]


@pytest.mark.parametrize(
    ("milestones", "options", "message"),
    [
        ({}, {}, "needs milestones"),
        ({"0 epochs": 0}, {}, "1 at least"),
        ({"0 epochs": -2}, {}, "1 at least"),
        ({"0 epochs": 1, "1 epoch": 2.5}, {}, "whole numbers"),
        ({"-1 epochs": 2}, {}, "duration"),
        ({"0 epochs": "2"}, {}, "finite numbers"),
        ({"0 epochs": 2}, {"target": "samples"}, "`target`"),
    ],
)
def test_milestones_that_make_no_sense_are_refused(milestones, options, message):
    with pytest.raises(ValueError, match=message):
        AccumulationSchedule(milestones, **options)


def test_what_cannot_be_served_is_refused_with_the_reason(quiet_trainer, monkeypatch):
    def fit(module=None, **options):
        schedule = AccumulationSchedule(2)
        options["callbacks"] = [schedule, *options.get("callbacks", [])]
        quiet_trainer(max_epochs=1, **options).fit(module or Plain(), batches(4))

    manual = Plain()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="optimizes manually"):
        fit(manual)
    with pytest.raises(ValueError, match="Remove the flag"):
        fit(accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="GradientAccumulationScheduler would both"):
        fit(callbacks=[GradientAccumulationScheduler({0: 2})])
    with pytest.raises(ValueError, match="max_steps"):
        quiet_trainer(max_epochs=-1, callbacks=[AccumulationSchedule({"0%": 1, "50%": 2})]).fit(Plain(), batches(4))
    from lightning.pytorch.strategies import SingleDeviceStrategy

    monkeypatch.setattr(SingleDeviceStrategy, "handles_gradient_accumulation", True)
    with pytest.raises(ValueError, match="its own engine"):
        fit()


def test_a_global_batch_below_one_micro_batch_is_said(quiet_trainer):
    with pytest.warns(UserWarning, match="Make the loader's batches smaller"):
        quiet_trainer(max_epochs=1, callbacks=[AccumulationSchedule(2, target="sequences")]).fit(
            Plain(), DataLoader(torch.utils.data.TensorDataset(torch.ones(16, 3)), batch_size=8)
        )


def test_first_micro_batches_without_a_token_do_not_stretch_a_step_to_the_epochs_end(quiet_trainer):
    entries = torch.ones(16, 3)
    entries[:2] = 0.0
    windows = Windows()
    schedule = AccumulationSchedule(8, target="tokens", token_fn=lambda batch: 4 * batch[0][:, 0].sum())
    data = DataLoader(torch.utils.data.TensorDataset(entries), batch_size=1)
    quiet_trainer(max_epochs=1, callbacks=[windows, schedule]).fit(Plain(), data)
    assert windows.sizes == [1, 1, *[2] * 7]


def test_tokens_of_a_batch_without_labels_need_a_function(quiet_trainer):
    with pytest.raises(TypeError, match="token_fn"):
        quiet_trainer(max_epochs=1, callbacks=[AccumulationSchedule(64, target="tokens")]).fit(Plain(), batches(4))
    module = Cadence()
    schedule = AccumulationSchedule(6, target="tokens", token_fn=lambda batch: batch[0].shape[1])
    quiet_trainer(max_epochs=1, callbacks=[schedule]).fit(module, batches(4))
    assert module.steps == [2]


def test_the_flag_comes_back_after_an_exception_and_the_next_fit_works(quiet_trainer):
    class Failing(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3 and self.trainer.max_epochs == 1:
                raise RuntimeError("once")
            return super().training_step(batch, batch_idx)

    trainer, module = quiet_trainer(max_epochs=1, callbacks=[AccumulationSchedule(3)]), Failing()
    with pytest.raises(RuntimeError, match="once"):
        trainer.fit(module, batches(8))
    assert trainer.accumulate_grad_batches == 1
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batches(8))


def test_a_skipped_rest_of_an_epoch_leaves_nothing_behind(quiet_trainer):
    class Skipping(Powers):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.trainer.current_epoch == 0 and batch_idx == 5 else None

    module = Skipping()
    quiet_trainer(max_epochs=2, callbacks=[AccumulationSchedule(4)]).fit(module, DataLoader(range(8), batch_size=1))
    assert module.gradients == [15 / 4, 15 / 4, 240 / 4]


def test_random_numbers_of_a_step_do_not_depend_on_validation(quiet_trainer):
    class Noise(Plain):
        def __init__(self):
            super().__init__()
            self.noise = []

        def training_step(self, batch, batch_idx):
            self.noise.append(float(torch.rand(())))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            torch.rand(())

    def noise(seed_steps=True, **options):
        torch.manual_seed(3)
        module = Noise()
        schedule = AccumulationSchedule(2, seed_steps=seed_steps)
        quiet_trainer(max_epochs=1, callbacks=[schedule], **options).fit(module, batches(8), batches(2))
        return module.noise

    assert noise(limit_val_batches=0) == noise(val_check_interval=2)
    assert noise(False, limit_val_batches=0) != noise(False, val_check_interval=2)
    assert len(set(noise())) == 8


def test_a_window_is_a_number_that_counts_from_its_offset():
    window = AccumulationWindow(5, offset=7)
    assert [position for position in range(7, 20) if position % window == 0] == [7, 12, 17]
    assert window == 5
    assert isinstance(window, int)
    assert torch.tensor(10.0) / window == 2


# ---- in company, and in corners --------------------------------------------------------------------------------------


def test_a_run_resumed_with_larger_batches_beyond_the_epochs_end_still_descends(quiet_trainer, tmp_path):
    class Ones(Powers):
        def training_step(self, batch, batch_idx):
            return self.weight * 1.0

        def validation_step(self, batch, batch_idx):
            pass

    rows = torch.ones(24, 1)
    saved = ModelCheckpoint(tmp_path, save_on_train_epoch_end=False, save_top_k=-1, filename="{step}")
    options = {"max_epochs": 2, "enable_checkpointing": True, "limit_val_batches": 1}
    trainer = quiet_trainer(callbacks=[AccumulationSchedule(4), saved], val_check_interval=12, **options)
    trainer.fit(Ones(), DataLoader(rows, batch_size=1), DataLoader(rows))
    for batch_size in (2, 3, 4):
        module = Ones()
        resumed = quiet_trainer(max_epochs=2, callbacks=[AccumulationSchedule(4)])
        resumed.fit(module, DataLoader(rows, batch_size=batch_size), ckpt_path=tmp_path / "step=3.ckpt")
        assert module.gradients == [1.0] * len(module.gradients)
        assert module.gradients


def test_a_stream_that_epochs_only_cut_goes_on_where_it_stood(quiet_trainer, tmp_path):
    class Stream:
        """Never ends, has no length, and does not start again with an epoch."""

        position = 0

        def __iter__(self):
            while True:
                self.position += 1
                yield torch.full((1,), self.position - 1)

        def state_dict(self):
            return {"position": self.position}

        def load_state_dict(self, state):
            self.position = state["position"]

    class Seeing(Powers):
        def training_step(self, batch, batch_idx):
            self.gradients.append(int(batch))
            return self.weight * 1.0

        def on_before_optimizer_step(self, optimizer):
            pass

    def fit(checkpoint=None, saves=()):
        module = Seeing()
        callbacks = [SaveAt(saves, tmp_path), AccumulationSchedule(2)]
        trainer = quiet_trainer(max_epochs=3, limit_train_batches=4, callbacks=callbacks)
        trainer.fit(module, Stream(), ckpt_path=checkpoint)
        return module.gradients

    whole = fit(saves=[2, 3, 4, 5, 6])
    assert whole == list(range(12))
    starts = {save: fit(tmp_path / f"{save}.ckpt")[0] for save in (2, 3, 4, 5, 6)}
    assert starts == {2: 2, 3: 2, 4: 4, 5: 4, 6: 6}


def test_weight_averaging_keeps_its_epoch_of_batch_statistics(quiet_trainer):
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    def steps(callbacks, **options):
        module = Plain()
        module.norm = nn.BatchNorm1d(3)
        averaging = StochasticWeightAveraging(0.05, swa_epoch_start=1)
        trainer = quiet_trainer(max_epochs=3, callbacks=[averaging, *callbacks], **options)
        trainer.fit(module, batches(8))
        return trainer.global_step

    assert steps([AccumulationSchedule(2)]) == steps([], accumulate_grad_batches=2)


def test_early_stopping_does_not_count_a_validation_inside_a_window_twice(quiet_trainer, tmp_path):
    from lightning.pytorch.callbacks import EarlyStopping

    class Constant(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("metric", 1.0)

    def fit(checkpoint=None, **options):
        stopping = EarlyStopping("metric", patience=3)
        saved = ModelCheckpoint(tmp_path, save_on_train_epoch_end=False, save_top_k=-1, filename="{step}")
        options = {"max_epochs": 4, "val_check_interval": 3, "enable_checkpointing": True}
        trainer = quiet_trainer(callbacks=[stopping, AccumulationSchedule(4), saved], **options)
        trainer.fit(Constant(), batches(24), batches(1), ckpt_path=checkpoint)
        return trainer.global_step

    stopped_at = fit()
    for path in sorted(tmp_path.glob("step=[12].ckpt")):
        assert fit(path) == stopped_at, path


def test_statistics_of_any_layer_are_those_of_the_windows_start(quiet_trainer, tmp_path):
    class Normalized(Plain):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 1).double())

        def training_step(self, batch, batch_idx):
            return self.layer(batch.double()).square().mean()

    data = [torch.randn(2, 3) for _ in range(12)]

    def fit(checkpoint=None, saves=()):
        module = Normalized()
        trainer = quiet_trainer(max_epochs=1, callbacks=[SaveAt(saves, tmp_path), AccumulationSchedule(4)])
        trainer.fit(module, Positions(data), ckpt_path=checkpoint)
        return torch.cat([value.flatten() for value in module.state_dict().values()])

    whole = fit(saves=[4, 6])
    assert torch.equal(fit(tmp_path / "4.ckpt"), whole)
    assert torch.equal(fit(tmp_path / "6.ckpt"), whole)


def test_a_step_without_a_loss_counts_no_part_in_the_mean(quiet_trainer):
    class Silent(Powers):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    module = Silent()
    quiet_trainer(max_epochs=1, callbacks=[AccumulationSchedule(4)]).fit(module, DataLoader(range(4), batch_size=1))
    assert module.gradients == pytest.approx([(2 + 4 + 8) / 3])


def test_milestones_within_an_epoch_of_unknown_length_are_refused(quiet_trainer):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.ones(8, 3).split(1))

    for milestones in ({"0%": 1, "50%": 4}, {"0 epochs": 1, "0.5 epochs": 4}):
        with pytest.raises(ValueError, match="needs the length of an epoch"):
            quiet_trainer(max_epochs=1, callbacks=[AccumulationSchedule(milestones)]).fit(
                Plain(), DataLoader(Endless(), batch_size=1)
            )


def test_a_training_step_that_fetches_its_own_batches_is_refused(quiet_trainer):
    class Fetching(Plain):
        def training_step(self, dataloader_iter):
            raise AssertionError

    with pytest.raises(ValueError, match="dataloader_iter"):
        quiet_trainer(max_epochs=1, callbacks=[AccumulationSchedule(2)]).fit(Fetching(), batches(4))


def test_a_refused_flag_stays_where_it_was(quiet_trainer):
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=4, callbacks=[AccumulationSchedule(2)])
    for _ in range(2):
        with pytest.raises(ValueError, match="Remove the flag"):
            trainer.fit(Plain(), batches(4))


def test_a_checkpoint_loads_without_trusting_it(quiet_trainer, tmp_path):
    trainer = quiet_trainer(max_epochs=1, callbacks=[AccumulationSchedule({"0 tokens": 2}, target="sequences")])
    trainer.fit(Plain(), batches(4))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    state = torch.load(tmp_path / "plain.ckpt", weights_only=True)["callbacks"]["AccumulationSchedule"]
    assert state["window"] == [2, 2]


def test_weight_averages_follow_the_optimizer_steps_of_a_schedule(quiet_trainer):
    from lightning.pytorch.callbacks import WeightAveraging

    seen = []

    class Average(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            if step_idx is not None:
                seen.append(step_idx)
            return step_idx is not None

    trainer = quiet_trainer(max_epochs=1, callbacks=[Average(), AccumulationSchedule({"0 steps": 1, "2 steps": 3})])
    trainer.fit(Plain(), batches(11))
    assert seen == list(range(trainer.global_step)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("finder", ["rate", "size"])
def test_lightnings_finders_leave_the_schedule_as_it_was(quiet_trainer, tmp_path, monkeypatch, finder):
    from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

    monkeypatch.chdir(tmp_path)

    class Found(Cadence):
        lr, batch_size = 0.01, 1

        def train_dataloader(self):
            data = torch.utils.data.TensorDataset(torch.ones(24, 3))
            return DataLoader(data, batch_size=self.batch_size)

    search = (
        LearningRateFinder(num_training_steps=5)
        if finder == "rate"
        else BatchSizeFinder("power", steps_per_trial=1, init_val=1, max_trials=2)
    )
    module = Found()
    trainer = quiet_trainer(
        max_epochs=1, callbacks=[search, TokenWeightedAccumulation("samples"), AccumulationSchedule(4)]
    )
    trainer.fit(module)
    assert trainer.global_step == math.ceil(24 / module.batch_size / 4)
    assert "training_step" not in module.__dict__


@pytest.mark.parametrize("callback", [lambda: AccumulationSchedule(2), TokenWeightedAccumulation, TokenThroughput])
def test_two_of_a_kind_are_refused_instead_of_overwriting_each_others_state(quiet_trainer, callback):
    with pytest.raises(RuntimeError, match="state"):
        quiet_trainer(callbacks=[callback(), callback()])


def test_a_second_run_with_the_same_callback_starts_anew(quiet_trainer):
    schedule = AccumulationSchedule({"0 tokens": 1, "9 tokens": 2}, token_fn=lambda batch: batch[0].numel())
    for _ in range(2):
        module = Cadence()
        quiet_trainer(max_epochs=1, callbacks=[schedule]).fit(module, batches(7))
        assert module.steps == [3 + 2]
