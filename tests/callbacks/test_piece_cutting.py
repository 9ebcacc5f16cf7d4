"""Batches of any kind are cut along their rows, packed ones between documents, and refused where nobody knows how."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import dataset_of, pad_rows, ragged_rows
from torch import Tensor
from transformers import BatchEncoding, DataCollatorWithFlattening

from lightning_llm.callbacks.pieces.cutting import BatchCutter
from lightning_llm.callbacks.pieces.rows import CannotSplit, fresh, take_rows

Pair = namedtuple("Pair", ["x", "names"])


@dataclass
class Example:
    x: Tensor
    extra: Any = None


def cut(batch, limit, **options):
    cutter = BatchCutter(**options)
    return cutter.cut(cutter.whole(batch), lambda length: limit)


X = torch.arange(12).reshape(4, 3)
KINDS = {
    "tensor": (X, lambda b: b),
    "dict": ({"x": X, "scale": 0.5, "name": "a", "none": None}, lambda b: b["x"]),
    "ordered dict": (OrderedDict(x=X), lambda b: b["x"]),
    "BatchEncoding": (BatchEncoding({"x": X}), lambda b: b["x"]),
    "tuple": ((X, torch.arange(4)), lambda b: b[0]),
    "list": ([X, torch.arange(4)], lambda b: b[0]),
    "named tuple": (Pair(X, ["a", "b", "c", "d"]), lambda b: b.x),
    "dataclass": (Example(X, {"deep": [X, X]}), lambda b: b.extra["deep"][1]),
    "nested": ({"inputs": {"x": X}, "targets": (X, torch.tensor(1.0))}, lambda b: b["inputs"]["x"]),
    "numpy": ({"x": X, "y": np.arange(4)}, lambda b: b["x"]),
    "ragged list": ({"x": X, "boxes": [torch.zeros(n, 4) for n in (1, 5, 2, 3)]}, lambda b: b["x"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_batch_is_cut_into_its_own_kind_with_each_row_once(kind):
    batch, rows_of = KINDS[kind]
    pieces = cut(batch, limit=3)
    assert len(pieces) == 4
    assert all(type(piece.batch) is type(batch) for piece in pieces)
    assert torch.equal(torch.cat([rows_of(piece.batch) for piece in pieces]), X)
    assert sum(piece.num_rows for piece in pieces) == 4


def test_lists_with_an_entry_per_row_follow_their_rows():
    batch = {"x": X, "names": ["a", "b", "c", "d"], "boxes": [torch.zeros(n, 4) for n in (1, 5, 2, 3)]}
    first, second = cut(batch, limit=6)
    assert first.batch["names"] == ["a", "b"]
    assert [len(box) for box in second.batch["boxes"]] == [2, 3]
    picked = take_rows(batch, torch.tensor([3, 0]), 4)
    assert picked["names"] == ["d", "a"]
    assert [len(box) for box in picked["boxes"]] == [3, 1]


@pytest.mark.parametrize(
    ("batch", "entry"),
    [
        ({"x": X, "shared": torch.zeros(1, 3)}, r"batch\['shared'\] has shape \(1, 3\)"),
        ({"x": X, "graph": object()}, r"batch\['graph'\] has type object"),
        ({"x": X, "names": ["a", "b"]}, r"batch\['names'\] has 2 entries"),
        ((X, {"y": [torch.zeros(4), torch.zeros(3)]}), r"batch\[1\]\['y'\]\[1\] has shape \(3,\)"),
        ({"x": X[:2], "pair": (X[:2], X[:2])}, r"batch\['pair'\].*two ways"),
    ],
)
def test_what_cannot_be_cut_is_named_and_split_fn_asked_for(batch, entry):
    with pytest.raises(CannotSplit, match=f"{entry}.*split_fn"):
        cut(batch, limit=3)


def test_a_batch_without_tensors_asks_for_split_fn():
    with pytest.raises(CannotSplit, match="holds none.*split_fn"):
        BatchCutter().halve(BatchCutter().whole("text"))


def test_split_fn_and_cost_fn_decide_for_batches_that_are_not_rows():
    batch = {"graph": list(range(10))}
    pieces = cut(
        batch,
        limit=3,
        split_fn=lambda b, n: [{"graph": part.tolist()} for part in np.array_split(b["graph"], n)],
        cost_fn=lambda b: len(b["graph"]),
    )
    assert [node for piece in pieces for node in piece.batch["graph"]] == list(range(10))
    assert all(piece.cost <= 3 for piece in pieces)


def test_right_padding_is_trimmed_and_nothing_that_counts_is():
    rows = ragged_rows(8, seed=1)
    batch = pad_rows(rows)
    pieces = cut(batch, limit=40)
    seen = 0
    for piece in pieces:
        mask = piece.batch["attention_mask"]
        assert mask.shape == piece.batch["input_ids"].shape == piece.batch["labels"].shape
        assert mask.any(0).all()  # no column of padding alone
        for ids, used in zip(piece.batch["input_ids"], mask.sum(1), strict=True):
            assert torch.equal(ids[:used], rows[seen]["input_ids"])
            seen += 1
    assert seen == 8
    untrimmed = cut(batch, limit=40, trim_padding=False)
    assert all(piece.batch["input_ids"].shape[1] == batch["input_ids"].shape[1] for piece in untrimmed)


def test_left_padding_and_unknown_entries_of_the_same_shape_are_not_trimmed():
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    left = cut({"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": mask}, limit=4)
    assert [piece.batch["input_ids"].shape for piece in left] == [(1, 4), (1, 4)]
    right = {
        "input_ids": torch.ones(2, 4, dtype=torch.long),
        "attention_mask": mask.flip(1),
        "image": torch.zeros(2, 4),
    }
    assert [piece.batch["image"].shape for piece in cut(right, limit=4)] == [(1, 4), (1, 4)]


def test_a_target_on_a_padded_position_is_kept():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    labels = torch.tensor([[1, 2, -100, -100], [1, 2, 3, -100]])
    pieces = cut({"input_ids": labels.clamp(min=0), "attention_mask": mask, "labels": labels}, limit=4)
    assert [piece.batch["labels"].shape[1] for piece in pieces] == [2, 3]


def test_sorting_puts_rows_of_similar_length_together_and_loses_none():
    rows = ragged_rows(16, seed=4)
    batch = {**pad_rows(rows), "number": torch.arange(16)}
    plain, sorted_ = cut(batch, 60), cut(batch, 60, sort_by_length=True)
    assert sorted(torch.cat([piece.batch["number"] for piece in sorted_]).tolist()) == list(range(16))
    assert sum(piece.cost for piece in sorted_) < sum(piece.cost for piece in plain)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    limit=st.integers(1, 60),
    sort=st.booleans(),
    trim=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_pieces_hold_each_row_once_and_keep_to_the_limit(lengths, limit, sort, trim):
    rows = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in lengths]
    batch = {**pad_rows(rows), "number": torch.arange(len(rows))}
    pieces = cut(batch, limit, sort_by_length=sort, trim_padding=trim)
    numbers = torch.cat([piece.batch["number"] for piece in pieces]).tolist()
    assert sorted(numbers) == list(range(len(rows)))
    assert sort or numbers == list(range(len(rows)))
    for piece in pieces:
        assert piece.cost <= limit or len(piece.batch["number"]) == 1
        assert piece.cost == piece.batch["input_ids"].numel()


@given(number=st.integers(1, 9), rows=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_as_many_pieces_as_other_ranks_need_or_as_there_are_rows(number, rows):
    cutter = BatchCutter()
    pieces = cutter.at_least([cutter.whole({"x": torch.arange(rows)})], number)
    assert len(pieces) == max(min(number, rows), 1)
    assert torch.cat([piece.batch["x"] for piece in pieces]).tolist() == list(range(rows))


def test_a_packed_row_is_cut_between_its_documents():
    dataset = dataset_of([5, 7, 3], max_length=16, windowing="packed")
    batch = dataset[[0]]
    (whole,) = cut(batch, limit=16)
    pieces = cut(batch, limit=8)
    assert len(pieces) > 1
    for key in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([piece.batch[key] for piece in pieces], 1), whole.batch[key])
    assert all(piece.batch["position_ids"][0, 0] == 0 for piece in pieces)
    assert sum(piece.num_rows for piece in pieces) == pytest.approx(1)


def test_flattened_rows_are_cut_between_documents_with_their_boundaries():
    rows = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in (4, 2, 6, 3)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate(rows)
    pieces = cut(batch, limit=7)
    expected = [collate(rows[0:2]), collate(rows[2:3]), collate(rows[3:4])]
    assert len(pieces) == 3
    for piece, other in zip(pieces, expected, strict=True):
        for key, value in other.items():
            if key == "seq_idx":
                continue  # numbers documents from the row's first one
            same = torch.equal(piece.batch[key], value) if isinstance(value, Tensor) else piece.batch[key] == value
            assert same, key


def test_a_target_at_a_documents_start_forbids_the_cut_there():
    batch = {"input_ids": torch.ones(1, 6, dtype=torch.long), "labels": torch.ones(1, 6, dtype=torch.long)}
    batch["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(CannotSplit, match="target at a document's first token"):
        cut(batch, limit=3)


def test_a_single_document_stays_whole():
    batch = {"input_ids": torch.ones(1, 6, dtype=torch.long), "position_ids": torch.arange(6)[None]}
    assert len(cut(batch, limit=3)) == 1


def test_pieces_of_rows_in_order_are_views_not_copies():
    pieces = cut({"x": X}, limit=6)
    assert pieces[1].batch["x"].data_ptr() == X[2:].data_ptr()


def test_without_labels_nothing_is_trimmed_as_the_loss_may_be_made_of_anything():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    ids = torch.ones(2, 4, dtype=torch.long)
    assert [p.batch["input_ids"].shape[1] for p in cut({"input_ids": ids, "attention_mask": mask}, limit=4)] == [4, 4]
    labels = torch.tensor([0, 1])
    (piece,) = cut({"input_ids": ids, "attention_mask": mask, "labels": labels}, limit=4)
    assert piece.batch["input_ids"].shape == (2, 2)


def test_a_decoder_s_columns_are_kept_by_its_own_mask():
    mask, ids = torch.tensor([[1, 1, 0, 0]] * 2), torch.ones(2, 4, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1]), "decoder_input_ids": ids}
    assert [piece.batch["decoder_input_ids"].shape[1] for piece in cut(batch, limit=4)] == [4, 4]
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 0]] * 2)
    assert [piece.batch["decoder_input_ids"].shape[1] for piece in cut(batch, limit=4)] == [3, 3]


def test_lists_of_equally_long_rows_are_cut_between_rows():
    pieces = cut({"input_ids": [torch.arange(4)] * 3}, limit=1)
    assert [[len(row) for row in piece.batch["input_ids"]] for piece in pieces] == [[4], [4], [4]]
    images = cut({"image": [torch.zeros(3, 2, 2)] * 8}, limit=4)
    assert [len(piece.batch["image"]) for piece in images] == [4, 4]
    assert images[0].batch["image"][0].shape == (3, 2, 2)
    with pytest.raises(CannotSplit, match="list of mappings"):
        cut([{"input_ids": torch.arange(4)}] * 3, limit=1)
    with pytest.raises(CannotSplit, match=r"batch\[1\] has shape \(5,\)"):
        cut((torch.zeros(2, 3), torch.zeros(5)), limit=3)


def test_entries_of_a_packed_row_are_cut_with_their_documents_or_refused():
    batch = {"input_ids": torch.ones(1, 6, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    batch |= {"documents": ["a", "b"], "weights": np.arange(6)[None], "row_ids": torch.tensor([7]), "name": "x"}
    first, second = cut(batch, limit=3)
    assert (first.batch["documents"], second.batch["documents"]) == (["a"], ["b"])
    assert second.batch["weights"].tolist() == [[3, 4, 5]]
    assert second.batch["row_ids"].tolist() == [7]
    with pytest.raises(CannotSplit, match=r"batch\['more'\] has type dict"):
        cut({**batch, "more": {"w": torch.ones(1, 6)}}, limit=3)


def test_fields_that_a_dataclass_makes_itself_are_cut_too():
    @dataclass
    class Made:
        x: Tensor
        twice: Tensor = field(init=False)

        def __post_init__(self):
            self.twice = 2 * self.x

    pieces = cut(Made(X), limit=6)
    assert torch.equal(torch.cat([piece.batch.twice for piece in pieces]), 2 * X)


def test_an_empty_batch_is_one_piece():
    assert len(BatchCutter().halve(BatchCutter().whole({"x": torch.zeros(0, 3)}))) == 1


def test_split_fn_without_tensors_asks_for_cost_fn():
    cutter = BatchCutter(split_fn=lambda batch, number: [batch[:1], batch[1:]])
    with pytest.raises(CannotSplit, match="cost_fn"):
        cutter.halve(cutter.whole(["a", "b"]))


def test_containers_are_made_anew_and_tensors_are_not_copied():
    batch = {"x": X, "deep": [Pair(X, ["a"]), {"y": X}]}
    again = fresh(batch)
    again["deep"][1].pop("y")
    again.pop("x")
    assert batch["x"] is X
    assert batch["deep"][1]["y"] is X


# ---- windows of documents: all of a document in one piece ---------------------------------------------------------


def windows_of_documents(counts, widths, columns=8):
    """Documents with so many windows, each of so many tokens; entries for windows and for documents."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    used = torch.tensor(widths)[ids]
    mask = (torch.arange(columns) < used[:, None]).long()
    number = torch.arange(len(ids))
    return {
        "labels": torch.arange(len(counts) * 3).reshape(-1, 3),
        "input_ids": mask * (number[:, None] + 1),
        "attention_mask": mask,
        "new_token_mask": mask,
        "document_ids": ids,
        "num_input_tokens": used,
        "row_ids": torch.arange(len(counts)) + 100,
        "names": [f"d{number}" for number in range(len(counts))],
        "scale": 0.5,
    }


