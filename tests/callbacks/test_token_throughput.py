"""Speeds that are right for uneven tokens, without a synchronisation per batch."""

import time

import lightning as L
import pytest
import torch
from support import Plain, pad_rows, ragged_rows
from torch import nn
from torch.utils.data import DataLoader

from lightning_llm import LLMModule
from lightning_llm.callbacks import TokenThroughput
from lightning_llm.callbacks.token_throughput import TokenCount, count_tokens


class Log(L.Callback):
    """What the callback before it has logged, at each optimizer step."""

    def __init__(self):
        self.entries = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.entries[trainer.global_step] = {k: float(v) for k, v in trainer.callback_metrics.items()}


def loader(rows, batch_size=2):
    return DataLoader(rows, batch_size=batch_size, collate_fn=pad_rows)


def true_counts(rows, batch_size=2):
    batches = [pad_rows(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    label = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return label, real, sum(batch["input_ids"].numel() for batch in batches)


def test_counts_of_a_run_are_exact(tiny_gpt2, quiet_trainer):
    rows = ragged_rows(12)
    speed, log = TokenThroughput(every_n_steps=3), Log()
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[speed, log])
    trainer.fit(LLMModule(tiny_gpt2), loader(rows))
    label, real, positions = true_counts(rows)
    entry = log.entries[3]
    assert speed.total_tokens == entry["train/total_tokens"] == label
    assert entry["train/global_batch_tokens"] == pytest.approx(label / 3)
    assert entry["train/padding"] == pytest.approx(1 - real / positions)
    assert entry["train/input_tokens_per_s"] / entry["train/tokens_per_s"] == pytest.approx(real / label)
    assert entry["train/peak_memory_gib"] > 0.05
    assert not any("tokens_per_s" in name for name in log.entries[2])


def test_tokens_after_the_last_entry_count_too(tiny_gpt2, quiet_trainer):
    rows = ragged_rows(10)
    speed = TokenThroughput(every_n_steps=4)
    quiet_trainer(max_epochs=1, callbacks=[speed]).fit(LLMModule(tiny_gpt2), loader(rows))
    assert speed.total_tokens == true_counts(rows)[0]


def test_validation_time_does_not_count(tiny_gpt2, quiet_trainer):
    class SlowValidation(L.Callback):
        def on_validation_batch_start(self, *args):
            time.sleep(0.5)

    rows = ragged_rows(8)
    log = Log()
    callbacks = [TokenThroughput(every_n_steps=4), log, SlowValidation()]
    trainer = quiet_trainer(max_epochs=1, val_check_interval=2, callbacks=callbacks)
    begin = time.perf_counter()
    trainer.fit(LLMModule(tiny_gpt2), loader(rows), loader(rows[:2]))
    wall = time.perf_counter() - begin
    counted = true_counts(rows)[0] / log.entries[4]["train/tokens_per_s"]
    assert wall > 1.0
    assert counted < wall - 0.45


def test_total_goes_on_after_a_resume(tiny_gpt2, quiet_trainer, tmp_path):
    rows = ragged_rows(8)
    label = true_counts(rows)[0]
    trainer = quiet_trainer(max_epochs=1, callbacks=[TokenThroughput(every_n_steps=3)])
    trainer.fit(LLMModule(tiny_gpt2), loader(rows))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    speed = TokenThroughput(every_n_steps=3)
    trainer = quiet_trainer(max_epochs=2, callbacks=[speed])
    trainer.fit(LLMModule(tiny_gpt2), loader(rows), ckpt_path=tmp_path / "one.ckpt")
    assert speed.total_tokens == 2 * label


def test_checkpoint_in_mid_run_holds_every_token_trained(tiny_gpt2, quiet_trainer, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    rows = ragged_rows(8)
    quiet_trainer(max_epochs=1, callbacks=[TokenThroughput(every_n_steps=100), Save()]).fit(
        LLMModule(tiny_gpt2), loader(rows)
    )
    state = torch.load(tmp_path / "mid.ckpt", weights_only=True)["callbacks"]["TokenThroughput"]
    assert state["total_tokens"] == true_counts(rows[:4])[0]


def test_nothing_waits_for_the_device_between_entries(tiny_gpt2, quiet_trainer, monkeypatch):
    """No tensor is read on the host (`.item()`, `.tolist()`, `float()`) while the callback counts a batch."""
    speed = TokenThroughput(every_n_steps=4)
    inside, reads = [False], []
    count = speed.on_train_batch_end

    def counting(trainer, *args):
        inside[0] = trainer.global_step % 4 != 0
        count(trainer, *args)
        inside[0] = False

    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def reading(self, *args, _original=original, _name=name, **kwargs):
            if inside[0]:
                reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, reading)
    monkeypatch.setattr(speed, "on_train_batch_end", counting)
    quiet_trainer(max_epochs=1, callbacks=[speed]).fit(LLMModule(tiny_gpt2), loader(ragged_rows(8)))
    assert speed.total_tokens > 0
    assert reads == []


def test_flop_utilisation_follows_the_palm_convention(tiny_llama, quiet_trainer):
    rows = ragged_rows(8, vocab_size=300)
    log = Log()
    speed = TokenThroughput(every_n_steps=2, peak_flops=1e12)
    module = LLMModule(tiny_llama)
    trainer = quiet_trainer(max_epochs=1, callbacks=[speed, log])
    trainer.fit(module, loader(rows))
    entry = log.entries[2]
    hidden, layers, vocab, ffn = 32, 2, 300, 64
    matrices = layers * (4 * hidden * hidden + 3 * hidden * ffn) + vocab * hidden
    flops = positions = real = 0
    for begin in (0, 2):
        batch = pad_rows(rows[begin : begin + 2])
        size = batch["input_ids"].numel()
        flops += (6 * matrices + 12 * layers * hidden * batch["input_ids"].shape[1]) * size
        positions, real = positions + size, real + int(batch["attention_mask"].sum())
    useful = flops * real / positions
    seconds = true_counts(rows[:4])[0] / entry["train/tokens_per_s"]
    assert entry["train/mfu"] == pytest.approx(useful / seconds / 1e12, rel=1e-4)


def test_other_modules_say_how_to_count(quiet_trainer):
    data = DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3)), batch_size=2)
    with pytest.raises(
        TypeError, match=r"with `input_ids`, or several such columns, but got a list. .* or pass token_fn="
    ):
        quiet_trainer(max_epochs=1, callbacks=[TokenThroughput()]).fit(Plain(), data)
    speed = TokenThroughput(token_fn=lambda batch, outputs: TokenCount(len(batch[0]), len(batch[0]), len(batch[0])))
    quiet_trainer(max_epochs=1, callbacks=[speed]).fit(Plain(), data)
    assert speed.total_tokens == 8


