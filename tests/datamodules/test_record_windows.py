"""Windows of records: each token decided once, answers and spans measured and predicted as wholes, on any ranks."""

import json
from copy import deepcopy

import pytest
import torch
from example_training import batches_of_ranks, largest_difference, step_gradients
from record_windows import BERT, QUESTIONS, TAGS, WORDS, WORDWISE, answers_data, tokens_data, word_tokenizer

from lightning_llm import LLMModule
from lightning_llm.cli import write_predictions
from lightning_llm.tasks.merging import merged_tokens
from lightning_llm.tasks.metrics import SpanMetrics

SPANS = [
    {
        "text": " ".join(row["tokens"]),
        "entities": [[len(" ".join(row["tokens"])) - len(row["tokens"][-1]), len(" ".join(row["tokens"])), "LOC"]],
    }
    for row in WORDS
]


@pytest.fixture
def tokens(tmp_path):
    return lambda data=WORDS, **options: tokens_data(tmp_path / "cache", data, **options)


@pytest.fixture
def answers(tmp_path):
    return lambda data=QUESTIONS, **options: answers_data(tmp_path / "cache", data, **options)


def module_of(task, **options):
    torch.manual_seed(0)
    settings = {"dtype": "float64", "learning_rate": 3e-2, "warmup": 0, **options}
    return LLMModule(dict(BERT), task, **settings)


def lines_of(trainer):
    return [json.loads(line) for line in write_predictions(trainer).read_text().splitlines()]


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "column"), [(WORDS, None), (SPANS, "text")])
@pytest.mark.parametrize("overlap", [0, 5])
def test_each_token_is_a_target_in_one_window(tokens, data, column, overlap):
    whole = tokens(data, text_column=column, max_length=500, long_texts="cut", overlap=0)
    parts = tokens(data, text_column=column, overlap=overlap)
    for each in (whole, parts):
        each.setup("fit")
    rows = parts._dataset("train")
    assert len(rows) > 2 * len(data)
    batch = rows[list(range(len(rows)))]
    for name, outside in (("input_ids", None), ("labels", -100)):
        found = merged_tokens(batch["example_ids"], batch["token_positions"], batch[name])
        for number in range(len(data)):
            assert found[number].tolist() == whole._dataset("train")[[number]][name][0].tolist(), (name, number)
        if outside is not None:
            assert (batch[name][batch["token_positions"] < 0] == outside).all()
    places = [(int(e), int(p)) for e, row in zip(batch["example_ids"], batch["token_positions"], strict=True)
              for p in row[row >= 0]]  # fmt: skip
    assert len(places) == len(set(places)) == sum(len(" ".join(row["tokens"])) for row in WORDS)


def test_the_summed_loss_does_not_depend_on_the_cut(tokens, tmp_path):
    module, data = module_of("token-classification", labels=TAGS), tokens(batching="rows")
    data.setup("fit")
    module.configure_model()
    module.eval()
    rows, sums = data._dataset("train"), []
    for size in (1, 3, len(rows)):
        batches = [rows[list(range(first, min(first + size, len(rows))))] for first in range(0, len(rows), size)]
        losses = [module.task.loss(module.model, batch) for batch in [*batches, rows[[-1]]]]
        sums.append((sum(loss.total.item() for loss in losses), sum(int(loss.num_tokens) for loss in losses)))
    assert sums[1] == pytest.approx(sums[0], rel=1e-12)
    assert sums[2] == pytest.approx(sums[0], rel=1e-12)
    assert sums[0][1] == sum(len(row["tokens"]) for row in WORDS)

    def gradients(micro_batches, weighted=True):
        module = module_of("token-classification", labels=TAGS, dtype=None)
        return step_gradients(tmp_path, module, tokens(global_batch_size=10), micro_batches, weighted=weighted)

    whole = gradients(1)
    assert largest_difference(gradients(3), whole) < 1e-12
    assert largest_difference(gradients(3, weighted=False), whole) > 1e-3  # the control: a mean of means


def test_documents_that_fit_are_measured_as_without_windows(tokens, quiet_trainer):
    found = {}
    for how in ("cut", "windows"):
        module = module_of("token-classification", labels=TAGS)
        data = tokens(validation_data=WORDS, max_length=200, long_texts=how, overlap=0)
        found[how] = quiet_trainer().validate(module, data, verbose=False)[0]
    assert found["windows"] == pytest.approx(found["cut"], rel=1e-12)
    assert found["cut"]["val/span_recall"] > 0


