"""TokenClassificationDataModule: tags of words and spans of characters as labels of tokens."""

import json

import datasets
import pytest
import torch
from example_training import largest_difference, step_gradients
from transformers import BertTokenizerFast

from lightning_llm import LLMModule
from lightning_llm.datamodules import TokenClassificationDataModule

BERT = {
    "model_type": "bert",
    "vocab_size": 258,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
WORDS = [
    {"tokens": ["Ada", "Lovelace", "left", "London", "."], "ner_tags": ["B-PER", "I-PER", "O", "B-LOC", "O"]},
    {"tokens": ["New", "York", "sleeps"], "ner_tags": ["B-LOC", "I-LOC", "O"]},
    {"tokens": ["nothing"], "ner_tags": ["O"]},
] * 8
SPANS = [
    {"text": "Ada Lovelace left  London.", "entities": [{"start": 0, "end": 12, "label": "PER"}, [19, 25, "LOC"]]},
    {"text": "New York sleeps", "entities": [{"start": 0, "end": 8, "label": "LOC", "text": "New York"}]},
    {"text": "nothing", "entities": []},
] * 8


@pytest.fixture
def make(tmp_path):
    def make(data=WORDS, **options):
        defaults = {"tokenizer": "bytes", "max_length": 32, "micro_batch_size": 4, "validation_fraction": 0}
        return TokenClassificationDataModule(data, **{**defaults, "cache_dir": str(tmp_path / "cache"), **options})

    return make


@pytest.fixture
def word_pieces(tmp_path):
    vocab = tmp_path / "vocab.txt"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.", "##a", "##o", "lo", "##ve"]
    vocab.write_text("\n".join([*pieces, "##la", "##ce", "ada", "left", "new", "london", "york"]))
    return BertTokenizerFast(str(vocab))


def row(data, number=0):
    data.setup("fit")
    return {name: column[0].tolist() for name, column in data._dataset("train")[[number]].items()}


@pytest.mark.parametrize("label_all_tokens", [False, True])
def test_labels_of_words_are_those_of_transformers_own_example(make, word_pieces, label_all_tokens):
    """Against words that the tokenizer splits itself, aligned by its ``word_ids``."""
    data = make(tokenizer=word_pieces, label_all_tokens=label_all_tokens)
    assert data.label_names == TAGS
    for number, record in enumerate(WORDS[:3]):
        encoding = word_pieces(record["tokens"], is_split_into_words=True)
        labels, before = [], None
        for word in encoding.word_ids():
            if word is None or (word == before and not label_all_tokens):
                labels.append(-100)
            else:
                tag = record["ner_tags"][word]
                labels.append(TAGS.index("I" + tag[1:] if word == before and tag != "O" else tag))
            before = word
        found = row(data, number)
        assert found["input_ids"] == encoding["input_ids"]
        assert found["labels"] == labels
    assert len(row(data)["labels"]) > len(WORDS[0]["tokens"]) + 2  # a word has several tokens


def test_bytes_of_words_and_blanks(make):
    found = row(make([{"tokens": ["é", "b"], "ner_tags": ["B-X", "O"]}]))
    assert found["labels"] == [1, -100, -100, 0]  # two bytes, a blank that no word has, a byte


def test_tokens_of_spans_are_labelled_to_their_end(make):
    found = row(make(SPANS, text_column="text"))
    text = SPANS[0]["text"]
    expected = ["O"] * len(text)
    for start, end, kind in [(0, 12, "PER"), (19, 25, "LOC")]:
        expected[start:end] = ["B-" + kind] + ["I-" + kind] * (end - start - 1)
    assert [TAGS[label] for label in found["labels"]] == expected


def test_tags_come_as_numbers_names_texts_and_files(make, tmp_path):
    expected = row(make())["labels"]
    numbers = [{**each, "ner_tags": [TAGS.index(tag) for tag in each["ner_tags"]]} for each in WORDS]
    assert row(make(numbers, labels=TAGS))["labels"] == expected
    named = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "ner_tags": datasets.Sequence(datasets.ClassLabel(names=TAGS)),
        }
    )
    data = make(datasets.Dataset.from_list(numbers, features=named))
    assert row(data)["labels"] == expected
    assert data.label_names == TAGS
    csv = "".join(f"{' '.join(each['tokens'])},{' '.join(each['ner_tags'])}\n" for each in WORDS)
    (tmp_path / "words.csv").write_text("tokens,ner_tags\n" + csv)
    assert row(make(str(tmp_path / "words.csv")))["labels"] == expected
    spans = [{"text": each["text"], "entities": json.dumps(each["entities"])} for each in SPANS]
    assert row(make(spans, text_column="text"))["labels"] == row(make(SPANS, text_column="text"))["labels"]


def test_kinds_of_spans_may_be_named(make):
    assert make(SPANS, text_column="text").label_names == TAGS
    assert make(SPANS, text_column="text", labels=["PER", "LOC"]).label_names[1] == "B-PER"
    assert make(SPANS, text_column="text", labels=TAGS).label_names == TAGS


