"""``LLMModule(sequence_window=...)`` in a Trainer: the run of the uncut sequence."""

import pytest
import torch
from support import TINY_GPT2

from lightning_llm import LLMModule
from lightning_llm.callbacks import TokenWeightedAccumulation
from lightning_llm.datamodules import TextDataModule
from lightning_llm.tasks.windowed_causal_lm import WindowedCausalLM


@pytest.fixture
def corpus(tmp_path):
    texts = [f"{n} " + "abc def "[n % 5 :] * (2 + 7 * n % 17) for n in range(60)]
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(texts))
    return str(path)


def run(quiet_trainer, corpus, sequence_window, windowing):
    torch.manual_seed(0)
    # With an eps of 1e-4 no step is made of rounding errors, which are all that biases of keys have for a gradient.
    options = {"learning_rate": 1e-2, "eps": 1e-4, "lr_schedule": "constant", "warmup": 0}
    module = LLMModule({**TINY_GPT2, "vocab_size": 258}, sequence_window=sequence_window, **options)
    data = TextDataModule(
        corpus, "bytes", max_length=60, windowing=windowing, micro_batch_size=2, validation_data=corpus
    )
    trainer = quiet_trainer(
        precision="64-true",
        max_steps=6,
        accumulate_grad_batches=2,
        gradient_clip_val=0.3,
        callbacks=[TokenWeightedAccumulation()],
        limit_val_batches=2,
    )
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    return torch.cat([p.detach().flatten() for p in module.parameters()]), dict(trainer.callback_metrics)


@pytest.mark.parametrize("windowing", ["packed", "windows"])
def test_windows_change_neither_training_nor_validation(quiet_trainer, corpus, windowing):
    """With accumulation, clipping and weights by token."""
    whole, metrics = run(quiet_trainer, corpus, None, windowing)
    for sequence_window in (7, 25):
        weights, found = run(quiet_trainer, corpus, sequence_window, windowing)
        torch.testing.assert_close(weights, whole, rtol=0, atol=1e-12)
        assert set(found) == set(metrics)
        for name, value in metrics.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_float16_makes_its_gradient_in_backward_where_the_loss_is_scaled(monkeypatch, dtype):
    forms = []
    monkeypatch.setattr(
        "lightning_llm.tasks.windowed_causal_lm.windowed_loss", lambda *_, when, **__: forms.append(when)
    )
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "labels": torch.zeros(1, 4, dtype=torch.int64)}
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        WindowedCausalLM(2).loss(torch.nn.Linear(1, 1), batch)
    WindowedCausalLM(2).loss(torch.nn.Linear(1, 1, dtype=dtype), batch)
    assert forms == (["backward"] * 2 if dtype == torch.float16 else ["forward"] * 2)


@pytest.mark.parametrize("window", [0, -1, 2.5, True])
def test_a_window_that_is_no_number_of_tokens_is_refused(window):
    with pytest.raises(
        ValueError, match=f"`sequence_window` must be a number of tokens, at least 1, but got {window!r}"
    ):
        LLMModule(TINY_GPT2, sequence_window=window)
