"""Ranks that share a row's tokens: loss, gradient, memory and refusals, against the whole row in one process."""

import pytest
import torch

from lightning_llm import LLMModule
from lightning_llm.context_parallel.layout import Share
from lightning_llm.context_parallel.mesh import sharing_group
from lightning_llm.tasks.context_parallel_causal_lm import ContextParallelCausalLM

EXACT = 1e-12


@pytest.mark.parametrize(("size", "length"), [(1, 5), (2, 8), (2, 37), (3, 2), (4, 37)])
def test_every_token_is_held_once_and_comes_back_to_its_place(size, length):
    rows = torch.arange(1, 2 * length + 1).view(2, length)
    shares = [Share(rank, size, length) for rank in range(size)]
    parts = [share.take(rows, fill=0) for share in shares]
    whole = shares[0].join(parts, dim=1)
    assert whole[:, :length].equal(rows)
    assert not whole[:, length:].any()
    assert whole.shape[1] - length < 2 * size
    assert all(part.equal(again) for part, again in zip(parts, shares[0].split(whole, dim=1), strict=True))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_causal_attention_is_the_same_work_on_each_rank(size):
    """Chunk c attends to c + 1 chunks; contiguous shares would differ by almost twice the mean."""
    seen = [sum(w.end for w in Share(rank, size, 16 * size).windows(None)) for rank in range(size)]
    assert len(set(seen)) == 1


def check_errors(result):
    assert len(result["errors"]) > 15
    for name, errors in result["errors"].items():
        assert errors["loss"] < EXACT, name
        assert errors["gradient"] < EXACT, name
    assert all(error < EXACT for error in result["nll"].values()), result["nll"]
    assert result["dropout"]["slope"] < 1e-5  # of a difference quotient
    assert result["control"]["loss"] < EXACT  # without the exchange of keys' gradients, only the gradient is wrong
    assert result["control"]["gradient"] > 0.1


def check_refusals(messages):
    for name in ("other rows", "other lengths"):
        assert "must be given the same rows" in messages[name]
    assert "`labels` must have the shape of `input_ids`, (2, 37)" in messages["labels"]
    assert "TypeError: `group` must be a process group" in messages["group"]
    assert "`loss_kernel` must be 'chunked', 'plain'" in messages["kernel"]
    assert "layers of kind LinearAttentionLayer" in messages["linear"]
    assert "attention interface" in messages["bloom"]
    for name in ("llama4", "bert"):
        assert "neither causal nor a causal sliding window" in messages[name]
    for name in ("linear", "bloom", "llama4", "bert"):
        assert messages[name].startswith("UnsupportedModelError")
        assert "without context parallelism" in messages[name]
    assert "use_reentrant" in messages["reentrant"]


def test_two_ranks_that_share_rows_have_the_loss_and_gradient_of_the_whole_rows(run_ranks):
    """Every family, packed, padded, with adapters, dropout and checkpointed layers; a control; errors; memory."""
    for result in run_ranks("context_parallel_loss", 2):
        check_errors(result)
        check_refusals(result["refusals"])
        assert result["memory"]["shared"] < 0.56 * result["memory"]["whole"]


@pytest.mark.slow
def test_four_ranks_that_share_rows_have_the_loss_and_gradient_of_the_whole_rows(run_ranks):
    for result in run_ranks("context_parallel_loss", 4, time_limit=240):
        check_errors(result)
        assert result["memory"]["shared"] < 0.32 * result["memory"]["whole"]


def check_training(results):
    first = results[0]
    single = first.pop("single")
    assert first["error"] < EXACT  # relative to the way that each parameter went
    assert first["checkpoint equal"]
    for result in results:
        assert result["shards"] == [len(results)]
        assert result["tokens_seen"] == result["total_tokens"] == single["tokens_seen"] == single["total_tokens"] > 0
        assert result["nll"] == pytest.approx(single["nll"], rel=EXACT)
        for name in ("val/loss", "val/perplexity", "val/bits_per_byte"):
            assert result[name] == pytest.approx(single[name], rel=EXACT)
        assert result["train/loss"] == pytest.approx(single["train/loss"], rel=1e-6)  # Lightning logs float32


def test_a_trainer_whose_ranks_share_rows_ends_at_the_weights_of_one_process(run_ranks):
    """FSDP2, accumulation, clipping, token weights, packed and padded rows, validation, prediction, a checkpoint."""
    results = run_ranks("context_parallel_training", 2, groups=1)
    check_training(results)
    assert results[0]["rows"] == results[1]["rows"]
    assert sorted(results[0]["rows"]) == list(range(16))


@pytest.mark.slow
def test_two_groups_that_share_rows_end_at_the_weights_of_one_process(run_ranks):
    results = run_ranks("context_parallel_training", 4, time_limit=240, groups=2)
    check_training(results)
    first, again, second, too = (result["rows"] for result in results)
    assert first == again
    assert second == too
    assert sorted(first + second) == list(range(16))


def test_settings_that_do_not_go_together_are_refused(tiny_llama, quiet_trainer):
    with pytest.raises(ValueError, match="`sequence_window` and `context_parallel` do not go together"):
        LLMModule(tiny_llama, sequence_window=8, context_parallel=True)
    with pytest.raises(ValueError, match="loss_kernel 'plain' or 'chunked', not 'liger'"):
        LLMModule(tiny_llama, loss_kernel="liger", context_parallel=True)
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}
    module = LLMModule(tiny_llama, context_parallel=True)
    with pytest.raises(ValueError, match=r"none under this strategy.*tensor_parallel_size=N"):
        quiet_trainer(max_steps=1).fit(module, [batch])
    with pytest.raises(ValueError, match="needs a Trainer, whose strategy says"):
        ContextParallelCausalLM().loss(torch.nn.Linear(1, 1), batch)


def test_a_mesh_with_one_rank_to_share_with_is_refused():
    class Mesh:
        mesh_dim_names = ("data_parallel", "tensor_parallel")

        def __getitem__(self, name):
            return self

        def size(self):
            return 1

    with pytest.raises(ValueError, match="of which there is only one"):
        sharing_group(Mesh())
