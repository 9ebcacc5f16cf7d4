"""The gradient of an optimizer step is that of one big batch, however the batch is cut."""

import lightning as L
import pytest
import torch
from support import Plain
from token_training import EPOCHS, GLOBAL_BATCH, Losses, Module, big_batch, difference, loader, rows, weights
from torch import nn
from torch.utils.data import DataLoader

from lightning_llm import LLMModule
from lightning_llm.callbacks import TokenWeightedAccumulation
from lightning_llm.callbacks.steps.counting import num_samples
from lightning_llm.callbacks.steps.gradients import scale_gradients
from lightning_llm.callbacks.token_weighted_accumulation import step_factor


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize(("micro_batch", "accumulate"), [(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)])
def test_weights_after_epochs_equal_those_of_the_big_batch(
    tiny_gpt2, quiet_trainer, optimizer, clip, micro_batch, accumulate
):
    truth, true_losses = big_batch(tiny_gpt2, optimizer, clip)
    module, losses = Module(tiny_gpt2, optimizer), Losses()
    trainer = quiet_trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[losses, TokenWeightedAccumulation()],
    )
    trainer.fit(module, loader(rows(), micro_batch))
    assert trainer.global_step == len(true_losses) == 6
    assert difference(module, truth) < 1e-12
    assert [float(losses.values[step + 1]) for step in range(6)] == pytest.approx(true_losses, rel=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_without_the_callback_the_same_run_is_wrong(tiny_gpt2, quiet_trainer, accumulate):
    truth, _ = big_batch(tiny_gpt2, "sgd", None)
    module = Module(tiny_gpt2, "sgd")
    trainer = quiet_trainer(max_epochs=EPOCHS, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(rows(), GLOBAL_BATCH // accumulate))
    assert difference(module, truth) > 1e-5


def test_micro_batches_without_a_label_count_for_nothing(tiny_gpt2, quiet_trainer):
    silent = [0, 1, 5, 16, 17, 18, 19, *range(32, 44)]  # single ones, a whole micro-batch, the whole tail
    data = rows(silent=silent)
    truth, _ = big_batch(tiny_gpt2, "sgd", None, data[:32], epochs=1)
    module = Module(tiny_gpt2, "sgd")
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=8, callbacks=[TokenWeightedAccumulation()])
    trainer.fit(module, loader(data, 2))
    assert trainer.global_step == 3
    assert difference(module, truth) < 1e-12  # the step without a token moved nothing, momentum or not


def test_llm_module_with_the_callback_is_exact_too(tiny_gpt2, quiet_trainer):
    def fit(micro_batch, accumulate, callbacks):
        torch.manual_seed(0)
        options = {"lr_schedule": "constant", "warmup": 0, "learning_rate": 1e-3, "eps": 1e-4, "dtype": "float64"}
        module = LLMModule(tiny_gpt2, **options)
        trainer = quiet_trainer(
            max_epochs=EPOCHS, accumulate_grad_batches=accumulate, gradient_clip_val=0.3, callbacks=callbacks
        )
        trainer.fit(module, loader(rows(), micro_batch))
        return module

    whole = weights(fit(16, 1, []))
    assert difference(fit(2, 8, [TokenWeightedAccumulation()]), whole) < 1e-12
    assert difference(fit(2, 8, []), whole) > 1e-6


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_with_unequal_tokens_equal_the_big_batch(run_ranks, strategy):
    first, second = run_ranks("token_weighted", 2, strategy=strategy, time_limit=180)
    assert first["cases"]
    for name, error in first["cases"].items():
        assert error < 1e-12, name
    assert first["without"] > 1e-5
    assert first["losses"] == second["losses"] == pytest.approx(first["true losses"], rel=1e-6)


def test_ranks_that_split_a_layer_count_a_batch_once(run_ranks):
    results = run_ranks("tensor_parallel_weights", 4, time_limit=180)
    for result in results:
        assert result["sampler"]["num_replicas"] == 2  # of four ranks
        assert result["error"] < 1e-12
        assert result["loss"] == pytest.approx(result["true loss"], rel=1e-6)


class Regression(Plain):
    """Not text: a squared error per row, returned as a bare tensor."""


def test_samples_weight_a_module_that_is_not_text(quiet_trainer):
    torch.manual_seed(0)
    data = torch.randn(22, 3, dtype=torch.float64)

    def fresh():
        torch.manual_seed(1)
        return Regression().double()

    batches = [data[i : i + n] for i, n in ((0, 5), (5, 1), (6, 2), (8, 7), (15, 7))]  # K = 3, a tail of 2
    truth = fresh()
    optimizer = truth.configure_optimizers()
    for part in (data[:8], data[8:]):
        optimizer.zero_grad()
        truth.training_step([part], 0).backward()
        optimizer.step()
    module = fresh()
    callback = TokenWeightedAccumulation(weight="samples", log_loss=None)
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=3, callbacks=[callback])
    trainer.fit(module, DataLoader([[batch] for batch in batches], batch_size=None))
    assert difference(module, weights(truth)) < 1e-14
    assert "train/loss" not in trainer.callback_metrics

    by_function = fresh()
    callback = TokenWeightedAccumulation(weight_fn=lambda batch, outputs: len(batch[0]))
    quiet_trainer(max_epochs=1, accumulate_grad_batches=3, callbacks=[callback]).fit(
        by_function, DataLoader([[batch] for batch in batches], batch_size=None)
    )
    assert difference(by_function, weights(truth)) < 1e-14


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_cut_step_in_low_precision_is_no_worse_than_twice_the_uncut_one(tiny_gpt2, quiet_trainer, precision):
    from lightning.pytorch.plugins.precision import MixedPrecision

    truth = {}

    class Gradient(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.value = torch.cat([p.grad.double().flatten() for p in pl_module.parameters()])

    def gradient(micro_batch, accumulate, dtype=torch.float32, plugins=()):
        module, seen = Module(tiny_gpt2, "sgd", dtype), Gradient()
        callbacks = [TokenWeightedAccumulation(), seen]
        trainer = quiet_trainer(
            max_steps=1, accumulate_grad_batches=accumulate, callbacks=callbacks, plugins=list(plugins)
        )
        trainer.fit(module, loader(rows(16), micro_batch))
        return seen.value

    def plugin():
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if precision == "16-mixed" else None
        return [MixedPrecision(precision, "cpu", scaler=scaler)]

    truth = gradient(16, 1, torch.float64)
    uncut = (gradient(16, 1, plugins=plugin()) - truth).norm()
    cut = (gradient(2, 8, plugins=plugin()) - truth).norm()
    assert uncut > 0
    assert cut <= 2 * uncut


def test_window_with_an_infinite_gradient_is_skipped_by_the_scaler(tiny_gpt2, quiet_trainer):
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Overflow(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 0 and trainer.fit_loop.batch_idx == 1:
                next(pl_module.parameters()).grad.view(-1)[0] = float("inf")

    class Steps(L.Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.weights.append(weights(pl_module).clone())

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    module, steps = Module(tiny_gpt2, "sgd", torch.float32), Steps()
    before = weights(module).clone()
    trainer = quiet_trainer(
        max_steps=2,
        accumulate_grad_batches=2,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        callbacks=[Overflow(), steps, TokenWeightedAccumulation()],
    )
    trainer.fit(module, loader(rows(16), 4))
    assert torch.equal(steps.weights[1], before)
    assert scaler.get_scale() == 4.0
    assert not torch.equal(steps.weights[3], before)
    assert steps.weights[3].isfinite().all()


def test_one_micro_batch_on_one_rank_needs_no_pass_over_the_gradients(tiny_gpt2, quiet_trainer, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "_foreach_mul_", lambda *args: calls.append(args))
    callback = TokenWeightedAccumulation()
    quiet_trainer(max_steps=3, callbacks=[callback]).fit(Module(tiny_gpt2, "sgd"), loader(rows(), 4))
    assert not calls
    quiet_trainer(max_steps=1, accumulate_grad_batches=2, callbacks=[TokenWeightedAccumulation()]).fit(
        Module(tiny_gpt2, "sgd"), loader(rows(), 4)
    )
    assert calls  # the test can fail


def test_callbacks_after_it_see_the_finished_gradient(tiny_gpt2, quiet_trainer):
    class Norm(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.first = trainer.callbacks[0]
            self.norm = torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm()

    norms = []
    for micro_batch, accumulate in ((16, 1), (2, 8)):
        seen, callback = Norm(), TokenWeightedAccumulation()
        trainer = quiet_trainer(max_steps=1, accumulate_grad_batches=accumulate, callbacks=[seen, callback])
        trainer.fit(Module(tiny_gpt2), loader(rows(), micro_batch))
        assert seen.first is callback
        norms.append(seen.norm)
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)


def test_module_gets_its_training_step_back(tiny_gpt2, quiet_trainer):
    module = Module(tiny_gpt2)
    quiet_trainer(max_steps=1, callbacks=[TokenWeightedAccumulation()]).fit(module, loader(rows(), 4))
    assert "training_step" not in module.__dict__

    class Stop(L.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        quiet_trainer(max_steps=1, callbacks=[TokenWeightedAccumulation(), Stop()]).fit(module, loader(rows(), 4))
    assert "training_step" not in module.__dict__


def test_resume_is_bitwise_and_the_state_is_plain(tiny_gpt2, quiet_trainer, tmp_path):
    def fit(epochs, ckpt_path=None):
        module, callback = Module(tiny_gpt2), TokenWeightedAccumulation()
        trainer = quiet_trainer(max_epochs=epochs, accumulate_grad_batches=4, callbacks=[callback])
        trainer.fit(module, loader(rows(), 4), ckpt_path=ckpt_path)
        return module, trainer

    whole, _ = fit(2)
    _, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]["TokenWeightedAccumulation"]
    assert state["unit"] > 1
    resumed, _ = fit(2, tmp_path / "one.ckpt")
    assert torch.equal(weights(resumed), weights(whole))


def test_missing_weight_is_named(tiny_gpt2, quiet_trainer):
    data = DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3)), batch_size=2)
    with pytest.raises(KeyError, match="a mapping with 'loss' and 'num_tokens', but got Tensor.*weight='samples'"):
        quiet_trainer(max_steps=1, callbacks=[TokenWeightedAccumulation()]).fit(Plain(), data)
    with pytest.raises(KeyError, match=r"'loss' and 'pairs', but got \['loss', 'num_tokens'\]"):
        quiet_trainer(max_steps=1, callbacks=[TokenWeightedAccumulation("pairs")]).fit(
            Module(tiny_gpt2), loader(rows(), 4)
        )


def test_nan_of_an_empty_micro_batch_is_explained(tiny_gpt2, quiet_trainer):
    class MeanOfNothing(Module):
        def training_step(self, batch, batch_idx):
            loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
            return {"loss": loss, "num_tokens": (batch["labels"][:, 1:] != -100).sum()}

    with pytest.raises(ValueError, match=r"without a single token .*divided by max\(num_tokens, 1\)"):
        quiet_trainer(max_steps=1, accumulate_grad_batches=2, callbacks=[TokenWeightedAccumulation()]).fit(
            MeanOfNothing(tiny_gpt2), loader(rows(silent=[0, 1]), 2)
        )


def test_manual_optimization_and_engines_that_accumulate_are_refused(tiny_gpt2, quiet_trainer, monkeypatch):
    module = Module(tiny_gpt2)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="needs automatic optimization, but Module optimizes manually"):
        quiet_trainer(max_steps=1, callbacks=[TokenWeightedAccumulation()]).fit(module, loader(rows(), 4))
    from lightning.pytorch.strategies import SingleDeviceStrategy

    monkeypatch.setattr(SingleDeviceStrategy, "handles_gradient_accumulation", True)
    with pytest.raises(ValueError, match="SingleDeviceStrategy accumulates and divides inside its own engine"):
        quiet_trainer(max_steps=1, callbacks=[TokenWeightedAccumulation()]).fit(Module(tiny_gpt2), loader(rows(), 4))


def test_rows_of_a_batch_are_counted_whatever_it_is():
    tensor = torch.zeros(3, 5)
    for batch in (tensor, [tensor], {"x": {"y": tensor}}, ("name", tensor), {"names": ["a"], "x": tensor}):
        assert num_samples(batch) == 3
    with pytest.raises(TypeError, match="without a tensor"):
        num_samples({"names": ["a"]})


def test_step_factor_and_scaling():
    assert step_factor(10.0, 5.0, 2) == 1.0
    assert step_factor(0.0, 5.0, 2) == 0.0
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.ones(2, 2)
    scale_gradients(torch.optim.SGD(layer.parameters(), lr=1.0), 0.5)
    assert layer.weight.grad.eq(0.5).all()
    assert layer.bias.grad is None
