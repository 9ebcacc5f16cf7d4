"""Parameter groups, and learning rates step by step."""

import math
import sys

import pytest
import torch
from support import Positions, pad_rows
from token_training import loader, rows, weights
from torch import nn

from lightning_llm import LLMModule
from lightning_llm.duration import Duration
from lightning_llm.learning_rate import make_schedule
from lightning_llm.optimizers import decay_groups, make_adamw, make_optimizer, optimizer_class


def rates(name, warmup, *, total_steps=20, total_tokens=None, tokens_per_step=100, options=None, num=None):
    """Learning rate of each step, as an optimizer would use it; ``tokens_per_step`` may be one number for each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    seen = [0]
    schedule = make_schedule(
        name,
        optimizer,
        total_steps=total_steps,
        total_tokens=total_tokens,
        warmup=Duration.parse(warmup),
        tokens_seen=lambda: seen[0],
        options=options,
    )
    values = []
    for step in range(num or int(total_steps)):
        values.append(optimizer.param_groups[0]["lr"])
        seen[0] += tokens_per_step if isinstance(tokens_per_step, int) else tokens_per_step[step]
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


# ---- by tokens -------------------------------------------------------------------------------------------------------

GROWING = [100] * 4 + [200] * 2 + [400] * 2 + [800]  # 2400 tokens in 9 steps


@pytest.mark.parametrize("name", ["cosine", "linear", "quarter_cosine", "polynomial", "cosine_with_min_lr"])
def test_a_schedule_by_tokens_gives_each_token_the_same_rate_whatever_the_batch(name):
    options = {"min_lr_rate": 0.1} if name == "cosine_with_min_lr" else None
    even = rates(name, "600 tokens", total_tokens=2400, tokens_per_step=100, options=options, num=24)
    grown = rates(name, "600 tokens", total_tokens=2400, tokens_per_step=GROWING, options=options, num=9)
    starts = [0, 1, 2, 3, 4, 6, 8, 12, 16]  # of the growing steps, in hundreds of tokens
    assert grown == pytest.approx([even[start] for start in starts], rel=1e-12)
    by_steps = rates(name, "6 steps", total_steps=24, options=options)
    assert even == pytest.approx(by_steps, abs=1e-9)
    control = rates(name, "600 tokens", total_steps=9, tokens_per_step=GROWING, options=options)
    assert control != pytest.approx(grown, abs=0.02)


def test_a_schedule_by_tokens_stays_where_it_ended():
    assert rates("cosine", 0, total_tokens=1000, num=16)[10:] == pytest.approx([0] * 6, abs=1e-12)
    assert rates("linear", 0, total_steps=5, num=8)[5:] == [0] * 3


def test_a_schedule_by_tokens_may_warm_up_by_steps_or_a_share():
    plain, warmed = (rates("linear", warmup, total_tokens=1000, num=10) for warmup in (0, "5 steps"))
    assert warmed == pytest.approx([rate * min(1, step / 5) for step, rate in enumerate(plain)])
    share = rates("linear", "20%", total_tokens=1000, num=10)
    assert share == pytest.approx(rates("linear", "200 tokens", total_tokens=1000, num=10))
    assert share[:3] == pytest.approx([0, 0.5, 1])


def test_a_quarter_cosine_is_one():
    assert rates("quarter_cosine", 0, total_steps=4) == pytest.approx(
        [math.cos(math.pi / 8 * step) for step in range(4)]
    )
    ended = rates("quarter_cosine", "1 step", total_steps=5, num=6, options={"min_lr_rate": 0.2})
    assert ended[:2] == [0, 1]
    assert ended[-1] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="do not fit the schedule 'quarter_cosine'"):
        rates("quarter_cosine", 0, options={"cycles": 2})
    with pytest.raises(ValueError, match="has no length"):
        rates("reduce_lr_on_plateau", 0, total_tokens=99)


# ---- other optimizers ------------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


def test_torchs_optimizers_are_found_by_name_and_any_by_path():
    assert optimizer_class("sgd") is optimizer_class("SGD") is torch.optim.SGD
    assert optimizer_class("torch.optim.NAdam") is optimizer_class("nadam") is torch.optim.NAdam
    for path in ("torch.nn.Linear", "torch.optim.Nothing"):
        with pytest.raises(ValueError, match=f"import path of an optimizer, but '{path}'"):
            optimizer_class(path)


def test_another_optimizer_has_the_decay_groups_and_its_own_options():
    made = make_optimizer("sgd", small(), learning_rate=0.1, weight_decay=0.3, options={"momentum": 0.9})
    assert [(len(group["params"]), group["weight_decay"]) for group in made.param_groups] == [(1, 0.3), (3, 0.0)]
    assert {group["momentum"] for group in made.param_groups} == {0.9}
    assert make_optimizer("AdamW", small(), learning_rate=1, weight_decay=0, options={"fused": False}).defaults[
        "betas"
    ] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd", {"betas": (0.8, 0.9)}, r"`betas` and `eps` are AdamW's.*optimizer_options=.*\(0\.8, 0\.9\)"),
        ("sgd", {"options": {"momentun": 1}}, "do not fit SGD: .*momentun"),
        ("rprop", {"weight_decay": 0.1}, "Rprop has no weight decay.*Set it to 0"),
    ],
)
def test_an_optimizer_that_cannot_be_made_says_why(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, small(), **{"learning_rate": 0.1, "weight_decay": 0.0, **options})


def test_without_the_library_its_optimizers_say_what_to_install(monkeypatch, tiny_gpt2, quiet_trainer):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=r"lightning-llm\[optimizers\]"):
        optimizer_class("lamb")
    module = LLMModule(tiny_gpt2, optimizer="lamb")  # to load a checkpoint, the library is not needed
    module.configure_model()
    with pytest.raises(ImportError, match="pip install pytorch-optimizer"):
        quiet_trainer(max_steps=1).fit(module, loader(rows(8), 4))


@pytest.mark.parametrize("name", ["lamb", "lars", "lion"])
def test_optimizers_of_the_library_train_in_a_module(name, tiny_gpt2, quiet_trainer, tmp_path):
    pytest.importorskip("pytorch_optimizer")
    assert optimizer_class(name).__module__.startswith("pytorch_optimizer")
    with pytest.raises(ValueError, match=r"one of torch's or one of .*lamb.* but got 'lamp'"):
        optimizer_class("lamp")

    def fit(checkpoint=None, steps=12):
        torch.manual_seed(3)
        module = LLMModule(tiny_gpt2, optimizer=name, learning_rate=0.01, lr_schedule="constant", warmup=0)
        trainer = quiet_trainer(max_steps=steps, accumulate_grad_batches=2, gradient_clip_val=1.0)
        batches = Positions([pad_rows(rows()[i : i + 4]) for i in range(0, 44, 4)] * 8)
        trainer.fit(module, batches, ckpt_path=checkpoint)
        return module, trainer

    module, trainer = fit(steps=6)
    groups = trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim < 2 for p in groups[1]["params"])
    trainer.save_checkpoint(tmp_path / "6.ckpt")
    whole, _ = fit()
    resumed, _ = fit(tmp_path / "6.ckpt")
    assert torch.equal(weights(resumed), weights(whole))
    assert not torch.equal(weights(module), weights(whole))
    batch = pad_rows(rows()[:4])
    before = LLMModule(tiny_gpt2)
    torch.manual_seed(3)
    before.configure_model()
    assert whole.training_step(batch, 0)["loss"] < before.training_step(batch, 0)["loss"] - 1e-4


def test_lamb_moves_each_matrix_by_the_same_share_of_its_norm():
    """Its trust ratio; AdamW, the control, moves each entry by the learning rate."""
    pytest.importorskip("pytorch_optimizer")
    for name in ("lamb", "adamw"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
        model[1].weight.data.mul_(5)
        before = [layer.weight.detach().clone() for layer in model]
        optimizer = make_optimizer(name, model, learning_rate=1e-3, weight_decay=0.0)
        model(torch.randn(8, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        moved = [float((layer.weight - old).norm() / old.norm()) for layer, old in zip(model, before, strict=True)]
        assert (moved[0] == pytest.approx(moved[1], rel=1e-3)) is (name == "lamb")
