"""What prediction gives for each row, and refusals that name what is wrong."""

import pytest
import torch
from task_models import BART, BERT, CASES, LLAMA, TAGS, batch_of, padded
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
    with pytest.raises(ValueError, match="Give each row the number of its class"):
        module.training_step({**batch, "labels": torch.zeros(4, 1).long()}, 0)
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
    with pytest.raises(ValueError, match="takes problem_type, pooling, but got problem"):
        LLMModule(BERT, "sequence-classification", task_options={"problem": 1})
    for option in ({"num_return_sequences": 2}, {"return_dict_in_generate": True}):
        with pytest.raises(ValueError, match="Each row gets one text.*leave"):
            LLMModule(BART, "seq2seq", task_options={"generate": option})
    with pytest.raises(ValueError, match="it takes none, but got generate"):
        LLMModule(LLAMA, task_options={"generate": True})
    with pytest.raises(ValueError, match="must be one of causal-lm, masked-lm"):
        LLMModule(BERT, "fill-mask")
    with pytest.raises(ValueError, match="'masked-lm' has none"):
        LLMModule(BERT, "masked-lm", labels=3)
    with pytest.raises(ValueError, match="`generate` is for causal-lm, dpo and seq2seq"):
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
    module.training_step({"input_ids": ids[:, :38], "labels": ids[:, :38] + 1}, 0)
    with pytest.raises(ValueError, match="has 38 positions"):
        module.training_step({"input_ids": ids, "labels": ids + 1}, 0)


@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2"])
def test_deberta_that_reads_distances_alone_takes_rows_of_any_length(model_type):
    sizes = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    module = LLMModule({**BERT, "model_type": model_type, **sizes}, "sequence-classification", labels=2)
    module.configure_model()
    ids = torch.full((2, 60), 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}
    assert module.training_step(batch, 0)["loss"].isfinite()
    other = LLMModule({**BERT, "model_type": model_type, "position_biased_input": True}, "sequence-classification")
    with pytest.raises(ValueError, match="has 40 positions"):
        other.task.check(batch, other.config)


def test_masked_lm_refuses_batches_in_which_nothing_is_hidden():
    module = CASES["masked-lm, bert"].module()
    ids = torch.arange(10, 34).view(2, 12)
    labels = ids.clone()
    with pytest.raises(ValueError, match=r"No token is hidden.*mlm=True"):
        module.training_step({"input_ids": ids, "labels": labels}, 0)
    hidden = ids.clone()
    hidden[1, 3] = 4
    module.training_step({"input_ids": hidden, "labels": labels}, 0)
    few = labels.masked_fill(torch.arange(12) > 3, -100)  # by chance they may stand in sight
    module.training_step({"input_ids": ids, "labels": few}, 0)


def test_a_built_model_with_the_head_of_another_task_is_refused_for_a_single_row_too():
    built = CASES["masked-lm, bert"].module().model
    module = LLMModule(built, "sequence-classification")
    for rows in (1, 3):
        batch = {"input_ids": torch.full((rows, 8), 5), "labels": torch.zeros(rows).long()}
        with pytest.raises(ValueError, match="has the head of another task"):
            module.training_step(batch, 0)


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


def test_a_number_that_becomes_classes_and_classes_that_become_a_number_change_the_problem():
    def problem_of(labels, **fields):
        module = LLMModule({**BERT, **fields}, "sequence-classification", labels=labels)
        assert module.task.problem_type == module.config.problem_type
        return module.task.problem_type

    number = {"num_labels": 1, "problem_type": "regression"}
    classes = {"num_labels": 3, "problem_type": "single_label_classification"}
    assert problem_of(None, **number) == problem_of(1, **number) == problem_of(1, **classes) == "regression"
    assert problem_of(3, **number) == problem_of(5, **classes) == "single_label_classification"
    assert problem_of(3, num_labels=2, problem_type="regression") == "regression"
    several = {"num_labels": 3, "problem_type": "multi_label_classification"}
    assert problem_of(1, **several) == problem_of(5, **several) == "multi_label_classification"
    module = LLMModule({**BERT, **number}, "sequence-classification")
    module.task.configure(module.config, None, datamodule=Names("bad", "good"))  # known only with the data
    assert module.task.problem_type == "single_label_classification"
    module.task.configure(module.config, None, datamodule=Names("bad", "good"))
    assert module.task.problem_type == "single_label_classification"


def test_classes_in_another_order_than_the_models_are_told(recwarn):
    config = {**BERT, "id2label": {0: "bad", 1: "fair", 2: "good"}}
    for labels in (None, 3, ["bad", "fair", "good"], ["x", "y", "z"]):
        LLMModule(config, "sequence-classification", labels=labels)
    assert not any("in the order" in str(warning.message) for warning in recwarn)
    with pytest.warns(UserWarning, match="in the order.*bad.*fair.*good.*another class"):
        LLMModule(config, "sequence-classification", labels=["good", "fair", "bad"])


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
