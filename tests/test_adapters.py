"""Adapters: peft's own loss and gradient, the same for any cut of the batch; what trains, is saved, is refused."""

import peft
import pytest
import torch
import yaml
from adapter_models import (
    BASES,
    FIXED,
    LLAMA,
    METHODS,
    PROMPTS,
    adapted,
    distance,
    gradient_of,
    move,
    own_loss,
)
from safetensors.torch import load_file
from support import TINY_GPT2, pad_rows, ragged_rows
from task_models import CASES, batch_of
from torch.utils.data import DataLoader

from lightning_llm import LLMModule
from lightning_llm.adapters import adapter_fields
from lightning_llm.callbacks import DynamicBatchScaler, TokenWeightedAccumulation
from lightning_llm.isolation import PackingLeakError

TOLERANCE = 1e-12
EVERY = pytest.mark.parametrize("method", METHODS)
CUTS = [(0, 1), (1, 3), (3, 7)]


def loader(rows, batch_size):
    return DataLoader(rows, batch_size=batch_size, collate_fn=pad_rows)


# ---- loss and gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@EVERY
def test_loss_and_gradient_are_those_of_pefts_own_forward(method, base):
    if (method, base) in (("OFT", "gpt2"), ("LoHa", "gpt2")):
        pytest.skip("peft has none for this model's layers")
    module, batch = adapted(method, dict(BASES[base])), pad_rows(ragged_rows(7))
    own = own_loss(module.model, batch)
    truth = gradient_of(module, own)
    assert truth.norm() > 0
    for kernel in ("chunked", "plain"):
        output = LLMModule(module.model, loss_kernel=kernel).training_step(batch, 0)
        assert output["loss"].item() == pytest.approx(own.item(), rel=TOLERANCE)
        assert distance(gradient_of(module, output["loss"]), truth) < TOLERANCE


@EVERY
def test_any_cut_of_a_batch_has_its_gradient_and_a_mean_of_means_has_not(method):
    module, rows = adapted(method), ragged_rows(7)
    truth = gradient_of(module, module.training_step(pad_rows(rows), 0)["loss"])
    losses = [module.task.loss(module.model, pad_rows(rows[a:b])) for a, b in CUTS]
    weighted = sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses)
    assert distance(gradient_of(module, weighted), truth) < TOLERANCE
    mean_of_means = sum(module.task.loss(module.model, pad_rows(rows[a:b])).mean for a, b in CUTS) / 3
    assert distance(gradient_of(module, mean_of_means), truth) > 1e-3


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "IA3", "prompt tuning", "prefix tuning"])
def test_training_in_micro_batches_and_pieces_is_training_on_whole_batches(method, quiet_trainer):
    trained = []
    for size, accumulate, callbacks in (
        (8, 1, []),
        (2, 4, [TokenWeightedAccumulation()]),
        (4, 2, [TokenWeightedAccumulation(), DynamicBatchScaler(max_piece=3)]),
        (2, 4, []),
    ):
        module = adapted(method, dict(TINY_GPT2), optimizer="sgd", learning_rate=0.1)  # no norm rounds to float32
        start = torch.cat([p.detach().flatten().clone() for p in module.parameters() if p.requires_grad])
        trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=accumulate, callbacks=callbacks)
        trainer.fit(module, loader(ragged_rows(24), size))
        trained.append(torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad]) - start)
    whole, micro_batches, pieces, plain_lightning = trained
    assert distance(micro_batches, whole) < 1e-10
    assert distance(pieces, whole) < 1e-10
    assert distance(plain_lightning, whole) > 1e-4


@pytest.mark.parametrize("kernel", ["chunked", "plain"])
@pytest.mark.parametrize("method", ["LoRA", *PROMPTS])
def test_scores_of_rows_sum_to_the_loss_and_evaluation_counts_the_same_tokens(method, kernel, quiet_trainer):
    module, rows = adapted(method, loss_kernel=kernel), ragged_rows(5)
    module.eval()
    loss = module.task.loss(module.model, pad_rows(rows))
    scores = module.predict_step(pad_rows(rows), 0)
    assert scores["num_tokens"].sum() == loss.num_tokens
    assert scores["nll"].sum().item() == pytest.approx(loss.total.item(), rel=TOLERANCE)
    (result,) = quiet_trainer().validate(module, loader(rows, 2), verbose=False)
    assert result["val/loss"] == pytest.approx(loss.mean.item(), rel=1e-6)


