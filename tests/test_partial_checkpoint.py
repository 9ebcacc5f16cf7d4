"""Checkpoints of what trains: small, exact on resume, and never put upon other frozen weights than they had."""

import lightning as L
import pytest
import torch
from adapter_models import FIXED, LLAMA, METHODS, save_base
from lightning.pytorch.callbacks import EMAWeightAveraging
from support import TINY_GPT2, Positions, pad_rows, ragged_rows
from task_models import BERT, CASES, batch_of
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from lightning_llm import LLMModule
from lightning_llm.callbacks import AccumulationSchedule, TokenWeightedAccumulation

BATCHES = [pad_rows(ragged_rows(2, seed)) for seed in range(8)]


def build(folder, method="LoRA", **options):
    torch.manual_seed(0)
    return LLMModule(str(folder), peft=METHODS[method], learning_rate=1e-2, **{**FIXED, **options})


class SaveAfter(L.Callback):
    def __init__(self, steps, path):
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.path is not None and trainer.global_step == self.steps and batch_idx % 2 == 1:
            trainer.save_checkpoint(self.path)


def fit(make_trainer, module, steps, ckpt_path=None, save=None):
    callbacks = [TokenWeightedAccumulation(), AccumulationSchedule(2), SaveAfter(2, save)]
    trainer = make_trainer(max_steps=steps, max_epochs=1, callbacks=callbacks)
    trainer.fit(module, Positions(BATCHES), ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "IA3", "prompt tuning", "prefix tuning", "VeRA"])
def test_checkpoint_holds_what_trains_and_a_run_resumes_to_the_same_bits(method, quiet_trainer, tmp_path):
    base, path = save_base(tmp_path / "base"), tmp_path / "run.ckpt"
    whole = fit(quiet_trainer, build(base, method), 4)
    fit(quiet_trainer, build(base, method, checkpoint="trainable"), 2, save=path)
    held = set(torch.load(path, weights_only=True)["state_dict"])
    module = build(base, method, checkpoint="trainable")
    module.configure_model()
    assert held >= {name for name, p in module.named_parameters() if p.requires_grad}
    assert not held & {name for name, p in module.named_parameters() if not p.requires_grad}
    resumed = fit(quiet_trainer, module, 4, ckpt_path=path)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())


def test_loading_reads_the_frozen_weights_from_their_folder_whatever_the_seed(quiet_trainer, tmp_path):
    base, path = save_base(tmp_path / "base"), tmp_path / "run.ckpt"
    module = fit(quiet_trainer, build(base, checkpoint="trainable"), 2, save=path)
    whole = fit(quiet_trainer, build(base), 2, save=tmp_path / "whole.ckpt")
    assert path.stat().st_size < (tmp_path / "whole.ckpt").stat().st_size / 3
    torch.manual_seed(99)
    loaded = LLMModule.load_from_checkpoint(path, weights_only=True)
    assert loaded.source == base
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(*(one.eval().training_step(BATCHES[0], 0)["loss"] for one in (module, loaded)))


def test_another_base_is_refused_also_in_another_precision(quiet_trainer, tmp_path):
    path = tmp_path / "run.ckpt"
    fit(quiet_trainer, build(save_base(tmp_path / "base"), checkpoint="trainable"), 2, save=path)
    other = save_base(tmp_path / "other", seed=1)
    for dtype in ("float64", "float32", "bfloat16"):
        with pytest.raises(ValueError, match="on top of frozen weights, but not on these"):
            LLMModule.load_from_checkpoint(path, model=other, dtype=dtype)
        LLMModule.load_from_checkpoint(path, model=str(tmp_path / "base"), dtype=dtype)


