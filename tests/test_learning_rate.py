"""Learning rates by tokens in whole runs: under a batch that grows each token has the rate that it should have."""

import lightning as L
import pytest
from support import Positions, pad_rows
from token_training import rows

from lightning_llm import Duration, LLMModule, Progress, Seesaw
from lightning_llm.callbacks import AccumulationSchedule, LearningRateScaling, TokenWeightedAccumulation
from lightning_llm.datamodules import TextDataModule
from lightning_llm.run_length import tokens_of


class Rates(L.Callback):
    """The learning rate of each optimizer step, and the tokens trained on before it."""

    def __init__(self):
        self.rates, self.tokens = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(self.tokens) == trainer.global_step:
            self.tokens.append(pl_module.tokens_seen)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if "train/learning_rate" in trainer.callback_metrics and len(self.rates) == trainer.global_step:
            self.rates[-1] = float(trainer.callback_metrics["train/learning_rate"])


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"document {number} " * (5 + number % 7))

    def make(**options):
        options = {"tokenizer": "bytes", "max_length": 32, "validation_fraction": 0.0, "seed": 1} | options
        return TextDataModule(str(folder), cache_dir=tmp_path / "cache", **options)

    return make


def test_a_run_with_a_growing_batch_has_the_rate_of_a_plain_run_at_every_token(tiny_gpt2, quiet_trainer, text):
    runs = {}
    for name, batch in (("plain", 4), ("growing", {"0 samples": 4, "40 samples": 12})):
        module, rates = LLMModule(tiny_gpt2 | {"vocab_size": 512}, warmup="10%", lr_schedule_length="2 epochs"), Rates()
        trainer = quiet_trainer(max_epochs=2, callbacks=[rates])
        trainer.fit(module, text(global_batch_size=batch))
        runs[name] = dict(zip(rates.tokens, rates.rates, strict=True))
        assert module.tokens_seen == tokens_of(trainer, Duration.parse("100%"))
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    shared = runs["plain"].keys() & runs["growing"].keys()
    assert len(shared) > 10
    assert len(runs["growing"]) < 0.6 * len(runs["plain"])
    assert all(runs["plain"][tokens] == pytest.approx(runs["growing"][tokens], rel=1e-12) for tokens in shared)


@pytest.mark.parametrize("decay", ["cosine", "quarter_cosine", "linear"])
def test_a_seesaw_run_has_its_batch_and_its_rate_at_equal_tokens(tiny_gpt2, quiet_trainer, decay):
    data = [pad_rows(rows()[i : i + 1]) for i in range(44)]
    total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in data)
    seesaw = Seesaw(30, f"{2 * total} tokens", decay, stair=2, warmup="10%", max_growth=8)
    module = LLMModule(tiny_gpt2, learning_rate=1e-3, lr_schedule=decay, warmup="10%", lr_schedule_length=seesaw.length)
    rates, schedule = Rates(), AccumulationSchedule(seesaw.batch, target="tokens")
    callbacks = [schedule, TokenWeightedAccumulation(), LearningRateScaling(0.5, log_prefix="train/"), rates]
    trainer = quiet_trainer(max_epochs=2, callbacks=callbacks)
    trainer.fit(module, Positions(data))
    expected = [1e-3 * seesaw.learning_rate(Progress(tokens=tokens)) for tokens in rates.tokens]
    assert rates.rates == pytest.approx(expected, rel=1e-6)
    assert max(rates.rates) > 0.5e-3
    assert module.tokens_seen == 2 * total
    steps = 2 * total / 30 * (1 - seesaw.steps_saved)
    assert trainer.global_step == pytest.approx(steps, rel=0.15)  # micro-batches of unequal tokens, short last steps
    assert trainer.global_step < 0.95 * 2 * total / 30


