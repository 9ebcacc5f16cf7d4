"""Test data without targets: they are predicted as those with targets are, and not measured."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from record_windows import BERT, QUESTIONS, WORDS

from lightning_llm import LLMModule
from lightning_llm.datamodules import (
    ImageClassificationDataModule,
    QuestionAnsweringDataModule,
    Seq2SeqDataModule,
    TextClassificationDataModule,
    TokenClassificationDataModule,
)

BART = {
    "model_type": "bart",
    "vocab_size": 258,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
       "intermediate_size": 32, "image_size": 16, "patch_size": 8}  # fmt: skip
TEXTS = [{"text": f"text {number}" * 3, "label": ["bad", "good"][number % 2]} for number in range(8)]
SEVERAL = [{"text": row["text"], "a": number % 2, "b": 1} for number, row in enumerate(TEXTS)]
NUMBERS = [{**row, "label": float(number)} for number, row in enumerate(TEXTS)]
SPANS = [{"text": "in New York", "entities": [[3, 11, "LOC"]]}, {"text": "nowhere", "entities": []}] * 4
PAIRS = [{"source": f"text {number}", "target": f"Text {number}"} for number in range(8)]
WRITES = {"generate": {"max_new_tokens": 4}}
SHORT = {"max_length": 12}

CASES = {
    "one class": (TextClassificationDataModule, TEXTS, ["label"], SHORT, BERT, {}),
    "one class, windows": (
        TextClassificationDataModule,
        TEXTS,
        ["label"],
        {**SHORT, "long_texts": "windows"},
        BERT,
        {},
    ),
    "some classes": (
        *(TextClassificationDataModule, SEVERAL, ["a", "b"]),
        *({"label_column": ["a", "b"], "problem_type": "multi_label_classification"}, BERT),
        {"problem_type": "multi_label_classification"},
    ),
    "a number": (TextClassificationDataModule, NUMBERS, ["label"], {"problem_type": "regression"}, BERT, {}),
    "tags": (TokenClassificationDataModule, WORDS, ["ner_tags"], {}, BERT, {}),
    "tags, windows": (TokenClassificationDataModule, WORDS, ["ner_tags"], {**SHORT, "long_texts": "windows"}, BERT, {}),
    "spans": (TokenClassificationDataModule, SPANS, ["entities"], {"text_column": "text"}, BERT, {}),
    "answers": (QuestionAnsweringDataModule, QUESTIONS, ["answers"], {"max_length": 32, "doc_stride": 8}, BERT, {}),
    "translations": (Seq2SeqDataModule, PAIRS, ["target"], {}, BART, WRITES),
}
TASKS = {
    TextClassificationDataModule: "sequence-classification",
    TokenClassificationDataModule: "token-classification",
    QuestionAnsweringDataModule: "question-answering",
    Seq2SeqDataModule: "seq2seq",
}


def without(rows, columns):
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_rows_without_targets_are_predicted_as_those_with_them(quiet_trainer, tmp_path, case):
    kind, rows, targets, options, model, task_options = CASES[case]
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(map(json.dumps, without(rows, targets))))
    defaults = {"tokenizer": "bytes", "validation_fraction": 0, "cache_dir": str(tmp_path / "cache")}
    found = []
    for test_data in (rows, str(path)):
        data = kind(rows, test_data=test_data, **defaults, **options)
        torch.manual_seed(0)
        module = LLMModule(dict(model), TASKS[kind], task_options=task_options)
        found.append(quiet_trainer().predict(module, data))
    labelled, unlabelled = found
    assert len(labelled) == len(unlabelled) > 0
    for one, two in zip(labelled, unlabelled, strict=True):
        names = one.keys() - {"nll", "num_tokens", "example_ids"}
        assert names == two.keys() - {"nll", "num_tokens", "example_ids"}
        for name in names:
            values = (one[name], two[name])
            assert torch.equal(*values) if isinstance(one[name], torch.Tensor) else values[0] == values[1], name
    for batch in data.test_dataloader():
        if "labels" in batch:
            assert ((batch["labels"] == -100) | batch["labels"].isnan()).all()
        else:
            assert (batch["start_positions"] >= batch["input_ids"].shape[1]).all()
    with pytest.raises(ValueError, match=rf"test.jsonl has no column '{targets[0]}'.*nothing to measure .* predicted"):
        quiet_trainer().test(module, data)


def test_images_without_a_label_are_predicted(quiet_trainer, tmp_path):
    rows = []
    for number in range(4):
        image = Image.fromarray(np.full((16, 16, 3), 60 * number, np.uint8))
        image.save(tmp_path / f"{number}.png")
        rows.append({"image": str(tmp_path / f"{number}.png"), "label": ["dark", "light"][number // 2]})
    options = {"image_size": 16, "validation_fraction": 0, "cache_dir": str(tmp_path / "cache")}
    data = ImageClassificationDataModule(rows, test_data=without(rows, ["label"]), **options)
    outputs = quiet_trainer().predict(LLMModule(dict(VIT), "image-classification"), data)
    assert len(outputs[0]["predictions"]) == 4


def test_rows_to_learn_from_need_their_targets(tmp_path):
    options = {"tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")}
    bare = without(TEXTS, ["label"])
    for given in ({"data": bare}, {"data": TEXTS, "validation_data": bare}):
        with pytest.raises(ValueError, match="has no column 'label'"):
            TextClassificationDataModule(**given, **options).prepare_data()
    with pytest.raises(ValueError, match="has no column 'text'"):
        TextClassificationDataModule(TEXTS, test_data=without(TEXTS, ["label", "text"]), **options).prepare_data()
    some = [TEXTS[0], bare[1]]  # a column that a row leaves empty is an error as ever
    with pytest.raises(ValueError, match="row 1"):
        TextClassificationDataModule(TEXTS, test_data=some, **options).prepare_data()
    half = without(SEVERAL, ["b"])
    with pytest.raises(ValueError, match="has no column 'b'"):
        TextClassificationDataModule(
            SEVERAL, test_data=half, label_column=["a", "b"], problem_type="multi_label_classification", **options
        ).prepare_data()
    with pytest.raises(ValueError, match="nothing to measure"):
        data = QuestionAnsweringDataModule(QUESTIONS, test_data=without(QUESTIONS, ["answers"]), **options)
        data.score_answers({row["id"]: "" for row in QUESTIONS}, "test")