@pytest.mark.parametrize("size", [1, 4])
def test_spans_are_those_of_whole_documents(tokens, quiet_trainer, size):
    module, data = module_of("token-classification", labels=TAGS), tokens(eval_micro_batch_size=size, test_data=WORDS)
    quiet_trainer(max_steps=4, limit_val_batches=0).fit(module, data)
    trainer = quiet_trainer()
    found = trainer.test(module, data, verbose=False)[0]
    assert 0 < found["test/span_f1"] < 1
    rows = data._dataset("test")
    labels = rows[list(range(len(rows)))]
    wanted = merged_tokens(labels["example_ids"], labels["token_positions"], labels["labels"])
    outputs = trainer.predict(module, data)
    whole, torn = SpanMetrics(TAGS), SpanMetrics(TAGS)
    preds = {}
    for output in outputs:
        for example, places, classes in zip(
            output["example_ids"], output["token_positions"], output["predictions"], strict=True
        ):
            known = places >= 0
            part = merged_tokens(example[None], places[None], classes[None])
            if len(part):
                preds.setdefault(int(example), {}).update(
                    dict(zip(places[known].tolist(), classes[known].tolist(), strict=True))
                )
                target = wanted[int(example)][places[known]]
                torn.update(classes[known][None], target[None])
    for example, classes in preds.items():
        ordered = torch.tensor([classes[place] for place in sorted(classes)])
        whole.update(ordered[None], wanted[example][None])
    for name, value in whole.compute().items():
        assert found[f"test/{name}"] == pytest.approx(value.item(), rel=1e-6)
    assert torn.counts.tolist() != whole.counts.tolist()  # the control: spans cut between windows


def test_a_tagger_of_long_documents_trains_and_predicts_their_words(tokens, quiet_trainer):
    trainer = quiet_trainer(max_steps=80, val_check_interval=8, check_val_every_n_epoch=None)
    data = tokens(validation_data=WORDS, test_data=WORDS, num_workers=0)
    trainer.fit(module_of("token-classification", dtype=None), data)
    assert trainer.callback_metrics["val/span_f1"] > 0.8
    trainer.predict(trainer.lightning_module, data)
    lines = lines_of(trainer)
    assert [line["tokens"] for line in lines] == [row["tokens"] for row in WORDS]
    right = [line["tags"] == row["ner_tags"] for line, row in zip(lines, WORDS, strict=True)]
    assert sum(right) > 0.7 * len(WORDS)
    assert lines[0]["id"] == "the test data, row 0"


def test_texts_are_predicted_by_their_entities(tokens):
    data = tokens(SPANS, text_column="text", validation_data=SPANS[:3])
    text = SPANS[5]["text"]
    start, end, _ = SPANS[5]["entities"][0]
    tags = ["O"] * len(text)
    tags[start:end] = ["B-LOC", *["I-LOC"] * (end - start - 1)]
    entities = data.described(5, tags)["entities"]
    assert entities == [{"start": start, "end": end, "label": "LOC", "text": text[start:end]}]
    assert data.record_of(len(SPANS) + 2)[0] == SPANS[2]  # of the validation data
    with pytest.raises(IndexError, match="no example 99999"):
        data.record_of(99999)


def test_ranks_without_a_row_left_add_nothing(tokens):
    ranks = batches_of_ranks(lambda: tokens(WORDS[:1], labels=TAGS), 4)
    last = [batches[-1] for batches in ranks]
    empty = [batch for batch in last if (batch["row_ids"] == -1).any()]
    assert empty
    for batch in empty:
        is_empty = batch["row_ids"] == -1
        assert (batch["example_ids"][is_empty] == -1).all()
        assert (batch["token_positions"][is_empty] == -1).all()
        assert (batch["labels"][is_empty] == -100).all()


def test_what_does_not_fit_is_refused(tokens):
    with pytest.raises(ValueError, match="`long_texts` must be 'cut' or 'windows', but got 'split'"):
        tokens(long_texts="split")
    with pytest.raises(ValueError, match="`overlap` is for long_texts='windows', but got 'cut'"):
        tokens(long_texts="cut", overlap=3)
    with pytest.raises(ValueError, match="`overlap` must leave room for a new token"):
        tokens(max_length=8, overlap=8).setup("fit")
    with pytest.warns(UserWarning, match="or read them whole with long_texts='windows'"):
        tokens(long_texts="cut", overlap=0).setup("fit")


# ---- questions ------------------------------------------------------------------------------------------------------


