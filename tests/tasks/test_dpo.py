"""Preference tuning: TRL's own loss, gradient, metrics and steps; any cut of the pairs is the whole; references."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from pair_models import GPT2, batch_of, distance, gradient_of, loader_of, make_pairs, preferring, rows_of, weights_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lightning_llm import LLMModule
from lightning_llm.callbacks import DynamicBatchScaler, TokenWeightedAccumulation

TOLERANCE = 1e-12
NAMES = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"]
NAMES = [*NAMES, "logps/rejected"]
LOSSES = {
    "sigmoid": {},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.2},
    "sigmoid_norm": {"loss_type": "sigmoid_norm"},
}


# ---- against TRL -----------------------------------------------------------------------------------------------------


def trl_trainer(folder, module, options, pairs, **arguments):
    """TRL's DPOTrainer around copies of the module's model and reference."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", "the", "cat", "sat", "ran"])}
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "[UNK]")), **special)
    rows = datasets.Dataset.from_list([{"prompt": "the cat", "chosen": " sat", "rejected": " ran"}] * len(pairs))
    config = trl.DPOConfig(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        beta=0.5,
        loss_type=[options.get("loss_type", "sigmoid")],
        label_smoothing=options.get("label_smoothing", 0.0),
        max_length=None,
        per_device_train_batch_size=len(pairs),
        disable_tqdm=True,
        save_strategy="no",
        **arguments,
    )
    reference = copy.deepcopy(module.task.reference._copy)
    model = copy.deepcopy(module.model)
    trainer = trl.DPOTrainer(model, reference, config, train_dataset=rows, processing_class=tokenizer)
    collator = trl.trainer.dpo_trainer.DataCollatorForPreference(pad_token_id=0)
    return trainer, collator


