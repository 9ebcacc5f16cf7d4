"""Windows: each token is new exactly once, nothing is lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize("stride", [0, 9, -1])
def test_impossible_stride_is_refused(stride):
    with pytest.raises(ValueError, match=f"1..max_length, but got stride={stride}, max_length=8"):
        window_table([5], 8, stride)
