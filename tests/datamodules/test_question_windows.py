"""Each context token belongs to one window, and a batch holds what the windows say."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.datamodules.questions.question_answering import encode_questions
from lightning_llm.datamodules.questions.question_windows import collate_question_windows, max_context_window
from lightning_llm.datamodules.tokenizer import byte_tokenizer
from lightning_llm.datamodules.windows import window_table


def owner_by_the_rule(starts, ends, token):
    """BERT's rule for one token, in exact fractions; max() takes the first of equals."""
    holding = [window for window, (start, end) in enumerate(zip(starts, ends, strict=True)) if start <= token < end]

    def score(window):
        return min(token - starts[window], ends[window] - 1 - token) + Fraction(ends[window] - starts[window], 100)

    return max(holding, key=score, default=-1)


@given(length=st.integers(1, 150), room=st.integers(1, 40), data=st.data(), right_align=st.booleans())
def test_each_token_belongs_to_the_window_with_most_context(length, room, data, right_align):
    table = window_table([length], room, data.draw(st.integers(1, room)), right_align=right_align)
    starts, ends = table.start, table.start + table.length
    owner = max_context_window(starts, ends, length)
    assert owner.tolist() == [owner_by_the_rule(starts.tolist(), ends.tolist(), token) for token in range(length)]
    assert (owner >= 0).all()


@given(windows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 300)), max_size=6))
def test_any_windows_at_all_follow_the_rule(windows):
    starts, ends = [start for start, _ in windows], [start + length for start, length in windows]
    owner = max_context_window(starts, ends, 330)
    assert owner.tolist() == [owner_by_the_rule(starts, ends, token) for token in range(330)]


def test_a_short_last_window_owns_its_end_only():
    assert max_context_window([0, 4], [8, 9], 9).tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_a_batch_holds_the_windows_asked_for():
    examples = [
        {"question": "Who?", "context": "Ann, then Bob, then Cid", "answers": {"text": ["Bob"], "answer_start": [10]}},
        {"question": "Where to?", "context": "home"},
    ]
    windows = encode_questions(examples, byte_tokenizer(), max_length=14, doc_stride=4)
    batch = collate_question_windows(windows, [4, 1, 0], pad_token_id=257)
    assert set(batch) == {
        *("input_ids", "attention_mask", "start_positions", "end_positions", "row_ids", "num_input_tokens")
    }
    assert batch["row_ids"].tolist() == [4, 1, 0]
    assert batch["num_input_tokens"].tolist() == [13, 14, 14]
    assert batch["input_ids"][0, 13:].tolist() == [257]
    assert batch["attention_mask"].sum(1).tolist() == [13, 14, 14]
    texts = [byte_tokenizer().decode(row[mask == 1].tolist()) for row, mask in zip(*_columns(batch), strict=True)]
    assert texts == ["Where to?home", "Who?hen Bob, t", "Who?Ann, then "]
    begin, end = batch["start_positions"][1], batch["end_positions"][1]
    assert byte_tokenizer().decode(batch["input_ids"][1, begin : end + 1].tolist()) == "Bob"
    assert batch["start_positions"].tolist() == [0, 4 + 4, 0]


def _columns(batch):
    return batch["input_ids"], batch["attention_mask"]


def test_windows_of_an_example_share_its_tokens():
    (window, *others) = encode_questions([{"question": "?", "context": "a" * 5000}], byte_tokenizer(), 101, 90)
    assert len(others) == 490
    assert all(other.pair is window.pair for other in others)
    assert np.concatenate([w.can_start for w in [window, *others]]).sum() == 5000
