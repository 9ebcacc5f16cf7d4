"""LLMModule in a plain Trainer equals a plain computation, and stops before harm is done."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import pad_rows, ragged_rows
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm import LLMModule
from lightning_llm.loss import NonFiniteLossError


def loader(rows, batch_size=4, **options):
    return DataLoader(rows, batch_size=batch_size, collate_fn=pad_rows, **options)


def constant(model, **options):
    return LLMModule(model, **{"lr_schedule": "constant", "warmup": 0, **options})


class GradientRecorder(L.Callback):
    """Keeps the gradients of each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({name: p.grad.clone() for name, p in pl_module.model.named_parameters()})


def plain_mean_loss(model, batch):
    """The definition in float64: one row at a time, without padding, one token at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][row].sum())
        logits = model(input_ids=batch["input_ids"][row : row + 1, :length]).logits[0].log_softmax(-1)
        for position in range(length - 1):
            target = int(batch["labels"][row, position + 1])
            if target != -100:
                total, count = total - logits[position, target], count + 1
    return total, count


def test_loss_and_gradients_equal_a_plain_float64_computation(tiny_gpt2, quiet_trainer):
    rows = ragged_rows(8)
    torch.manual_seed(0)
    module, recorder = constant(tiny_gpt2, learning_rate=0.0), GradientRecorder()
    losses = []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: losses.append(step(batch, batch_idx)) or losses[-1]
    quiet_trainer(max_epochs=1, precision="64-true", callbacks=[recorder]).fit(module, loader(rows))
    assert module.model.dtype == torch.float64
    for index, batch in enumerate([pad_rows(rows[:4]), pad_rows(rows[4:])]):
        total, count = plain_mean_loss(module.model, batch)
        truth = total / count
        assert losses[index]["loss"].item() == pytest.approx(truth.item(), rel=1e-12)
        assert losses[index]["num_tokens"].item() == count
        module.model.zero_grad()
        truth.backward()
        for name, parameter in module.model.named_parameters():
            error = (recorder.steps[index][name] - parameter.grad).norm()
            assert error <= 1e-12 * max(parameter.grad.norm(), 1e-3), name


def test_validation_metrics_equal_a_plain_float64_computation(tiny_gpt2, quiet_trainer):
    rows = ragged_rows(10, seed=1)
    module = constant(tiny_gpt2)

    def collate(part):
        return {**pad_rows(part), "num_bytes": torch.tensor([3.0 * len(row["labels"]) for row in part])}

    trainer = quiet_trainer(precision="64-true")
    trainer.validate(module, DataLoader(rows, batch_size=4, collate_fn=collate), verbose=False)
    total, count = plain_mean_loss(module.model, pad_rows(rows))
    num_bytes = sum(3.0 * len(row["labels"]) for row in rows)
    logged = trainer.callback_metrics
    assert logged["val/loss"].item() == pytest.approx((total / count).item(), rel=1e-12)
    assert logged["val/perplexity"].item() == pytest.approx((total / count).exp().item(), rel=1e-12)
    assert logged["val/bits_per_byte"].item() == pytest.approx(total.item() / math.log(2) / num_bytes, rel=1e-12)


def test_metrics_are_right_over_two_ranks_with_unequal_tokens(run_ranks, tiny_gpt2):
    from lightning_llm.module import LLMModule as Module  # the same rows on one rank

    first, second = run_ranks("ddp_module", 2)
    assert first["val/loss"] == second["val/loss"]
    rows = ragged_rows(9, seed=3)
    torch.manual_seed(0)
    module = Module(tiny_gpt2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            module.configure_model()
        finally:
            torch.set_default_dtype(torch.float32)
    total, count = plain_mean_loss(module.model, pad_rows(rows))
    assert first["val/loss"] == pytest.approx((total / count).item(), rel=1e-12)
    assert first["tokens_seen"] == second["tokens_seen"] == first["true_tokens"]
    assert first["train/loss"] == pytest.approx(first["true_train_loss"], rel=1e-6)
    assert first["train/loss"] == second["train/loss"]


def test_nan_on_one_rank_stops_all_ranks_before_the_step(run_ranks):
    first, second = run_ranks("ddp_nan", 2)
    assert "on another rank" in first["error"]
    assert "batch 1 of rank 1 (row_ids [7])" in second["error"]
    assert first["steps"] == second["steps"] == 1
    assert first["finite"]
    assert second["finite"]


def test_module_trains_with_a_plain_loader_of_hugging_face_batches(tiny_llama, quiet_trainer):
    from transformers import DataCollatorForLanguageModeling

    from lightning_llm.datamodules.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    texts = ["to be or not to be", "that is the question"] * 8
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = DataLoader([tokenizer(text) for text in texts], batch_size=4, collate_fn=collate)
    torch.manual_seed(0)
    module = constant(tiny_llama, learning_rate=1e-2)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, data)
    before = trainer.callback_metrics["train/loss"].item()
    trainer = quiet_trainer(max_epochs=8)
    trainer.fit(module, data)
    assert trainer.callback_metrics["train/loss"].item() < 0.6 * before


def test_batch_without_a_label_gives_zero_loss_and_zero_gradient(tiny_gpt2):
    module = constant(tiny_gpt2)
    module.configure_model()
    ids = torch.tensor([[1, 2, 3]])
    output = module.training_step({"input_ids": ids, "labels": torch.full_like(ids, -100)}, 0)
    assert output["loss"] == 0
    assert output["num_tokens"] == 0
    output["loss"].backward()
    assert all(not p.grad.any() for p in module.model.parameters())


def test_batch_that_lacks_labels_is_refused(tiny_gpt2):
    module = constant(tiny_gpt2)
    module.configure_model()
    with pytest.raises(KeyError, match="needs `labels`"):
        module.training_step({"input_ids": torch.tensor([[1, 2, 3]])}, 0)


def test_logged_loss_is_the_token_mean_of_the_whole_optimizer_step(tiny_gpt2, quiet_trainer):
    rows = ragged_rows(12)
    module = constant(tiny_gpt2, learning_rate=0.0)
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=3)
    trainer.fit(module, loader(rows))
    total, count = plain_mean_loss(module.model.double(), pad_rows(rows))
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx((total / count).item(), rel=1e-5)
    assert module.tokens_seen == count


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_non_finite_loss_names_step_and_rows_and_leaves_the_last_good_checkpoint(
    tiny_gpt2, quiet_trainer, tmp_path, value
):
    rows = ragged_rows(12)

    def collate(part):
        return {**pad_rows(part), "row_ids": torch.tensor([rows.index(row) for row in part])}

    class Poison(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                pl_module.model.register_forward_hook(poison)

    def poison(model, args, output):
        output.logits = output.logits * float(value)

    class Rows(list):
        def index(self, row):
            return next(i for i, other in enumerate(self) if other is row)

    rows = Rows(rows)
    module = constant(tiny_gpt2)
    checkpoint = ModelCheckpoint(tmp_path / "good", every_n_train_steps=1, save_top_k=-1, save_on_exception=True)
    trainer = quiet_trainer(
        max_epochs=1, accumulate_grad_batches=2, enable_checkpointing=True, callbacks=[checkpoint, Poison()]
    )
    with pytest.raises(NonFiniteLossError) as error:
        trainer.fit(module, DataLoader(rows, batch_size=2, collate_fn=collate))
    message = str(error.value)
    assert "at optimizer step 1, epoch 0" in message
    assert "in batch 3 of rank 0 (row_ids [6, 7])" in message
    assert "lower the learning rate" in message
    assert all(parameter.isfinite().all() for parameter in module.model.parameters())
    saved = sorted((tmp_path / "good").glob("*.ckpt"))
    assert saved
    for path in saved:
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in weights.values())


def test_checkpoint_restores_weights_tokens_and_architecture_without_the_folder(tiny_gpt2, quiet_trainer, tmp_path):
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_gpt2)).save_pretrained(folder)
    module = constant(str(folder), weight_decay=0.3)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader(ragged_rows(8)))
    path = tmp_path / "module.ckpt"
    trainer.save_checkpoint(path)
    for file in folder.iterdir():
        file.unlink()
    loaded = LLMModule.load_from_checkpoint(path)
    assert loaded.tokens_seen == module.tokens_seen > 0
    assert loaded.hparams["weight_decay"] == 0.3
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, loaded.model.get_parameter(name)), name


def test_resumed_run_equals_the_uninterrupted_one(tiny_gpt2, quiet_trainer, tmp_path):
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def fit(ckpt_path=None):
        torch.manual_seed(0)
        module = LLMModule(tiny_gpt2, lr_schedule="linear", warmup="60 tokens")
        callbacks = [] if ckpt_path else [Save()]
        trainer = quiet_trainer(max_epochs=4, limit_train_batches=4, callbacks=callbacks)
        trainer.fit(module, loader(ragged_rows(16)), ckpt_path=ckpt_path)
        return module

    whole = fit()
    resumed = fit(tmp_path / "half.ckpt")
    assert resumed.tokens_seen == whole.tokens_seen
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_llama):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = constant(tiny_llama, gradient_checkpointing=checkpointing)
        module.configure_model()
        module.train()
        assert module.model.is_gradient_checkpointing is checkpointing
        batch = pad_rows(ragged_rows(4))
        module.training_step(batch, 0)["loss"].backward()
        gradients.append([p.grad.clone() for p in module.model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_lora_trains_only_its_adapters(tiny_llama, quiet_trainer):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_llama))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    module = constant(model, learning_rate=1e-2, gradient_checkpointing=True)
    quiet_trainer(max_epochs=1).fit(module, loader(ragged_rows(8)))
    moved = [name for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name and p.any()]
    assert len(moved) == 4
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_checkpoint_of_a_built_adapter_model_asks_for_the_model(tiny_llama, quiet_trainer, tmp_path):
    from peft import LoraConfig, get_peft_model

    def build():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_llama))
        return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    module = constant(build())
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader(ragged_rows(4)))
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    with pytest.raises(ValueError, match=r"load_from_checkpoint\(path, model="):
        LLMModule.load_from_checkpoint(tmp_path / "adapter.ckpt")
    loaded = LLMModule.load_from_checkpoint(tmp_path / "adapter.ckpt", model=build())
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, loaded.model.get_parameter(name)), name


@pytest.mark.parametrize("built", [True, False])
def test_pretrained_model_trains_with_its_dropout(tiny_gpt2, quiet_trainer, tmp_path, built):
    """from_pretrained leaves a model in evaluation mode, and Lightning keeps the mode that it finds."""

    class Modes(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.training = {module.training for module in pl_module.model.modules()}

    AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_gpt2)).save_pretrained(tmp_path / "model")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "model") if built else str(tmp_path / "model")
    modes = Modes()
    quiet_trainer(max_steps=1, callbacks=[modes]).fit(constant(source), loader(ragged_rows(4)))
    assert modes.training == {True}


def test_generate_continues_greedily_as_the_model_itself_does(tiny_gpt2):
    module = constant(tiny_gpt2)
    ids = torch.tensor([[5, 6, 7]])
    continued = module.generate(ids, max_new_tokens=4, do_sample=False)
    module.train()
    assert module.generate(ids, max_new_tokens=4, do_sample=False).equal(continued)
    assert module.model.training
    current = ids
    for _ in range(continued.shape[1] - 3):
        current = torch.cat([current, module.model.eval()(input_ids=current).logits[:, -1:].argmax(-1)], 1)
    assert continued.equal(current)


def test_predict_scores_rows(tiny_gpt2, quiet_trainer):
    rows = ragged_rows(6)
    module = constant(tiny_gpt2)
    (first, second) = quiet_trainer().predict(module, loader(rows, batch_size=3))
    total, count = plain_mean_loss(module.model, pad_rows(rows[:3]))
    assert first["nll"].sum().item() == pytest.approx(total.item(), rel=1e-5)
    assert first["num_tokens"].sum() == count
    assert second["nll"].shape == (3,)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains(tiny_gpt2, quiet_trainer, precision):
    module = constant(tiny_gpt2)
    trainer = quiet_trainer(max_epochs=1, precision=precision, gradient_clip_val=1.0)
    trainer.fit(module, loader(ragged_rows(8)))
    assert module.model.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert 3 < trainer.callback_metrics["train/loss"] < 6


@pytest.mark.parametrize("fused", [True, False])
def test_fused_adamw_under_a_gradient_scaler_with_clipping_equals_the_plain_one(tiny_gpt2, quiet_trainer, fused):
    from lightning.pytorch.plugins.precision import MixedPrecision

    weights = []
    for kernel in (True, fused):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        torch.manual_seed(0)
        module = constant(tiny_gpt2, learning_rate=1e-2, eps=1e-2)  # no division by what is only rounding
        make = module.configure_optimizers

        def configure(make=make, kernel=kernel):
            config = make()
            config["optimizer"].defaults["fused"] = kernel
            for group in config["optimizer"].param_groups:
                group["fused"] = kernel
            return config

        module.configure_optimizers = configure
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        trainer = quiet_trainer(max_epochs=1, plugins=[plugin], gradient_clip_val=0.1)
        trainer.fit(module, loader(ragged_rows(8)))
        assert trainer.global_step == 2
        weights.append(torch.cat([p.flatten() for p in module.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def test_packed_rows_with_flash_attention_become_one_row(tiny_llama):
    """Transformers separates packed documents under flash attention only in a batch of one row."""
    from lightning_llm.tasks.causal_lm import CausalLM, flatten_rows

    torch.manual_seed(0)
    module = constant(tiny_llama)
    module.configure_model()
    model = module.model.double()
    ids = torch.randint(0, 300, (2, 10))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]])
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    plain = CausalLM().loss(model, batch)
    flat = flatten_rows({"input_ids": ids, "position_ids": positions})
    assert flat["input_ids"].shape == flat["position_ids"].shape == (1, 20)
    logits = model(**flat, use_cache=False).logits.view(2, 10, -1)
    from lightning_llm.loss import token_cross_entropy

    torch.testing.assert_close(token_cross_entropy(logits, ids).total, plain.total, rtol=1e-6, atol=0)


class FakeData(L.LightningDataModule):
    def __init__(self, tokenizer=None, max_length=16):
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length

    def train_dataloader(self):
        return loader(ragged_rows(4))


def test_tokenizer_larger_than_the_vocabulary_is_refused_before_training(tiny_gpt2, quiet_trainer):
    from lightning_llm.datamodules.tokenizer import byte_tokenizer

    with pytest.raises(
        ValueError, match=r"tokenizer has 258 tokens, but the model's vocabulary only 97 .*vocab_size: 258"
    ):
        quiet_trainer(max_epochs=1).fit(constant(tiny_gpt2), FakeData(byte_tokenizer()))


def test_random_model_takes_the_special_tokens_of_the_tokenizer(tiny_llama, quiet_trainer):
    from lightning_llm.datamodules.tokenizer import byte_tokenizer

    module = constant(tiny_llama)
    quiet_trainer(max_epochs=1).fit(module, FakeData(byte_tokenizer()))
    assert (module.model.config.eos_token_id, module.model.config.pad_token_id) == (256, 257)
    assert module.model.generation_config.eos_token_id == 256


def test_max_length_beyond_the_positions_is_refused_before_training(tiny_gpt2, quiet_trainer):
    with pytest.raises(ValueError, match="64 positions .*`max_length` has 65 tokens"):
        quiet_trainer(max_epochs=1).fit(constant(tiny_gpt2), FakeData(max_length=65))


def test_batch_beyond_the_positions_is_refused(tiny_gpt2):
    module = constant(tiny_gpt2)
    module.configure_model()
    ids = torch.zeros(1, 65, dtype=torch.int64)
    with pytest.raises(ValueError, match="64 positions .* a batch has 65 tokens"):
        module.training_step({"input_ids": ids, "labels": ids}, 0)


def test_unknown_task_is_refused(tiny_gpt2):
    with pytest.raises(ValueError, match="must be one of causal-lm, .*, but got 'chess'"):
        LLMModule(tiny_gpt2, task="chess")


def test_use_before_the_model_is_built_is_explained(tiny_gpt2):
    with pytest.raises(RuntimeError, match="call `configure_model"):
        constant(tiny_gpt2)(input_ids=torch.tensor([[1]]))


def test_plateau_schedule_watches_the_validation_loss(tiny_gpt2, quiet_trainer):
    module = LLMModule(tiny_gpt2, lr_schedule="reduce_lr_on_plateau", warmup=0, lr_schedule_options={"patience": 0})
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, loader(ragged_rows(4)), loader(ragged_rows(4)))
    assert trainer.lr_scheduler_configs[0].monitor == "val/loss"


def test_pure_bfloat16_keeps_rotary_frequencies_and_metric_sums_exact(tiny_llama, quiet_trainer):
    rows = ragged_rows(8, vocab_size=300)
    module = constant(tiny_llama)
    trainer = quiet_trainer(precision="bf16-true")
    trainer.validate(module, loader(rows), verbose=False)
    assert module.model.dtype == torch.bfloat16
    assert module.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert module.val_metrics.total_nats.dtype == torch.float64
    exact = module.model.float()
    total = sum(module.task.loss(exact, pad_rows(rows[i : i + 4])).total for i in (0, 4))
    count = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx((total / count).item(), rel=3e-3)


def test_double_precision_casts_buffers_too(tiny_llama, quiet_trainer):
    module = constant(tiny_llama)
    quiet_trainer(precision="64-true").validate(module, loader(ragged_rows(4)), verbose=False)
    assert module.model.model.rotary_emb.inv_freq.dtype == torch.float64


def test_checkpoint_of_a_model_with_fields_its_class_does_not_declare_loads(tiny_llama, quiet_trainer, tmp_path):
    """Configurations on the hub carry fields of their own; a person's misspelt field is refused all the same."""
    config = AutoConfig.for_model(**tiny_llama, is_llama_config=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    module = constant(str(tmp_path / "model"))
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, loader(ragged_rows(4)))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = LLMModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.config.is_llama_config is True
    assert loaded.config.eos_token_id == config.eos_token_id


