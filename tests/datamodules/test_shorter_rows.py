"""Shorter rows of a batch: every target once, in the windows that each document by itself would be cut into."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TINY_GPT2, TINY_LLAMA, dataset_of
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm.datamodules.collate import Segment, collate_rows
from lightning_llm.datamodules.shorter_rows import cut_rows
from lightning_llm.tasks.causal_lm import CausalLM

PAD = 7
LAYOUTS = ["packed", "padded", "padding_free"]
SEGMENT = st.tuples(st.integers(1, 30), st.integers(0, 12))  # tokens, context
ROWS = st.lists(st.lists(SEGMENT, max_size=4), min_size=1, max_size=4)


def batch_of(shape, layout):
    """A batch of segments of distinct tokens; ``padded`` takes the first of each row."""
    fresh = iter(range(100, 60_000))
    rows = [
        [Segment(np.array([next(fresh) for _ in range(size)]), min(context, size)) for size, context in row]
        for row in shape
    ]
    rows = [row[:1] for row in rows] if layout == "padded" else rows
    ids = np.arange(len(rows))
    return collate_rows(rows, pad_token_id=PAD, layout=layout, per_row={"row_ids": ids}), rows


def scored(batch):
    """How often each target stands in a batch, with the tokens before it in its document."""
    found = Counter()
    for row, ids in enumerate(batch["input_ids"].tolist()):
        labels = batch["labels"][row].tolist()
        positions = batch["position_ids"][row].tolist() if "position_ids" in batch else list(range(len(ids)))
        for column, label in enumerate(labels):
            if label != -100 and column:  # nothing predicts a row's first token
                assert label == ids[column]
                assert positions[column] == positions[column - 1] + 1, "a target at a document's first token"
                found[tuple(ids[column - positions[column] : column + 1])] += 1
    return found


def cut_each(rows, length, layout):
    """The same, document by document and token by token."""
    found = Counter()
    for segment in (segment for row in rows for segment in row):
        tokens, begin, done = segment.tokens.tolist(), 0, max(segment.num_context, 1)
        while begin + 1 < len(tokens):
            end = min(begin + length, len(tokens))
            start = max(end - length, 0) if layout == "padded" else begin
            for target in range(max(done, begin + 1), end):
                found[tuple(tokens[start : target + 1])] += 1
            begin, done = end - 1, max(done, end)
    return found


@settings(deadline=None, max_examples=150)
@given(ROWS, st.integers(2, 20), st.sampled_from(LAYOUTS))
def test_every_target_is_scored_once_with_the_context_of_its_window(shape, length, layout):
    batch, rows = batch_of(shape, layout)
    cut = cut_rows(batch, length, layout=layout, pad_token_id=PAD)
    found = scored(cut)
    assert found == cut_each(rows, length, layout)
    assert sorted(context[-1] for context in found.elements()) == sorted(c[-1] for c in scored(batch).elements())
    assert max(map(len, found), default=0) <= length


@settings(deadline=None, max_examples=100)
@given(ROWS, st.integers(2, 20), st.sampled_from(LAYOUTS))
def test_what_is_no_target_is_none_in_shorter_rows(shape, length, layout):
    whole, _ = batch_of(shape, layout)
    cut = cut_rows(whole, length, layout=layout, pad_token_id=PAD)
    expected = Counter({context: n for context, n in scored(cut).items() if context[-1] % 3})
    masked = {**whole, "labels": whole["labels"].where(whole["labels"] % 3 != 0, -100)}
    assert scored(cut_rows(masked, length, layout=layout, pad_token_id=PAD)) == expected


@settings(deadline=None, max_examples=150)
@given(ROWS, st.integers(2, 20), st.sampled_from(LAYOUTS))
def test_a_cut_batch_is_one_that_collating_could_have_made(shape, length, layout):
    batch, _ = batch_of(shape, layout)
    cut = cut_rows(batch, length, layout=layout, pad_token_id=PAD)
    if cut is batch:
        return
    rows = []
    for number, ids in enumerate(cut["input_ids"].numpy()):
        if layout == "padded":
            edges = [0, int(cut["num_input_tokens"][number])]
        else:
            edges = [*np.flatnonzero(cut["position_ids"][number].numpy() == 0).tolist(), len(ids)]
            tokens = int(cut["num_input_tokens"][number] if layout == "packed" else len(ids))
            edges = [edge for edge in edges if edge < tokens] + [tokens]
        labels = cut["labels"][number].numpy()
        segments = []
        for a, b in zip(edges, edges[1:], strict=False):
            targets = np.flatnonzero(labels[a:b] != -100)
            segments.append(Segment(ids[a:b], int(targets[0]) if len(targets) else b - a))
        rows.append(segments)
    per_row = {"row_ids": cut["row_ids"].numpy()}
    if layout == "padding_free":
        rows, per_row = [[segment] for segment in rows[0]], per_row
    width = length if layout == "packed" else None
    expected = collate_rows(rows, pad_token_id=PAD, layout=layout, width=width, per_row=per_row)
    assert expected.keys() == cut.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == cut[key].dtype, key
            assert torch.equal(value, cut[key]), key
        else:
            assert value == cut[key], key


def test_a_row_is_named_by_the_row_of_its_first_token():
    batch, _ = batch_of([[(9, 0), (3, 0)], [(5, 0)]], "packed")
    cut = cut_rows(batch, 6, layout="packed", pad_token_id=PAD)
    where = {token: row for row, ids in enumerate(batch["input_ids"].tolist()) for token in ids}
    assert cut["row_ids"].tolist() == [where[ids[0]] for ids in cut["input_ids"].tolist()]
    batch, _ = batch_of([[(9, 0), (3, 0)], [(5, 0)]], "padding_free")
    cut = cut_rows(batch, 6, layout="padding_free", pad_token_id=PAD)
    assert cut["row_ids"].tolist() == [0, 0, 0, 1]  # an entry per document: 9 tokens are cut into 6 and 4
    assert cut["cu_seq_lens_q"].tolist() == [0, 6, 10, 13, 18]
    assert cut["max_length_q"] == 6


def test_other_entries_are_cut_or_repeated():
    batch, _ = batch_of([[(9, 0)], [(5, 0)]], "padded")
    batch |= {"weights": batch["input_ids"].double()[..., None] / 2, "names": ["a", "b"], "number": 3}
    cut = cut_rows(batch, 6, layout="padded", pad_token_id=PAD)
    assert cut["names"] == ["a", "a", "b"]
    assert cut["number"] == 3
    real = cut["attention_mask"].bool()
    assert torch.equal(cut["weights"][..., 0][real], cut["input_ids"][real] / 2)


def test_batches_without_longer_rows_come_back_as_they_are():
    for layout in LAYOUTS:
        batch, _ = batch_of([[(9, 0)], [(5, 0)]], layout)
        assert cut_rows(batch, 9, layout=layout, pad_token_id=PAD) is batch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_without_a_target_keeps_a_row_so_that_every_rank_runs(layout):
    batch, _ = batch_of([[(9, 9)], []], layout)
    cut = cut_rows(batch, 4, layout=layout, pad_token_id=PAD)
    assert cut["input_ids"].shape == (1, 4)
    assert (cut["labels"] == -100).all()


@pytest.mark.parametrize("windowing", ["packed", "windows"])
def test_whole_documents_become_the_rows_of_a_data_module_with_that_length(windowing):
    """Where no document was cut before; the rows' order aside."""
    lengths = [31, 5, 17, 2, 40, 23, 11, 29]
    long, short = dataset_of(lengths, 40, windowing), dataset_of(lengths, 12, windowing)
    batch = {key: value for key, value in long[list(range(len(long)))].items() if key != "num_bytes"}
    cut = cut_rows(batch, 12, layout=long.layout, pad_token_id=0)
    whole = short[list(range(len(short)))]
    assert scored(cut) == scored(whole)
    assert cut["input_ids"].shape == whole["input_ids"].shape
    if windowing == "windows":
        assert sorted(cut["input_ids"].tolist()) == sorted(whole["input_ids"].tolist())


