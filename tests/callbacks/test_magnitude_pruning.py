"""Pruning by magnitude in optimizer steps: the bare loop's weights for any cut, resumed bit for bit, plain exports."""

import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from pruned_training import BEGIN, END, EPOCHS, EVERY, FINAL, PRUNING, bare_loop, matrices
from support import Plain, Positions, pad_rows
from token_training import Module, difference, loader, rows, weights
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_llm import LLMModule, Schedule
from lightning_llm.callbacks import (
    AccumulationSchedule,
    DynamicBatchScaler,
    GradientNoiseScale,
    HuggingFaceCheckpoint,
    MagnitudePruning,
    TokenWeightedAccumulation,
)
from lightning_llm.callbacks.magnitude_pruning import cubic_sparsity
from lightning_llm.callbacks.pruning.layers import linear_layers
from lightning_llm.callbacks.pruning.masks import (
    keep_largest_of_group,
    magnitude_keys,
    num_marked,
    pack,
    smallest,
    unpack,
)

TOLERANCE = 1e-12


def zeros(module):
    return {name: p == 0 for name, p in matrices(module).items()}


# ---- equal to the bare loop --------------------------------------------------------------------------------------


CUTS = {
    "whole": (16, 1, []),
    "8 x 2": (8, 2, []),
    "4 x 4": (4, 4, []),
    "1 x 16": (1, 16, []),
    "scheduled": (4, 1, [lambda: AccumulationSchedule(4)]),
    "pieces": (16, 1, [lambda: DynamicBatchScaler(max_piece=60)]),
    "scheduled pieces": (8, 1, [lambda: AccumulationSchedule(2), lambda: DynamicBatchScaler(max_piece=60)]),
}


def prune(config, quiet_trainer, cut="8 x 2", optimizer="adamw", pruning=None, callbacks=(), module=None, **options):
    micro_batch, accumulate, others = CUTS[cut]
    module, pruning = module or Module(config, optimizer), pruning or MagnitudePruning(**PRUNING)
    trainer = quiet_trainer(
        **{"max_epochs": EPOCHS, "accumulate_grad_batches": accumulate, **options},
        callbacks=[TokenWeightedAccumulation(), *(make() for make in others), pruning, *callbacks],
    )
    trainer.fit(module, loader(rows(), micro_batch))
    return module, pruning, trainer


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_and_masks_are_those_of_the_bare_loop_however_the_batch_is_cut(
    tiny_gpt2, quiet_trainer, cut, optimizer
):
    truth, pruned = bare_loop(tiny_gpt2, optimizer, clip=0.3)
    module, pruning, trainer = prune(tiny_gpt2, quiet_trainer, cut, optimizer, gradient_clip_val=0.3)
    assert trainer.global_step == 12
    assert difference(module, truth) < TOLERANCE
    for name, mask in zeros(module).items():
        assert torch.equal(mask, pruned[name]), name
        assert mask.sum() == round(FINAL * mask.numel())
    assert pruning.achieved == pytest.approx(FINAL, abs=1e-3)
    assert trainer.callback_metrics["train/sparsity"] == pytest.approx(pruning.achieved)


def test_global_scope_and_clipping_by_value_equal_the_bare_loop_too(tiny_gpt2, quiet_trainer):
    truth, pruned = bare_loop(tiny_gpt2, clip_value=1e-3, scope="global")
    pruning = MagnitudePruning(**PRUNING, scope="global")
    options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    module, _, _ = prune(tiny_gpt2, quiet_trainer, pruning=pruning, **options)
    assert difference(module, truth) < TOLERANCE
    shares = {name: float(mask.double().mean()) for name, mask in zeros(module).items()}
    assert all(torch.equal(mask, pruned[name]) for name, mask in zeros(module).items())
    assert max(shares.values()) - min(shares.values()) > 0.05  # another choice than layer by layer