def plain_head(model):
    """What TRL's fused head gives, in the model's own precision; TRL's is float32."""

    def forward(labels, fused_lm_head, input_ids, attention_mask, use_cache):
        logits = type(model).forward(model, input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        targets = labels[:, 1:]
        logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return SimpleNamespace(
            log_probs=logps.masked_fill(targets == -100, 0.0),
            entropy=torch.zeros_like(logps),
            mean_logits=logits.mean(-1),
            is_top1=logits.argmax(-1) == targets,
        )

    return forward


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_and_metrics_are_those_of_trl(tmp_path, name):
    options, pairs = LOSSES[name], make_pairs(6)
    module = preferring(task_options=options)
    trainer, collator = trl_trainer(tmp_path, module, options, pairs)
    for model in (trainer.model.train(), trainer.ref_model):
        model.forward = plain_head(model)
    own = trainer.compute_loss(trainer.model, collator(pairs))
    own.backward()
    truth = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    loss, details = module.task.loss_and_details(module.model, batch_of(pairs))
    assert own.dtype == torch.float64
    assert loss.num_tokens == 6
    assert loss.mean.item() == pytest.approx(own.item(), rel=TOLERANCE)
    assert distance(gradient_of(module, loss.mean), truth) < TOLERANCE
    for key in NAMES:
        assert details[key].mean.item() == pytest.approx(trainer._metrics["train"][key][0], rel=1e-6), key
    assert 0 < details["rewards/accuracies"].mean.item() < 1


def test_steps_are_those_of_trl(quiet_trainer, tmp_path):
    steps = [make_pairs(5, seed) for seed in range(3)]
    options = {"learning_rate": 1e-2, "eps": 1e-3, "betas": (0.9, 0.95)}
    module = preferring(**options)
    start = weights_of(module)
    trl = {"learning_rate": 1e-2, "adam_epsilon": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.95}
    trl |= {"lr_scheduler_type": "constant", "max_grad_norm": 1.0, "weight_decay": 0.0}
    trainer, collator = trl_trainer(tmp_path, module, {}, steps[0], max_steps=3, **trl)
    ready = iter(steps)
    trainer.data_collator = lambda rows: collator(next(ready))
    trainer.train()
    truth = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    fit = quiet_trainer(max_epochs=1, gradient_clip_val=1.0)
    fit.fit(module, loader_of([batch_of(pairs) for pairs in steps]))
    assert fit.global_step == 3
    assert float((weights_of(module) - truth).norm() / (truth - start).norm()) < 1e-5  # TRL's head is float32


# ---- the mathematics -------------------------------------------------------------------------------------------------


def plain_losses(module, batch, beta, smoothing=0.0, margin=0.0, sft_weight=0.0, with_reference=True):
    """Pair by pair, from logits, without padding."""
    losses = []
    for row in range(len(batch["row_ids"])):
        logps = []
        for side in ("chosen", "rejected"):
            ids = batch[f"{side}_input_ids"][row][batch[f"{side}_attention_mask"][row] == 1][None]
            labels = batch[f"{side}_labels"][row, : ids.shape[1]][1:]
            for model in (module.model, module.task.reference._copy):
                if model is None:
                    logps.append(0.0)
                    continue
                given = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                logps.append(given.gather(1, labels.clamp(min=0)[:, None])[labels != -100].sum())
        chosen, ref_chosen, rejected, ref_rejected = logps
        x = beta * (chosen - ref_chosen - rejected + ref_rejected) - margin
        loss = -(1 - smoothing) * torch.log(x.sigmoid()) - smoothing * torch.log((-x).sigmoid())
        losses.append(loss - sft_weight * chosen / (batch["chosen_labels"][row] != -100).sum())
    return torch.stack(losses)


OPTIONS = {
    "smoothed": {"label_smoothing": 0.1},
    "margin": {"margin": 0.7},
    "sft": {"sft_weight": 0.3},
    "no reference": {"reference": "none", "margin": 0.7},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_what_they_say(name):
    options = OPTIONS[name]
    module, batch = preferring(task_options=options), batch_of(make_pairs(4))
    known = {"smoothing": options.get("label_smoothing", 0.0), "margin": options.get("margin", 0.0)}
    truth = plain_losses(module, batch, 0.5, **known, sft_weight=options.get("sft_weight", 0.0)).mean()
    gradient = gradient_of(module, truth)
    loss = module.training_step(batch, 0)["loss"]
    assert loss.item() == pytest.approx(truth.item(), rel=TOLERANCE)
    assert distance(gradient_of(module, loss), gradient) < TOLERANCE
    without = preferring().training_step(batch, 0)["loss"]
    assert abs(without.item() - loss.item()) > 1e-3


WAYS = [{"loss_kernel": "plain"}, {"sequence_window": 5}, {"gradient_checkpointing": True}, {"offload": True}]


@pytest.mark.parametrize("options", WAYS)
def test_logits_windows_and_checkpointing_change_no_gradient(options):
    batch = batch_of(make_pairs(5))
    plain, other = preferring(), preferring(**options)
    truth = gradient_of(plain, plain.training_step(batch, 0)["loss"])
    assert distance(gradient_of(other, other.training_step(batch, 0)["loss"]), truth) < TOLERANCE


@pytest.mark.parametrize("name", [*LOSSES, *OPTIONS])
def test_any_cut_of_the_pairs_has_the_gradient_of_all_and_a_mean_of_means_has_not(name):
    options = (LOSSES | OPTIONS)[name]
    module, batch = preferring(task_options=options), batch_of(make_pairs(7))
    truth = gradient_of(module, module.training_step(batch, 0)["loss"])
    parts = [rows_of(batch, slice(a, b)) for a, b in [(0, 1), (1, 3), (3, 7)]]
    losses = [module.task.loss(module.model, part) for part in parts]
    weighted = sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses)
    assert distance(gradient_of(module, weighted), truth) < TOLERANCE
    mean_of_means = sum(module.task.loss(module.model, part).mean for part in parts) / 3
    assert distance(gradient_of(module, mean_of_means), truth) > 1e-3


def test_pairs_without_labels_fill_up_a_batch_and_count_nothing():
    module, batch = preferring(), batch_of(make_pairs(5))
    truth = gradient_of(module, module.training_step(rows_of(batch, slice(0, 4)), 0)["loss"])
    batch["chosen_labels"][4] = batch["rejected_labels"][4] = -100
    output = module.training_step(batch, 0)
    assert output["num_tokens"] == module.num_targets(batch) == 4
    assert distance(gradient_of(module, output["loss"]), truth) < TOLERANCE


# ---- in a Trainer ----------------------------------------------------------------------------------------------------


def fit(make_trainer, size, accumulate, callbacks, **options):
    module = preferring(learning_rate=1e-2, eps=1e-3, **options)
    whole = batch_of(make_pairs(21))
    batches = [rows_of(whole, slice(a, min(a + size, b))) for b in (7, 14, 21) for a in range(b - 7, b, size)]
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate, callbacks=callbacks, gradient_clip_val=1.0)
    trainer.fit(module, loader_of(batches))
    assert trainer.global_step == 3
    return weights_of(module), trainer


