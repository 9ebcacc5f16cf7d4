"""Several ranks: each cuts its own rows, and gradients are reduced once."""

EXACT = 1e-12


def test_ranks_get_the_mean_of_the_uncut_gradients_and_reduce_once_a_sequence(run_ranks):
    """DDP with another number of windows on each rank; shards of FSDP2 with as many, of rows of other lengths."""
    for result in run_ranks("windowed_ranks", 2):
        assert len(result["ddp"]) == 10
        assert all(error < EXACT for error in result["ddp"].values()), result
        assert all(error < EXACT for error in result["fsdp"]["errors"].values()), result
        reductions = result["fsdp"]["reductions"]
        assert set(reductions.values()) == {reductions["plain"]}
        assert reductions["plain"] > 0