def test_tokens_are_counted_from_what_a_batch_has():
    ids = torch.ones(2, 5, dtype=torch.int64)
    labels = torch.tensor([[1, 1, -100, -100, -100], [1, 1, 1, 1, 1]])
    assert count_tokens({"input_ids": ids}, None) == (10, 10, 10)
    assert count_tokens({"input_ids": ids, "labels": labels}, None).label == 7
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert count_tokens({"input_ids": ids, "attention_mask": mask}, {"num_tokens": 5})[:2] == (5, 7)
    pair = {"chosen_input_ids": ids, "chosen_attention_mask": mask, "rejected_input_ids": ids[:, :3]}
    assert count_tokens(pair, {"num_tokens": 2}) == (2, 7 + 6, 10 + 6)
    assert count_tokens({"input_ids": ids, "decoder_input_ids": ids}, None).positions == 10
    assert count_tokens({"input_ids": ids, "num_input_tokens": torch.tensor([1, 2])}, None).real == 3
    with pytest.raises(TypeError, match=r"but got the keys \['labels', 'pixel_values'\]. Leave it out for images"):
        count_tokens({"pixel_values": ids, "labels": ids}, None)


def test_mixture_of_experts_and_unknown_models_have_no_utilisation():
    from transformers import AutoConfig, AutoModelForCausalLM

    from lightning_llm.flops import training_flops_per_token

    size = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = AutoConfig.for_model("mixtral", **size, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    assert training_flops_per_token(AutoModelForCausalLM.from_config(config), 64) is None
    assert training_flops_per_token(nn.Linear(2, 2), 64) is None


def test_entries_that_a_logger_would_miss_are_announced(tiny_gpt2, quiet_trainer, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    callbacks = [TokenThroughput(every_n_steps=3)]
    trainer = quiet_trainer(max_steps=1, log_every_n_steps=2, logger=CSVLogger(tmp_path), callbacks=callbacks)
    with pytest.warns(UserWarning, match="no multiple of the Trainer's log_every_n_steps=2"):
        trainer.fit(LLMModule(tiny_gpt2), loader(ragged_rows(4)))


def test_interval_must_be_positive():
    with pytest.raises(ValueError, match="`every_n_steps` must be 1 at least, but got 0"):
        TokenThroughput(every_n_steps=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_of_the_gpu_is_known_and_utilisation_is_plausible(tiny_llama, quiet_trainer):
    from lightning_llm.flops import peak_flops

    assert peak_flops(torch.device("cuda"), torch.bfloat16) > 1e13
    log = Log()
    trainer = quiet_trainer(
        accelerator="cuda",
        precision="bf16-mixed",
        max_epochs=1,
        callbacks=[TokenThroughput(every_n_steps=2), log],
    )
    trainer.fit(LLMModule(tiny_llama), loader(ragged_rows(8, vocab_size=300)))
    assert 0 < log.entries[4]["train/mfu"] < 1