@given(
    documents=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 8)), min_size=1, max_size=9),
    limit=st.integers(1, 80),
    trim=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_all_windows_of_a_document_are_in_one_piece(documents, limit, trim):
    counts, widths = zip(*documents, strict=True)
    batch = windows_of_documents(list(counts), list(widths))
    cutter = BatchCutter(trim_padding=trim)
    whole = cutter.whole(batch)
    assert (whole.num_rows, whole.cost) == (len(counts), 8 * sum(counts))
    pieces = cutter.cut(whole, lambda length: limit)
    seen = []
    for piece in pieces:
        part = piece.batch
        ids = part["document_ids"]
        assert ids.unique().tolist() == list(range(len(part["labels"])))
        assert piece.num_rows == len(part["labels"]) == len(part["row_ids"]) == len(part["names"])
        assert piece.cost == part["input_ids"].numel()
        assert piece.cost <= limit or len(part["labels"]) == 1
        assert part["attention_mask"].sum(1).tolist() == part["num_input_tokens"].tolist()
        for number, document in enumerate((part["row_ids"] - 100).tolist()):
            assert int((ids == number).sum()) == counts[document]
            assert part["labels"][number].tolist() == batch["labels"][document].tolist()
            assert part["input_ids"][ids == number].max() - 1 < sum(counts[: document + 1])
        seen += (part["row_ids"] - 100).tolist()
    assert seen == list(range(len(counts)))
    halves = cutter.halve(whole)
    assert len(halves) == min(len(counts), 2)
    assert sum(len(half.batch["document_ids"]) for half in halves) == sum(counts)


def test_labels_of_documents_are_no_columns_where_each_has_one_window():
    batch = windows_of_documents([1, 1], [1, 1])
    batch = {**batch, "input_ids": batch["input_ids"][:, :1], "attention_mask": batch["attention_mask"][:, :1]}
    batch["new_token_mask"] = batch["new_token_mask"][:, :1]
    assert batch["labels"].shape[1] > 1
    assert BatchCutter().whole(batch).cost == 2


def test_documents_are_taken_in_any_order_with_their_windows():
    batch = windows_of_documents([2, 1, 3], [4, 8, 2])
    taken = take_rows(batch, torch.tensor([2, 0, 2]), 3)
    assert taken["document_ids"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert taken["input_ids"].amax(1).tolist() == [4, 5, 6, 1, 2, 4, 5, 6]
    assert taken["row_ids"].tolist() == [102, 100, 102]
    with pytest.raises(CannotSplit, match="rows, but batch\\['other'\\] has shape"):
        take_rows({**batch, "other": torch.zeros(5)}, slice(0, 2), 3)
