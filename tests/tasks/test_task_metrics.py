"""Metrics of heads equal scikit-learn's and scipy's on all rows, however these come: in batches, in pieces."""

import numpy as np
import pytest
import torch
from task_models import CASES, TAGS, batch_of, padded
from torch.utils.data import DataLoader

from lightning_llm.callbacks import DynamicBatchScaler
from lightning_llm.tasks.metrics import SpanMetrics, spans_of

sklearn = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


def truth_of(case, module, batch):
    """From one forward of all rows."""
    with torch.no_grad():
        output = module.model(**{key: value for key, value in batch.items() if key != "row_ids"})
    found = {"loss": output.loss.item()}
    if case.task == "question-answering":
        start, end = output.start_logits.argmax(-1), output.end_logits.argmax(-1)
        is_in = batch["start_positions"] < output.start_logits.shape[1]
        starts, ends = (start == batch["start_positions"])[is_in], (end == batch["end_positions"])[is_in]
        names = {"start_accuracy": starts, "end_accuracy": ends, "exact_match": starts & ends}
        return found | {name: right.double().mean().item() for name, right in names.items()}
    logits, labels = output.logits, batch["labels"]
    if case.task in ("masked-lm", "seq2seq"):
        right = (logits.argmax(-1) == labels)[labels != -100]
        return found | {"perplexity": np.exp(found["loss"]), "accuracy": right.double().mean().item()}
    if module.config.problem_type == "regression":
        x, y = logits.flatten().numpy(), labels.flatten().numpy()
        return found | {"mse": found["loss"], "pearson": stats.pearsonr(x, y)[0], "spearman": stats.spearmanr(x, y)[0]}
    if module.config.problem_type == "multi_label_classification":
        predicted, labels = (logits > 0).long().numpy(), labels.long().numpy()
        name = "exact_match"
    else:
        is_target = labels != -100
        predicted, labels = logits.argmax(-1)[is_target].numpy(), labels[is_target].numpy()
        name = "accuracy"
    f1 = sklearn.f1_score(labels, predicted, average="macro", zero_division=0)
    return found | {name: sklearn.accuracy_score(labels, predicted), "f1": f1}


def make_some_right(module, rows):
    """A random model of many classes is never right by itself."""
    with torch.no_grad():
        likeliest = module.task.outputs(module.model, batch_of(rows)).argmax(-1)
    for row, best in zip(rows, likeliest, strict=True):
        is_last = (row["labels"] != -100) & (row["labels"].roll(-1) == -100)  # the decoder does not read it again
        row["labels"] = best.where(is_last, row["labels"])


SOME = ["masked-lm, bert", "seq2seq, bart", "one class", "some classes", "a number", "tokens", "answers, bert"]


@pytest.mark.parametrize("name", [*SOME, "images", "audio"])
def test_metrics_are_those_of_all_rows_at_once(quiet_trainer, name):
    case = CASES[name]
    module, rows = case.module().eval(), padded(case.rows(23))
    if case.task in ("masked-lm", "seq2seq"):
        make_some_right(module, rows)
    truth = truth_of(case, module, batch_of(rows))
    scaler = DynamicBatchScaler(max_piece=3, cost_fn=lambda batch: len(batch["row_ids"]))
    for callbacks in ([], [scaler]):
        logged = quiet_trainer(callbacks=callbacks).validate(module, DataLoader(rows, 5), verbose=False)[0]
        for key, value in truth.items():
            assert logged[f"val/{key}"] == pytest.approx(value, rel=2e-6, abs=1e-7), key
    assert 0 < truth.get("accuracy", 0.5) < 1


def test_spans_are_those_of_conll():
    assert spans_of(["O", "B-PER", "I-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER"]) == [
        ("PER", 1, 4),
        ("LOC", 5, 6),
        ("LOC", 6, 7),
        ("PER", 7, 8),
    ]
    assert spans_of(["S-LOC", "S-LOC", "B-PER", "E-PER", "I-PER"]) == [
        ("LOC", 0, 1), ("LOC", 1, 2), ("PER", 2, 4), ("PER", 4, 5),
    ]  # fmt: skip
    assert spans_of([]) == spans_of(["O", "O"]) == []


def test_span_f1_counts_whole_spans_only():
    metric = SpanMetrics(TAGS)
    target = torch.tensor([[1, 2, 0, 3, -100], [0, 1, -100, 2, 0]])  # PER LOC | PER, over a word's second token
    preds = torch.tensor([[1, 2, 0, 1, 1], [0, 1, 0, 2, 0]])  # the first right, the second of another kind; right
    metric.update(preds, target)
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == {"span_precision": 2 / 3, "span_recall": 2 / 3, "span_f1": 2 / 3}


def test_sums_of_metrics_stay_exact_in_a_bfloat16_model():
    module = CASES["a number"].module(dtype="float32")
    before = {name: value.dtype for name, value in module.val_metrics["mse"].metric_state.items()}
    module.to(torch.bfloat16)
    assert module.val_metrics["means" if "means" in module.val_metrics else "loss"].sums.dtype == torch.float64
    assert {name: value.dtype for name, value in module.val_metrics["mse"].metric_state.items()} == before
