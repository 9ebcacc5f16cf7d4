"""Heads in a Trainer: accumulated, in pieces and over ranks they train as with the whole batch."""

import pytest
import torch
from task_models import CASES, Case, padded
from torch.utils.data import DataLoader

from lightning_llm.callbacks import AccumulationSchedule, DynamicBatchScaler, TokenWeightedAccumulation

TOLERANCE = 1e-11  # of weights after three steps of AdamW
ROWS = 21  # three steps of 7
# Not T5, whose norms round to float32 in float64 models too: there the factor of a loss shows at 1e-7.
SOME = ["masked-lm, roberta", "seq2seq, bart", "one class", "some classes", "a number", "tokens", "answers, bert"]


def weights_of(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.model.parameters()])


def batches(rows, size):
    """Batches of ``size`` rows that never cross the end of a step of 7."""
    sampler = [list(range(a, min(a + size, b))) for b in range(7, len(rows) + 1, 7) for a in range(b - 7, b, size)]
    return DataLoader(padded(rows), batch_sampler=sampler)


def fit(make_trainer, case, size, accumulate, callbacks):
    module = case.module(eps=1e-3, learning_rate=1e-2)
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate, callbacks=callbacks, gradient_clip_val=1.0)
    trainer.fit(module, batches(case.rows(ROWS), size))
    assert trainer.global_step == 3
    return weights_of(module), trainer


@pytest.mark.parametrize("name", [*SOME, "images", "audio"])
def test_accumulation_and_pieces_train_as_the_whole_batch_does(quiet_trainer, name):
    case = CASES[name]
    truth, whole = fit(quiet_trainer, case, 7, 1, [])
    moved = (truth - weights_of(case.module())).norm()
    ways = {
        "accumulated": fit(quiet_trainer, case, 3, 3, [TokenWeightedAccumulation()]),
        "pieces": fit(quiet_trainer, case, 7, 1, [TokenWeightedAccumulation(), _scaler(case)]),
    }
    for way, (found, trainer) in ways.items():
        assert float((found - truth).norm() / moved) < TOLERANCE, way
        assert trainer.callback_metrics["train/loss"].item() == pytest.approx(
            whole.callback_metrics["train/loss"].item(), rel=1e-6
        )
    assert ways["pieces"][1].callback_metrics["train/pieces"] > 1
    control, _ = fit(quiet_trainer, case, 3, 3, [])
    assert float((control - truth).norm() / moved) > 1e-3


def _scaler(case: Case):
    if case.task in ("image-classification", "audio-classification"):
        return DynamicBatchScaler(max_piece=2, cost_fn=lambda batch: len(batch["labels"]))
    return DynamicBatchScaler(max_piece=40)


@pytest.mark.parametrize("name", ["masked-lm, bert", "seq2seq, bart", "one class", "tokens", "answers, bert"])
def test_a_schedule_in_tokens_counts_the_targets_of_the_task(quiet_trainer, name):
    case = CASES[name]
    module, schedule = case.module(), AccumulationSchedule({"0 tokens": 1, "1M tokens": 2})
    loader = batches(case.rows(ROWS), 3)
    trainer = quiet_trainer(max_steps=len(loader), callbacks=[TokenWeightedAccumulation(), schedule])
    trainer.fit(module, loader)
    truth = sum(int(module.task.loss(module.model, batch).num_tokens) for batch in loader)
    assert schedule.content.tokens == module.tokens_seen == truth
