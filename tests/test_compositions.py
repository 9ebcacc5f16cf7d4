"""Precisions, clipping and averages of weights beside accumulation, schedules and pieces: the bare loop's results."""

from typing import NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from scarce_memory import Scarce
from support import Positions, pad_rows
from token_training import EPOCHS, Module, loader, rows, weights
from torch import nn

from lightning_llm.callbacks import AccumulationSchedule, DynamicBatchScaler, TokenWeightedAccumulation

TOLERANCE = 1e-12
# Rows of each optimizer step: 8, 8, 16, and the 12 that are left; in the second epoch 16, 16, 12.
EPOCH_1, EPOCH_2 = [(0, 8), (8, 16), (16, 32), (32, 44)], [(0, 16), (16, 32), (32, 44)]


class Cut(NamedTuple):
    """How the steps are made: rows of a loader batch, and whether these run out of memory."""

    rows: int
    scarce: bool = False

    def callbacks(self):
        growing = AccumulationSchedule({"0 steps": 8 // self.rows, "2 steps": 16 // self.rows})
        pieces = [DynamicBatchScaler()] if self.scarce else []
        return [TokenWeightedAccumulation(), growing, *pieces]


CUTS = {"2 rows": Cut(2), "4 rows": Cut(4), "8 rows out of memory": Cut(8, scarce=True)}


class Bare(NamedTuple):
    """What a bare loop over whole steps comes to, each (number of weights,)."""

    weights: torch.Tensor
    average: torch.Tensor


def bare_loop(config, optimizer="adamw", clip=None, average=None, each_epoch=False, micro_rows=None, epochs=2):
    """The truth, in float64.

    Args:
        clip: Of the gradient, in place, after the backward.
        average: (average, current, number of averages so far) -> average, after each step.
        each_epoch: Average before each epoch from the second on instead.
        micro_rows: A control: average after each micro-batch of so many rows, steps or not.
    """
    module, data = Module(config, optimizer, torch.float32).double(), rows()
    stepper = module.configure_optimizers()
    averages = []

    def take(times=1):
        for _ in range(times if average is not None else 0):
            now = weights(module).clone()
            averages.append(average(averages[-1], now, len(averages)) if averages else now)

    for epoch in range(epochs):
        take(each_epoch and epoch > 0)
        for begin, end in EPOCH_1 if epoch == 0 else EPOCH_2:
            take((end - begin) // micro_rows - 1 if micro_rows else 0)
            stepper.zero_grad()
            module.training_step(pad_rows(data[begin:end]), 0)["loss"].backward()
            if clip is not None:
                clip(list(module.parameters()))
            stepper.step()
            take(not each_epoch)
    return Bare(weights(module), averages[-1] if averages else weights(module))


def fit(config, quiet_trainer, cut, others=(), optimizer="adamw", dtype=torch.float64, **options):
    limit = 60 if cut.scarce else None
    module = Scarce(config, optimizer, backward_limit=limit, dtype=torch.float32).to(dtype)
    trainer = quiet_trainer(**{"max_epochs": EPOCHS, "callbacks": [*cut.callbacks(), *others], **options})
    trainer.fit(module, loader(rows(), cut.rows))
    assert trainer.global_step == len(EPOCH_1) + len(EPOCH_2) * (trainer.max_epochs - 1)
    assert (module.num_failed > 0) == cut.scarce
    return module


def distance(found, truth):
    found = weights(found) if isinstance(found, nn.Module) else found
    return float((found.double() - truth.double()).norm() / truth.double().norm())


# ---- clipping ----------------------------------------------------------------------------------------------------


CLIPPING = {
    "norm": (0.3, lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.3)),
    "value": (2e-3, lambda parameters: nn.utils.clip_grad_value_(parameters, 2e-3)),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(("kind", "scaled"), [("norm", False), ("value", False), ("value", True)])
def test_the_whole_steps_gradient_is_clipped_by_norm_and_by_value(tiny_gpt2, quiet_trainer, cut, kind, scaled):
    """Under a gradient scaler too, which must have divided before: one of float16's, around float64."""
    value, clip = CLIPPING[kind]
    truth = bare_loop(tiny_gpt2, "sgd", clip)
    options = {"gradient_clip_val": value, "gradient_clip_algorithm": kind}
    if scaled:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        plugin.forward_context = plugin.train_step_context = torch.enable_grad
        options["plugins"] = [plugin]
    assert distance(fit(tiny_gpt2, quiet_trainer, cut, optimizer="sgd", **options), truth.weights) < TOLERANCE
    assert distance(bare_loop(tiny_gpt2, "sgd").weights, truth.weights) > 1e-4  # it does clip


# ---- precisions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_double_precision_of_the_trainer_is_exact_for_any_cut(tiny_gpt2, quiet_trainer, cut):
    module = fit(tiny_gpt2, quiet_trainer, cut, dtype=torch.float32, precision="64-true")
    assert distance(module, bare_loop(tiny_gpt2).weights) < TOLERANCE


def plain_accumulation(config, rows_at_once, precision):
    """The bare loop in low precision: micro-batches weighted by their tokens, gradients added where they are kept."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    module, data = Module(config, "sgd", torch.float32).to(dtype), rows()
    stepper = module.configure_optimizers()
    low = torch.float16 if precision == "16-mixed" else torch.bfloat16
    scale = 1024.0 if precision == "16-mixed" else 1.0
    for begin, end in EPOCH_1 + EPOCH_2:
        stepper.zero_grad()
        micro_batches = [pad_rows(data[i : min(i + rows_at_once, end)]) for i in range(begin, end, rows_at_once)]
        total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
        for batch in micro_batches:
            with torch.autocast("cpu", low, enabled=precision != "bf16-true"):
                output = module.training_step(batch, 0)
            (output["loss"] * (output["num_tokens"] / total) * scale).backward()
        for parameter in module.parameters():
            parameter.grad /= scale
        stepper.step()
    return weights(module)


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_low_precision_is_no_further_from_the_truth_than_a_bare_loop_with_the_same_cut(
    tiny_gpt2, quiet_trainer, precision, cut
):
    """Bound: one and a half times the rounding of the bare loop of micro-batches, each run as it is cut."""
    truth = bare_loop(tiny_gpt2, "sgd").weights
    rounding = distance(plain_accumulation(tiny_gpt2, 2 if cut.scarce else cut.rows, precision), truth)
    plugins = []
    if precision == "16-mixed":
        plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]
    options = {"plugins": plugins} if plugins else {"precision": precision}
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    module = fit(tiny_gpt2, quiet_trainer, cut, optimizer="sgd", dtype=dtype, **options)
    assert 0 < distance(module, truth) <= 1.5 * rounding


# ---- averages of weights -----------------------------------------------------------------------------------------


def mean(average, now, number):
    return average + (now - average) / (number + 1)


AVERAGES = {
    "EMA": (lambda: EMAWeightAveraging(decay=0.8), lambda average, now, _: 0.8 * average + 0.2 * now),
    "mean": (WeightAveraging, mean),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("kind", AVERAGES)
def test_weights_are_averaged_once_an_optimizer_step(tiny_gpt2, quiet_trainer, cut, kind):
    make, average = AVERAGES[kind]
    truth = bare_loop(tiny_gpt2, average=average).average
    assert distance(fit(tiny_gpt2, quiet_trainer, cut, [make()]), truth) < TOLERANCE
    assert distance(bare_loop(tiny_gpt2, average=average, micro_rows=2).average, truth) > 1e-5  # the control


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_stochastic_weight_averaging_takes_the_weights_between_epochs(tiny_gpt2, quiet_trainer, cut):
    """Its learning rate is the optimizer's here. What the last epoch trains is in no average: so Lightning has it."""
    truth = bare_loop(tiny_gpt2, average=mean, each_epoch=True, epochs=3)
    averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2)
    module = fit(tiny_gpt2, quiet_trainer, cut, [averaging], max_epochs=3)
    assert int(averaging.n_averaged) == 2
    assert distance(module, truth.average) < TOLERANCE
    assert distance(truth.average, truth.weights) > 1e-5


class SaveAt(L.Callback):
    def __init__(self, micro_batches, folder):
        self.micro_batches, self.folder, self._count = micro_batches, folder, 0

    def on_train_batch_end(self, trainer, *_):
        self._count += 1
        if self._count in self.micro_batches:
            trainer.save_checkpoint(self.folder / f"{self._count}.ckpt")


def test_a_run_with_an_average_resumes_bitwise_inside_a_window(tiny_gpt2, quiet_trainer, tmp_path):
    data = [pad_rows(rows()[n : n + 4]) for n in range(0, 44, 4)]

    def run(saves=(), checkpoint=None):
        module = Module({**tiny_gpt2, "resid_pdrop": 0.2})
        growing = AccumulationSchedule({"0 steps": 2, "2 steps": 4})
        averaging = EMAWeightAveraging(decay=0.8)
        callbacks = [TokenWeightedAccumulation(), growing, SaveAt(saves, tmp_path), averaging]
        L.seed_everything(1, verbose=False)
        trainer = quiet_trainer(max_epochs=3, callbacks=callbacks)
        trainer.fit(module, Positions(data), ckpt_path=checkpoint)
        return weights(module)

    saves = [3, 4, 6, 11, 14]  # inside windows, after steps, at an epoch's end
    whole = run(saves)
    for save in saves:
        assert torch.equal(run(checkpoint=tmp_path / f"{save}.ckpt"), whole), save


# ---- what Lightning does otherwise than one would think, watched so that we notice when it changes ---------------


def test_lightning_averages_a_step_again_that_the_scaler_skipped(tiny_gpt2, quiet_trainer):
    class Overflow(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 1:
                next(pl_module.parameters()).grad.view(-1)[0] = float("inf")

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    averaging = EMAWeightAveraging(decay=0.8)
    trainer = quiet_trainer(max_steps=3, plugins=[plugin], callbacks=[Overflow(), averaging])
    trainer.fit(Module(tiny_gpt2, dtype=torch.float32), loader(rows(), 8))
    assert plugin.scaler.get_scale() == 4.0
    assert int(averaging._average_model.n_averaged) == trainer.global_step == 3


def test_lightnings_swa_is_only_resumed_rightly_between_epochs(tiny_gpt2, quiet_trainer, tmp_path):
    """No callback of ours: inside an epoch its learning-rate schedule is lost until the next one, and a step late."""

    class SaveAtEpochEnd(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "epoch.ckpt")

    def run(*callbacks, checkpoint=None):
        module = Module(tiny_gpt2)
        averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=2)
        data = Positions([pad_rows(rows()[n : n + 4]) for n in range(0, 44, 4)])
        quiet_trainer(max_epochs=3, callbacks=[averaging, *callbacks]).fit(module, data, ckpt_path=checkpoint)
        return weights(module)

    whole = run(SaveAt([5], tmp_path), SaveAtEpochEnd())
    assert torch.equal(run(checkpoint=tmp_path / "epoch.ckpt"), whole)
    assert distance(run(checkpoint=tmp_path / "5.ckpt"), whole) > 1e-3
