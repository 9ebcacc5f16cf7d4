"""QuestionAnsweringDataModule: windows of contexts, answers per question, exact match and F1."""

import json

import numpy as np
import pytest
import torch

from lightning_llm import LLMModule
from lightning_llm.answer_scores import exact_match, f1, normalized
from lightning_llm.datamodules import QuestionAnsweringDataModule
from lightning_llm.datamodules.questions.scores import score_answers

BERT = {
    "model_type": "bert",
    "vocab_size": 258,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
NAMES = ["Ann", "Bob", "Eve", "Max"]


def rows_of(number):
    rows = []
    for index in range(number):
        context = "word " * (index % 7) * 2 + f"then {NAMES[index % 4]} came" + " in" * (index % 5)
        answer = {"text": [NAMES[index % 4]], "answer_start": [context.index(NAMES[index % 4])]}
        if index % 6 == 5:
            answer = {"text": [], "answer_start": []}
        rows.append({"id": f"q{index}", "question": "Who?", "context": context, "answers": answer})
    return rows


ROWS = rows_of(40)


@pytest.fixture
def make(tmp_path):
    def make(data=ROWS, **options):
        defaults = {"tokenizer": "bytes", "max_length": 32, "doc_stride": 8, "validation_fraction": 0.3}
        settings = {**defaults, "micro_batch_size": 4, "cache_dir": str(tmp_path / "cache"), **options}
        return QuestionAnsweringDataModule(data, **settings)

    return make


def test_windows_hold_each_answer_at_its_characters(make):
    data = make(validation_fraction=0)
    data.setup("fit")
    dataset = data._dataset("train")
    assert len(dataset) > len(ROWS)
    answered = set()
    for row_id in range(len(dataset)):
        batch = dataset[[row_id]]
        start, end = int(batch["start_positions"]), int(batch["end_positions"])
        record = ROWS[int(batch["example_ids"])]
        if start:
            found = data.tokenizer.decode(batch["input_ids"][0, start : end + 1])
            assert [found] == record["answers"]["text"]
            answered.add(record["id"])
    assert answered == {row["id"] for row in ROWS if row["answers"]["text"]}


def test_validation_holds_out_whole_questions(make):
    data = make()
    data.setup("fit")
    examples = [
        {number for batch in loader for number in batch["example_ids"].tolist()}
        for loader in (data.train_dataloader(), data.val_dataloader())
    ]
    assert not examples[0] & examples[1]
    assert examples[0] | examples[1] == set(range(len(ROWS)))


def test_an_empty_row_is_no_target_and_of_no_question(make):
    data = make()
    data.setup("fit")
    batch = data._dataset("train")[[-1, 0]]
    assert batch["example_ids"][0] == -1
    module = LLMModule(BERT, "question-answering")
    module.configure_model()
    with torch.no_grad():
        assert module.training_step(batch, 0)["num_tokens"] == 2


@pytest.mark.parametrize("form", ["mappings", "json", "columns", "csv", "scalar"])
def test_answers_come_in_several_forms(make, tmp_path, form):
    rows, options = [], {}
    for row in ROWS:
        pairs = list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        text, start = pairs[0] if pairs else ("", "")
        changed = {
            "mappings": {"answers": answers},
            "json": {"answers": json.dumps(row["answers"])},
            "scalar": {"answers": {"text": text, "answer_start": start} if pairs else None},
        }.get(form, {"answers": text, "at": start})
        rows.append({**row, **changed})
    if form in ("columns", "csv"):
        options["answer_start_column"] = "at"
    if form == "csv":
        path = tmp_path / "rows.csv"
        lines = [",".join(str(row[name]) for name in rows[0]) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
        rows = str(path)
    found, expected = make(rows, **options), make()
    for data in (found, expected):
        data.setup("fit")
    for row_id in range(len(expected._dataset("train"))):
        one, two = found._dataset("train")[[row_id]], expected._dataset("train")[[row_id]]
        assert all(torch.equal(one[name], two[name]) for name in two)


def oracle_logits(dataset, row_ids):
    """Certain of what is right, and of no answer less than of an answer."""
    starts, ends = [], []
    for row in row_ids:
        batch = dataset[[row]]
        pair = []
        for name in ("start_positions", "end_positions"):
            place, logits = int(batch[name]), np.zeros(batch["input_ids"].shape[1] + 3)
            logits[place] = 9.0 if place else 4.0
            pair.append(logits)
        starts.append(pair[0])
        ends.append(pair[1])
    return starts, ends


def test_answers_are_chosen_among_all_windows_of_a_question(make):
    data = make()
    data.setup("validate")
    dataset = data._dataset("validation")
    row_ids = np.random.default_rng(0).permutation(len(dataset)).tolist()
    starts, ends = oracle_logits(dataset, row_ids)
    answers = data.best_answers([*row_ids, -1], [*starts, starts[0]], [*ends, ends[0]], null_score_threshold=0.0)
    held_out = [row for row in ROWS if row["id"] in answers]
    assert 5 < len(held_out) < len(dataset)
    assert any(not row["answers"]["text"] for row in held_out)
    for row in held_out:
        assert [answers[row["id"]].text] == (row["answers"]["text"] or [""])
    assert data.score_answers(answers) == {"exact_match": 1.0, "f1": 1.0}
    wrong = {**answers, held_out[0]["id"]: "nobody"}
    assert data.score_answers(wrong)["exact_match"] == 1 - 1 / len(held_out)
    examples = dataset[row_ids]["example_ids"].tolist()
    window = next(place for place, number in enumerate(examples) if examples.count(number) > 1)
    fewer = row_ids[:window] + row_ids[window + 1 :]
    with pytest.raises(
        ValueError, match=rf"no logits of 1 rows of the validation split: \[{row_ids[window]}\]. Collect"
    ):
        data.best_answers(fewer, *oracle_logits(dataset, fewer))


def test_scores_are_squads():
    assert normalized("An apple, a day") == "apple day"
    assert exact_match("the Apple.", ["apple"]) == 1
    assert exact_match("", []) == 1
    assert exact_match("x", []) == f1("x", []) == 0
    assert f1("big red apple", ["red apple"]) == pytest.approx(0.8)
    with pytest.raises(ValueError, match=r"an answer to each of 2 questions, but 1 have none: \['b'\]"):
        score_answers({"a": "x"}, {"a": ["x"], "b": ["y"]})


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"answers": {"text": ["Bob"], "answer_start": [0]}}, {}, "the answer 'Bob' should begin at character 0, but"),
        ({"answers": {"text": ["Bob"], "answer_start": [900]}}, {}, "should begin at character 900"),
        ({"answers": {"text": ["Bob"], "answer_start": []}}, {}, "column 'answers' should hold the answers"),
        ({"answers": "Bob"}, {}, "column 'answers' should hold the answers.*answer_start_column"),
        ({"answers": [{"text": "Bob"}]}, {}, "column 'answers' should hold the answers"),
        ({"answers": 3}, {}, "column 'answers' should hold the answers"),
        ({"question": ""}, {}, "column 'question' should hold a text, but holds nothing"),
        ({"context": None}, {}, "column 'context' should hold a text, but holds nothing"),
        ({"question": "Who " * 9}, {}, "its question and the special tokens take 36 of max_length=32 tokens"),
    ],
)
def test_bad_rows_are_named(make, change, options, message):
    with pytest.raises(ValueError, match=f"the data, row 40: .*{message}"):
        make([*ROWS, {**ROWS[1], **change}], **options).setup("fit")


