"""Windows: each token is new exactly once, nothing is lost, and a tokenizer's own windows are the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.datamodules.tokenizer import byte_tokenizer
from lightning_llm.datamodules.windows import window_table

LENGTHS = st.lists(st.integers(0, 200), max_size=20)


@given(lengths=LENGTHS, max_length=st.integers(1, 64), data=st.data(), right_align=st.booleans())
def test_each_token_is_new_in_exactly_one_window_and_no_window_overflows(lengths, max_length, data, right_align):
    stride = data.draw(st.integers(1, max_length))
    table = window_table(lengths, max_length, stride, right_align=right_align)
    new = [np.zeros(length, int) for length in lengths]
    for document, start, length, num_context in zip(*table, strict=True):
        assert 1 <= length <= max_length
        assert 0 <= num_context < length
        assert start >= 0
        assert start + length <= lengths[document]
        new[document][start + num_context : start + length] += 1
    assert all((count == 1).all() for count in new)


@given(lengths=LENGTHS, max_length=st.integers(2, 64))
def test_default_stride_makes_every_token_but_the_first_a_target(lengths, max_length):
    table = window_table(lengths, max_length)
    targets = sum(
        int(length - max(context, 1)) for length, context in zip(table.length, table.num_context, strict=True)
    )
    assert targets == sum(max(length - 1, 0) for length in lengths)


@given(length=st.integers(1, 300), max_length=st.integers(1, 64), data=st.data())
def test_right_aligned_windows_of_a_long_document_are_all_full(length, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    table = window_table([length], max_length, stride)
    assert set(table.length.tolist()) == {min(length, max_length)}
    assert table.start[-1] + table.length[-1] == length


@given(lengths=LENGTHS, max_length=st.integers(1, 64), data=st.data(), right_align=st.booleans())
def test_every_window_but_a_documents_first_has_the_context_that_the_stride_leaves(
    lengths, max_length, data, right_align
):
    stride = data.draw(st.integers(1, max_length))
    table = window_table(lengths, max_length, stride, right_align=right_align)
    is_first = np.append(True, np.diff(table.document) > 0)[: len(table.document)]
    assert (table.num_context[is_first] == 0).all()
    assert (table.start[is_first] == 0).all()
    context = table.num_context[~is_first]
    assert (context >= max_length - stride).all()
    assert right_align or (context == max_length - stride).all()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), max_length=st.integers(1, 20), data=st.data())
def test_windows_equal_a_fast_tokenizers_overflowing_ones(tokenizer, lengths, max_length, data):
    """Its ``stride`` is our overlap; its last window starts where the stride puts it, and is shorter."""
    overlap = data.draw(st.integers(0, max_length - 1))
    texts = ["".join(chr(97 + (place * 7 + length) % 26) for place in range(length)) for length in lengths]
    options = {"return_overflowing_tokens": True, "return_attention_mask": False, "add_special_tokens": False}
    theirs = tokenizer(texts, truncation=True, max_length=max_length, stride=overlap, **options)
    table = window_table(lengths, max_length, max_length - overlap, right_align=False)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ours = [ids[d][start : start + length] for d, start, length, _ in zip(*table, strict=True)]
    assert theirs["input_ids"] == ours
    assert theirs["overflow_to_sample_mapping"] == table.document.tolist()


def test_no_document_gives_no_window():
    assert [len(column) for column in window_table([], 8)] == [0, 0, 0, 0]
    assert [len(column) for column in window_table([0, 0], 8)] == [0, 0, 0, 0]


@pytest.mark.parametrize("stride", [0, 9, -1])
def test_impossible_stride_is_refused(stride):
    with pytest.raises(ValueError, match=f"1..max_length, but got stride={stride}, max_length=8"):
        window_table([5], 8, stride)