def test_the_prompt_predicts_the_first_token():
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    assert adapted("prompt tuning").training_step(batch, 0)["num_tokens"] == 3
    assert adapted("prefix tuning").training_step(batch, 0)["num_tokens"] == 2


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "AdaLoRA", "IA3"])
def test_windows_have_the_gradient_of_whole_rows(method):
    batch = pad_rows(ragged_rows(3))
    plain, windows = adapted(method, dict(TINY_GPT2)), adapted(method, dict(TINY_GPT2), sequence_window=8)
    truth, found = (gradient_of(module, module.training_step(batch, 0)["loss"]) for module in (plain, windows))
    assert distance(found, truth) < TOLERANCE


OF_TOKENS = [{"trainable_token_indices": [5, 6, 7]}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["wte"]}]


@pytest.mark.parametrize("fields", OF_TOKENS)
def test_windows_train_tokens_and_heads_too_and_leave_each_parameter_in_its_place(fields):
    """Of trained tokens peft has one module under two names, where embedding and head are tied."""
    batch, found = pad_rows(ragged_rows(3)), []
    for options in ({"loss_kernel": "plain"}, {"sequence_window": 8}):
        torch.manual_seed(0)
        module = LLMModule(dict(TINY_GPT2), peft={"peft_type": "LORA", "r": 2, **fields}, **FIXED, **options)
        module.configure_model()
        move(module)
        before = list(map(id, module.parameters()))
        found.append(gradient_of(module, module.training_step(batch, 0)["loss"]))
        assert list(map(id, module.parameters())) == before
    assert distance(found[1], found[0]) < TOLERANCE


@pytest.mark.parametrize("method", ["LoRA", "prompt tuning"])
def test_recomputed_activations_have_the_same_gradient(method):
    batch = pad_rows(ragged_rows(3))
    modules = (adapted(method), adapted(method, gradient_checkpointing=True))
    for module in modules:
        module.train()
    truth, found = (gradient_of(module, module.training_step(batch, 0)["loss"]) for module in modules)
    assert distance(found, truth) < TOLERANCE


@pytest.mark.parametrize("method", ["LoRA", *PROMPTS])
def test_generation_goes_through_the_adapter(method):
    module, ids = adapted(method), torch.tensor([[5, 6, 7]])
    module.eval()
    written = module.generate(ids, max_new_tokens=3, do_sample=False)
    current = ids
    for _ in range(written.shape[1] - 3):
        current = torch.cat([current, module.model(input_ids=current).logits[:, -1:].argmax(-1)], 1)
    assert written.equal(current)


# ---- heads -----------------------------------------------------------------------------------------------------------

HEADS = {
    "masked-lm, bert": ["LoRA", "IA3"],
    "seq2seq, t5": ["LoRA", "IA3", *PROMPTS],
    "seq2seq, bart": ["LoRA", *PROMPTS],
    "one class": ["LoRA", "DoRA", "AdaLoRA", "IA3", *PROMPTS],
    "one class, decoder": ["LoRA", "prefix tuning"],
    "numbers": ["LoRA"],
    "tokens": ["LoRA", "prefix tuning"],
    "answers, bert": ["LoRA", "prefix tuning"],
    "images": ["LoRA"],
    "audio": ["LoRA"],
}
TARGETS = {"a number": ["q_lin", "v_lin"], "images": ["q_proj", "v_proj"], "audio": ["q_proj", "v_proj"]}