def test_a_second_run_of_a_module_warms_up_and_decays_anew(tiny_gpt2, quiet_trainer, tmp_path):
    data = [pad_rows(rows()[i : i + 4]) for i in range(0, 44, 4)]
    module = LLMModule(tiny_gpt2, lr_schedule="linear", warmup="150 tokens", lr_schedule_length="900 tokens")
    found = []
    for _ in range(2):
        rates = Rates()
        quiet_trainer(max_epochs=1, callbacks=[rates]).fit(module, Positions(data))
        found.append(rates.rates)
    assert found[0] == found[1]
    assert found[0][0] == 0

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "4.ckpt")

    quiet_trainer(max_epochs=1, callbacks=[Save()]).fit(module, Positions(data))
    rest = Rates()
    resumed = LLMModule(tiny_gpt2, lr_schedule="linear", warmup="150 tokens", lr_schedule_length="900 tokens")
    quiet_trainer(max_epochs=1, callbacks=[rest]).fit(resumed, Positions(data), ckpt_path=tmp_path / "4.ckpt")
    assert rest.rates == found[0][4:]
    loaded = LLMModule.load_from_checkpoint(tmp_path / "4.ckpt")
    again = Rates()
    quiet_trainer(max_epochs=1, callbacks=[again]).fit(loaded, Positions(data))
    assert again.rates == found[0]


def test_the_tokens_of_a_length_of_time(tiny_gpt2, quiet_trainer, text):
    def tokens(length, data=None, **options):
        found = []

        class Asking(LLMModule):
            def configure_optimizers(self):
                found.append(tokens_of(self.trainer, Duration.parse(length)))
                return super().configure_optimizers()

        module = Asking(tiny_gpt2 | {"vocab_size": 512}, lr_schedule="constant")
        quiet_trainer(**({"max_epochs": 3, "max_steps": 1} | options)).fit(module, data or text(micro_batch_size=2))
        return found[0]

    epoch = tokens("1 epoch")
    assert tokens("2M tokens") == 2e6
    assert tokens("100%") == 3 * epoch
    assert tokens("1 epoch", limit_train_batches=0.5) == pytest.approx(epoch / 2, rel=0.05)
    with pytest.raises(ValueError, match="depends on the batch"):
        tokens("100 steps")
    with pytest.raises(ValueError, match=r"needs Trainer\(max_epochs=...\)"):
        tokens("50%", max_epochs=-1)
    with pytest.raises(ValueError, match="does not tell how many tokens '1 epochs' are"):
        tokens("1 epoch", data=Positions([pad_rows(rows()[:4])] * 3))


def test_a_length_in_steps_is_one_and_stays(tiny_gpt2, quiet_trainer):
    rates = Rates()
    module = LLMModule(tiny_gpt2, lr_schedule="cosine", warmup=0, learning_rate=1.0, lr_schedule_length="4 steps")
    data = Positions([pad_rows(rows()[:4])] * 7)
    quiet_trainer(max_epochs=1, callbacks=[rates]).fit(module, data)
    assert rates.rates == pytest.approx([1, 0.853553, 0.5, 0.146447, 0, 0, 0], abs=1e-6)


def test_a_data_module_says_what_its_global_batch_is_now(quiet_trainer, tiny_gpt2, text):
    seen, between = [], []

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, *_):
            seen.append(trainer.datamodule.global_batch)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 6:
                trainer.datamodule.set_global_batch(10)
            between.append(trainer.datamodule.global_batch)

    assert (text().global_batch, text().global_batch_unit) == (None, None)
    data = text(global_batch_size={"0 samples": 4, "12 samples": 8}, num_workers=0)
    assert (data.global_batch, data.global_batch_unit) == (4, "sequences")
    module = LLMModule(tiny_gpt2 | {"vocab_size": 512}, lr_schedule="constant", warmup=0)
    quiet_trainer(max_steps=9, callbacks=[Look()]).fit(module, data)
    assert seen == [4, 4, 4, 8, 8, 8, 10, 10, 10]
    assert between[:8] == seen[1:]
    tokens = text(global_batch_tokens=100)
    assert (tokens.global_batch, tokens.global_batch_unit) == (100, "tokens")
    quiet_trainer(max_steps=1).fit(LLMModule(tiny_gpt2 | {"vocab_size": 512}), tokens)
    assert tokens.global_batch == pytest.approx(100, abs=16)  # whole rows
    quiet_trainer(max_steps=1).fit(LLMModule(tiny_gpt2 | {"vocab_size": 512}), plain := text())
    assert plain.global_batch is None
