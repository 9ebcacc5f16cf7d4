"""Every cut of a step into micro-batches of 1 to 16 rows, 1 to 16 of them, on one rank and two: the same weights.

The default run takes a sample; `pytest -m slow` takes them all.
"""

import itertools
import random

import pytest
from token_training import Module, big_batch, difference, loader, rows

from lightning_llm.callbacks import AccumulationSchedule, TokenWeightedAccumulation

SIZES = range(1, 17)
CUTS = list(itertools.product(SIZES, SIZES, ["sgd", "adamw"], [None, 0.3]))
SAMPLE = random.Random(7).sample(CUTS, 12)


def error(config, quiet_trainer, cut, callbacks, **options):
    """Relative difference of the weights after two epochs of 44 rows, the last step of each being short."""
    micro_batch, accumulate, optimizer, clip = cut
    truth, losses = big_batch(config, optimizer, clip, global_batch=micro_batch * accumulate)
    module = Module(config, optimizer)
    trainer = quiet_trainer(max_epochs=2, gradient_clip_val=clip, callbacks=callbacks, **options)
    trainer.fit(module, loader(rows(), micro_batch))
    assert trainer.global_step == len(losses)
    return difference(module, truth)


@pytest.mark.parametrize("cut", SAMPLE, ids=str)
def test_sampled_cuts_give_the_weights_of_the_big_batch(tiny_gpt2, quiet_trainer, cut):
    callbacks = [TokenWeightedAccumulation()]
    assert error(tiny_gpt2, quiet_trainer, cut, callbacks, accumulate_grad_batches=cut[1]) < 1e-12


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("micro_batch", SIZES)
def test_every_cut_gives_the_weights_of_the_big_batch(tiny_gpt2, quiet_trainer, micro_batch):
    for cut in [cut for cut in CUTS if cut[0] == micro_batch]:
        schedule = [TokenWeightedAccumulation(), AccumulationSchedule(cut[1])]
        assert error(tiny_gpt2, quiet_trainer, cut, schedule) < 1e-12, cut
        callbacks = [TokenWeightedAccumulation()]
        assert error(tiny_gpt2, quiet_trainer, cut, callbacks, accumulate_grad_batches=cut[1]) < 1e-12, cut
        is_cut = cut[1] > 1 and micro_batch < 44
        if is_cut and cut[2] == "sgd":  # and without the callback it is not
            assert error(tiny_gpt2, quiet_trainer, cut, [], accumulate_grad_batches=cut[1]) > 1e-6, cut


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_every_cut_over_two_ranks_gives_the_weights_of_the_big_batch(run_ranks, strategy):
    cuts = [cut for number, cut in enumerate(CUTS) if number % 4 == (number // 4) % 4]  # each size, in turn each way
    first, second = run_ranks("accumulation_campaign", 2, time_limit=3000, strategy=strategy, cuts=cuts)
    assert len(first["errors"]) == 256
    assert max(first["errors"].values()) < 1e-12
    assert first == second