@pytest.mark.parametrize("broken", ["dense_gradients", "revive"])
def test_without_masked_gradients_or_without_masks_after_the_step_it_is_another_run(tiny_gpt2, broken):
    truth, _ = bare_loop(tiny_gpt2, clip=0.3)
    other, _ = bare_loop(tiny_gpt2, clip=0.3, **{broken: True})
    assert (other - truth).norm() / truth.norm() > 1e-6


class PrunesMicroBatches(MagnitudePruning):
    """What it must not do: go by micro-batches, inside a window."""

    def on_train_batch_end(self, trainer, *_):
        self.num_batches = getattr(self, "num_batches", 0) + 1
        progress = self._progress(trainer, self.num_batches)
        if self.num_batches % self.every_n_steps == 0:
            self.wanted = cubic_sparsity(self.schedule(progress), self.final)
            for weight in self._weights:
                self._prune([weight])
            self._measure()
            self._apply()

    def _change_masks(self, *_):
        pass


def test_pruning_by_micro_batches_depends_on_the_cut(tiny_gpt2, quiet_trainer):
    truth, _ = bare_loop(tiny_gpt2)
    found = {}
    for cut in ("whole", "4 x 4"):
        module, _, _ = prune(
            tiny_gpt2, quiet_trainer, cut, pruning=PrunesMicroBatches(**{**PRUNING, "end": "10 steps"})
        )
        found[cut] = difference(module, truth)
    assert found["4 x 4"] > 1e-3


def test_masks_only_grow_and_pruned_weights_stay_zero_at_every_step(tiny_gpt2, quiet_trainer):
    class Watch(L.Callback):
        seen, shares = None, ()

        def on_train_batch_end(self, trainer, pl_module, *_):
            now = zeros(pl_module)
            if self.seen is not None:
                assert all(bool((now[name] | ~mask).all()) for name, mask in self.seen.items())
            self.seen = now
            self.shares += (sum(int(m.sum()) for m in now.values()) / sum(m.numel() for m in now.values()),)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):  # after the pruning's
            if self.seen is not None:
                assert not any(bool(p.grad[self.seen[name]].any()) for name, p in matrices(pl_module).items())

    watch = Watch()
    prune(tiny_gpt2, quiet_trainer, "whole", "sgd", callbacks=[watch])
    steps = range(1, 13)
    wanted = [cubic_sparsity(min(max((s - BEGIN) / (END - BEGIN), 0), 1), FINAL) for s in steps]
    held = [max(w for s, w in zip(steps, wanted, strict=True) if s <= step and (s % EVERY == 0 or s == END or s == 1))
            for step in steps]  # fmt: skip
    assert watch.shares == pytest.approx(held, abs=1e-3)