def scores_of_predictions(trainer, module, data, **options):
    """As before there were metrics of whole questions: from the logits of all windows."""
    outputs = trainer.predict(module, data)
    columns = [
        [row for output in outputs for row in output[name]] for name in ("row_ids", "start_logits", "end_logits")
    ]
    found = data.best_answers(*columns, "test", **options)
    return data.score_answers(found, "test"), found


@pytest.mark.parametrize("threshold", [None, 0.0])
@pytest.mark.parametrize("own", [False, True])
def test_questions_are_measured_as_their_answers_are_scored(answers, quiet_trainer, threshold, own):
    given = {"validation_data": QUESTIONS[:9], "test_data": QUESTIONS[5:]} if own else {"validation_fraction": 0.4}
    module = module_of("question-answering", task_options={"null_score_threshold": threshold})
    data = answers(tokenizer=word_tokenizer("[CLS] $A [SEP] $B [SEP]"), **WORDWISE, **given)
    trainer = quiet_trainer(max_steps=30, limit_val_batches=0)
    trainer.fit(module, data)
    trainer = quiet_trainer()
    found = {**trainer.validate(module, data, verbose=False)[0], **trainer.test(module, data, verbose=False)[0]}
    scores, texts = scores_of_predictions(trainer, module, data, null_score_threshold=threshold)
    for name, value in scores.items():
        assert found[f"test/answer_{name}"] == pytest.approx(value, rel=1e-6)
    assert own == (found["val/answer_f1"] != found["test/answer_f1"])
    assert 0 < scores["f1"] < 1
    lines = lines_of(trainer)
    assert {line["id"]: line["answer"] for line in lines} == {name: each.text for name, each in texts.items()}
    contexts = {row["id"]: row["context"] for row in QUESTIONS}
    for line in lines:
        assert contexts[line["id"]][line["begin"] : line["end"]] == line["answer"]
        assert line["score"] == pytest.approx(texts[line["id"]].score)


def test_no_answer_stands_where_the_tokenizer_says(answers, quiet_trainer):
    data = answers(tokenizer=word_tokenizer("$A [SEP] $B [SEP] [CLS]"), **WORDWISE, validation_fraction=0.4)
    module = module_of("question-answering", task_options={"null_score_threshold": 0.0})
    quiet_trainer(max_steps=10, limit_val_batches=0).fit(module, data)
    batch = next(iter(data.val_dataloader()))
    at = batch["input_ids"].gather(1, batch["null_positions"][:, None])
    assert (at == data.tokenizer.cls_token_id).all()
    assert (batch["null_positions"] > 0).all()
    trainer = quiet_trainer()
    answered = scores_of_predictions(trainer, module, data)[1].values()
    threshold = sorted(each.null_score - each.score for each in answered)[len(answered) // 2] - 1e-9
    module.task.null_score_threshold = threshold
    found = trainer.validate(module, data, verbose=False)[0]
    scores, texts = scores_of_predictions(trainer, module, data, null_score_threshold=threshold)
    assert found["val/answer_f1"] == pytest.approx(scores["f1"], rel=1e-6)
    assert 0 < sum(not answer.text for answer in texts.values()) < len(texts)
    without = [
        {name: value for name, value in each.items() if name != "null_positions"} for each in data.val_dataloader()
    ]
    wrong = module.task.metrics()
    module.eval()
    for each in without:
        module.task.evaluate(module.model, each, wrong)
    assert wrong.compute()["answer_f1"].item() != pytest.approx(scores["f1"])  # the control: the first token


def test_a_copy_of_the_metrics_does_not_copy_the_data(answers, quiet_trainer):
    module, data = module_of("question-answering"), answers(validation_fraction=0.4)
    quiet_trainer().validate(module, data, verbose=False)
    assert deepcopy(module.task)._data() is data
    assert deepcopy(module.val_metrics)["answers"].context_of(0) == QUESTIONS[0]["context"]


def test_two_ranks_measure_documents_and_questions_as_one(run_ranks):
    for rank in run_ranks("record_windows_ranks", 2):
        for task, metric in (("tokens", "val/span_f1"), ("answers", "val/answer_f1")):
            # the softmax over places goes over padding too, so that the loss of answers depends on the batch
            names = [name for name in rank[task]["found"] if task == "tokens" or "answer" in name]
            for name in names:
                assert rank[task]["found"][name] == pytest.approx(rank[task]["true"][name], rel=1e-6), name
            assert 0 < rank[task]["found"][metric] < 1
            assert rank[task]["torn"], "the windows of some record lie on both ranks"