def head_module(name, method, **options):
    case = CASES[name]
    targets = {"target_modules": TARGETS[name]} if name in TARGETS else {}
    torch.manual_seed(0)
    model = options.pop("model", dict(case.config))
    peft_fields = {**METHODS[method], **targets}
    module = LLMModule(model, case.task, peft=peft_fields, **{**FIXED, **case.options, **options})
    module.configure_model()
    move(module)
    return case, module


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in HEADS for method in HEADS[name]])
def test_heads_keep_transformers_loss_and_any_cut_its_gradient(name, method):
    case, module = head_module(name, method)
    batch = batch_of(case.rows(7))
    own = module.model(**{key: value for key, value in batch.items() if key != "row_ids"}).loss
    loss = module.training_step(batch, 0)["loss"]
    assert loss.item() == pytest.approx(own.item(), rel=TOLERANCE)
    truth = gradient_of(module, loss)
    parts = [{key: value[a:b] for key, value in batch.items()} for a, b in CUTS]
    losses = [module.task.loss(module.model, part) for part in parts]
    weighted = sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses)
    tolerance = 1e-6 if "t5" in name else TOLERANCE  # T5 rounds to float32 inside
    assert distance(gradient_of(module, weighted), truth) < tolerance


@pytest.mark.parametrize("name", ["one class", "a number", "tokens", "answers, bert", "images", "audio"])
def test_a_classifiers_head_trains_and_is_saved_with_its_adapter(name, tmp_path):
    case, module = head_module(name, "LoRA")
    plain = case.module().model
    heads = {key for key, child in plain.named_children() if key != plain.base_model_prefix and [*child.parameters()]}
    base = module.model.get_base_model()
    for head in heads:
        assert next(iter(getattr(base, head).modules_to_save["default"].parameters())).requires_grad, head
    module.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for key, parameter in module.model.named_parameters():
        if parameter.requires_grad and "modules_to_save" in key:
            assert torch.equal(saved[key.replace("modules_to_save.default.", "")], parameter), key


# ---- what is saved ---------------------------------------------------------------------------------------------------


@EVERY
def test_checkpoint_holds_architecture_and_adapter(method, quiet_trainer, tmp_path):
    module = adapted(method, learning_rate=1e-2)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader(ragged_rows(4), 2))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    torch.manual_seed(7)  # other random numbers than those it began with
    loaded = LLMModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert loaded.hparams["peft"] == adapter_fields(METHODS[method])
    expected = module.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    batch = pad_rows(ragged_rows(3))
    losses = [one.eval().training_step(batch, 0)["loss"].item() for one in (module, loaded)]
    assert losses[0] == losses[1]


def test_a_configuration_object_is_as_good_as_its_fields():
    config = peft.LoraConfig(r=2, target_modules={"v_proj", "q_proj"}, task_type="CAUSAL_LM")
    module = LLMModule(dict(LLAMA), peft=config)
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]}
    assert {key: value for key, value in module.hparams["peft"].items() if value} == fields
    assert yaml.safe_load(yaml.safe_dump(module.hparams["peft"])) == module.hparams["peft"]
    module.configure_model()
    assert module.model.active_peft_config.r == 2


def test_adapter_of_a_half_precision_model_trains_in_float32():
    module = LLMModule(dict(LLAMA), dtype="bfloat16", peft=METHODS["LoRA"])
    module.configure_model()
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert module.training_step(pad_rows(ragged_rows(3)), 0)["loss"].isfinite()


# ---- packed rows -----------------------------------------------------------------------------------------------------

PACKED = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11]]),
    "labels": torch.tensor([[5, 6, 7, 8, 9, 10, 11]]),
    "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
}
APART = {
    "input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]]),
    "labels": torch.tensor([[5, 6, 7, -100], [8, 9, 10, 11]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
}


@pytest.mark.parametrize("method", PROMPTS)
def test_packed_rows_are_refused_by_prompts_or_unpacked(method):
    with pytest.raises(PackingLeakError, match=r"only the first document would have it.*windowing='documents'"):
        adapted(method).training_step(PACKED, 0)
    unpacking, apart = adapted(method, leaking_packs="unpack"), adapted(method)
    with pytest.warns(UserWarning, match="leaking_packs='unpack'"):
        found = unpacking.training_step(PACKED, 0)
    truth = apart.training_step(APART, 0)
    assert found["num_tokens"] == truth["num_tokens"]
    assert found["loss"].item() == pytest.approx(truth["loss"].item(), rel=TOLERANCE)


@pytest.mark.parametrize("method", PROMPTS)
def test_positions_of_a_single_document_change_nothing(method):
    batch = {key: value for key, value in APART.items() if key != "position_ids"}
    with_positions = {**batch, "position_ids": torch.arange(4).expand(2, 4)}
    module = adapted(method)
    losses = [module.training_step(one, 0)["loss"].item() for one in (batch, with_positions)]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "AdaLoRA", "IA3"])
