"""GradientNoiseScale: what it measures equals a plain computation, however the step was cut, and disturbs nothing."""

import math

import lightning as L
import pytest
import torch
from noise_truth import Estimates, Quadratic, Recorder, Still, average_of, error, true_estimates
from scarce_memory import Scarce
from support import pad_rows
from token_training import Module, loader, rows, weights
from torch import nn
from torch.utils.data import DataLoader

from lightning_llm import LLMModule
from lightning_llm.callbacks import (
    AccumulationSchedule,
    DynamicBatchScaler,
    GradientNoiseScale,
    LearningRateScaling,
    TokenWeightedAccumulation,
)
from lightning_llm.callbacks.pieces import training

TOLERANCE = 1e-11


class StillScarce(Scarce):
    configure_optimizers = Still.configure_optimizers


def measure(make_trainer, module, data, *others, noise_scale=None, **options):
    """Fit for an epoch; returns the callback, what each step gave, and the batches of each step's parts."""
    noise_scale = noise_scale or GradientNoiseScale()
    estimates, recorder = Estimates(noise_scale), Recorder()
    trainer = make_trainer(**{"max_epochs": 1, "callbacks": [recorder, noise_scale, *others, estimates], **options})
    trainer.fit(module, data)
    return noise_scale, estimates, recorder


# ---- exact: each step's estimates equal the plain computation --------------------------------------------------------

CUTS = {
    "accumulated": (3, [], {"accumulate_grad_batches": 3}),  # with a short last window
    "accumulated, clipped": (3, [], {"accumulate_grad_batches": 3, "gradient_clip_val": 1e-3}),
    "pieces": (8, [lambda: DynamicBatchScaler(max_piece=70)], {}),
    "accumulated pieces": (4, [lambda: DynamicBatchScaler(max_piece=60)], {"accumulate_grad_batches": 2}),
    "schedule": (2, [lambda: AccumulationSchedule({"0 steps": 2, "1 steps": 3}), LearningRateScaling], {}),
    "single rows": (1, [], {"accumulate_grad_batches": 8}),
}


@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_gives_the_estimates_of_a_plain_computation(tiny_gpt2, quiet_trainer, cut):
    """Ragged rows, unequal tokens, a micro-batch without a label, and GPT-2's tied head."""
    micro_batch, others, options = CUTS[cut]
    data = loader(rows(22, silent=[3, 4, 5]), micro_batch)
    module = Still(tiny_gpt2)
    callbacks = [TokenWeightedAccumulation(), *(make() for make in others)]
    noise_scale, estimates, recorder = measure(quiet_trainer, module, data, *callbacks, **options)
    truth = true_estimates(module, recorder.steps)
    for unit in ("tokens", "sequences"):
        assert error(estimates.of(unit), truth[unit]) < TOLERANCE
        average = average_of(truth[unit], smoothing=0.99)
        assert getattr(noise_scale, f"noise_scale_{unit}") == pytest.approx(average.noise_scale, rel=1e-6)
        assert getattr(noise_scale, f"interval_{unit}") == pytest.approx(average.interval(0.9), rel=1e-6)


@pytest.mark.parametrize("cut", ["accumulated", "pieces", "schedule"])
def test_weights_of_lightning_alone_are_measured_too(tiny_gpt2, quiet_trainer, cut):
    """Without token weights micro-batches count by their rows, and a short last window is divided by the full K."""
    data = loader(rows(16), 2)
    others, options = {
        "accumulated": ([], {"accumulate_grad_batches": 3}),
        "pieces": ([DynamicBatchScaler(max_piece=30)], {"accumulate_grad_batches": 3}),
        "schedule": ([AccumulationSchedule(3)], {}),
    }[cut]
    module = Still(tiny_gpt2)
    _, estimates, recorder = measure(quiet_trainer, module, data, *others, **options)
    truth = true_estimates(module, recorder.steps, weighting="rows")
    assert {len(batch["input_ids"]) for step in recorder.steps for batch in step} == (
        {1, 2} if cut == "pieces" else {2}
    )
    for unit in ("tokens", "sequences"):
        assert error(estimates.of(unit), truth[unit]) < TOLERANCE


