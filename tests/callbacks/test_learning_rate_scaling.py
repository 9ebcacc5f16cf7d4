"""When the batch changes by a factor, the learning rate follows by its power, whatever scheduler there is."""

import lightning as L
import pytest
import torch
from support import Plain
from torch.utils.data import DataLoader, TensorDataset

from lightning_llm.callbacks import AccumulationSchedule, LearningRateScaling
from lightning_llm.callbacks.learning_rate_scaling import learning_rate_factor

RAMP = {"0 steps": 1, "2 steps": 4, "4 steps": 2}  # sizes of 1 1 4 4 2 2: 14 micro-batches
RATIOS = [1, 1, 4, 4, 2, 2]


class Recording(Plain):
    """Notes what the optimizer has in hand inside its step."""

    def __init__(self, kind="sgd", scheduler=None):
        super().__init__()
        self.kind, self.scheduler = kind, scheduler
        self.used, self.betas = [], []

    def configure_optimizers(self):
        module, base = self, torch.optim.SGD if self.kind == "sgd" else torch.optim.AdamW

        class Recorder(base):
            def step(self, closure=None):
                def then_look():
                    result = closure() if closure is not None else None
                    module.used.append(self.param_groups[0]["lr"])
                    module.betas.append(self.param_groups[0].get("betas"))
                    return result

                if closure is None:  # from a gradient scaler
                    then_look()
                return super().step(then_look if closure is not None else None)

        optimizer = Recorder(self.parameters(), lr=0.1)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}


def batches(num_batches=14):
    return DataLoader(TensorDataset(torch.ones(num_batches, 3)), batch_size=1)


def fit(quiet_trainer, module, scaling, milestones=RAMP, num_batches=14, **options):
    trainer = quiet_trainer(max_epochs=1, callbacks=[scaling, AccumulationSchedule(milestones)], **options)
    trainer.fit(module, batches(num_batches))
    return trainer


