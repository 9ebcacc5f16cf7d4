"""Packed batches taken apart: the loss of separate documents, for models that leak."""

import pytest
import torch
from packed_models import build, documents, gradients, join, pack
from test_isolation import separate_total

from lightning_llm.loss import token_cross_entropy
from lightning_llm.tasks.causal_lm import CausalLM
from lightning_llm.unpacking import sum_rows, unpack_documents


@pytest.mark.parametrize("layout", [pack, join])
@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "opt", "falcon", "mamba"])
def test_unpacked_loss_and_gradients_equal_those_of_separate_documents(model_type, layout):
    """To 1e-12 in float64; Bloom takes the softmax and Mamba sums its state in float32."""
    tolerance = {"bloom": 1e-8, "mamba": 1e-6}.get(model_type, 1e-12)
    model, rows = build(model_type), documents()
    batch = layout(rows)
    loss, wanted = CausalLM().loss(model, unpack_documents(batch)), separate_total(model, rows)
    assert loss.num_tokens == sum(len(d) - 1 for row in rows for d in row)
    assert abs(loss.total / wanted - 1) <= tolerance
    expected = gradients(model, wanted)
    assert (gradients(model, loss.total) - expected).abs().max() <= tolerance * expected.abs().max()
    if model_type != "gpt2":  # the control: packed, the same comparison fails
        assert abs(CausalLM().loss(model, batch).total / wanted - 1) > 1e-6


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_scores_are_those_of_the_packed_rows(model_type):
    model, rows = build(model_type), documents()
    truth = torch.stack([separate_total(model, [row]) for row in rows])
    packed = CausalLM().score(model, unpack_documents(pack(rows)))
    torch.testing.assert_close(packed["nll"], truth, rtol=1e-12, atol=0)
    assert packed["num_tokens"].tolist() == [17, 16]

    joined = join(rows)  # without padding and with an entry for each document, documents are the rows
    scores = CausalLM().score(model, unpack_documents({**joined, "num_input_tokens": torch.arange(7)}))
    truth = torch.stack([separate_total(model, [[d]]) for row in rows for d in row])
    torch.testing.assert_close(scores["nll"], truth, rtol=1e-12, atol=0)
    assert scores["num_tokens"].tolist() == [6, 3, 8, 2, 8, 4, 2]
    assert CausalLM().score(model, unpack_documents(joined))["nll"].shape == (1,)


def test_documents_without_a_target_are_left_out_and_score_nothing():
    batch = join(documents())
    first, second = batch["cu_seq_lens_q"][:2].tolist()
    batch["labels"][0, first:second] = -100
    batch["row_ids"] = torch.arange(7)
    rows = unpack_documents(batch)
    assert rows["unpacked_rows"].tolist() == [1, 2, 3, 4, 5, 6]
    assert sum_rows(rows["attention_mask"], rows).tolist() == [0, 4, 9, 3, 9, 5, 3]


def test_a_target_at_a_first_token_belongs_to_no_document():
    """The document before it would predict it, which is what keeping documents apart forbids."""
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 0, 0]])}
    rows = unpack_documents({**batch, "labels": batch["input_ids"]})
    assert rows["input_ids"].tolist() == [[5, 6]]
    assert token_cross_entropy(torch.zeros(1, 2, 9), rows["labels"]).num_tokens == 1


def test_a_batch_without_any_target_still_runs():
    batch = pack(documents())
    batch["labels"][:] = -100
    rows = unpack_documents(batch)
    assert rows["input_ids"].shape == (1, 7)
    loss = CausalLM().loss(build("opt"), rows)
    assert (loss.total, loss.num_tokens) == (0, 0)
    assert CausalLM().score(build("opt"), rows)["num_tokens"].tolist() == [0, 0]


def test_what_has_an_entry_per_token_goes_along_and_the_rest_stays():
    batch = pack(documents())
    extra = {
        "weights": torch.rand(2, 24),
        "features": torch.rand(2, 24, 3),
        "row_ids": torch.tensor([4, 9]),
        "name": "a",
    }
    rows = unpack_documents({**batch, **extra})
    mask = rows["attention_mask"].bool()

    used = torch.arange(24).expand(2, -1) < 20  # the rest is filler
    assert rows["weights"].shape == (7, 9)
    assert rows["features"].shape == (7, 9, 3)
    assert rows["weights"][mask].sum() == pytest.approx(extra["weights"][used].sum().item(), rel=1e-6)
    assert torch.equal(rows["row_ids"], extra["row_ids"])
    assert rows["name"] == "a"
    assert not {"position_ids", "cu_seq_lens_q", "max_length_q"} & set(rows)


def test_masked_tokens_stay_masked_and_padded_batches_stay_as_they_are():
    batch = {"input_ids": torch.tensor([[0, 0, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    assert unpack_documents(batch) == batch
    batch |= {"position_ids": torch.tensor([[1, 1, 0, 1, 2]]), "labels": torch.tensor([[-100, -100, 5, 6, 7]])}
    rows = unpack_documents(batch)
    assert rows["input_ids"].tolist() == [[5, 6, 7]]
    assert rows["attention_mask"].tolist() == [[1, 1, 1]]
    batch["attention_mask"] = torch.ones(1, 1, 5, 5)  # made for the packed row
    assert unpack_documents(batch)["attention_mask"].tolist() == [[1, 1, 1]]
