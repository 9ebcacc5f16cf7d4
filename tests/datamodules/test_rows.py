"""Rows: labels, positions and padding of a batch, and packed rows equal to separate documents."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import dataset_of

from lightning_llm.datamodules.rows import EMPTY_ROW
from lightning_llm.loss import shift_labels, token_cross_entropy

LENGTHS = st.lists(st.integers(2, 70), min_size=1, max_size=12)


@settings(deadline=None)
@given(lengths=LENGTHS, max_length=st.integers(2, 24), windowing=st.sampled_from(["packed", "windows"]))
def test_every_token_but_each_documents_first_is_a_target_once(lengths, max_length, windowing):
    dataset = dataset_of(lengths, max_length, windowing)
    batch = dataset[list(range(len(dataset)))]
    targets = shift_labels(batch["labels"])
    assert int((targets != -100).sum()) == sum(length - 1 for length in lengths)
    offsets, tokens = dataset.store.offsets, dataset.store.tokens
    expected = np.concatenate([tokens[a + 1 : b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)])
    assert sorted(targets[targets != -100].tolist()) == sorted(expected.tolist())
    assert batch["num_bytes"].sum() == dataset.store.token_bytes[expected].sum()


def test_packed_batch_has_restarting_positions_and_no_mask():
    dataset = dataset_of([3, 2, 4], 6, "packed")
    batch = dataset[[0, 1]]
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]]
    assert (batch["labels"] == -100).tolist() == [
        [True, False, True, False, False, False],
        [True, False, False, True, True, True],
    ]
    assert batch["num_input_tokens"].tolist() == [6, 3]
    assert batch["row_ids"].tolist() == [0, 1]
    assert batch["input_ids"][1, 3:].tolist() == [0, 0, 0]


def test_long_document_is_cut_with_one_token_of_context():
    dataset = dataset_of([9], 4, "packed")
    rows = [dataset[[row]] for row in range(len(dataset))]
    pieces = sorted(row["input_ids"][0, : int(row["num_input_tokens"])].tolist() for row in rows)
    tokens = dataset.store.tokens.tolist()
    assert pieces == sorted([tokens[0:4], tokens[3:7], tokens[6:9]])


def test_windows_are_padded_to_the_longest_of_the_batch():
    dataset = dataset_of([3, 5, 20], 8, "windows", stride=4)
    batch = dataset[[0, 1]]
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert "position_ids" not in batch
    context = dataset[[3]]
    assert (context["labels"][0, :4] == -100).all()
    assert (context["labels"][0, 4:] != -100).all()


def test_documents_keep_their_beginning_and_count_what_is_cut():
    dataset = dataset_of([3, 20], 8, "documents")
    assert len(dataset) == 2
    assert dataset.table.num_cut_tokens == 12
    assert dataset[[1]]["input_ids"][0].tolist() == dataset.store.tokens[3:11].tolist()


@pytest.mark.parametrize("windowing", ["packed", "windows"])
def test_empty_row_has_no_target_and_no_token(windowing):
    batch = dataset_of([5], 8, windowing)[[EMPTY_ROW]]
    assert (batch["labels"] == -100).all()
    assert batch["num_input_tokens"].tolist() == [0]
    assert batch["num_bytes"].tolist() == [0.0]


def test_rows_hold_only_the_chosen_documents():
    dataset = dataset_of([5, 6, 7], 32, "packed", documents=[0, 2])
    assert dataset.table.num_tokens == 12


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_packed_loss_and_gradients_equal_those_of_separate_documents(model_type):
    """In float64 for GPT-2; Llama's norms and rotary tables are float32 inside."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    special = {"bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 32}
    llama = {"intermediate_size": 48} if model_type == "llama" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **small, **special, **llama))
    model.double().eval()
    dataset = dataset_of([5, 9, 3, 14, 7], 16, "packed")
    batch = dataset[list(range(len(dataset)))]
    assert len(batch["input_ids"]) < 5
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    packed = token_cross_entropy(logits, batch["labels"])
    packed.total.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    total, count = 0.0, 0
    for begin, end in zip(dataset.store.offsets[:-1], dataset.store.offsets[1:], strict=True):
        ids = torch.tensor(dataset.store.tokens[begin:end].astype(np.int64))[None]
        loss = token_cross_entropy(model(input_ids=ids, use_cache=False).logits, ids)
        loss.total.backward()
        total, count = total + loss.total.item(), count + int(loss.num_tokens)
    tolerance = 1e-12 if model_type == "gpt2" else 1e-6
    assert int(packed.num_tokens) == count
    assert packed.total.item() == pytest.approx(total, rel=tolerance)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert (gradient - parameter.grad).norm() <= tolerance * max(float(parameter.grad.norm()), 1e-3)