def test_packed_rows_are_documents_apart_in_other_adapters(method):
    module = adapted(method)
    packed, apart = (module.training_step(batch, 0) for batch in (PACKED, APART))
    # packed, the second document's first token is predicted by nothing either way
    assert packed["num_tokens"] == apart["num_tokens"] + 1
    labels = PACKED["labels"].clone()
    labels[0, 3] = -100
    packed = module.training_step({**PACKED, "labels": labels}, 0)
    assert packed["loss"].item() == pytest.approx(apart["loss"].item(), rel=TOLERANCE)


def test_prompt_and_row_need_positions_for_both():
    module = adapted("prompt tuning")  # 64 positions
    ids = torch.zeros(1, 62, dtype=torch.long)
    with pytest.raises(ValueError, match="a batch after a prompt of 3 has 65 tokens"):
        module.training_step({"input_ids": ids, "labels": ids}, 0)


# ---- refused ---------------------------------------------------------------------------------------------------------

LORA = METHODS["LoRA"]
PROMPT, PREFIX = METHODS["prompt tuning"], METHODS["prefix tuning"]
REFUSED = {
    "no type": ({"r": 8}, {}, r"`peft` needs a `peft_type`.*but got \['r'\]"),
    "unknown type": ({"peft_type": "LORRA"}, {}, "has no `peft_type` 'LORRA'. Did you mean 'LORA'?"),
    "DoRA by name": ({"peft_type": "DoRA"}, {}, "DoRA is {'peft_type': 'LORA', 'use_dora': True}"),
    "unknown field": ({"peft_type": "LORA", "rank": 8}, {}, "LoraConfig has no field `rank`."),
    "misspelt field": ({"peft_type": "LORA", "lora_alfa": 8}, {}, "Did you mean `lora_alpha`?"),
    "another task": ({**LORA, "task_type": "SEQ_CLS"}, {}, "Leave `task_type` out"),
    "own loss": ({"peft_type": "CPT"}, {}, "does not train adapters of the type CPT: its loss"),
    "batch router": ({"peft_type": "LILY"}, {}, "depends on how that is cut"),
    "windows": (PROMPT, {"sequence_window": 8}, "cannot be cut along the sequence"),
    "shared rows": (PREFIX, {"context_parallel": True}, "cannot be cut along the sequence"),
    "checkpointed prefix": (PREFIX, {"gradient_checkpointing": True}, "drops under gradient checkpointing"),
    "tokens": (PROMPT, {"task": "token-classification"}, "not 'token-classification'. Use LoRA, or PREFIX_TUNING"),
    "hidden tokens": (PREFIX, {"task": "masked-lm"}, "not 'masked-lm'. Use LoRA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_built(name):
    fields, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace("{", r"\{")):
        LLMModule(dict(LLAMA), peft=fields, **options)


def test_a_built_model_takes_no_further_adapter_and_no_other_type_is_taken_for_one():
    with pytest.raises(ValueError, match="for a model that LLMModule builds"):
        LLMModule(adapted("LoRA").model, peft=LORA)
    with pytest.raises(TypeError, match="or a PeftConfig, but got str"):
        LLMModule(dict(LLAMA), peft="LORA")


def test_a_decoder_that_looks_for_padding_takes_no_embedded_prompt():
    with pytest.raises(ValueError, match="looks for padding in `input_ids`.*Use PREFIX_TUNING or LoRA"):
        head_module("one class, decoder", "prompt tuning")


def test_ada_lora_alone_warns(quiet_trainer):
    with pytest.warns(UserWarning, match="AdaLoRA without the callback AdaLoraAllocation"):
        quiet_trainer(max_steps=1).fit(adapted("AdaLoRA"), loader(ragged_rows(2), 2))
