"""The number of optimizer steps that a learning-rate schedule is told is the number that the run takes."""

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from support import Plain, Positions, pad_rows
from token_training import Module, rows
from torch.utils.data import DataLoader

from lightning_llm import LLMModule, total_optimizer_steps
from lightning_llm.callbacks import AccumulationSchedule


class Scheduled(Plain):
    """A learning rate that falls from 0.1 to 0 over the run."""

    def configure_optimizers(self):
        self.total = total_optimizer_steps(self.trainer)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches(num_batches):
    return DataLoader(torch.utils.data.TensorDataset(torch.ones(num_batches * 2, 3)), batch_size=2)


@pytest.mark.parametrize(
    ("milestones", "options", "trainer_options"),
    [
        ({"0 steps": 1, "3 steps": 2, "5 steps": 3, "8 steps": 5}, {}, {}),
        ({"0 epochs": 2, "1 epoch": 4, "2 epochs": 22}, {}, {"max_epochs": 4}),
        ({"0 steps": 1, "20 steps": 8}, {"interpolation": "geometric"}, {"limit_train_batches": 17}),
        ({"0 steps": 2, "50%": 5}, {}, {}),
        (4, {}, {"max_steps": 9}),
        ({"0 steps": 4, "6 steps": 12}, {"target": "sequences"}, {}),
    ],
)
def test_the_learning_rate_reaches_its_end_exactly(quiet_trainer, milestones, options, trainer_options):
    module = Scheduled()
    schedule = AccumulationSchedule(milestones, **options)
    trainer = quiet_trainer(callbacks=[schedule], **({"max_epochs": 2} | trainer_options))
    trainer.fit(module, batches(22))
    assert trainer.global_step == module.total
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-15)


def test_lightnings_own_estimate_does_not_know_the_schedule(quiet_trainer):
    class Estimated(Scheduled):
        def configure_optimizers(self):
            self.estimate = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    module = Estimated()
    quiet_trainer(max_epochs=2, callbacks=[AccumulationSchedule(4)]).fit(module, batches(22))
    assert (module.estimate, module.total) == (44, 12)


def test_lightnings_own_scheduler_and_flag_are_counted_too(quiet_trainer):
    module = Scheduled()
    trainer = quiet_trainer(max_epochs=3, callbacks=[GradientAccumulationScheduler({1: 4})])
    trainer.fit(module, batches(10))
    assert trainer.global_step == module.total == 10 + 3 + 3
    trainer = quiet_trainer(max_epochs=3, accumulate_grad_batches=4)
    trainer.fit(module, batches(10))
    assert trainer.global_step == module.total == 9


def test_endless_runs_and_loaders_without_a_length(quiet_trainer):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.ones(12, 3).split(1))

    module = Scheduled()
    quiet_trainer(max_epochs=-1, max_steps=5).fit(module, batches(4))
    assert module.total == 5
    quiet_trainer(max_epochs=1).fit(module, DataLoader(Endless(), batch_size=2))
    assert module.total == float("inf")


def test_a_schedule_of_tokens_nobody_can_count_beforehand_says_what_to_do(quiet_trainer):
    schedule = AccumulationSchedule(64, target="tokens", token_fn=lambda batch: batch[0].numel())
    with pytest.raises(ValueError, match=r"max_steps"):
        quiet_trainer(max_epochs=1, callbacks=[schedule]).fit(Scheduled(), batches(4))
    module = Scheduled()
    with pytest.warns(UserWarning, match="taken to have 2 optimizer steps"):
        quiet_trainer(max_epochs=1, max_steps=2, callbacks=[schedule]).fit(module, batches(4))
    assert module.total == 2
    quiet_trainer(max_epochs=1, max_steps=100_000, callbacks=[schedule]).fit(module, batches(4))
    assert module.total == 4  # the epochs end first


def test_the_steps_of_a_very_long_run_are_counted_without_walking_through_it(monkeypatch):
    from types import SimpleNamespace

    from lightning_llm import Schedule

    trainer = SimpleNamespace(max_steps=-1, max_epochs=1000, world_size=1, strategy=None)
    schedule = AccumulationSchedule({"0 steps": 1, "100 steps": 7})
    asked, evaluate = [], Schedule.__call__
    monkeypatch.setattr(Schedule, "__call__", lambda self, progress: asked.append(1) or evaluate(self, progress))
    assert schedule.count_optimizer_steps(trainer, 100_000, None) == 100 + -(-99_900 // 7) + 999 * -(-100_000 // 7)
    assert len(asked) == 101


def test_rows_of_a_batch_sampler_are_known(quiet_trainer):
    from torch.utils.data import BatchSampler, SequentialSampler

    data = torch.ones(24, 3)
    loader = DataLoader(
        torch.utils.data.TensorDataset(data), batch_sampler=BatchSampler(SequentialSampler(data), 2, False)
    )
    module = Scheduled()
    trainer = quiet_trainer(max_epochs=1, callbacks=[AccumulationSchedule(6, target="sequences")])
    trainer.fit(module, loader)
    assert trainer.global_step == module.total == 4


def test_a_text_data_module_tells_its_tokens(quiet_trainer, tiny_gpt2, tmp_path):
    from lightning_llm.datamodules import TextDataModule

    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"document {number} " * (5 + number % 7))
    data = TextDataModule(
        str(folder), tokenizer="bytes", max_length=32, micro_batch_size=2, cache_dir=tmp_path / "cache"
    )
    module = LLMModule({**tiny_gpt2, "vocab_size": 512}, lr_schedule="linear", warmup=0)
    schedule = AccumulationSchedule({"0 tokens": 60, "2k tokens": 240}, target="tokens", interpolation="linear")
    trainer = quiet_trainer(max_epochs=2, callbacks=[schedule])
    trainer.fit(module, datamodule=data)
    expected = schedule.count_optimizer_steps(trainer, trainer.num_training_batches, data.train_dataloader())
    assert trainer.global_step == pytest.approx(expected, rel=0.1)
    assert schedule.state_dict()["tokens"] == module.tokens_seen == 2 * data.train_dataloader().tokens_per_epoch


def test_a_stateful_loader_keeps_the_position_that_it_is_resumed_at(quiet_trainer, tiny_gpt2, tmp_path):
    """Where ``estimated_stepping_batches`` is read in configure_optimizers, Lightning drops it."""

    data = [pad_rows(rows()[i : i + 2]) for i in range(0, 20, 2)]

    class Seen(Module):
        length = staticmethod(total_optimizer_steps)

        def __init__(self, config):
            super().__init__(config)
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch["input_ids"][0, :3].tolist())
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            self.length(self.trainer)
            return super().configure_optimizers()

    class WithLightnings(Seen):
        length = staticmethod(lambda trainer: trainer.estimated_stepping_batches)

    def fit(module, checkpoint=None, **options):
        trainer = quiet_trainer(max_epochs=1, callbacks=[AccumulationSchedule(2)], **options)
        trainer.fit(module, Positions(data), ckpt_path=checkpoint)
        return module.seen

    from lightning.pytorch.callbacks import Callback

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                trainer.save_checkpoint(tmp_path / "4.ckpt")

    trainer = quiet_trainer(max_epochs=1, callbacks=[AccumulationSchedule(2), Save()])
    whole = Seen(tiny_gpt2)
    trainer.fit(whole, Positions(data))
    assert fit(Seen(tiny_gpt2), tmp_path / "4.ckpt") == whole.seen[4:]
    assert fit(WithLightnings(tiny_gpt2), tmp_path / "4.ckpt") != whole.seen[4:]