# ---- gradient scalers, other precisions --------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_no_mask(tiny_gpt2, quiet_trainer, fused):
    class Fused(Module):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=fused)

    class Overflow(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 1:
                next(pl_module.parameters()).grad.view(-1)[0] = float("inf")

    class Watch(L.Callback):
        achieved = ()

        def on_train_batch_end(self, trainer, *_):
            self.achieved += (pruning.achieved,)

    pruning, watch = MagnitudePruning(0.5, "1 steps", "3 steps", every_n_steps=2), Watch()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    trainer = quiet_trainer(max_steps=4, plugins=[plugin], callbacks=[Overflow(), pruning, watch])
    trainer.fit(Fused(tiny_gpt2, dtype=torch.float32), loader(rows(), 4))
    assert watch.achieved[:2] == (0.0, 0.0)  # step 2 was due, and skipped
    assert watch.achieved[2:] == pytest.approx([0.5, 0.5], abs=1e-3)  # the next one catches up
    assert plugin.scaler.get_scale() == 4.0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_have_exactly_as_many_zeros(tiny_gpt2, quiet_trainer, precision):
    pruning = MagnitudePruning(0.5, end="2 steps", every_n_steps=1)
    module = Module(tiny_gpt2, dtype=torch.bfloat16 if precision == "bf16-true" else torch.float32)
    trainer = quiet_trainer(max_steps=3, precision=precision, callbacks=[pruning])
    trainer.fit(module, loader(rows(), 4))
    for mask in zeros(module).values():
        assert int(mask.sum()) >= mask.numel() // 2
    assert pruning.achieved == 0.5  # though many bfloat16 magnitudes are equal


# ---- resume ------------------------------------------------------------------------------------------------------


class SaveAt(L.Callback):
    def __init__(self, micro_batches, folder):
        self.micro_batches, self.folder, self._count = micro_batches, folder, 0

    def on_train_batch_end(self, trainer, *_):
        self._count += 1
        if self._count in self.micro_batches:
            trainer.save_checkpoint(self.folder / f"{self._count}.ckpt")


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_resume_is_bitwise_also_inside_a_window(tiny_gpt2, quiet_trainer, tmp_path, unit):
    data = rows()
    total = sum(int((row["labels"][1:] != -100).sum()) for row in data)
    times = {"begin": "2 steps", "end": "9 steps"} if unit == "steps" else {"end": f"{2 * total} tokens"}

    def fit(saves=(), checkpoint=None):
        module = Module({**tiny_gpt2, "resid_pdrop": 0.2})
        pruning = MagnitudePruning(FINAL, **times, every_n_steps=EVERY)
        others = [TokenWeightedAccumulation(), AccumulationSchedule({"0 steps": 3, "4 steps": 2}), pruning]
        trainer = quiet_trainer(max_epochs=4, callbacks=[SaveAt(saves, tmp_path), *others], gradient_clip_val=0.3)
        L.seed_everything(3, verbose=False)
        trainer.fit(module, Positions([pad_rows(data[n : n + 4]) for n in range(0, 44, 4)]), ckpt_path=checkpoint)
        return weights(module), pruning

    saves = [5, 9, 14, 15, 17, 26, 39]
    whole, pruning = fit(saves)
    assert pruning.achieved == pytest.approx(FINAL, abs=1e-3)
    for save in saves:
        resumed, again = fit(checkpoint=tmp_path / f"{save}.ckpt")
        assert torch.equal(resumed, whole), save
        assert all(torch.equal(bits, again._bits[name]) for name, bits in pruning._bits.items())
    state = torch.load(tmp_path / "17.ckpt", weights_only=True)["callbacks"]["MagnitudePruning"]
    assert 0 < state["wanted"] < FINAL
    names = set(torch.load(tmp_path / "17.ckpt", weights_only=True)["state_dict"])
    assert names == set(Module(tiny_gpt2).state_dict())


def test_a_weight_that_is_zero_by_itself_is_trained_on_after_a_resume(quiet_trainer, tmp_path):
    """Masks are in the checkpoint: they could not be told from the weights."""

    def fit(steps, checkpoint=None):
        torch.manual_seed(0)
        module = Plain()
        module.layer = nn.Linear(3, 4)
        nn.init.zeros_(module.layer.weight)
        module.layer.weight.data[0] = torch.tensor([1.0, 2.0, 3.0])
        pruning = MagnitudePruning(0.25, end="1 steps", every_n_steps=1)
        trainer = quiet_trainer(max_steps=steps, callbacks=[pruning])
        module.training_step = lambda batch: (module.layer(batch[0]) - 1).square().mean()
        trainer.fit(module, DataLoader([[torch.eye(3)]] * 4, batch_size=None), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module.layer.weight.detach()

    whole = fit(3)
    fit(1)
    assert torch.equal(fit(3, tmp_path / "1.ckpt"), whole)
    assert int((whole == 0).sum()) == 3


def test_a_checkpoint_of_other_layers_is_refused(tiny_gpt2, quiet_trainer, tmp_path):
    _, _, trainer = prune(tiny_gpt2, quiet_trainer)
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    with pytest.raises(ValueError, match="masks of 8 matrices, but `modules` chooses 4; only in one of the two"):
        quiet_trainer(max_epochs=9, callbacks=[MagnitudePruning(**PRUNING, modules="mlp")]).fit(
            Module(tiny_gpt2), loader(rows(), 8), ckpt_path=tmp_path / "all.ckpt"
        )


def test_a_second_run_with_the_same_callback_starts_anew(tiny_gpt2, quiet_trainer):
    pruning, found = MagnitudePruning(**PRUNING), []
    for _ in range(2):
        module, _, _ = prune(tiny_gpt2, quiet_trainer, pruning=pruning)
        found.append(weights(module))
        assert pruning._handles == []
    assert torch.equal(*found)


# ---- ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_have_the_bare_loops_weights_and_the_same_masks(run_ranks, strategy):
    first, second = run_ranks("magnitude_pruning", 2, strategy=strategy, time_limit=180)
    assert set(first["errors"]) == {"layer", "global"}
    for name, error in first["errors"].items():
        assert error < TOLERANCE, name
        assert first["zeros"][name] == pytest.approx(FINAL, abs=1e-3)
    assert first["bits"] == second["bits"]
    assert first["resumed on one rank"] is True


def test_a_search_before_the_first_step_changes_no_mask(tiny_gpt2, quiet_trainer):
    """It lets the optimizer step, and takes that back."""

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 0:
                assert pruning.achieved == 0.0
                assert searching.limits.buckets  # it did search

    truth, _ = bare_loop(tiny_gpt2)
    for options in (PRUNING, {"sparsity": 0.5, "end": "0 steps", "every_n_steps": 1}):
        pruning, searching = MagnitudePruning(**options), DynamicBatchScaler(find="start")
        module, _, _ = prune(tiny_gpt2, quiet_trainer, "whole", pruning=pruning, callbacks=[searching, Watch()])
        assert (difference(module, truth) < TOLERANCE) == (options is PRUNING)


# ---- averages, exports, plain modules ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "averaging",
    [
        lambda: WeightAveraging(),
        lambda: EMAWeightAveraging(decay=0.9),
        lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1),
    ],
    ids=["WeightAveraging", "EMA", "SWA"],
)
def test_averages_are_zero_where_weights_are(tiny_gpt2, quiet_trainer, monkeypatch, averaging):
    def holds(pruning_first=False):
        module, pruning = Module(tiny_gpt2), MagnitudePruning(**PRUNING)
        callbacks = [pruning, averaging()] if pruning_first else [averaging(), pruning]
        quiet_trainer(max_epochs=EPOCHS, callbacks=callbacks).fit(module, loader(rows(), 16))
        counted = {name: int(mask.sum()) for name, mask in zeros(module).items()}
        return counted == {name: num_marked(bits) for name, bits in pruning._bits.items()}

    assert holds()
    assert holds(pruning_first=True)
    monkeypatch.setattr("lightning_llm.callbacks.magnitude_pruning.zero_averages", lambda *_: None)
    assert not holds()


