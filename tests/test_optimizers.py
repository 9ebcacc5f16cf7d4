"""Parameter groups, and learning rates step by step."""

import pytest
import torch
from torch import nn

from lightning_llm.duration import Duration
from lightning_llm.optimizers import decay_groups, make_adamw, make_schedule


def rates(name, warmup, *, total_steps=20, tokens_per_step=100, options=None, num=None):
    """Learning rate of each step, as an optimizer would use it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    seen = [0]
    schedule = make_schedule(
        name,
        optimizer,
        total_steps=total_steps,
        warmup=Duration.parse(warmup),
        tokens_seen=lambda: seen[0],
        options=options,
    )
    values = []
    for _ in range(num or int(total_steps)):
        values.append(optimizer.param_groups[0]["lr"])
        seen[0] += tokens_per_step
        optimizer.step()
        schedule.step()
    return values


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(3, 4))
    model[0].weight.requires_grad_(True)
    model[2].weight.requires_grad_(False)
    decayed, plain = decay_groups(model.named_parameters(), 0.1)
    assert [p.ndim for p in decayed["params"]] == [2]
    assert decayed["weight_decay"] == 0.1
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert plain["weight_decay"] == 0.0


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        decay_groups(nn.Linear(2, 2).requires_grad_(False).named_parameters(), 0.1)


def test_adamw_is_fused_where_every_parameter_allows_it():
    options = {"learning_rate": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    assert make_adamw(nn.Linear(2, 2), **options).defaults["fused"] is True
    assert make_adamw(nn.Linear(2, 2, device="meta"), **options).defaults["fused"] is False


def test_linear_schedule_with_warmup_in_steps_and_as_a_share_agree():
    in_steps = rates("linear", "4 steps")
    assert in_steps[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert in_steps[-1] == pytest.approx(1 / 16)
    assert rates("linear", "20%") == in_steps


def test_warmup_in_tokens_follows_the_tokens_not_the_steps():
    assert rates("constant", "400 tokens")[:6] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates("constant", "400 tokens", tokens_per_step=200)[:4] == [0.0, 0.5, 1.0, 1.0]
    plain, warmed = rates("cosine", 0), rates("cosine", "400 tokens")
    assert warmed == pytest.approx([rate * min(1, step / 4) for step, rate in enumerate(plain)])


def test_constant_schedule_honours_the_warmup():
    assert rates("constant", "2 steps")[:4] == [0.0, 0.5, 1.0, 1.0]


def test_schedule_options_reach_the_schedule():
    assert rates("cosine_with_min_lr", 0, options={"min_lr_rate": 0.1})[-1] >= 0.1
    stable = rates("warmup_stable_decay", "2 steps", options={"num_decay_steps": 4})
    assert stable[2:16] == [1.0] * 14
    assert stable[-1] < 0.5


@pytest.mark.parametrize(
    ("name", "warmup", "total", "options", "message"),
    [
        ("cosin", 0, 20, None, "`lr_schedule` must be one of .*cosine.* but got 'cosin'"),
        ("cosine", 0, float("inf"), None, "must know how long the run is"),
        ("constant", "5%", float("inf"), None, "must know how long the run is"),
        ("cosine", "1 epoch", 20, None, "steps, tokens or as a share"),
        ("cosine", 0, 20, {"min_lr": 1}, "do not fit the schedule 'cosine'"),
        ("reduce_lr_on_plateau", "2 steps", 20, None, "has no warm-up"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(name, warmup, total, options, message):
    with pytest.raises(ValueError, match=message):
        rates(name, warmup, total_steps=total, options=options, num=1)


def test_endless_run_can_have_a_constant_rate():
    assert rates("constant", "2 steps", total_steps=float("inf"), num=4) == [0.0, 0.5, 1.0, 1.0]