def gradient(model, batch):
    model.zero_grad()
    loss = CausalLM().loss(model, batch)
    loss.total.backward()
    return loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("config", [TINY_GPT2, TINY_LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_that_of_rows_made_short_by_hand(config, layout):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "vocab_size": 300})).double()
    shape = [[(30, 0), (9, 4)], [(17, 0), (2, 0), (6, 0)], [(25, 8)]]
    batch, rows = batch_of(shape, layout)
    loss, cut = gradient(model, cut_rows(batch, 8, layout=layout, pad_token_id=PAD))
    total, by_hand, number = 0.0, torch.zeros_like(cut), 0
    for context in cut_each(rows, 8, layout):  # every target with its context, in a row of its own
        ids = torch.tensor([context])
        labels = torch.full_like(ids, -100)
        labels[0, -1] = ids[0, -1]
        one, each = gradient(model, {"input_ids": ids, "labels": labels})
        total, by_hand, number = total + one.total.item(), by_hand + each, number + 1
    assert int(loss.num_tokens) == number
    exact = 1e-12 if config is TINY_GPT2 else 1e-6  # Llama rounds to float32 inside
    assert abs(loss.total.item() - total) / total < exact
    assert float((cut - by_hand).norm() / by_hand.norm()) < exact
    _, uncut = gradient(model, batch)
    assert float((uncut - by_hand).norm() / by_hand.norm()) > 1e-4  # control: more context is another gradient


@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_a_step_is_cut_into_micro_batches_does_not_change_what_is_scored(layout):
    shape = [[(30, 0), (9, 4)], [(17, 0), (2, 0), (6, 0)], [(25, 8)], [(13, 0), (21, 0)]]
    whole, rows = batch_of(shape, layout)
    together = scored(cut_rows(whole, 8, layout=layout, pad_token_id=PAD))
    apart = Counter()
    for row in rows:
        batch = collate_rows([row], pad_token_id=PAD, layout=layout)
        apart += scored(cut_rows(batch, 8, layout=layout, pad_token_id=PAD))
    assert together == apart


def test_full_rows_stay_nearly_full():
    rng = np.random.default_rng(0)
    dataset = dataset_of(rng.integers(5, 900, 200).tolist(), 256, "packed")
    batch = {key: value for key, value in dataset[list(range(64))].items() if key != "num_bytes"}
    for length in (32, 64, 128):
        cut = cut_rows(batch, length, layout="packed", pad_token_id=0)
        assert cut["input_ids"].numel() < 1.05 * batch["input_ids"].numel()


def test_what_cannot_be_cut_is_refused():
    batch, _ = batch_of([[(9, 0)]], "packed")
    with pytest.raises(ValueError, match="2 tokens at least.*got 1"):
        cut_rows(batch, 1, layout="packed", pad_token_id=PAD)
    with pytest.raises(ValueError, match=r"\['num_bytes'\] is one of evaluation"):
        cut_rows({**batch, "num_bytes": torch.tensor([3])}, 4, layout="packed", pad_token_id=PAD)
