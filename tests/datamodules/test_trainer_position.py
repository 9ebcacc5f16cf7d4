"""What is read from Lightning's private counters is there, and means what we take it to mean."""

import lightning as L
import pytest
from support import Plain

from lightning_llm.datamodules.trainer_position import align_batches, announce_length, trained_batches


def test_lightning_still_has_what_is_touched(quiet_trainer):
    """If this fails after an update of Lightning, datamodules/trainer_position.py needs another look."""
    trainer = quiet_trainer()
    loop = trainer.fit_loop
    assert {"_combined_loader", "_data_fetcher", "max_batches"} <= set(vars(loop))
    assert "_batches_that_stepped" in vars(loop.epoch_loop)
    progress = loop.epoch_loop.batch_progress
    for counts in (progress.current, progress.total):
        assert {"ready", "started", "processed", "completed"} <= set(vars(counts))
    assert isinstance(progress.is_last_batch, bool)


class Watch(L.Callback):
    def __init__(self):
        self.trained = []

    def on_train_batch_end(self, trainer, *_):
        self.trained.append(trained_batches(trainer))


def test_trained_batches_are_those_up_to_the_last_optimizer_step(quiet_trainer):
    import torch

    watch = Watch()
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=3, callbacks=[watch])
    trainer.fit(Plain(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 3)), batch_size=1))
    assert watch.trained == [0, 0, 3, 3, 3, 6, 6, 8]  # the last window is short


class Alternating:
    """A loader whose epochs have 6 and 3 batches in turn."""

    def __init__(self, trainer):
        self.trainer, self.epoch, self.sampler, self.batch_sampler = trainer, 0, self, None

    def __len__(self):
        return 6 if self.epoch % 2 == 0 else 3

    def set_epoch(self, epoch):
        self.epoch = epoch
        announce_length(self.trainer, len(self))

    def __iter__(self):
        import torch

        return (torch.ones(1, 3)[None] for _ in range(len(self)))


@pytest.mark.parametrize(("limit", "expected"), [(1.0, [6, 3, 6]), (4, [4, 3, 4]), (0.5, [3, 1, 3])])
def test_lightning_follows_epochs_of_unequal_length(quiet_trainer, limit, expected):
    class Lengths(L.Callback):
        def __init__(self):
            self.batches, self.last, self.validations = {}, {}, 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.batches[trainer.current_epoch] = self.batches.get(trainer.current_epoch, 0) + 1
            self.last[trainer.current_epoch] = trainer.is_last_batch

    lengths = Lengths()
    trainer = quiet_trainer(max_epochs=3, callbacks=[lengths], limit_train_batches=limit)
    trainer.fit(Plain(), Alternating(trainer))
    assert list(lengths.batches.values()) == expected
    assert all(lengths.last.values())


def test_counters_are_moved_together(quiet_trainer):
    trainer = quiet_trainer(accumulate_grad_batches=4)
    progress = trainer.fit_loop.epoch_loop.batch_progress
    for counts, base in ((progress.current, 6), (progress.total, 26)):
        counts.ready = counts.started = counts.processed = base
        counts.completed = base - 1
    align_batches(trainer, 4)
    assert (progress.current.ready, progress.current.processed, progress.current.completed) == (4, 4, 3)
    assert (progress.total.started, progress.total.completed) == (24, 23)
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == -1  # as Lightning adds one on a restart after a step
