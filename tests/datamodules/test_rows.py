"""Rows: labels, positions and padding of a batch, and packed rows equal to separate documents."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import dataset_of, store_of

from lightning_llm.datamodules.rows import EMPTY_ROW, RowDataset, make_rows
from lightning_llm.loss import shift_labels, token_cross_entropy

LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=12)
LOSSLESS = st.sampled_from(["packed", "wrapped", "windows"])


def table_of(lengths, max_length, windowing, stride=None, documents=None):
    """Rows of documents whose tokens are numbered through the store, from 0."""
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    numbers = np.arange(len(lengths)) if documents is None else np.array(documents)
    return make_rows(offsets, numbers, max_length, windowing, stride)


def tokens_of(table):
    """The tokens of each segment of each row."""
    return [
        [list(range(start, start + length)) for start, length, _ in table.segments(row)] for row in range(len(table))
    ]


@settings(deadline=None, max_examples=80)
@given(lengths=LENGTHS, max_length=st.integers(2, 24), windowing=LOSSLESS, data=st.data())
def test_every_token_but_each_documents_first_is_a_target_once(lengths, max_length, windowing, data):
    stride = None if windowing == "wrapped" else data.draw(st.integers(1, max_length - 1))
    dataset = dataset_of(lengths, max_length, windowing, stride)
    expected_count = sum(max(length - 1, 0) for length in lengths)
    assert dataset.table.num_label_tokens == expected_count
    if not len(dataset):
        assert not sum(lengths)
        return
    batch = dataset[list(range(len(dataset)))]
    targets = shift_labels(batch["labels"])
    assert int((targets != -100).sum()) == expected_count
    offsets, tokens = dataset.store.offsets, dataset.store.tokens
    expected = np.concatenate([tokens[a + 1 : b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)])
    assert sorted(targets[targets != -100].tolist()) == sorted(expected.tolist())
    assert batch["num_bytes"].sum() == dataset.store.token_bytes[expected].sum()


@settings(deadline=None, max_examples=80)
@given(lengths=LENGTHS, max_length=st.integers(1, 24), windowing=LOSSLESS, data=st.data())
def test_every_token_is_new_in_one_segment_of_its_own_document(lengths, max_length, windowing, data):
    stride = None if windowing == "wrapped" else data.draw(st.integers(1, max_length))
    documents = data.draw(st.permutations(range(len(lengths))))[: data.draw(st.integers(0, len(lengths)))]
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    table = make_rows(offsets, np.array(documents, np.int64), max_length, windowing, stride)
    assert (table.length >= 1).all()
    assert (table.row_lengths <= max_length).all()
    assert (np.diff(table.row_offsets) >= 1).all()
    assert (table.start >= offsets[table.document]).all()
    assert (table.start + table.length <= offsets[table.document + 1]).all()
    new = np.zeros(offsets[-1], int)
    for start, length, num_context in zip(table.start, table.length, table.num_context, strict=True):
        new[start + num_context : start + length] += 1
    chosen = np.repeat(np.isin(np.arange(len(lengths)), documents), lengths)
    assert (new == chosen).all()


@settings(deadline=None, max_examples=80)
@given(lengths=LENGTHS, max_length=st.integers(2, 24))
def test_wrapped_rows_are_the_documents_end_to_end_and_overlap_by_one_token(lengths, max_length):
    table = table_of(lengths, max_length, "wrapped")
    rows = [[token for segment in row for token in segment] for row in tokens_of(table)]
    whole = list(range(sum(lengths)))
    starts = range(0, max(len(whole) - 1, min(len(whole), 1)), max_length - 1)
    assert rows == [whole[start : start + max_length] for start in starts]
    assert all(len(row) == max_length for row in rows[:-1])
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for row in tokens_of(table):
        held = [set(document_of[segment]) for segment in row]
        assert all(len(documents) == 1 for documents in held)
        assert len(set.union(*held)) == len(row)  # a document is one segment of a row


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=8), max_length=st.integers(2, 20), data=st.data())
def test_packed_windows_share_the_context_that_the_stride_leaves(lengths, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    table = table_of(lengths, max_length, "packed", stride)
    is_later = table.start > np.append(0, np.cumsum(lengths))[table.document]
    assert (table.num_context == np.where(is_later, max_length - stride, 0)).all()


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=10), windowing=LOSSLESS, data=st.data())
def test_batch_without_padding_holds_the_tokens_and_targets_of_the_rows(lengths, windowing, data):
    dataset = dataset_of(lengths, 16, windowing)
    free = RowDataset(dataset.store, dataset.table, 0, dataset.token_bytes, layout="padding_free")
    rows = data.draw(st.lists(st.integers(0, len(dataset) - 1), min_size=1, max_size=5, unique=True))
    batch, expected = free[[*rows, EMPTY_ROW]], dataset[rows]
    real = np.arange(expected["input_ids"].shape[1]) < expected["num_input_tokens"][:, None].numpy()
    for key in ("input_ids", "labels"):
        assert batch[key].flatten().tolist() == expected[key].numpy()[real].tolist()
    assert 0 not in batch["input_ids"]
    segments = [segment for row in rows for segment in dataset.table.segments(row)]
    assert batch["cu_seq_lens_q"].diff().tolist() == [length for _, length, _ in segments]
    assert batch["num_input_tokens"].tolist() == [length for _, length, _ in segments]
    assert batch["row_ids"].tolist() == [row for row in rows for _ in dataset.table.segments(row)]
    assert batch["num_bytes"].sum() == expected["num_bytes"].sum()


# What a well-known packer's own tests expect: rows of these documents, as lengths; pieces there do not overlap.
@pytest.mark.parametrize(
    ("documents", "max_length", "rows"),
    [
        ([3, 4, 1], 4, [[4], [3, 1]]),
        ([5, 2, 4, 1], 4, [[4], [4], [2, 1, 1]]),  # longer than a row
        ([6, 3, 3, 4], 4, [[4], [4], [3], [3], [2]]),
        ([5, 1, 4, 3], 5, [[5], [4, 1], [3]]),  # a capacity that is no power of two
        ([5, 2, 3, 1], 4, [[4], [3, 1], [2, 1]]),
        ([4, 2, 3, 1], 3, [[3], [3], [2, 1], [1]]),
        ([2, 4, 5, 1], 1, [[1]] * 12),
        ([0, 2, 0, 2, 0], 4, [[2, 2]]),  # empty documents give nothing
        ([0, 0], 4, []),
    ],
)
def test_packed_rows_are_those_of_published_cases(documents, max_length, rows):
    table = table_of(documents, max_length, "packed", stride=max_length)
    assert sorted([sorted(map(len, row), reverse=True) for row in tokens_of(table)]) == sorted(rows)
    tokens = sorted(token for row in tokens_of(table) for segment in row for token in segment)
    assert tokens == list(range(sum(documents)))


def test_capacities_beyond_a_power_of_two_pack_as_well():
    lengths = np.random.default_rng(0).normal(4096, 512, 3000).astype(int).clip(100, 8192)
    for max_length, most in ((8192, 1600), (8193, 1600), (16385, 800), (32769, 400)):
        assert len(table_of(lengths, max_length, "packed")) < most


def test_wrapped_rows_of_a_published_case():
    """Documents of 3, 4 and 1 tokens in rows of 3; there without overlap: 0-2, 3-5, 6-7."""
    table = table_of([3, 4, 1], 3, "wrapped")
    assert tokens_of(table) == [[[0, 1, 2]], [[2], [3, 4]], [[4, 5, 6]], [[6], [7]]]
    assert table.num_context.tolist() == [0, 1, 0, 1, 1, 0]
    assert table.document.tolist() == [0, 0, 1, 1, 1, 2]


def test_a_table_cuts_every_column_alike():
    """Rows are an index, so what else there is for each token is cut where the tokens are: documents of 5 and 3."""
    table = table_of([5, 3], 4, "packed", stride=4)
    column = np.arange(8) * -10
    cut = [[column[start : start + length].tolist() for start, length, _ in table.segments(row)] for row in (0, 1)]
    assert cut == [[[0, -10, -20, -30]], [[-40], [-50, -60, -70]]]


def test_rows_of_chosen_documents_in_their_order():
    table = table_of([3, 2, 4], 4, "wrapped", documents=[2, 0])
    assert tokens_of(table) == [[[5, 6, 7, 8]], [[8], [0, 1, 2]]]
    assert table.document.tolist() == [2, 2, 0]


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


@pytest.mark.parametrize("layout", [None, "padding_free"])
@pytest.mark.parametrize("windowing", ["packed", "wrapped", "windows", "documents"])
def test_empty_row_has_no_target_and_no_token(windowing, layout):
    dataset = dataset_of([5], 8, windowing)
    batch = RowDataset(dataset.store, dataset.table, 0, dataset.token_bytes, layout=layout)[[EMPTY_ROW]]
    assert batch["input_ids"].numel() >= 1
    assert (batch["labels"] == -100).all()
    assert batch["num_input_tokens"].tolist() == [0]
    assert batch["num_bytes"].tolist() == [0]
    assert batch["row_ids"].tolist() == [EMPTY_ROW]


@pytest.mark.parametrize("windowing", ["packed", "wrapped", "windows", "documents"])
def test_empty_documents_give_no_row_and_nothing_is_lost(windowing):
    table = table_of([0, 3, 0, 0, 2, 0], 4, windowing)
    assert sorted({token for row in tokens_of(table) for segment in row for token in segment}) == [0, 1, 2, 3, 4]
    assert set(table.document.tolist()) == {1, 4}
    assert (table.row_lengths > 0).all()
    assert len(table_of([0, 0], 4, windowing)) == 0


def test_rows_hold_only_the_chosen_documents():
    dataset = dataset_of([5, 6, 7], 32, "packed", documents=[0, 2])
    assert dataset.table.num_tokens == 12
    assert set(dataset.table.document.tolist()) == {0, 2}


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, windowing=LOSSLESS, max_length=st.integers(2, 24), data=st.data())
def test_words_of_a_document_add_up_over_its_rows(lengths, windowing, max_length, data):
    stride = None if windowing == "wrapped" else data.draw(st.integers(1, max_length))
    num_words = np.array(data.draw(st.lists(st.integers(0, 90), min_size=len(lengths), max_size=len(lengths))))
    store = replace(store_of(lengths), num_words=num_words)
    table = make_rows(store.offsets, np.arange(len(lengths)), max_length, windowing, stride)
    if not len(table):
        return
    free = RowDataset(store, table, 0, np.ones(50), layout="padding_free")
    by_segment = free[list(range(len(table)))]["num_words"].numpy()
    sums = np.bincount(table.document, by_segment, minlength=len(lengths))
    assert sums.tolist() == np.where(np.array(lengths) > 0, num_words, 0).tolist()
    by_row = RowDataset(store, table, 0, np.ones(50))[[*range(len(table)), EMPTY_ROW]]["num_words"]
    assert by_row.tolist() == [*np.add.reduceat(by_segment, table.row_offsets[:-1]).tolist(), 0]


def test_words_are_spread_evenly_over_a_documents_tokens():
    """Ten tokens and five words: windows of 0-3, 3-6 and 6-9 end after 2, 3.5 and 5 words."""
    store = replace(store_of([10]), num_words=np.array([5]))
    table = make_rows(store.offsets, np.array([0]), 4, "windows")
    assert RowDataset(store, table, 0, np.ones(50))[[0, 1, 2]]["num_words"].tolist() == [2, 1, 2]
    assert "num_words" not in RowDataset(store, table, 0)[[0]]


def test_the_store_is_asked_once_a_batch_before_it_is_read():
    class Cut:
        offsets, num_words, asked = np.array([0, 8]), None, 0

        def check(self):
            self.asked += 1
            if self.asked > 1:
                raise OSError("tokens.bin was cut short")

        @property
        def tokens(self):
            assert self.asked == 1, "read before it was asked"
            return np.arange(8, dtype=np.uint16)

    dataset = RowDataset(Cut(), make_rows(Cut.offsets, np.array([0]), 4, "windows"), 0)
    assert dataset[[0, 1]]["input_ids"].shape == (2, 4)
    with pytest.raises(OSError, match="cut short"):
        dataset[[0]]


def test_unknown_windowing_and_a_stride_without_meaning_are_refused():
    with pytest.raises(ValueError, match="'packed', 'wrapped', 'windows' or 'documents', but got 'sliding'"):
        table_of([5], 4, "sliding")
    for windowing in ("wrapped", "documents"):
        with pytest.raises(ValueError, match=f"'packed' and 'windows', but got stride=2 for '{windowing}'"):
            table_of([5], 4, windowing, stride=2)


def test_padded_rows_of_several_documents_are_refused():
    for windowing in ("packed", "wrapped"):
        dataset = dataset_of([5, 3], 8, windowing)
        with pytest.raises(ValueError, match=f"windowing='{windowing}' puts several into a row. Use layout='packed'"):
            RowDataset(dataset.store, dataset.table, 0, layout="padded")


@pytest.mark.parametrize("row", [-2, 1])
def test_rows_that_are_not_there_are_refused(row):
    with pytest.raises(IndexError, match=rf"lie in 0..0, or are -1 for an empty row, but got {row}"):
        dataset_of([5], 8, "packed")[[row]]


@pytest.mark.parametrize(
    ("model_type", "windowing", "layout"),
    [
        ("gpt2", "packed", "packed"),
        ("gpt2", "packed", "padding_free"),
        ("gpt2", "wrapped", "packed"),
        ("llama", "packed", "packed"),
    ],
)
def test_packed_loss_and_gradients_equal_those_of_separate_segments(model_type, windowing, layout):
    """In float64 for GPT-2; Llama's norms and rotary tables are float32 inside."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    special = {"bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 32}
    llama = {"intermediate_size": 48} if model_type == "llama" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **small, **special, **llama))
    model.double().eval()
    dataset = dataset_of([5, 9, 3, 14, 7], 16, windowing)
    dataset = RowDataset(dataset.store, dataset.table, 0, layout=layout)
    batch = dataset[list(range(len(dataset)))]
    assert len(batch["input_ids"]) < 5
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    packed = token_cross_entropy(logits, batch["labels"])
    packed.total.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    total, count = 0.0, 0
    for row in range(len(dataset)):
        for start, length, num_context in dataset.table.segments(row):
            ids = torch.tensor(dataset.store.tokens[start : start + length].astype(np.int64))[None]
            labels = ids.clone()
            labels[:, :num_context] = -100
            loss = token_cross_entropy(model(input_ids=ids, use_cache=False).logits, labels)
            loss.total.backward()
            total, count = total + loss.total.item(), count + int(loss.num_tokens)
    tolerance = 1e-12 if model_type == "gpt2" else 1e-6
    assert int(packed.num_tokens) == count == sum([5, 9, 3, 14, 7]) - 5
    assert packed.total.item() == pytest.approx(total, rel=tolerance)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert (gradient - parameter.grad).norm() <= tolerance * max(float(parameter.grad.norm()), 1e-3)