def test_an_exported_folder_has_exact_zeros_and_the_models_own_names(tiny_gpt2, quiet_trainer, tmp_path):
    module = LLMModule(tiny_gpt2, learning_rate=1e-2, lr_schedule="constant", warmup=0)
    export, pruning = (
        HuggingFaceCheckpoint(str(tmp_path), monitor=None),
        MagnitudePruning(0.5, end="2 steps", every_n_steps=1),
    )
    quiet_trainer(max_steps=3, callbacks=[pruning, export]).fit(module, loader(rows(), 8))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "last")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, module.model.get_parameter(name)), name
    assert int((loaded.transformer.h[0].mlp.c_fc.weight == 0).sum()) == 32 * 128 // 2
    assert not (loaded.lm_head.weight == 0).any()


def test_a_module_that_optimizes_by_hand_is_pruned_as_one_that_does_not(quiet_trainer):
    class Automatic(Plain):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1)).double()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    class ByHand(Automatic):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx) / 2)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    data, found = [[torch.randn(4, 3, dtype=torch.float64)] for _ in range(12)], []
    for module, options in ((Automatic(), {"accumulate_grad_batches": 2}), (ByHand(), {})):
        pruning = MagnitudePruning(0.5, end="4 steps", every_n_steps=1)
        quiet_trainer(max_epochs=1, callbacks=[pruning], **options).fit(module, DataLoader(data, batch_size=None))
        assert pruning.achieved == 0.5
        found.append(weights(module))
    torch.testing.assert_close(*found, rtol=0, atol=1e-14)