def test_accumulation_and_pieces_train_and_log_as_the_whole_batch_does(quiet_trainer):
    truth, whole = fit(quiet_trainer, 7, 1, [])
    moved = (truth - weights_of(preferring())).norm()
    scaler = DynamicBatchScaler(max_piece=40)
    ways = {
        "accumulated": fit(quiet_trainer, 3, 3, [TokenWeightedAccumulation()]),
        "pieces": fit(quiet_trainer, 7, 1, [TokenWeightedAccumulation(), scaler]),
    }
    for way, (found, trainer) in ways.items():
        assert float((found - truth).norm() / moved) < 1e-11, way
        for key in ["loss", *NAMES]:
            name = f"train/{key}"
            assert trainer.callback_metrics[name].item() == pytest.approx(whole.callback_metrics[name].item(), rel=1e-6)
    assert ways["pieces"][1].callback_metrics["train/pieces"] > 1
    control, _ = fit(quiet_trainer, 3, 3, [])
    assert float((control - truth).norm() / moved) > 1e-3


def test_pieces_after_an_out_of_memory_error_train_as_the_whole_batch_does(quiet_trainer, monkeypatch):
    from lightning_llm.tasks import dpo

    truth, whole = fit(quiet_trainer, 7, 1, [])
    inner, failed = dpo.DPO._row_logps, []

    def scarce(self, model, rows):
        if len(rows["labels"]) > 6:  # three pairs
            failed.append(torch.is_grad_enabled())
            raise torch.OutOfMemoryError("injected")
        return inner(self, model, rows)

    monkeypatch.setattr(dpo.DPO, "_row_logps", scarce)
    found, trainer = fit(quiet_trainer, 7, 1, [TokenWeightedAccumulation(), DynamicBatchScaler()])
    assert failed
    assert float((found - truth).norm() / (truth - weights_of(preferring())).norm()) < 1e-11
    for key in NAMES:
        name = f"train/{key}"
        assert trainer.callback_metrics[name].item() == pytest.approx(whole.callback_metrics[name].item(), rel=1e-6)


def test_validation_and_prediction_are_those_of_all_pairs_at_once(quiet_trainer):
    module, whole = preferring(), batch_of(make_pairs(11))
    with torch.no_grad():
        loss, details = module.task.loss_and_details(module.model, whole)
        scores = module.task.score(module.model, whole)
    batches = [rows_of(whole, slice(a, a + 4)) for a in (0, 4, 8)]
    for callbacks in ([], [DynamicBatchScaler(max_piece=40)]):
        trainer = quiet_trainer(callbacks=callbacks)
        logged = trainer.validate(module, loader_of(batches), verbose=False)[0]
        assert logged["val/loss"] == pytest.approx(loss.mean.item(), rel=1e-6)
        for key, value in details.items():
            assert logged[f"val/{key}"] == pytest.approx(value.mean.item(), rel=1e-6), key
        predicted = trainer.predict(module, loader_of(batches))
        for key, value in scores.items():
            assert torch.allclose(torch.cat([part[key] for part in predicted]), value, rtol=1e-10), key
        assert torch.cat([part["row_ids"] for part in predicted]).tolist() == list(range(11))


def test_two_ranks_train_and_measure_as_one(run_ranks):
    for rank in run_ranks("dpo", 2):
        assert rank["error"] < 1e-11
        assert rank["metrics"] == pytest.approx(rank["true metrics"], rel=1e-6)
        assert len(rank["metrics"]) == 7
        assert rank["without"] > 1e-3