def test_what_is_cut_is_said(make):
    with pytest.warns(UserWarning, match="8 of 24 rows of the data are longer than max_length=16, and"):
        found = row(make(max_length=16, labels=TAGS))
    assert len(found["labels"]) == len(found["input_ids"]) == 16


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"tokens": ["a", "b"], "ner_tags": ["O"]}],
            {},
            "column 'ner_tags' should hold a tag for each of 2 words, but has 1",
        ),
        ([{"tokens": ["a"], "ner_tags": None}], {}, "should hold a tag for each word, but holds nothing"),
        ([{"tokens": [], "ner_tags": []}], {"labels": TAGS}, r"should hold the words of the row, .* but holds \[\]"),
        (
            [{"tokens": ["a", 3], "ner_tags": ["O", "O"]}],
            {},
            r"should hold the words of the row, .* but holds \['a', 3\]",
        ),
        ([{"tokens": ["a"], "ner_tags": ["B-ORG"]}], {"labels": TAGS}, "holds 'B-ORG', which is none of the 5 classes"),
        ([{"tokens": ["a"], "ner_tags": [7]}], {"labels": TAGS}, "holds 7, which is none of the 5 classes"),
        ([{"words": ["a"]}], {}, "no column 'tokens' and no column 'ner_tags'; .*tokens_column=..., tags_column=..."),
    ],
)
def test_bad_words_and_tags_are_named(make, rows, options, message):
    good = [] if "words" in rows[0] else WORDS[:1]
    with pytest.raises(ValueError, match=rf"the data, row {len(good)}.*{message}"):
        make([*good, *rows], **options).setup("fit")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (None, "should hold a list of spans, each with `start`, `end` .* but holds nothing"),
        ("[oops", "should hold a list of spans"),
        ([{"start": 0, "end": 2}], "should hold spans with `start`, `end` .*`label`, but has {'start': 0, 'end': 2}"),
        ([{"start": "0", "end": 2, "label": "PER"}], "should hold spans with"),
        ([[0, 99, "PER"]], r"the span \(0, 99, 'PER'\) .* does not lie in the text, which has 12 characters"),
        ([[3, 3, "PER"]], "does not lie in the text"),
        ([[-1, 3, "PER"]], "does not lie in the text"),
        ([[0, 5, "PER"], [4, 8, "LOC"]], r"spans \(0, 5, 'PER'\) and \(4, 8, 'LOC'\) .* share characters"),
        ([{"start": 4, "end": 7, "label": "PER", "text": "Ada"}], "should be 'Ada', but there the text reads 'was'"),
        ([[0, 3, "ORG"]], "holds 'B-ORG', which is none of the 5 classes"),
    ],
)
def test_bad_spans_are_named(make, spans, message):
    rows = [*SPANS, {"text": "Ada was here", "entities": spans}]
    with pytest.raises(ValueError, match=f"the data, row 24: .*{message}"):
        make(rows, text_column="text", labels=TAGS).setup("fit")


def test_a_kind_without_a_row_is_named_and_a_rare_tag_is_not(make):
    rare = [each for each in WORDS if each["tokens"][0] != "New"]  # no I-LOC
    make(rare, labels=TAGS).setup("fit")
    with pytest.raises(ValueError, match="has the class 'B-ORG', 'I-ORG' in its column 'ner_tags'"):
        make(labels=[*TAGS, "B-ORG", "I-ORG"]).setup("fit")
    make(labels=[*TAGS, "B-ORG", "I-ORG"], allow_empty_classes=True).setup("fit")


def test_slow_tokenizers_are_refused(make):
    from transformers import CanineTokenizer

    with pytest.raises(ValueError, match=r"Expected a fast tokenizer .* but got CanineTokenizer"):
        make(tokenizer=CanineTokenizer()).setup("fit")


@pytest.mark.parametrize("options", [{}, {"data": SPANS, "text_column": "text"}])
def test_a_model_trains_on_them_and_validates_spans(make, quiet_trainer, options):
    torch.manual_seed(0)
    trainer = quiet_trainer(max_steps=60, val_check_interval=6, check_val_every_n_epoch=None)
    data = make(**options, validation_data=(options or {"data": WORDS})["data"])
    trainer.fit(LLMModule(BERT, "token-classification", learning_rate=3e-2, warmup=0), data)
    assert trainer.callback_metrics["val/span_f1"] > 0.8


def test_a_ragged_cut_of_the_global_batch_does_not_change_the_gradient(make, tmp_path):
    def gradients(micro_batches, weighted=True):
        torch.manual_seed(0)
        module = LLMModule(BERT, "token-classification")
        return step_gradients(tmp_path, module, make(global_batch_size=10), micro_batches, weighted=weighted)

    whole = gradients(1)
    assert largest_difference(gradients(3), whole) < 1e-12
    assert largest_difference(gradients(3, weighted=False), whole) > 1e-3  # a mean of means