@pytest.mark.parametrize("power", [0.5, 1, 0, 0.25])
def test_the_learning_rate_is_multiplied_by_the_power_of_the_ratio(quiet_trainer, power):
    module = Recording()
    trainer = fit(quiet_trainer, module, LearningRateScaling(power))
    assert module.used == pytest.approx([0.1 * ratio**power for ratio in RATIOS])
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1  # taken back
    logged = trainer.callback_metrics
    assert float(logged["train/learning_rate"]) == pytest.approx(0.1 * 2**power)
    assert float(logged["train/lr_factor"]) == pytest.approx(learning_rate_factor(2, power))
    assert float(logged["train/global_batch_ratio"]) == 2


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),  # goes on from the last value
    ],
    ids=["closed form", "recursive"],
)
def test_any_scheduler_stays_what_it_is(quiet_trainer, scheduler):
    module = Recording(scheduler=scheduler)
    trainer = fit(quiet_trainer, module, LearningRateScaling())
    assert module.used == pytest.approx([0.1 * 0.9**step * ratio**0.5 for step, ratio in enumerate(RATIOS)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**6)


def test_betas_keep_their_half_life_in_tokens(quiet_trainer):
    module = Recording("adamw")
    trainer = fit(quiet_trainer, module, LearningRateScaling(scale_betas=True))
    assert [second for _, second in module.betas] == pytest.approx([0.999**ratio for ratio in RATIOS])
    assert [first for first, _ in module.betas] == pytest.approx([0.9**ratio for ratio in RATIOS])
    assert trainer.optimizers[0].param_groups[0]["betas"] == (0.9, 0.999)


def test_a_short_last_window_is_no_change_of_the_batch_asked_for(quiet_trainer):
    module = Recording()
    fit(quiet_trainer, module, LearningRateScaling(1), {"0 steps": 4}, num_batches=6)
    assert module.used == [0.1, 0.1]


def test_the_reference_is_given_or_the_first_and_is_in_the_checkpoint(quiet_trainer, tmp_path):
    module = Recording()
    scaling = LearningRateScaling(1, base_batch=2)
    trainer = fit(quiet_trainer, module, scaling)
    assert module.used == pytest.approx([0.1 * ratio / 2 for ratio in RATIOS])
    scaling = LearningRateScaling(1)
    trainer = fit(quiet_trainer, Recording(), scaling, {"0 steps": 2}, num_batches=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module = Recording()
    more = quiet_trainer(
        max_epochs=2, callbacks=[LearningRateScaling(1), AccumulationSchedule({"0 steps": 2, "2 steps": 4})]
    )
    more.fit(module, batches(4), ckpt_path=tmp_path / "half.ckpt")
    assert module.used == pytest.approx([0.2])


def test_a_batch_function_of_ones_own_and_a_plain_trainer(quiet_trainer):
    module = Recording()
    sizes = iter([8.0, 16.0, 32.0, 8.0])
    scaling = LearningRateScaling(1, batch_fn=lambda trainer: next(sizes))
    quiet_trainer(max_epochs=1, callbacks=[scaling]).fit(module, batches(4))
    assert module.used == pytest.approx([0.1, 0.2, 0.4, 0.1])


def test_a_step_that_the_scaler_skips_leaves_no_scaled_rate_behind(quiet_trainer):
    class Skipping(Recording):
        def __init__(self):
            super().__init__(scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx in (2, 3, 4, 5) else loss  # the first window of four

    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    module = Skipping()
    trainer = fit(quiet_trainer, module, LearningRateScaling(1), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert module.used == pytest.approx([0.1 * 0.9**step * RATIOS[step] for step in (0, 1, 3, 4, 5)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**6)


def test_after_an_exception_the_optimizer_is_as_it_was(quiet_trainer):
    class Failing(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 3:
                raise RuntimeError("in the step")

    module = Recording()
    trainer = quiet_trainer(max_epochs=1, callbacks=[LearningRateScaling(1), Failing(), AccumulationSchedule(RAMP)])
    with pytest.raises(RuntimeError, match="in the step"):
        trainer.fit(module, batches())
    optimizer = trainer.optimizers[0]
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer._optimizer_step_pre_hooks


def test_what_cannot_be_scaled_is_said(quiet_trainer):
    with pytest.raises(ValueError, match="`power`"):
        LearningRateScaling(float("nan"))
    with pytest.raises(ValueError, match="`base_batch`"):
        LearningRateScaling(base_batch=0)
    with pytest.raises(ValueError, match="optimizer with `betas`"):
        fit(quiet_trainer, Recording("sgd"), LearningRateScaling(scale_betas=True))
    manual = Plain()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="optimizes manually"):
        quiet_trainer(max_epochs=1, callbacks=[LearningRateScaling()]).fit(manual, batches())
    with pytest.warns(UserWarning, match="no batch that changes"):
        quiet_trainer(max_epochs=1, callbacks=[LearningRateScaling()]).fit(Plain(), batches(2))


def test_the_given_reference_wins_over_the_checkpoints_and_a_new_run_starts_anew(quiet_trainer, tmp_path):
    scaling = LearningRateScaling(1)
    fit(quiet_trainer, Recording(), scaling, {"0 steps": 2}, num_batches=4).save_checkpoint(tmp_path / "two.ckpt")
    assert scaling.base_batch is None
    module = Recording()
    trainer = quiet_trainer(max_epochs=2, callbacks=[LearningRateScaling(1, base_batch=1), AccumulationSchedule(2)])
    trainer.fit(module, batches(4), ckpt_path=tmp_path / "two.ckpt")
    assert module.used == pytest.approx([0.2, 0.2])
    module = Recording()
    fit(quiet_trainer, module, scaling, {"0 steps": 4}, num_batches=4)
    assert module.used == [0.1]


def test_a_schedule_counts_before_a_data_modules_constant(quiet_trainer):
    class Data(L.LightningDataModule):
        global_batch = 256

        def train_dataloader(self):
            return batches()

    module = Recording()
    trainer = quiet_trainer(max_epochs=1, callbacks=[LearningRateScaling(1), AccumulationSchedule(RAMP)])
    trainer.fit(module, datamodule=Data())
    assert module.used == pytest.approx([0.1 * ratio for ratio in RATIOS])


def test_lightnings_own_scheduler_is_followed_without_a_warning(quiet_trainer, recwarn):
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    module = Recording()
    trainer = quiet_trainer(max_epochs=2, callbacks=[LearningRateScaling(1), GradientAccumulationScheduler({1: 4})])
    trainer.fit(module, batches(4))
    assert module.used == pytest.approx([0.1] * 4 + [0.4])
    assert not [warning for warning in recwarn if "no batch that changes" in str(warning.message)]


def test_an_optimizer_that_reads_its_rate_too_early_is_refused(quiet_trainer):
    class Early(Plain):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match="LBFGS"):
        quiet_trainer(max_epochs=1, callbacks=[LearningRateScaling()]).fit(Early(), batches(2))