def test_sharded_model_and_reference_train_as_whole_ones(run_ranks):
    for rank in run_ranks("dpo", 2, sharded=True):
        assert rank["sharded"]
        assert rank["error"] < 1e-11


# ---- references ------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_model_as_built_and_stays_so(quiet_trainer):
    torch.manual_seed(0)
    module = LLMModule(dict(GPT2), "dpo", learning_rate=1e-2, lr_schedule="constant", warmup=0)
    module.configure_model()
    before = weights_of(module)
    batches = [batch_of(make_pairs(5, seed)) for seed in range(3)]
    assert module.training_step(batches[0], 0)["loss"].item() == pytest.approx(math.log(2), rel=1e-6)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader_of(batches))
    reference = torch.cat([parameter.flatten() for parameter in module.task.reference._copy.parameters()])
    assert torch.equal(reference, before)
    assert not torch.equal(weights_of(module), before)
    assert not any("reference" in name for name in module.state_dict())
    assert not any(part.training for part in module.task.reference._copy.modules())
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(parameter) for parameter in module.model.parameters()}


def test_columns_of_the_batch_take_the_place_of_the_model(quiet_trainer):
    whole = batch_of(make_pairs(6))
    truth = preferring()
    expected = gradient_of(truth, truth.training_step(whole, 0)["loss"])
    module = preferring(task_options={"reference": "batch"})
    original = LLMModule(copy.deepcopy(truth.task.reference._copy), "dpo", task_options={"reference": "none"})
    scores = quiet_trainer().predict(original, loader_of([whole]))[0]
    batch = whole | {f"ref_{side}_logps": scores[f"{side}_logps"] for side in ("chosen", "rejected")}
    assert module.task.reference._copy is None
    assert distance(gradient_of(module, module.training_step(batch, 0)["loss"]), expected) < TOLERANCE
    with pytest.raises(ValueError, match=r"needs the columns ref_chosen_logps"):
        module.training_step(whole, 0)
    with pytest.raises(ValueError, match="only used with"):
        truth.training_step(batch, 0)


def test_the_reference_of_an_adapter_is_the_model_without_it():
    peft = pytest.importorskip("peft")
    config = {**GPT2, "attn_pdrop": 0.5}  # for the adapted model in training alone
    original = preferring(config).model
    adapted = peft.get_peft_model(
        copy.deepcopy(original), peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    )
    module, batch = LLMModule(adapted, "dpo", task_options={"beta": 0.5}), batch_of(make_pairs(5))
    module.configure_model()
    assert module.task.reference._copy is None
    module.train()
    own = module.task.reference.run(module.model, lambda model: module.task._row_logps(model, _chosen(batch)))
    assert module.model.training
    truth = module.task._row_logps(original.eval(), _chosen(batch))
    assert torch.allclose(own, truth, rtol=1e-12)
    module.training_step(batch, 0)["loss"].backward()
    assert {name.split(".")[-2] for name, p in adapted.named_parameters() if p.grad is not None} == {"default"}


KEEPS_BASE = {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}, {"init_lora_weights": "gaussian"}
CHANGES_BASE = {
    "weights of the base train as well, such as .*bias": ({"bias": "all"}, {"bias": "lora_only"}),
    "init_lora_weights='pissa' takes a part": ({"init_lora_weights": "pissa"},),
}


def test_adapters_that_change_their_base_are_no_reference():
    pytest.importorskip("peft")

    def build(fields, **options):
        torch.manual_seed(0)
        module = LLMModule(dict(GPT2), "dpo", peft={"peft_type": "LORA", "r": 2, **fields}, **options)
        module.configure_model()
        return module

    batch = batch_of(make_pairs(5))
    for fields in KEEPS_BASE:
        assert build(fields).training_step(batch, 0)["loss"].item() == pytest.approx(math.log(2), rel=1e-6)
    for words, several in CHANGES_BASE.items():
        for fields in several:
            with pytest.raises(ValueError, match=words):
                build(fields)
            build(fields, task_options={"reference": "batch"})


