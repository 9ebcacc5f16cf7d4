"""Collating: the same batch as a slow one made token by token, in every layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.callbacks.pieces.documents import document_edges, take_documents
from lightning_llm.datamodules.collate import Segment, collate_rows

PAD = 77
SEGMENT = st.tuples(st.integers(1, 9), st.integers(0, 10), st.integers(0, 5))  # tokens, context, words
ROWS = st.lists(st.lists(SEGMENT, max_size=4), min_size=1, max_size=4)
ROWS_OF_ONE = st.lists(st.lists(SEGMENT, max_size=1), min_size=1, max_size=4)


def segments_of(shape):
    """Segments of distinct tokens, in the store's small type; with an odd number of words, every third is no target."""
    fresh = iter(range(100, 60_000))

    def segment(length, context, words):
        tokens = np.array([next(fresh) for _ in range(length)], np.uint16)
        labels = np.where(tokens % 3 == 0, -100, tokens.astype(np.int32)) if words % 2 else None
        return Segment(tokens, min(context, length), 1.5 * words, words, labels)

    return [[segment(*each) for each in row] for row in shape]


def naive(rows, layout, width=None):
    """One token at a time."""
    if layout == "padding_free":
        rows = [[segment for row in rows for segment in row]]
        width = max(sum(len(segment.tokens) for segment in rows[0]), 1)
    width = width or max(1, *(sum(len(segment.tokens) for segment in row) for row in rows))
    batch = {"input_ids": [], "labels": [], "position_ids": [], "attention_mask": []}
    for row in rows:
        ids, labels, positions, mask = [], [], [], []
        for segment in row:
            for place, token in enumerate(segment.tokens.tolist()):
                ids.append(token)
                is_target = segment.labels is None or token % 3 != 0
                labels.append(token if is_target and place >= segment.num_context and place > 0 else -100)
                positions.append(place)
                mask.append(1)
        for place in range(width - len(ids)):
            ids.append(PAD)
            labels.append(-100)
            positions.append(place)
            mask.append(0)
        for name, values in zip(batch, (ids, labels, positions, mask), strict=True):
            batch[name].append(values)
    return batch


def same(batch, expected, *names):
    for name in names:
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == expected[name], name


@settings(deadline=None, max_examples=60)
@given(shape=ROWS, spare=st.integers(0, 5))
def test_packed_rows_equal_those_made_token_by_token(shape, spare):
    rows = segments_of(shape)
    width = max(1, *(sum(len(segment.tokens) for segment in row) for row in rows)) + spare
    batch = collate_rows(rows, pad_token_id=PAD, layout="packed", width=width)
    same(batch, naive(rows, "packed", width), "input_ids", "labels", "position_ids")
    assert "attention_mask" not in batch
    assert batch["num_input_tokens"].tolist() == [sum(length for length, *_ in row) for row in shape]
    assert ("cu_seq_lens_q" in batch) == (len(rows) == 1)


@settings(deadline=None, max_examples=60)
@given(shape=ROWS_OF_ONE)
def test_padded_rows_equal_those_made_token_by_token(shape):
    batch = collate_rows(segments_of(shape), pad_token_id=PAD, layout="padded")
    same(batch, naive(segments_of(shape), "padded"), "input_ids", "labels", "attention_mask")
    assert not {"position_ids", "cu_seq_lens_q"} & set(batch)


@settings(deadline=None, max_examples=60)
@given(shape=ROWS)
def test_rows_without_padding_equal_those_made_token_by_token(shape):
    rows = segments_of(shape)
    batch = collate_rows(rows, pad_token_id=PAD, layout="padding_free")
    same(batch, naive(rows, "padding_free"), "input_ids", "labels", "position_ids")
    lengths = [length for row in shape for length, *_ in row]
    assert batch["num_input_tokens"].tolist() == (lengths or [0])
    assert (PAD in batch["input_ids"]) == (not lengths)