def test_mismatched_answers_are_left_out_if_asked(make, caplog):
    bad = {**ROWS[1], "id": "bad", "answers": {"text": ["Bob"], "answer_start": [0]}}
    data = make([*ROWS, bad], skip_mismatched=True, validation_fraction=0)
    data.setup("fit")
    assert "1 answers do not match their context and are left out" in caplog.text
    assert len(ROWS) not in np.asarray(data._dataset("train").store.values["_record"])
    with pytest.raises(ValueError, match="of the data can be used"):
        make([bad], skip_mismatched=True).setup("fit")


def test_missing_columns_are_named(make):
    with pytest.raises(
        ValueError, match=r"no column 'body'; .* question_column=..., context_column=..., answers_column"
    ):
        make(context_column="body").setup("fit")


def test_a_model_trains_on_them_and_its_predictions_are_scored(make, quiet_trainer):
    data = make()
    trainer = quiet_trainer(max_steps=10, val_check_interval=5, check_val_every_n_epoch=None)
    module = LLMModule(BERT, "question-answering", learning_rate=1e-2, warmup=0)
    trainer.fit(module, data)
    assert np.isfinite(trainer.callback_metrics["val/loss"].item())
    predictions = trainer.predict(module, data)
    columns = {
        name: [row for batch in predictions for row in batch[name]]
        for name in ("row_ids", "start_logits", "end_logits")
    }
    answers = data.best_answers(columns["row_ids"], columns["start_logits"], columns["end_logits"], "test")
    scores = data.score_answers(answers, "test")
    assert 0 <= scores["exact_match"] <= scores["f1"] <= 1