def _chosen(batch):
    return {key.removeprefix("chosen_"): value for key, value in batch.items() if key.startswith("chosen_")}


def test_a_resumed_run_has_the_same_reference_or_is_refused(quiet_trainer, tmp_path):
    batches = [batch_of(make_pairs(5, seed)) for seed in range(2)]
    folder = tmp_path / "original"
    preferring(dtype="float32").model.save_pretrained(folder)

    def module_of(source, **options):
        return LLMModule(source, "dpo", learning_rate=1e-2, lr_schedule="constant", warmup=0, **options)

    whole = module_of(str(folder))
    quiet_trainer(max_epochs=2).fit(whole, loader_of(batches))
    first = quiet_trainer(max_epochs=1)
    first.fit(module_of(str(folder)), loader_of(batches))
    path = tmp_path / "half.ckpt"
    first.save_checkpoint(path)
    resumed = module_of(str(folder))
    quiet_trainer(max_epochs=2).fit(resumed, loader_of(batches), ckpt_path=path, weights_only=True)
    assert torch.equal(weights_of(resumed), weights_of(whole))

    torch.manual_seed(1)
    other = module_of(dict(GPT2))
    with pytest.raises(ValueError, match="not the one with which training began"):
        quiet_trainer(max_epochs=2).fit(other, loader_of(batches), ckpt_path=path)
    loaded = LLMModule.load_from_checkpoint(path)  # knows the architecture only
    assert loaded.generate(batches[0]["chosen_input_ids"], max_new_tokens=1).shape[0] == 5
    with pytest.raises(ValueError, match=r"load_from_checkpoint\(path, model=...\)"):
        loaded.training_step(batches[0], 0)
    right = LLMModule.load_from_checkpoint(path, model=str(folder))
    right.training_step(batches[0], 0)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_batches_that_are_no_pairs_are_refused():
    module, batch = preferring(), batch_of(make_pairs(3), first_id=40)
    with pytest.raises(KeyError, match="`chosen_input_ids`, `chosen_labels`, `rejected_input_ids`"):
        module.training_step({"input_ids": batch["chosen_input_ids"], "labels": batch["chosen_labels"]}, 0)
    with pytest.raises(ValueError, match="one row on either side"):
        module.training_step(batch | {k: v[:2] for k, v in batch.items() if k.startswith("rejected")}, 0)
    with pytest.raises(ValueError, match="must have the shape of"):
        module.training_step(batch | {"chosen_labels": batch["chosen_labels"][:, :-1]}, 0)
    cut = batch["rejected_labels"].clone()
    cut[1] = -100
    with pytest.raises(ValueError, match=r"the rejected one of row 1 of the batch \(row_id 41\) has no label token"):
        module.training_step(batch | {"rejected_labels": cut}, 0)
    long = {k: torch.nn.functional.pad(v, (0, 60)) for k, v in batch.items() if k.startswith("chosen")}
    with pytest.raises(ValueError, match="a batch of chosen answers"):
        module.training_step(batch | long, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "kto"}, "`loss_type` must be one of sigmoid, robust, hinge, ipo, sigmoid_norm"),
        ({"beta": 0.0}, "`beta` must be above 0"),
        ({"label_smoothing": 0.5}, "`label_smoothing` is a share"),
        ({"loss_type": "ipo", "margin": 1.0}, "have no meaning"),
        ({"reference": "other"}, "`reference` must be"),
        ({"sft_weight": -1.0}, "`sft_weight` must be 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        LLMModule(dict(GPT2), "dpo", task_options=options)


def test_windows_need_a_number():
    with pytest.raises(ValueError, match="'auto'` plans for the task 'causal-lm' only: give 'dpo' a number"):
        LLMModule(dict(GPT2), "dpo", sequence_window="auto")


def test_batches_come_from_plain_loaders_too(quiet_trainer):
    module = preferring()
    loader = DataLoader(make_pairs(6), 3, collate_fn=batch_of)
    quiet_trainer(max_epochs=1, callbacks=[TokenWeightedAccumulation()]).fit(module, loader)
    assert module.tokens_seen == 6
