"""Folders of models with adapters: the adapter alone, or plain weights with it in them; the run goes on untouched."""

import json
import sys
from pathlib import Path

import pytest
import torch
from adapter_models import FIXED, LLAMA, METHODS, move, save_base
from peft import AutoPeftModelForCausalLM, PeftModel
from support import pad_rows, ragged_rows
from task_models import BERT
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    pipeline,
)

from lightning_llm import LLMModule
from lightning_llm.callbacks import AdaLoraAllocation, HuggingFaceCheckpoint, TokenWeightedAccumulation
from lightning_llm.callbacks.merged_adapters import merged_copy

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
from test_export import TEXTS, word_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9]])
NO_PROMPTS = [method for method in METHODS if method[-1] != "t" and "tuning" not in method]


def fit(make_trainer, module, folder, **options):
    adaptive = module.peft["peft_type"] == "ADALORA"
    callbacks = [TokenWeightedAccumulation(), *([AdaLoraAllocation()] if adaptive else [])]
    export = HuggingFaceCheckpoint(str(folder), monitor=None, **options)
    data = DataLoader(ragged_rows(12), 2, collate_fn=pad_rows)
    make_trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[*callbacks, export]).fit(module, data)
    module.eval()
    return folder / "last"


def build(method, folder, **options):
    torch.manual_seed(0)
    module = LLMModule(str(folder), peft=METHODS[method], learning_rate=1e-2, **{**FIXED, **options})
    module.configure_model()
    move(module)
    return module


@pytest.mark.parametrize("method", NO_PROMPTS)
def test_merged_folder_is_a_plain_model_with_the_logits_of_base_and_adapter(method, quiet_trainer, tmp_path):
    module = build(method, save_base(tmp_path / "base"))
    folder = fit(quiet_trainer, module, tmp_path / "export", adapter="merged")
    assert not (folder / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert not any("lora" in name or "base_layer" in name for name, _ in plain.named_parameters())
    expected = module.model(IDS).logits
    assert torch.allclose(plain(IDS).logits, expected, rtol=0, atol=1e-10)
    with module.model.disable_adapter():
        assert (module.model(IDS).logits - expected).abs().max() > 1e-3


OF_TOKENS = {
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "another head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6]},
}


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("name", OF_TOKENS)
def test_what_is_merged_into_an_embedding_is_not_in_the_head_that_it_was_tied_to(name, is_tied, tmp_path):
    base = save_base(tmp_path / "base", {**LLAMA, "tie_word_embeddings": is_tied})
    module = LLMModule(base, peft={**METHODS["LoRA"], **OF_TOKENS[name]}, **FIXED)
    module.configure_model()
    move(module)
    expected = module.model.eval()(IDS).logits
    merged_copy(module.model).save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    assert torch.allclose(plain(IDS).logits, expected, rtol=0, atol=1e-6)
    assert torch.equal(module.model(IDS).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_adapter_alone_loads_onto_its_base(method, quiet_trainer, tmp_path):
    module = build(method, save_base(tmp_path / "base"))
    folder = fit(quiet_trainer, module, tmp_path / "export")
    assert not (folder / "model.safetensors").exists()
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    assert torch.allclose(loaded(IDS).logits, module.model(IDS).logits, rtol=0, atol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    assert (base(IDS).logits - module.model(IDS).logits[:, -5:]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "AdaLoRA"])
def test_merging_while_training_changes_nothing_of_the_run(method, quiet_trainer, tmp_path):
    weights = []
    for options in ({"adapter": "merged", "every_n_steps": 1}, {"adapter": "alone", "every_n_steps": 100}):
        module = build(method, save_base(tmp_path / "base"))
        fit(quiet_trainer, module, tmp_path / options["adapter"], **options)
        weights.append(module.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_a_prompt_is_written_alone_with_a_word_why(method, quiet_trainer, tmp_path):
    module = build(method, save_base(tmp_path / "base"))
    with pytest.warns(UserWarning, match="writes the adapter alone: a prompt is no change of weights"):
        folder = fit(quiet_trainer, module, tmp_path / "export", adapter="merged")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")


def test_an_adapter_whose_base_is_in_no_folder_is_warned_of(tiny_llama, quiet_trainer, tmp_path):
    module = LLMModule(tiny_llama, peft=METHODS["LoRA"])
    with pytest.warns(UserWarning, match="its base comes from no folder.*Use adapter='merged'"):
        fit(quiet_trainer, module, tmp_path)
    with pytest.raises(ValueError, match="`adapter` must be 'alone' or 'merged', but got 'both'"):
        HuggingFaceCheckpoint(adapter="both")


@pytest.mark.parametrize("method", ["LoRA", "IA3"])
def test_a_classifier_answers_in_pipeline_merged_and_from_its_adapter(method, quiet_trainer, tmp_path):
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    BertModel(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"})).save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    labels = ["bad", "fair", "good"]
    module = LLMModule(
        *(str(tmp_path / "base"), "sequence-classification"),
        labels=labels,
        peft=METHODS[method],
        learning_rate=1e-2,
        lr_schedule="constant",
    )
    rows = [{**tokenizer(text), "labels": index % 3} for index, text in enumerate(TEXTS)]
    exports = [
        HuggingFaceCheckpoint(str(tmp_path / how), tokenizer=tokenizer, monitor=None, adapter=how)
        for how in ("alone", "merged")
    ]
    data = DataLoader(rows, 2, collate_fn=DataCollatorWithPadding(tokenizer))
    quiet_trainer(max_epochs=3, callbacks=exports).fit(module, data)
    module.eval()
    with torch.no_grad():
        scores = module.predict_step(dict(DataCollatorWithPadding(tokenizer)(rows)), 0)["probabilities"]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    alone = PeftModel.from_pretrained(again, tmp_path / "alone" / "last").eval()
    with torch.no_grad():
        inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
        found = alone(**inputs).logits.softmax(-1)
    assert torch.allclose(found, scores, atol=1e-5)
    classify = pipeline("text-classification", str(tmp_path / "merged" / "last"), top_k=None)
    for answers, expected in zip(classify(TEXTS), scores, strict=True):
        found_scores = {answer["label"]: answer["score"] for answer in answers}
        assert [found_scores[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-5)