@settings(deadline=None, max_examples=60)
@given(shape=ROWS, layout=st.sampled_from(["packed", "padding_free"]))
def test_boundaries_of_a_single_row_are_where_positions_restart(shape, layout):
    rows = segments_of(shape)[:1]
    batch = collate_rows(rows, pad_token_id=PAD, layout=layout, width=45 if layout == "packed" else None)
    positions = batch["position_ids"][0]
    edges = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    for side in "qk":
        assert batch[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert batch[f"cu_seq_lens_{side}"].tolist() == edges
        assert batch[f"max_length_{side}"] == int(positions.max()) + 1
    assert all((positions[a:b] == torch.arange(b - a)).all() for a, b in zip(edges, edges[1:], strict=False))


@settings(deadline=None, max_examples=60)
@given(shape=ROWS)
def test_all_layouts_hold_the_same_tokens_and_targets(shape):
    rows = segments_of(shape)
    single = [[segment] for row in rows for segment in row] or [[]]
    packed = collate_rows(rows, pad_token_id=PAD, layout="packed")
    free = collate_rows(rows, pad_token_id=PAD, layout="padding_free")
    padded = collate_rows(single, pad_token_id=PAD, layout="padded")

    def content(batch):
        pairs = zip(batch["input_ids"].flatten().tolist(), batch["labels"].flatten().tolist(), strict=True)
        return sorted(pair for pair in pairs if pair[0] != PAD)

    assert content(packed) == content(free) == content(padded)


@settings(deadline=None, max_examples=60)
@given(shape=ROWS, layout=st.sampled_from(["packed", "padding_free"]))
def test_counts_and_ids_stand_by_row_or_by_segment(shape, layout):
    ids = np.arange(len(shape)) + 40
    batch = collate_rows(
        segments_of(shape),
        pad_token_id=PAD,
        layout=layout,
        per_row={"row_ids": ids},
        counts=["num_bytes", "num_words"],
    )
    entries = [[segment] for row in shape for segment in row] or [[]] if layout == "padding_free" else shape
    assert batch["num_words"].tolist() == [sum(words for *_, words in entry) for entry in entries]
    assert batch["num_bytes"].tolist() == [round(sum(1.5 * words for *_, words in entry)) for entry in entries]
    assert batch["num_bytes"].dtype == torch.int64
    expected = [40 + row for row, segments in enumerate(shape) for _ in segments] or [40]
    assert batch["row_ids"].tolist() == (expected if layout == "padding_free" else ids.tolist())


def test_empty_batch_without_padding_is_one_padding_token_and_no_target():
    batch = collate_rows([[], []], pad_token_id=PAD, layout="padding_free", per_row={"row_ids": np.array([-1, -1])})
    assert batch["input_ids"].tolist() == [[PAD]]
    assert batch["labels"].tolist() == [[-100]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 1]
    assert batch["num_input_tokens"].tolist() == [0]
    assert batch["row_ids"].tolist() == [-1]


def test_batch_without_padding_can_be_cut_between_its_documents():
    rows = segments_of([[(5, 0, 1), (3, 1, 2)], [], [(4, 2, 3)]])
    options = {"pad_token_id": PAD, "layout": "padding_free", "counts": ["num_words"]}
    batch = collate_rows(rows, per_row={"row_ids": np.array([4, 5, 6])}, **options)
    edges = document_edges(batch)
    assert edges == [0, 5, 8, 12]
    piece = take_documents(batch, edges, 1, 3)
    alone = collate_rows([rows[0][1:], rows[2]], per_row={"row_ids": np.array([4, 6])}, **options)
    assert piece.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(torch.as_tensor(piece[key]), torch.as_tensor(value)), key


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {"layout": "packed"}, "at least one row, but got none"),
        ([[(3, 0, 0)]], {"layout": "flat"}, "must be 'packed', 'padded' or 'padding_free', but got 'flat'"),
        ([[(3, 0, 0)]], {"layout": "padding_free", "width": 8}, "no padding and so no `width`, but got width=8"),
        ([[(3, 0, 0), (4, 0, 0)]], {"layout": "padded"}, "one segment a row.*got a row of 2. Use layout='packed'"),
        ([[(3, 0, 0), (4, 0, 0)]], {"layout": "packed", "width": 6}, "got a row of 7 with width=6"),
        ([[(3, 0, 0)], [(0, 0, 0)]], {"layout": "padding_free"}, "one token at least, but segment 1 of the batch"),
    ],
)
def test_rows_that_do_not_fit_the_layout_are_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        collate_rows(segments_of(rows), pad_token_id=PAD, **options)