def test_two_of_four_inputs_stay_and_the_ramp_leads_there(quiet_trainer):
    class Wide(Plain):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 16), nn.Linear(16, 1))

    class Watch(L.Callback):
        most = ()

        def on_train_batch_end(self, trainer, pl_module, *_):
            groups = pl_module.layer[1].weight.unflatten(1, (-1, 4))
            self.most += (int((groups == 0).sum(-1).max()),)

    module, watch = Wide(), Watch()
    pruning = MagnitudePruning(0.5, end="4 steps", every_n_steps=1, structure="2:4", modules=r"layer\.[12]")
    data = DataLoader([[torch.randn(4, 3)] for _ in range(8)], batch_size=None)
    quiet_trainer(max_epochs=1, callbacks=[pruning, watch]).fit(module, data)
    for layer in module.layer[1:]:
        assert torch.all((layer.weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2)
    assert max(watch.most) == 2  # nor more on the way


def test_conv1d_is_structured_along_its_inputs(tiny_gpt2, quiet_trainer):
    pruning = MagnitudePruning(0.5, end="2 steps", every_n_steps=1, structure="2:4")
    module, _, _ = prune(tiny_gpt2, quiet_trainer, pruning=pruning)
    for weight in matrices(module).values():
        assert torch.all((weight.T.unflatten(1, (-1, 4)) == 0).sum(-1) == 2)


# ---- which weights, which times ----------------------------------------------------------------------------------


def test_linear_layers_are_found_but_neither_embeddings_nor_heads(tiny_gpt2, tiny_llama):
    names = {
        name for name, _, _ in linear_layers(AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_gpt2)), None)
    }
    assert {re.sub(r"h\.\d", "h", name) for name in names} == {
        f"transformer.h.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_llama, tie_word_embeddings=False))
    assert "lm_head.weight" not in {name for name, _, _ in linear_layers(llama, None)}
    assert [name for name, _, _ in linear_layers(llama, ["^lm_head$"])] == ["lm_head.weight"]
    tied = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_llama, tie_word_embeddings=True))
    assert list(linear_layers(tied, ["^lm_head$"])) == []
    llama.model.layers[0].requires_grad_(requires_grad=False)
    assert len(list(linear_layers(llama, None))) == 7
    bert = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    for kind, auto in (("bert", AutoModelForSequenceClassification), ("distilbert", AutoModel)):
        model = auto.from_config(AutoConfig.for_model(kind, **bert))
        assert len(list(linear_layers(model, None))) >= 6
        assert not any("classifier" in name for name, _, _ in linear_layers(model, None))
        assert any("classifier" in name for name, _, _ in linear_layers(model, [""])) is (kind == "bert")


