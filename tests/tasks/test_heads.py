"""Every head: transformers' own loss and gradient, and the same for any cut of the batch."""

import pytest
import torch
from task_models import CASES, batch_of

from lightning_llm import LLMModule

TOLERANCE = 1e-12
EVERY = pytest.mark.parametrize("name", CASES)


def gradient_of(module, value):
    module.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in module.model.parameters() if p.grad is not None])


def distance(found, truth):
    return float((found - truth).norm() / truth.norm())


def part_of(batch, rows):
    return {key: value[rows] for key, value in batch.items()}


@EVERY
def test_mean_loss_and_gradient_are_those_of_transformers(name):
    case = CASES[name]
    module, batch = case.module(), batch_of(case.rows(7))
    own = module.model(**{key: value for key, value in batch.items() if key != "row_ids"}).loss
    truth = gradient_of(module, own)
    output = module.training_step(batch, 0)
    assert own.dtype == torch.float64
    assert output["loss"].item() == pytest.approx(own.item(), rel=TOLERANCE)
    assert distance(gradient_of(module, output["loss"]), truth) < TOLERANCE


@EVERY
def test_any_cut_of_a_batch_has_its_gradient_and_a_mean_of_means_has_not(name):
    case = CASES[name]
    module, batch = case.module(), batch_of(case.rows(7))
    truth = gradient_of(module, module.training_step(batch, 0)["loss"])
    parts = [part_of(batch, slice(a, b)) for a, b in [(0, 1), (1, 3), (3, 7)]]
    losses = [module.task.loss(module.model, part) for part in parts]
    whole = module.task.loss(module.model, batch)
    assert sum(loss.num_tokens for loss in losses) == whole.num_tokens
    weighted = sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses)
    assert distance(gradient_of(module, weighted), truth) < TOLERANCE
    mean_of_means = sum(module.task.loss(module.model, part).mean for part in parts) / 3
    assert distance(gradient_of(module, mean_of_means), truth) > 1e-3


@pytest.mark.parametrize("option", ["gradient_checkpointing", "offload"])
@pytest.mark.parametrize("name", ["masked-lm, bert", "seq2seq, bart", "tokens", "answers, distilbert", "images"])
def test_recomputing_or_offloading_activations_changes_no_gradient(name, option):
    case = CASES[name]
    batch = batch_of(case.rows(5))
    plain, other = case.module(), case.module(**{option: True})
    truth, found = (gradient_of(module, module.training_step(batch, 0)["loss"]) for module in (plain, other))
    assert distance(found, truth) < TOLERANCE


ADAPTED = {"masked-lm, bert": ["query", "decoder"], "seq2seq, t5": ["q", "v"], "one class": ["query"]}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_train_with_transformers_own_loss(name):
    peft = pytest.importorskip("peft")
    case = CASES[name]
    adapted = peft.get_peft_model(case.module().model, peft.LoraConfig(r=2, target_modules=ADAPTED[name]))
    module, batch = LLMModule(adapted, case.task), batch_of(case.rows(5))
    own = adapted(**{key: value for key, value in batch.items() if key != "row_ids"}).loss
    loss = module.training_step(batch, 0)["loss"]
    assert loss.item() == pytest.approx(own.item(), rel=TOLERANCE)
    loss.backward()
    assert {name.split(".")[-2] for name, p in adapted.named_parameters() if p.grad is not None} == {"default"}


def test_answers_beyond_the_row_or_before_it_are_clamped_as_transformers_does():
    module, batch = CASES["answers, bert"].module(), batch_of(CASES["answers, bert"].rows(4))
    length = batch["input_ids"].shape[1]
    batch["start_positions"] = torch.tensor([-7, 2, length, length - 1])
    batch["end_positions"] = torch.tensor([1, length + 9, 3, length - 1])
    own = module.model(**{key: value for key, value in batch.items() if key != "row_ids"}).loss
    output = module.training_step(batch, 0)
    assert output["num_tokens"] == 6  # three starts, three ends, of different rows
    assert output["loss"].item() == pytest.approx(own.item(), rel=TOLERANCE)


def test_where_texts_are_cut_within_answers_every_cut_has_one_gradient_unlike_transformers_own():
    module, batch = CASES["answers, bert"].module(), batch_of(CASES["answers, bert"].rows(4))
    batch["start_positions"] = torch.tensor([1, 2, 3, 4])
    batch["end_positions"] = torch.tensor([400, 400, 3, 400])  # four starts, one end
    truth = gradient_of(module, module.training_step(batch, 0)["loss"])
    parts = [part_of(batch, slice(a, b)) for a, b in [(0, 1), (1, 4)]]
    losses = [module.task.loss(module.model, part) for part in parts]
    weighted = sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses)
    assert weighted.item() == pytest.approx(module.training_step(batch, 0)["loss"].item(), rel=TOLERANCE)
    assert distance(gradient_of(module, weighted), truth) < TOLERANCE
    own = module.model(**{key: value for key, value in batch.items() if key != "row_ids"}).loss
    assert abs(own.item() - weighted.item()) > 1e-3  # each start weighs a quarter of what the end does


@pytest.mark.parametrize("name", ["a number", "numbers", "some classes"])
def test_values_that_are_nan_are_no_targets(name):
    case = CASES[name]
    module, batch = case.module(), batch_of(case.rows(5))
    batch["labels"][3:] = torch.nan
    found = module.training_step(batch, 0)
    truth = module.training_step(part_of(batch, slice(0, 3)), 0)
    assert found["num_tokens"] == truth["num_tokens"] == batch["labels"][:3].numel()
    gradient = gradient_of(module, found["loss"])
    assert distance(gradient, gradient_of(module, truth["loss"])) < TOLERANCE
    for rows in (slice(3, 5), slice(0, 4), slice(0, 3)):  # no row, some, all
        module.task.evaluate(module.model, part_of(batch, rows), module.val_metrics)
    assert all(value.isfinite() for value in module.val_metrics.compute().values())