def test_a_tied_weight_counts_once(tiny_gpt2, quiet_trainer):
    """The control sums over names, as a hook on modules does: a weight with two names counts twice."""
    module = Still(tiny_gpt2)
    names = [p for _, p in module.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(module.parameters())) + 1
    data = loader(rows(12), 3)
    others = [TokenWeightedAccumulation()]
    _, estimates, recorder = measure(quiet_trainer, module, data, *others, accumulate_grad_batches=2)
    assert error(estimates.of("tokens"), true_estimates(module, recorder.steps)["tokens"]) < TOLERANCE
    module.parameters = lambda: iter(names)
    assert error(estimates.of("tokens"), true_estimates(module, recorder.steps)["tokens"]) > 0.01


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"sequence_window": 8}, {"loss_kernel": "plain"}],
    ids=["plain", "checkpointing", "windows", "logits"],
)
def test_llm_module_in_any_way_of_training(tiny_gpt2, quiet_trainer, options):
    torch.manual_seed(0)
    common = {"lr_schedule": "constant", "warmup": 0, "learning_rate": 0.0, "dtype": "float64"}
    module = LLMModule(tiny_gpt2, **common, **options)
    data = loader(rows(10), 2)
    others = [TokenWeightedAccumulation()]
    _, estimates, recorder = measure(quiet_trainer, module, data, *others, accumulate_grad_batches=2)
    truth = true_estimates(module, recorder.steps)
    for unit in ("tokens", "sequences"):
        assert error(estimates.of(unit), truth[unit]) < TOLERANCE


def test_a_failed_piece_counts_for_nothing(tiny_gpt2, quiet_trainer):
    module = StillScarce(tiny_gpt2, backward_limit=60, forward_limit=100)
    data = loader(rows(22), 8)
    others = [TokenWeightedAccumulation(), DynamicBatchScaler(grow_every=2)]
    _, estimates, recorder = measure(quiet_trainer, module, data, *others)
    assert module.num_failed >= 2
    module.backward_limit = module.forward_limit = None
    assert error(estimates.of("tokens"), true_estimates(module, recorder.steps)["tokens"]) < TOLERANCE


def test_a_step_whose_failed_piece_left_gradients_is_not_measured(tiny_gpt2, quiet_trainer):
    """A piece that was trusted, as much had fitted: its parts skip the layers that have its gradient already."""

    class FailsLate(StillScarce):
        calls = 0

        def training_step(self, batch, batch_idx):
            self.calls = self.calls + 1 if self.global_step == 1 else 0
            self.backward_limit = 30 if self.calls == 2 else None
            return super().training_step(batch, batch_idx)

    module = FailsLate(tiny_gpt2)
    data = loader(rows(8) * 4, 8)
    noise_scale = GradientNoiseScale()
    told = []
    inner = noise_scale.on_backward_failed
    noise_scale.on_backward_failed = lambda is_taken_back: (told.append(is_taken_back), inner(is_taken_back))
    others = [TokenWeightedAccumulation(), DynamicBatchScaler(max_piece=90, grow_every=0)]
    _, estimates, recorder = measure(quiet_trainer, module, data, *others, noise_scale=noise_scale)
    assert False in told
    kept = [step for number, step in enumerate(recorder.steps) if number != 1]
    module.backward_limit = None
    assert error(estimates.of("tokens"), true_estimates(module, kept)["tokens"]) < TOLERANCE