def test_an_adapter_is_pruned_only_where_its_layers_are_named(tiny_gpt2):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_gpt2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2))
    with pytest.raises(ValueError, match="zeros in the adapter's matrices are none in their product"):
        list(linear_layers(adapted, None))
    assert {name.split(".")[-3] for name, _, _ in linear_layers(adapted, ["lora_A"])} == {"lora_A"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "a share from 0 to below 1 that does not fall, but got 1.0"),
        ({"sparsity": {"0 steps": 0.5, "10 steps": 0.2}}, "does not fall"),
        ({"begin": "10%", "end": "500 steps"}, "share one unit, but got '10%' and '500 steps'"),
        ({"begin": "20 steps", "end": "10 steps"}, "`begin` is not after `end`"),
        ({"every_n_steps": 0}, "`every_n_steps` must be 1 at least"),
        ({"scope": "matrix"}, "`scope` must be 'layer' or 'global', but got 'matrix'"),
        ({"structure": "4:2"}, "`structure` is like '2:4'"),
        ({"structure": "2:4", "sparsity": 0.6}, "leaves at most 0.5 zeros, but got sparsity=0.6"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MagnitudePruning(**options)


def test_what_cannot_be_pruned_is_refused_before_training(tiny_gpt2, quiet_trainer):
    for pruning, message in (
        (MagnitudePruning(modules="nothing", end="9 steps"), "finds no weight"),
        (MagnitudePruning(end="50%"), "needs a run with an end"),
        (MagnitudePruning(end="100 samples"), "Nobody counts samples"),
        (MagnitudePruning(end="10 steps", structure="2:5"), "a multiple of 5 inputs, but model.transformer.h.0.attn"),
    ):
        with pytest.raises(ValueError, match=message):
            quiet_trainer(max_epochs=-1, callbacks=[pruning]).fit(Module(tiny_gpt2), loader(rows(), 4))
    with pytest.raises(ValueError, match="GradientNoiseScale must see the gradient before"):
        quiet_trainer(max_steps=1, callbacks=[MagnitudePruning(), GradientNoiseScale()]).fit(
            Module(tiny_gpt2), loader(rows(), 4)
        )


def test_milestones_and_shares_of_the_run_are_followed(tiny_gpt2, quiet_trainer):
    linear = Schedule({"0 steps": 0, "4 steps": 0.5}, "linear")
    for pruning, expected in (
        (MagnitudePruning({"0 steps": 0.0, "2 steps": 0.25, "1 epoch": 0.5}, every_n_steps=1), [0, 0.25, 0.5, 0.5]),
        (MagnitudePruning(linear, every_n_steps=1), [0.125, 0.25, 0.375, 0.5]),
        (MagnitudePruning(0.5, begin="50%", end="50%", every_n_steps=1), [0, 0.5, 0.5, 0.5]),
    ):
        seen = []

        class Watch(L.Callback):
            def on_train_batch_end(self, *_, pruning=pruning, seen=seen):
                seen.append(pruning.achieved)

        quiet_trainer(max_steps=4, callbacks=[pruning, Watch()]).fit(Module(tiny_gpt2), loader(rows(12), 4))
        assert seen == pytest.approx(expected, abs=1e-3)


# ---- the pure parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_smallest_are_those_of_a_stable_sort(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(7, 5, generator=generator).mul(4).round().to(dtype),
        torch.randn(11, generator=generator).to(dtype),
    ]
    pruned = [torch.rand(tensor.shape, generator=generator) < 0.2 for tensor in tensors]
    keys = [magnitude_keys(*pair, dtype) for pair in zip(tensors, pruned, strict=True)]
    flat = torch.cat([t.abs().double().masked_fill(p, -1).flatten() for t, p in zip(tensors, pruned, strict=True)])
    order = flat.argsort(stable=True)
    for number in range(len(flat) + 1):
        found = torch.cat([mask.flatten() for mask in smallest(keys, number)])
        expected = torch.zeros_like(found)
        expected[order[:number]] = True
        assert torch.equal(found, expected), number


def test_groups_keep_their_largest_along_either_dimension():
    keys = torch.tensor([[4, 1, 3, 2], [1, 1, 1, 1]], dtype=torch.int32)
    most = torch.iinfo(torch.int32).max
    assert keep_largest_of_group(keys, 2, 4, 1).tolist() == [[most, 1, most, 2], [1, 1, most, most]]
    assert torch.equal(keep_largest_of_group(keys.T, 2, 4, 0), keep_largest_of_group(keys, 2, 4, 1).T)


def test_masks_as_bits_come_back_and_other_shapes_are_refused():
    mask = torch.rand(3, 7) < 0.5
    assert torch.equal(unpack(pack(mask), (3, 7), torch.device("cpu")), mask)
    assert len(pack(mask)) == 3
    with pytest.raises(ValueError, match=r"Expected 4 bytes for a mask of shape \(5, 5\), but got 3"):
        unpack(pack(mask), (5, 5), torch.device("cpu"))
