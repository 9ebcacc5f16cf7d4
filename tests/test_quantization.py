"""Quantised bases: adapters on them train, with the same gradient for any cut; what cannot be is refused."""

import importlib.util

import pytest
import torch
from adapter_models import METHODS, distance, gradient_of, move, save_base
from support import TINY_LLAMA, pad_rows, ragged_rows
from torch.utils.data import DataLoader

from lightning_llm import LLMModule
from lightning_llm.callbacks import HuggingFaceCheckpoint, TokenWeightedAccumulation
from lightning_llm.quantization import quantization_config

torchao = pytest.importorskip("torchao")
INT8 = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}


def build(folder, quantization=INT8, **options):
    torch.manual_seed(0)
    defaults = {"peft": METHODS["LoRA"], "learning_rate": 1e-2, "lr_schedule": "constant", "warmup": 0}
    module = LLMModule(str(folder), quantization=quantization, **{**defaults, **options})
    module.configure_model()
    move(module)
    return module


@pytest.mark.parametrize("method", ["LoRA", "IA3", "prompt tuning"])
def test_gradient_on_int8_weights_does_not_depend_on_the_cut(method, tmp_path):
    module, rows = build(save_base(tmp_path), peft=METHODS[method]), ragged_rows(7)
    layer = module.model.get_base_model().model.layers[0].mlp.down_proj
    weight = getattr(layer, "base_layer", layer).weight
    assert type(weight).__name__ == "Int8Tensor"
    truth = gradient_of(module, module.training_step(pad_rows(rows), 0)["loss"])
    losses = [module.task.loss(module.model, pad_rows(rows[a:b])) for a, b in [(0, 1), (1, 3), (3, 7)]]
    weighted = sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses)
    assert distance(gradient_of(module, weighted), truth) < 1e-5  # float32
    mean_of_means = sum(loss.mean for loss in [module.task.loss(module.model, pad_rows([row])) for row in rows]) / 7
    assert distance(gradient_of(module, mean_of_means), truth) > 1e-3


def test_int8_is_near_what_it_was_made_from_and_not_the_same(tmp_path):
    folder, batch = save_base(tmp_path), pad_rows(ragged_rows(4))
    plain, quantised = build(folder, None), build(folder)
    losses = [module.training_step(batch, 0)["loss"].item() for module in (plain, quantised)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != losses[1]


def test_it_trains_and_its_checkpoint_holds_the_adapter_alone(quiet_trainer, tmp_path):
    module = build(save_base(tmp_path / "base"))
    before = module.training_step(pad_rows(ragged_rows(8)), 0)["loss"].item()
    export = HuggingFaceCheckpoint(str(tmp_path / "export"), monitor=None, adapter="merged")
    trainer = quiet_trainer(max_epochs=4, accumulate_grad_batches=2, callbacks=[TokenWeightedAccumulation(), export])
    with pytest.warns(UserWarning, match="writes the adapter alone: the weights are quantised"):
        trainer.fit(module, DataLoader(ragged_rows(8), 2, collate_fn=pad_rows))
    assert module.training_step(pad_rows(ragged_rows(8)), 0)["loss"].item() < before
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    held = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in key for key in held)
    loaded = LLMModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    batch = pad_rows(ragged_rows(3))
    assert torch.equal(*(one.eval().training_step(batch, 0)["loss"] for one in (module, loaded)))
    assert (tmp_path / "export" / "last" / "adapter_model.safetensors").exists()


def test_arguments_of_a_type_are_read_from_a_mapping():
    config = quantization_config(
        {"quant_method": "torchao", "quant_type": {"name": "Int4WeightOnlyConfig", "group_size": 32}}
    )
    assert config.quant_type.group_size == 32
    same = quantization_config({"quant_method": "torchao", "quant_type": config.quant_type})
    assert same.quant_type is config.quant_type


def test_what_cannot_be_quantised_or_trained_is_refused(quiet_trainer, tmp_path):
    folder = save_base(tmp_path)
    with pytest.raises(ValueError, match="read from the hub or a folder, but `model` is random weights"):
        LLMModule(dict(TINY_LLAMA), quantization=INT8)
    with pytest.raises(ValueError, match="but `model` is a built model"):
        LLMModule(build(folder, None, peft=None).model, quantization=INT8)
    with pytest.raises(ValueError, match="leave `checkpoint` out, or say 'trainable'"):
        LLMModule(folder, quantization=INT8, checkpoint="whole")
    kind = quantization_config(INT8)
    with pytest.raises(TypeError, match=r"`quantization` must be a mapping.*but got TorchAoConfig"):
        LLMModule(folder, quantization=kind)
    with pytest.raises(TypeError, match=r"`quant_type` must be a name or a mapping.*but got Int8WeightOnlyConfig"):
        LLMModule(folder, quantization={"quant_method": "torchao", "quant_type": kind.quant_type})
    with pytest.raises(ValueError, match="needs a `quant_method` that transformers knows, .* but got 'int8'"):
        LLMModule(folder, quantization={"quant_method": "int8"})
    with pytest.raises(ValueError, match=r"must name a configuration of torchao, such as .*Int8WeightOnlyConfig"):
        LLMModule(folder, quantization={"quant_method": "torchao", "quant_type": "int8_weight_only"})
    with pytest.raises(ValueError, match="pass another `dtype`"):
        build(folder, dtype="float64")
    with pytest.raises(ValueError, match="Not one weight of LlamaForCausalLM was quantised.*`group_size`"):
        build(folder, {"quant_method": "torchao", "quant_type": "Int4WeightOnlyConfig"})
    data = DataLoader(ragged_rows(2), 2, collate_fn=pad_rows)
    with pytest.raises(ValueError, match="Quantised weights do not train: add an adapter"):
        quiet_trainer(max_steps=1).fit(build(folder, peft=None), data)
    dynamic = {"quant_method": "torchao", "quant_type": "Int8DynamicActivationInt8WeightConfig"}
    with pytest.raises(ValueError, match="No gradient flows through activations that are quantised too"):
        quiet_trainer(max_steps=1).fit(build(folder, dynamic), data)


def test_a_missing_package_is_named(tmp_path):
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ImportError, match="needs its package: `pip install bitsandbytes`"):
        LLMModule(save_base(tmp_path), quantization={"load_in_4bit": True})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_lora_on_four_bits_of_bitsandbytes_trains_on_a_gpu(quiet_trainer, tmp_path):
    pytest.importorskip("bitsandbytes")
    fields = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    module = LLMModule(save_base(tmp_path), quantization=fields, peft=METHODS["LoRA"], learning_rate=1e-2)
    trainer = quiet_trainer(max_epochs=2, accelerator="gpu", precision="bf16-mixed")
    trainer.fit(module, DataLoader(ragged_rows(8), 2, collate_fn=pad_rows))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    held = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert held
    assert all("lora_" in key for key in held)