def test_a_checkpoint_that_lacks_what_trains_is_an_error(quiet_trainer, tmp_path):
    path = tmp_path / "run.ckpt"
    fit(quiet_trainer, build(save_base(tmp_path / "base"), checkpoint="trainable"), 2, save=path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"].popitem()
    torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
        LLMModule.load_from_checkpoint(path)


def test_frozen_layers_without_an_adapter_are_left_out_too_with_tied_weights(quiet_trainer, tmp_path):
    base, path = save_base(tmp_path / "base", TINY_GPT2), tmp_path / "run.ckpt"

    def freeze():
        module = LLMModule(base, checkpoint="trainable", **FIXED)
        module.configure_model()
        for name, parameter in module.model.named_parameters():
            parameter.requires_grad_("h.1." in name)
        return module

    module = fit(quiet_trainer, freeze(), 2, save=path)
    held = torch.load(path, weights_only=True)["state_dict"]
    assert held
    assert all(".h.1." in key for key in held)
    with pytest.raises(RuntimeError, match="Missing key"):  # the module would not freeze them again
        LLMModule.load_from_checkpoint(path)
    resumed = fit(quiet_trainer, freeze(), 4, ckpt_path=path)
    assert torch.equal(resumed.model.lm_head.weight, module.model.lm_head.weight)


def test_beside_an_average_of_weights_neither_state_holds_what_is_frozen(quiet_trainer, tmp_path):
    """The average of frozen weights is another one by rounding; what is compared on loading must not be taken of it."""
    base, path = save_base(tmp_path / "base"), tmp_path / "run.ckpt"

    def run(ckpt_path=None, save=None, **options):
        module = build(base, dtype="float32", **options)
        callbacks = [TokenWeightedAccumulation(), EMAWeightAveraging(decay=0.8), SaveAfter(2, save)]
        trainer = quiet_trainer(max_steps=4, accumulate_grad_batches=2, callbacks=callbacks)
        trainer.fit(module, Positions(BATCHES), ckpt_path=ckpt_path, weights_only=True)
        return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}

    whole = run(save=path, checkpoint="trainable")
    held = torch.load(path, weights_only=True)
    for state in ("state_dict", "current_model_state"):
        assert set(held[state]) == set(whole)
    resumed = run(path, checkpoint="trainable")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_a_built_model_is_passed_again(quiet_trainer, tmp_path):
    import peft

    base, path = save_base(tmp_path / "base"), tmp_path / "run.ckpt"

    def built():
        model = AutoModelForCausalLM.from_pretrained(base)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))

    module = fit(quiet_trainer, LLMModule(built(), checkpoint="trainable"), 2, save=path)
    with pytest.raises(ValueError, match="`model` is missing"):
        LLMModule.load_from_checkpoint(path)
    loaded = LLMModule.load_from_checkpoint(path, model=built())
    expected = module.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_classes_that_the_data_named_are_known_without_it(quiet_trainer, tmp_path):
    class Data(L.LightningDataModule):
        label_names = ("bad", "fair", "good")
        problem_type = "single_label_classification"

        def train_dataloader(self):
            return DataLoader(CASES["one class"].rows(4), 2, collate_fn=batch_of)

    torch.manual_seed(0)
    BertModel(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"})).save_pretrained(tmp_path / "base")
    module = LLMModule(str(tmp_path / "base"), "sequence-classification", peft=METHODS["LoRA"], checkpoint="trainable")
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, Data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = LLMModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert loaded.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert loaded.task.problem_type == "single_label_classification"
    expected = module.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_random_weights_that_are_nowhere_else_are_refused():
    with pytest.raises(ValueError, match="are random, and are nowhere else. Keep them"):
        LLMModule(dict(LLAMA), peft=METHODS["LoRA"], checkpoint="trainable")
    with pytest.raises(ValueError, match="must be 'whole' or 'trainable', but got 'adapter'"):
        LLMModule(dict(LLAMA), checkpoint="adapter")


def test_a_base_that_the_adapters_start_changes_is_refused(tmp_path):
    base = save_base(tmp_path)
    for start in ("pissa", "pissa_niter_4", "olora"):
        fields = {**METHODS["LoRA"], "init_lora_weights": start}
        with pytest.raises(ValueError, match="leaves out the base's weights, which init_lora_weights='"):
            LLMModule(base, peft=fields, checkpoint="trainable")
        LLMModule(base, peft=fields)
    LLMModule(base, peft={**METHODS["LoRA"], "init_lora_weights": "gaussian"}, checkpoint="trainable")


def test_a_pooler_that_the_folder_lacks_trains_and_is_kept(quiet_trainer, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"})
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    module = LLMModule(
        *(str(tmp_path / "base"), "sequence-classification"), labels=3, peft=METHODS["LoRA"], checkpoint="trainable"
    )
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, DataLoader(CASES["one class"].rows(4), 2, collate_fn=batch_of))
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert any("pooler" in name for name in trained)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    torch.manual_seed(5)
    loaded = LLMModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    expected = module.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
