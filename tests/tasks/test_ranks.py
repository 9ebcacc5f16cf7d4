"""Heads over two ranks, whole or sharded: weights and metrics are those of one process."""

import pytest

TOLERANCE = 1e-11  # of weights after steps of AdamW
SOME = ["masked-lm, roberta", "seq2seq, bart", "one class", "some classes", "a number", "tokens", "answers, bert"]


def test_ranks_train_as_one_and_measure_as_one(run_ranks):
    ranks = run_ranks("task_heads", 2, names=SOME)
    for name in SOME:
        for rank in ranks:
            assert rank[name]["error"] < TOLERANCE, name
            assert rank[name]["metrics"] == pytest.approx(rank[name]["true metrics"], rel=1e-6, nan_ok=True), name
            assert len(rank[name]["metrics"]) >= 3
    assert all(ranks[0][name]["without"] > 1e-3 for name in SOME[:2])  # a mean of means


def test_sharded_parameters_train_as_whole_ones_and_write_texts(run_ranks):
    names = ["masked-lm, bert", "seq2seq, bart"]
    for rows, found in zip((2, 5), run_ranks("fsdp_heads", 2, names=names), strict=True):
        assert all(found[name]["sharded"] and found[name]["error"] < TOLERANCE for name in names), found
        assert found["seq2seq, bart"]["written"] == [[rows, 10]] * 2