def test_search_and_repeats_are_not_measured(tiny_gpt2, quiet_trainer):
    module = Still(tiny_gpt2)
    scaler = DynamicBatchScaler(find="start", max_piece=70)
    calls = []

    class Quietly(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            batch = pad_rows(rows(3))
            kept = [p.grad.clone() for p in pl_module.parameters()]
            training.run_quietly(trainer, batch, factor=0.0)
            for parameter, gradient in zip(pl_module.parameters(), kept, strict=True):
                parameter.grad = gradient
            calls.append(1)

    noise_scale, estimates, _ = measure(
        quiet_trainer, module, loader(rows(16), 8), TokenWeightedAccumulation(), scaler, Quietly()
    )
    assert len(calls) > 2
    assert len(estimates.of("tokens")) == 2
    assert noise_scale.noise_scale_tokens is not None


def test_sparse_gradients_count_like_dense_ones(quiet_trainer):
    class Bag(L.LightningModule):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(20, 3, sparse=sparse).double()
            self.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def training_step(self, batch, batch_idx):
            hidden = self.table(batch["input_ids"])
            return {"loss": (hidden - 1).square().mean(), "num_tokens": hidden.shape[0] * hidden.shape[1]}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    batches = [{"input_ids": torch.randint(0, 20, (3, 5))} for _ in range(8)]
    found = []
    for sparse in (False, True):
        module, data = Bag(sparse), DataLoader(batches, batch_size=None)
        _, estimates, recorder = measure(quiet_trainer, module, data, accumulate_grad_batches=2)
        found.append(estimates.of("tokens"))
    assert error(found[1], found[0]) < TOLERANCE
    assert error(found[1], true_estimates(Bag(False), recorder.steps)["tokens"]) < TOLERANCE


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_measure_what_one_process_would(run_ranks, strategy):
    """The same parts, wherever they are computed: unequal rows, a rank without a label, pieces, repeats of pieces."""
    for result in run_ranks("noise_scale", 2, strategy=strategy, time_limit=180):
        assert len(result["cases"]) == 4
        for name, found in result["cases"].items():
            assert found["error"] < 1e-10, name
            assert found["scale"] == pytest.approx(found["true scale"], rel=1e-8), name
            assert found["ranks agree"], name
        assert result["control"] > 1e-3
        for text, error_message in result["refused"].items():
            assert text in error_message


# ---- statistical: near the truth -----------------------------------------------------------------------------------


def noisy_points(num_steps, sizes, tokens=4, dimensions=64, seed=0):
    """Micro-batches of (rows, tokens, dimensions) standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(size, tokens, dimensions) for _ in range(num_steps) for size in sizes]
    return DataLoader([torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes], batch_size=None)


@pytest.mark.parametrize(
    ("sizes", "others", "options"),
    [
        ((8, 8, 8, 8), [], {}),
        ((2,) * 16, [], {}),
        ((1, 14, 9, 3, 5), [TokenWeightedAccumulation], {}),
        ((32,), [lambda: DynamicBatchScaler(max_piece=40, trim_padding=False)], {}),
        ((32,), [], {"consecutive": True}),
    ],
    ids=["4 x 8", "16 x 2", "ragged", "pieces", "consecutive"],
)
def test_quadratic_with_known_covariance_is_measured_within_five_percent(quiet_trainer, sizes, others, options):
    """Nine in ten of the usual intervals hold the truth (tests/test_noise_scale.py); of these 99 in 100 do."""
    module = Quadratic(noise_scale=10.0)
    noise_scale = GradientNoiseScale(smoothing=0.999, confidence=0.99, **options)
    data = noisy_points(100 if len(sizes) > 1 or others else 300, sizes)
    callbacks = [make() for make in others]
    measure(quiet_trainer, module, data, *callbacks, noise_scale=noise_scale, accumulate_grad_batches=len(sizes))
    assert noise_scale.noise_scale_tokens == pytest.approx(10.0, rel=0.05)
    assert noise_scale.noise_scale_sequences == pytest.approx(2.5, rel=0.05)
    for (low, high), truth in ((noise_scale.interval_tokens, 10.0), (noise_scale.interval_sequences, 2.5)):
        assert low < truth < high
        assert (high - low) / truth < 0.2


# ---- steps that cannot be used -------------------------------------------------------------------------------------


def half_precision():
    from lightning.pytorch.plugins.precision import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))


def test_a_step_with_an_infinite_gradient_leaves_no_trace(tiny_gpt2, quiet_trainer):
    """AdaptDL's property: averages stay finite and training goes on; and here the other steps' values are the same."""

    class Overflow(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 1 and trainer.fit_loop.batch_idx == 3:
                next(pl_module.parameters()).grad.view(-1)[0] = float("inf")

    def run(*others):
        module = Still(tiny_gpt2, dtype=torch.float32)
        callbacks = [TokenWeightedAccumulation(), *others]
        return measure(
            quiet_trainer,
            module,
            loader(rows(18), 3),
            *callbacks,
            accumulate_grad_batches=2,
            plugins=[half_precision()],
        )

    _, whole, _ = run()
    noise_scale, spoilt, _ = run(Overflow())
    assert len(whole.of("tokens")) == 3
    assert len(spoilt.of("tokens")) == 2
    assert spoilt.of("tokens")[0] == whole.of("tokens")[0]
    assert error(spoilt.of("tokens")[1:], whole.of("tokens")[2:]) < 1e-2  # the scale is another by then
    assert math.isfinite(noise_scale.noise_scale_tokens)


def test_the_scale_of_float16_gradients_does_not_matter(tiny_gpt2, quiet_trainer):
    module = Still(tiny_gpt2, dtype=torch.float32)
    data = loader(rows(18), 3)
    _, estimates, recorder = measure(quiet_trainer, module, data, accumulate_grad_batches=2, plugins=[half_precision()])
    truth = true_estimates(module.double(), recorder.steps, weighting="equal")
    assert error(estimates.of("tokens"), truth["tokens"]) < 0.05


def test_a_step_without_a_token_is_no_step(tiny_gpt2, quiet_trainer):
    data = loader(rows(12, silent=range(4, 8)), 2)
    module = Still(tiny_gpt2)
    others = [TokenWeightedAccumulation()]
    _, estimates, recorder = measure(quiet_trainer, module, data, *others, accumulate_grad_batches=2)
    del recorder.steps[1]
    assert error(estimates.of("tokens"), true_estimates(module, recorder.steps)["tokens"]) < TOLERANCE


def test_one_micro_batch_per_step_says_what_is_missing(tiny_gpt2, quiet_trainer):
    noise_scale = GradientNoiseScale()
    trainer = quiet_trainer(max_steps=3, callbacks=[noise_scale])
    with pytest.warns(
        UserWarning, match=r"but this step has one, on one rank.*accumulate_grad_batches=2.*consecutive="
    ):
        trainer.fit(Still(tiny_gpt2), loader(rows(12), 4))
    assert (noise_scale.noise_scale_tokens, noise_scale.interval_tokens) == (None, None)


def test_consecutive_steps_stand_in_for_parts(tiny_gpt2, quiet_trainer):
    """Steps 0 and 1, then 2 and 3: no gradient is in two pairs, so that pairs are independent."""
    module = Still(tiny_gpt2)
    noise_scale = GradientNoiseScale(consecutive=True)
    others = [TokenWeightedAccumulation()]
    _, estimates, recorder = measure(quiet_trainer, module, loader(rows(20), 4), *others, noise_scale=noise_scale)
    pairs = [recorder.steps[i] + recorder.steps[i + 1] for i in (0, 2)]
    truth = true_estimates(module, pairs)
    for unit in ("tokens", "sequences"):
        assert error(estimates.of(unit), truth[unit]) < TOLERANCE


# ---- settings ------------------------------------------------------------------------------------------------------


def test_only_every_nth_step_is_measured_and_the_others_touch_no_gradient(tiny_gpt2, quiet_trainer, monkeypatch):
    from lightning_llm.callbacks.noise import watch

    norms = []
    inner = watch.gradient_norms
    monkeypatch.setattr(
        watch, "gradient_norms", lambda gradients: norms.append(trainer.global_step) or inner(gradients)
    )
    estimates = Estimates(noise_scale := GradientNoiseScale(every_n_steps=3))
    trainer = quiet_trainer(max_steps=7, accumulate_grad_batches=2, callbacks=[noise_scale, estimates])
    trainer.fit(Still(tiny_gpt2), loader(rows(28), 2))
    assert len(estimates.of("tokens")) == 3
    assert set(norms) == {0, 3, 6}


def test_groups_add_up_to_the_whole(tiny_gpt2, quiet_trainer):
    class Grouped(Still):
        def configure_optimizers(self):
            head, *rest = self.parameters()
            return torch.optim.SGD([{"params": rest}, {"params": [head]}], lr=0.0)

    noise_scale = GradientNoiseScale(per_group=True)
    names = set()

    class Names(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            names.update(trainer.callback_metrics)

    data = loader(rows(16), 2)
    measure(quiet_trainer, Grouped(tiny_gpt2), data, Names(), noise_scale=noise_scale, accumulate_grad_batches=4)
    for unit in ("tokens", "sequences"):
        whole, groups = noise_scale._averages[unit][0], noise_scale.of_groups(unit)
        assert len(groups) == 2
        assert sum(group.noise for group in groups) == pytest.approx(whole.noise, rel=1e-12)
        assert sum(group.signal for group in groups) == pytest.approx(whole.signal, rel=1e-9)
    assert any(name.endswith(("/group_0", "/group_1")) for name in names)
    assert GradientNoiseScale().of_groups() == []


def test_preconditioned_gradients_are_divided_as_adam_divides_them(tiny_gpt2, quiet_trainer):
    class Adam(Still):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.0, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)

    module, reference = Adam(tiny_gpt2), Adam(tiny_gpt2)
    noise_scale = GradientNoiseScale(precondition=True)
    data = loader(rows(24), 2)
    _, estimates, recorder = measure(
        quiet_trainer, module, data, TokenWeightedAccumulation(), noise_scale=noise_scale, accumulate_grad_batches=4
    )
    moments = [torch.zeros_like(p) for p in reference.parameters()]
    for number, batches in enumerate(recorder.steps):
        if number:
            roots = [(m / (1 - 0.95**number)).sqrt() for m in moments]
            divide = [torch.where(root > 0, root + 1e-5, torch.inf) for root in roots]
            truth = true_estimates(reference, [batches], divide=divide)["tokens"]
            assert error(estimates.of("tokens")[number - 1 : number], truth) < 1e-9
        reference.zero_grad()
        outputs = [reference.training_step(batch, 0) for batch in batches]
        tokens = sum(output["num_tokens"] for output in outputs)
        sum(output["loss"] * output["num_tokens"] / tokens for output in outputs).backward()
        for moment, parameter in zip(moments, reference.parameters(), strict=True):
            moment.mul_(0.95).addcmul_(parameter.grad, parameter.grad, value=0.05)
    assert len(estimates.of("tokens")) == len(recorder.steps) - 1  # there is no second moment before the first step
    plain = true_estimates(reference, recorder.steps[1:])["tokens"]
    assert error(estimates.of("tokens"), plain) > 1


def test_batches_that_are_not_text_are_counted_in_sequences_or_by_functions(quiet_trainer):
    class Rows(Quadratic):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"]

    data = noisy_points(20, (4, 4))
    noise_scale, _, _ = measure(quiet_trainer, Rows(5.0), data, accumulate_grad_batches=2)
    assert noise_scale.noise_scale_tokens is None
    assert noise_scale.noise_scale_sequences > 0
    counted = GradientNoiseScale(token_fn=lambda batch, outputs: 10 * len(batch), sequence_fn=lambda batch: 1)
    measure(quiet_trainer, Rows(5.0), data, noise_scale=counted, accumulate_grad_batches=2)
    assert counted.noise_scale_tokens == pytest.approx(10 * noise_scale.noise_scale_sequences)
    assert counted.noise_scale_sequences == pytest.approx(noise_scale.noise_scale_sequences / 4)


# ---- a run like any other ------------------------------------------------------------------------------------------


def test_training_is_bitwise_the_same_with_it(tiny_gpt2, quiet_trainer):
    found = []
    for callbacks in ([], [GradientNoiseScale(consecutive=True, per_group=True)]):
        module = Module(tiny_gpt2)
        callbacks = [TokenWeightedAccumulation(), *callbacks]
        quiet_trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=callbacks).fit(module, loader(rows(), 4))
        found.append(weights(module))
    assert torch.equal(*found)


def test_resume_is_bitwise_and_the_state_is_plain(tiny_gpt2, quiet_trainer, tmp_path):
    def fit(epochs, ckpt_path=None):
        noise_scale = GradientNoiseScale(smoothing=0.9, per_group=True)
        callbacks = [TokenWeightedAccumulation(), noise_scale]
        trainer = quiet_trainer(max_epochs=epochs, accumulate_grad_batches=2, callbacks=callbacks)
        trainer.fit(Module(tiny_gpt2), loader(rows(), 4), ckpt_path=ckpt_path)
        return noise_scale, trainer

    whole, _ = fit(2)
    half, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]["GradientNoiseScale"]["tokens"]
    resumed, _ = fit(2, tmp_path / "one.ckpt")
    assert whole.state_dict() != half.state_dict()
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.interval_tokens == whole.interval_tokens


def test_another_fit_starts_from_nothing(tiny_gpt2, quiet_trainer):
    noise_scale, states = GradientNoiseScale(), []
    for _ in range(2):
        trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[noise_scale])
        trainer.fit(Still(tiny_gpt2), loader(rows(), 4))
        states.append(noise_scale.state_dict())
    assert states[0] == states[1]
    assert states[0]["tokens"][0]["num_steps"] == 5


@pytest.mark.parametrize("token_weights_first", [True, False])
def test_the_module_gets_everything_back(tiny_gpt2, quiet_trainer, token_weights_first):
    class Stop(L.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    for stop in ([], [Stop()]):
        module = Still(tiny_gpt2)
        callbacks = [TokenWeightedAccumulation(), GradientNoiseScale()]
        trainer = quiet_trainer(max_steps=2, callbacks=callbacks[:: 1 if token_weights_first else -1] + stop)
        if stop:
            with pytest.raises(RuntimeError, match="stop"):
                trainer.fit(module, loader(rows(), 4))
        else:
            trainer.fit(module, loader(rows(), 4))
        assert "training_step" not in module.__dict__
        assert not any(parameter._backward_hooks for parameter in module.parameters())


def test_nothing_of_the_size_of_a_gradient_is_kept(tiny_gpt2, quiet_trainer):
    sizes = []

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            parts = noise_scale._parts
            sizes.append([sum(t.numel() for t in vars(part).values() if torch.is_tensor(t)) for part in parts])

    noise_scale = GradientNoiseScale()
    trainer = quiet_trainer(max_steps=2, accumulate_grad_batches=3, callbacks=[Look(), noise_scale])
    trainer.fit(Still(tiny_gpt2), loader(rows(), 2))
    assert sizes == [[2, 2, 2], [2, 2, 2]]  # a weight, and a squared norm for the one group of parameters


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused(tiny_gpt2, quiet_trainer, monkeypatch):
    module = Still(tiny_gpt2)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="needs automatic optimization, but Still optimizes manually"):
        quiet_trainer(max_steps=1, callbacks=[GradientNoiseScale()]).fit(module, loader(rows(), 4))
    with pytest.raises(ValueError, match="divides by Adam's second moment, which SGD does not have"):
        callbacks = [GradientNoiseScale(precondition=True)]
        quiet_trainer(max_steps=1, callbacks=callbacks).fit(Still(tiny_gpt2), loader(rows(), 4))
    with pytest.raises(TypeError, match="neither the tokens nor the sequences of a list.*token_fn"):

        class Odd(Still):
            def training_step(self, batch, batch_idx):
                return super().training_step(pad_rows(rows(2)), 0)["loss"]

        quiet_trainer(max_steps=1, callbacks=[GradientNoiseScale()]).fit(Odd(tiny_gpt2), DataLoader(["a", "b"]))
    from lightning_llm.callbacks import gradient_noise_scale

    monkeypatch.setattr(gradient_noise_scale, "data_parallel_size", lambda trainer: 0)
    with pytest.raises(ValueError, match="needs ranks that hold different batches"):
        quiet_trainer(max_steps=1, callbacks=[GradientNoiseScale()]).fit(Still(tiny_gpt2), loader(rows(), 4))
    monkeypatch.setattr(gradient_noise_scale, "SingleDeviceStrategy", ())
    with pytest.raises(ValueError, match=r"works with one device, DDPStrategy and .*has SingleDeviceStrategy"):
        quiet_trainer(max_steps=1, callbacks=[GradientNoiseScale()]).fit(Still(tiny_gpt2), loader(rows(), 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be 1 at least, but got 0"),
        ({"confidence": 1.0}, "between 0 and 1, such as 0.9, but got 1.0"),
        ({"smoothing": -0.1}, "from 0 to below 1"),
        ({"precondition": True, "consecutive": True}, "exclude each other"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        GradientNoiseScale(**options)


def test_a_gradient_in_two_parts_is_refused(quiet_trainer):
    from torch.utils.checkpoint import checkpoint

    class Shared(L.LightningModule):
        def __init__(self, use_reentrant):
            super().__init__()
            self.layer, self.use_reentrant = nn.Linear(3, 3), use_reentrant

        def training_step(self, batch, batch_idx):
            hidden = batch.requires_grad_()
            for _ in range(2):
                hidden = checkpoint(self.layer, hidden, use_reentrant=self.use_reentrant)
            return hidden.square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    data = DataLoader([torch.randn(2, 3) for _ in range(2)], batch_size=None)
    options = {"max_steps": 1, "accumulate_grad_batches": 2}
    quiet_trainer(**options, callbacks=[GradientNoiseScale()]).fit(Shared(False), data)
    with pytest.raises(ValueError, match="in several parts within one backward.*'use_reentrant': False"):
        quiet_trainer(**options, callbacks=[GradientNoiseScale()]).fit(Shared(True), data)
