"""What prediction gives for each row, and refusals that name what is wrong."""

import pytest
import torch
from task_models import BERT, CASES, LLAMA, TAGS, batch_of, padded
from torch.utils.data import DataLoader
from transformers import AutoConfig

from lightning_llm import LLMModule
from lightning_llm.callbacks import DynamicBatchScaler


def without_targets(row):
    return {key: value for key, value in row.items() if key not in ("labels", "start_positions", "end_positions")}


def predicted(make_trainer, module, rows, **options):
    batches = make_trainer(**options).predict(module, DataLoader(rows, 5))
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


EXPECTED = {
    "masked-lm, bert": {"predictions": (9, 12)},
    "one class": {"logits": (9, 3), "probabilities": (9, 3), "predictions": (9,)},
    "some classes": {"logits": (9, 4), "probabilities": (9, 4), "predictions": (9, 4)},
    "a number": {"values": (9,)},
    "numbers": {"values": (9, 3)},
    "tokens": {"probabilities": (9, 12, 5), "predictions": (9, 12)},
    "answers, bert": {"start_logits": (9, 12), "end_logits": (9, 12), "starts": (9,), "ends": (9,), "scores": (9,)},
    "images": {"logits": (9, 3), "probabilities": (9, 3), "predictions": (9,)},
    "audio": {"logits": (9, 3), "probabilities": (9, 3), "predictions": (9,)},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_without_labels_are_predicted_each_by_its_id_in_pieces_too(quiet_trainer, name):
    case = CASES[name]
    module, rows = case.module(), [without_targets(row) for row in padded(case.rows(9))]
    found = predicted(quiet_trainer, module, rows)
    assert {key: tuple(value.shape) for key, value in found.items() if key != "row_ids"} == EXPECTED[name]
    assert found["row_ids"].tolist() == list(range(100, 109))
    scaler = DynamicBatchScaler(max_piece=2, cost_fn=lambda batch: len(batch["row_ids"]))
    pieces = predicted(quiet_trainer, module, rows, callbacks=[scaler])
    for key, value in found.items():
        assert torch.allclose(pieces[key].double(), value.double(), rtol=1e-10), key
    if "probabilities" in found and name != "some classes":
        assert torch.allclose(found["probabilities"].sum(-1), torch.ones((), dtype=torch.float64))


def test_an_answer_is_the_likeliest_pair_within_the_row():
    case = CASES["answers, bert"]
    module, batch = case.module().eval(), batch_of(case.rows(5))
    found = module.predict_step(batch, 0)
    for row in range(5):
        length = int(batch["attention_mask"][row].sum())
        first, last = (found[f"{name}_logits"][row, :length].softmax(0) for name in ("start", "end"))
        pairs = {(a, b): float(first[a] * last[b]) for a in range(length) for b in range(a, length)}
        best = max(pairs, key=pairs.get)
        assert (int(found["starts"][row]), int(found["ends"][row])) == best
        assert float(found["scores"][row]) == pytest.approx(pairs[best], rel=1e-9)


@pytest.mark.parametrize("name", ["masked-lm, bert", "seq2seq, bart"])
def test_language_models_score_rows_that_have_labels(name):
    case = CASES[name]
    module, batch = case.module(), batch_of(case.rows(4))
    scores, loss = module.predict_step(batch, 0), module.task.loss(module.model, batch)
    assert scores["nll"].sum().item() == pytest.approx(loss.total.item(), rel=1e-12)
    assert scores["num_tokens"].sum() == loss.num_tokens


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one class", "tokens", "masked-lm, bert", "seq2seq, t5", "images"])
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_a_label_outside_the_classes_names_its_row(name, step):
    case = CASES[name]
    module, batch = case.module(), batch_of(case.rows(4))
    batch["labels"][2].view(-1)[0] = 77
    with pytest.raises(ValueError, match=r"row 2 of the batch \(row_id 102\).* has 77"):
        getattr(module, step)(batch, 0)


def test_labels_are_looked_into_on_the_host_before_they_go_to_a_device(monkeypatch):
    case = CASES["one class"]
    module, batch = case.module(), batch_of(case.rows(4))
    monkeypatch.setattr(type(module), "device", torch.device("cuda"))
    batch["labels"][3] = -1
    with pytest.raises(ValueError, match=r"row_id 103.* has -1"):
        module._on_before_batch_transfer(batch)


def test_lightning_calls_what_looks_into_labels_before_each_transfer(quiet_trainer):
    case, seen = CASES["one class"], []
    module = case.module()
    inner = module._on_before_batch_transfer
    module._on_before_batch_transfer = lambda batch, *rest, **more: seen.append(batch) or inner(batch, *rest, **more)
    quiet_trainer(max_epochs=1).fit(module, DataLoader(padded(case.rows(6)), 2))
    assert len(seen) == 3


@pytest.mark.parametrize("name", CASES)
def test_a_batch_without_targets_or_without_input_says_what_it_needs(name):
    case = CASES[name]
    module, batch = case.module(), batch_of(case.rows(3))
    with pytest.raises(KeyError, match=f"A {case.task} batch needs `.*but got the keys"):
        module.training_step(without_targets(batch), 0)
    inputs = ("input_ids", "pixel_values", "input_values")
    with pytest.raises(KeyError, match=f"A {case.task} batch needs `(input_ids|pixel_values|input_values)`"):
        module.training_step({key: value for key, value in batch.items() if key not in inputs}, 0)


def test_labels_of_another_kind_name_the_problem_type():
    case = CASES["one class"]
    module, batch = case.module(), batch_of(case.rows(4))
    with pytest.raises(ValueError, match="'multi_label_classification'"):
        module.training_step({**batch, "labels": torch.rand(4, 3)}, 0)
    with pytest.raises(ValueError, match="'regression'"):
        module.training_step({**batch, "labels": torch.rand(4)}, 0)
    several = CASES["some classes"].module()
    with pytest.raises(ValueError, match="with 4 labels have as many values a row"):
        several.training_step({**batch, "labels": torch.rand(4, 3)}, 0)
    with pytest.raises(ValueError, match=r"0\.\.1, but row 1"):
        several.training_step({**batch, "labels": torch.tensor([[0.0] * 4, [0, 3.0, 0, 0], [0] * 4, [1] * 4])}, 0)


def test_arguments_of_other_tasks_are_refused_with_the_alternative():
    for options in ({"sequence_window": 8}, {"sequence_window": "auto"}, {"context_parallel": True}):
        with pytest.raises(ValueError, match="cuts rows of the task 'causal-lm'.*gradient_checkpointing"):
            LLMModule(BERT, "masked-lm", **options)
    with pytest.raises(ValueError, match="'masked-lm' takes 'chunked' or 'plain'"):
        LLMModule(BERT, "masked-lm", loss_kernel="cce")
    with pytest.raises(ValueError, match="takes problem_type, but got problem"):
        LLMModule(BERT, "sequence-classification", task_options={"problem": 1})
    with pytest.raises(ValueError, match="it takes none, but got generate"):
        LLMModule(LLAMA, task_options={"generate": True})
    with pytest.raises(ValueError, match="must be one of causal-lm, masked-lm"):
        LLMModule(BERT, "fill-mask")
    with pytest.raises(ValueError, match="'masked-lm' has none"):
        LLMModule(BERT, "masked-lm", labels=3)
    with pytest.raises(ValueError, match="`generate` is for causal-lm and seq2seq"):
        LLMModule(BERT, "masked-lm").generate(torch.ones(1, 2).long())
    with pytest.raises(ValueError, match="Plans choose between ways to train decoders"):
        LLMModule(BERT, "masked-lm").plan(16, "1GB")


def test_packed_batches_are_refused_where_documents_would_see_each_other():
    case = CASES["masked-lm, bert"]
    module, batch = case.module(), batch_of(case.rows(2))
    length = batch["input_ids"].shape[1]
    ordinary = torch.arange(length).expand(2, -1)
    module.training_step({**batch, "position_ids": ordinary}, 0)
    with pytest.raises(ValueError, match="one document a row, but this batch is packed"):
        module.training_step({**batch, "attention_mask": None, "position_ids": ordinary % 4}, 0)


def test_roberta_has_fewer_positions_than_its_configuration_says():
    module = CASES["masked-lm, roberta"].module().float()
    ids = torch.full((1, 39), 5)
    module.training_step({"input_ids": ids[:, :38], "labels": ids[:, :38]}, 0)
    with pytest.raises(ValueError, match="has 38 positions"):
        module.training_step({"input_ids": ids, "labels": ids}, 0)


# ---- labels ----------------------------------------------------------------------------------------------------------


class Names:
    """What a data module tells of labels."""

    def __init__(self, *names, problem_type=None):
        self.label_names = list(names)
        self.problem_type = problem_type


def test_classes_come_from_the_argument_the_data_or_the_configuration():
    module = LLMModule(BERT, "token-classification", labels=TAGS)
    assert module.config.num_labels == 5
    assert module.config.id2label[1] == "B-PER"
    assert module.config.label2id["I-LOC"] == 4
    module = LLMModule(BERT, "sequence-classification")
    module.task.configure(module.config, None, datamodule=Names("a", "b", "c"))
    assert module.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert module.config.problem_type == "single_label_classification"
    module.task.configure(module.config, 3, datamodule=Names("a", "b", "c", problem_type="multi_label_classification"))
    assert module.config.problem_type == "multi_label_classification"
    module.task.configure(module.config, None, datamodule=Names("score"))
    assert module.config.problem_type == "regression"
    config = AutoConfig.for_model(**BERT, num_labels=2, id2label={0: "no", 1: "yes"})
    assert LLMModule(config, "sequence-classification").config.id2label == {0: "no", 1: "yes"}
    assert LLMModule(config, "sequence-classification", labels=2).config.id2label == {0: "no", 1: "yes"}


def test_classes_that_disagree_are_refused():
    module = LLMModule(BERT, "sequence-classification", labels=["a", "b"])
    with pytest.raises(ValueError, match="would mean another class"):
        module.task.configure(module.config, ["a", "b"], datamodule=Names("b", "a"))
    with pytest.raises(ValueError, match="must be names that differ"):
        LLMModule(BERT, "sequence-classification", labels=["a", "a"])
    with pytest.raises(ValueError, match="a list of names, or how many"):
        LLMModule(BERT, "sequence-classification", labels=0)
    built = CASES["one class"].module().model
    with pytest.raises(ValueError, match="a head of 3 classes, but there are 4 labels"):
        LLMModule(built, "sequence-classification", labels=4)
