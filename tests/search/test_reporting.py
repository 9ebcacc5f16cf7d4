"""Trials are compared at equal shares of their runs, whatever their batch, and end early where they are pruned."""

import gc
import weakref

import pytest
import torch
from support import Plain
from torch.utils.data import DataLoader, TensorDataset

from lightning_llm.loss import NonFiniteLossError
from lightning_llm.search.reporting import TrialReport, percents
from lightning_llm.search.running import check_one_process, failure, run_trial


class Watched(Plain):
    """Validates; its metric is what the test says."""

    def __init__(self, metric=lambda step: 1.0 / (1 + step)):
        super().__init__()
        self.metric = metric
        self.ended = 0

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", float(self.metric(self.global_step)))

    def on_train_end(self):
        self.ended += 1


class Notes:
    """Hears a run, and prunes it from a percent on."""

    def __init__(self, prune_from=101):
        self.values, self.prune_from = {}, prune_from

    def report(self, value, step):
        assert step not in self.values, "a step was reported twice"
        self.values[step] = value

    def should_prune(self):
        return max(self.values) >= self.prune_from


def loader(rows=96, batch_size=4):
    return DataLoader(TensorDataset(torch.randn(rows, 3)), batch_size=batch_size)


def train(quiet_trainer, notes, batch_size=4, model=None, **options):
    report = TrialReport("val/loss", notes)
    trainer = quiet_trainer(callbacks=[report], **{"max_epochs": 2, "val_check_interval": 0.25, **options})
    trainer.fit(model or Watched(), loader(batch_size=batch_size), loader(4))
    return report, trainer


def test_percents_lie_on_the_line_between_two_validations():
    assert percents(0.5, 3.0) == {50: 3.0}
    line = percents(0.751, 1.0, before=(0.502, 3.0))
    assert [*line] == [*range(51, 76)]
    assert all(abs(value - (3.0 - 2.0 * (percent / 100 - 0.502) / 0.249)) < 1e-9 for percent, value in line.items())
    assert percents(0.503, 9.0, before=(0.502, 3.0)) == {}


def test_runs_with_unequal_batches_report_at_the_same_percents(quiet_trainer):
    small, large = Notes(), Notes()
    train(quiet_trainer, small, batch_size=4)  # 48 steps
    _, trainer = train(quiet_trainer, large, batch_size=7)  # 28 steps, of which a quarter of an epoch is 3, not 3.5
    assert trainer.global_step == 28
    assert {*range(13, 93)} <= small.values.keys() & large.values.keys()
    assert small.values[100] == pytest.approx(1 / 49)
    assert small.values[50] == pytest.approx(1 / 25)
    assert large.values[50] == pytest.approx(1 / 15, rel=0.2)  # steps alone would compare 1/25 with a run at its end


def test_share_counts_steps_where_they_end_the_run(quiet_trainer):
    notes = Notes()
    report, _ = train(quiet_trainer, notes, max_epochs=-1, max_steps=12, val_check_interval=6)
    assert [share for share, _ in report.history] == [0.5, 1.0]
    report, _ = train(quiet_trainer, Notes(), max_epochs=1, max_steps=48, val_check_interval=12)
    assert [share for share, _ in report.history] == [0.5, 1.0]  # of the epoch, which comes first


@pytest.mark.parametrize("options", [{}, {"min_epochs": 2}, {"min_steps": 30}])
def test_pruned_run_stops_at_once_and_ends_in_order(quiet_trainer, options):
    model, notes = Watched(), Notes(prune_from=25)
    report, trainer = train(quiet_trainer, notes, model=model, **options)
    assert report.is_pruned
    assert trainer.global_step == 12  # of 48
    assert max(notes.values) == 25
    assert model.ended == 1
    control = Notes()
    assert train(quiet_trainer, control)[1].global_step == 48


def test_metric_must_be_there_and_finite(quiet_trainer):
    with pytest.raises(ValueError, match="no metric 'val/acc' after a validation. There is .*val/loss"):
        trainer = quiet_trainer(callbacks=[TrialReport("val/acc", Notes())], max_epochs=1)
        trainer.fit(Watched(), loader(), loader(4))
    with pytest.raises(NonFiniteLossError, match="val/loss is nan at optimizer step 6"):
        train(quiet_trainer, Notes(), model=Watched(lambda step: float("nan")))


def test_failure_is_what_lies_in_the_values():
    assert failure(NonFiniteLossError("loss nan\nin row 3")) == "not finite: loss nan"
    assert failure(torch.OutOfMemoryError("no room")) == "out of memory: no room"
    with pytest.raises(ValueError, match="does not fit") as caught:
        try:
            raise torch.OutOfMemoryError("no room")
        except RuntimeError as error:
            raise ValueError("the batch does not fit") from error
    assert failure(caught.value) == "out of memory: no room"
    assert failure(RuntimeError("shapes cannot be multiplied")) is None


class Opened:
    """What would be opened by the command line."""

    def __init__(self, trainer, model, validates=True):
        self.trainer, self.model, self.datamodule, self.settings = trainer, model, None, {}
        self.fit_arguments = {
            "model": model,
            "train_dataloaders": loader(),
            "val_dataloaders": loader(4) if validates else None,
        }


def test_trial_gives_its_memory_back_whether_it_ends_or_fails(quiet_trainer, tmp_path):
    kept = []

    def fails(step):
        if step > 10:
            raise torch.OutOfMemoryError("no room")
        return 1.0

    def opened(metric):
        model = Watched(metric)
        kept.append(weakref.ref(model))
        return Opened(quiet_trainer(max_epochs=1, val_check_interval=0.25), model)

    gc.disable()  # what is freed is freed by the trial itself
    try:
        good = run_trial(lambda _: opened(lambda step: 0.5), tmp_path / "config.yaml", "val/loss", Notes())
        assert kept[0]() is None
        bad = run_trial(lambda _: opened(fails), tmp_path / "config.yaml", "val/loss", Notes())
        assert kept[1]() is None
    finally:
        gc.enable()
    assert (good.state, good.values, good.facts["share"]) == ("complete", [0.5] * 4, 1.0)
    assert (bad.state, bad.values, bad.reason) == ("failed", [1.0], "out of memory: no room")


def test_other_errors_and_runs_without_validation_are_raised(quiet_trainer, tmp_path):
    def opened(_):
        return Opened(quiet_trainer(max_epochs=1), Watched(lambda step: 1 / 0))

    with pytest.raises(ZeroDivisionError):
        run_trial(opened, tmp_path / "config.yaml", "val/loss", Notes())

    def blind(_):
        return Opened(quiet_trainer(max_epochs=1, limit_val_batches=0), Watched())

    with pytest.raises(ValueError, match="without a validation, so there is no val/loss"):
        run_trial(blind, tmp_path / "config.yaml", "val/loss", Notes())


def test_several_devices_are_refused(quiet_trainer):
    check_one_process(quiet_trainer())
    with pytest.raises(ValueError, match="the Trainer has 2. Add --trainer.devices 1"):
        check_one_process(quiet_trainer(devices=2))
