"""DynamicBatchScaler: the gradient is that of the whole batch, whatever fits."""

import pytest
import torch
from scarce_memory import Scarce
from token_training import GLOBAL_BATCH, big_batch, difference, loader, rows, weights

from lightning_llm.callbacks import DynamicBatchScaler, TokenWeightedAccumulation

TOLERANCE = 1e-12


def fit(make_trainer, module, micro_batch=GLOBAL_BATCH, accumulate=1, clip=None, data=None, epochs=2, **options):
    scaler = DynamicBatchScaler(**{"grow_every": 2, **options})
    trainer = make_trainer(
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[TokenWeightedAccumulation(), scaler],
    )
    trainer.fit(module, loader(data or rows(), micro_batch))
    return scaler, trainer


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize(
    ("accumulate", "forward", "backward"),
    [
        (1, None, None),
        (1, 150, None),
        (1, None, 150),
        (1, 200, 90),
        (2, None, 90),
        (4, None, 40),
        (2, 100, 60),
        (1, 45, 41),
    ],
)
def test_running_out_of_memory_anywhere_does_not_change_the_training(
    tiny_gpt2, quiet_trainer, optimizer, sort, accumulate, forward, backward
):
    truth, _ = big_batch(tiny_gpt2, optimizer, 0.3)
    module = Scarce(tiny_gpt2, optimizer, forward, backward)
    scaler, trainer = fit(
        quiet_trainer, module, GLOBAL_BATCH // accumulate, accumulate, clip=0.3, sort_by_length=sort
    )
    assert trainer.global_step == 6
    assert (module.num_failed > 0) == (forward is not None or backward is not None)
    assert difference(module, truth) < TOLERANCE
    assert scaler.limits.num_failed == module.num_failed
