"""DynamicBatchScaler: the gradient is that of the whole batch, whatever fits."""

import pytest
from scarce_memory import Scarce
from token_training import GLOBAL_BATCH, big_batch, difference, loader, rows

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
    scaler, trainer = fit(quiet_trainer, module, GLOBAL_BATCH // accumulate, accumulate, clip=0.3, sort_by_length=sort)
    assert trainer.global_step == 6
    assert (module.num_failed > 0) == (forward is not None or backward is not None)
    assert difference(module, truth) < TOLERANCE
    assert scaler.limits.num_failed == module.num_failed


DDP_CASES = {
    "nothing fails": {"accumulate": 1, "overlap": True},
    "forward": {"accumulate": 1, "forward": 100, "overlap": False},
    "forward, overlap": {"accumulate": 1, "forward": 100, "overlap": True},
    "backward": {"accumulate": 1, "backward": 60, "overlap": False},
    "backward, overlap": {"accumulate": 1, "backward": 60, "overlap": True, "optimizer": "adamw"},
    "both, K = 2": {"accumulate": 2, "forward": 60, "backward": 40, "overlap": False, "optimizer": "adamw"},
    "both, K = 2, overlap": {"accumulate": 2, "forward": 60, "backward": 40, "overlap": True},
    "bucket views": {"accumulate": 2, "backward": 40, "overlap": True, "ddp": {"gradient_as_bucket_view": True}},
    "bucket views, K = 1": {
        "accumulate": 1, "backward": 40, "overlap": False, "ddp": {"gradient_as_bucket_view": True},
    },
    "unused parameter": {
        "accumulate": 2, "backward": 40, "overlap": True, "optimizer": "adamw", "unused": True,
        "ddp": {"find_unused_parameters": True},
    },
    "communication hook": {"accumulate": 2, "backward": 40, "overlap": False, "ddp": {"hook": True}},
    "a trusted piece fails": {"accumulate": 2, "shrink_at": 2, "overlap": False},
    "a trusted piece fails while it is reduced": {"accumulate": 2, "shrink_at": 2, "overlap": True},
    "it fails while it is reduced, K = 1": {"accumulate": 1, "shrink_at": 2, "overlap": True},
    "it fails while it is reduced, bucket views": {
        "accumulate": 1, "shrink_at": 2, "overlap": True, "ddp": {"gradient_as_bucket_view": True},
    },
    "it fails while it is reduced, unused": {
        "accumulate": 1, "shrink_at": 2, "overlap": True, "unused": True, "optimizer": "adamw",
        "ddp": {"find_unused_parameters": True},
    },
}  # fmt: skip


def test_one_rank_out_of_memory_neither_hangs_nor_changes_the_others(run_ranks):
    ranks = run_ranks("dynamic_batch", 2, time_limit=300, cases=list(DDP_CASES.values()))
    for (name, case), *found in zip(DDP_CASES.items(), *ranks, strict=True):
        for rank, result in enumerate(found):
            assert result["error"] < TOLERANCE, (name, rank, result["error"])
            assert result["steps"] == 6, name
            assert result["logged"] == pytest.approx(result["expected"], rel=1e-6), (name, rank)
        fails = any(key in case for key in ("forward", "backward", "shrink_at"))
        assert found[0]["failed"] == 0
        assert (found[1]["failed"] > 0) == fails, name
        if case.get("unused"):  # never touched: no decay either
            assert found[0]["unused"] == found[1]["unused"] == [1.0, 1.0, 1.0], name