def test_subclass_with_a_training_step_of_its_own_trains(tiny_gpt2, quiet_trainer):
    class Own(LLMModule):
        def training_step(self, batch, batch_idx):
            return self.model(input_ids=batch["input_ids"]).logits.square().mean()

    trainer = quiet_trainer(max_steps=2)
    trainer.fit(Own(tiny_gpt2), loader(ragged_rows(8)))
    assert trainer.global_step == 2


def test_weights_that_are_already_bad_are_told_from_a_bad_step(tiny_gpt2, quiet_trainer):
    class BadGradient(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 1:
                next(pl_module.model.parameters()).grad.fill_(float("nan"))

    with pytest.raises(NonFiniteLossError, match="weights are not finite either.* older than the last"):
        quiet_trainer(max_epochs=1, callbacks=[BadGradient()]).fit(constant(tiny_gpt2), loader(ragged_rows(12)))


class PackedData(FakeData):
    windowing = "packed"


@pytest.mark.parametrize(
    ("model_type", "isolated"), [("llama", True), ("gpt2", True), ("qwen3", True), ("mamba", False), ("opt", False)]
)
def test_models_that_let_packed_documents_see_each_other_are_refused(quiet_trainer, model_type, isolated):
    size = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0}
    if model_type != "mamba":
        size |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    if model_type in ("llama", "qwen3"):
        size |= {"intermediate_size": 48, "num_key_value_heads": 2}
    if model_type == "opt":
        size |= {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0}
    module = constant({"model_type": model_type, **size, "pad_token_id": 0})
    trainer = quiet_trainer(max_steps=1)
    if isolated:
        trainer.fit(module, PackedData())
        assert module.model.training
    else:
        with pytest.raises(ValueError, match=r"lets packed documents see each other.*windowing='windows'"):
            trainer.fit(module, PackedData())
