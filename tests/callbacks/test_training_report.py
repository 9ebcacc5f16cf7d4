"""A picture and a summary of what a run reached."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from support import Plain, pad_rows, ragged_rows
from torch.utils.data import DataLoader

from lightning_llm import LLMModule
from lightning_llm.callbacks import (
    GradientNoiseScale,
    HuggingFaceCheckpoint,
    LearningRateScaling,
    TokenThroughput,
    TokenWeightedAccumulation,
    TrainingReport,
)
from lightning_llm.callbacks.training_report import _tick, plot_history


def loader(rows):
    return DataLoader(rows, batch_size=2, collate_fn=pad_rows)


def test_report_prints_results_and_paths_that_exist(tiny_gpt2, quiet_trainer, tmp_path, capsys):
    report = TrainingReport()
    callbacks = [TokenThroughput(), HuggingFaceCheckpoint(), ModelCheckpoint(save_last=True), report]
    trainer = quiet_trainer(
        max_epochs=2, logger=CSVLogger(tmp_path, name=""), enable_checkpointing=True, callbacks=callbacks
    )
    trainer.fit(LLMModule(tiny_gpt2), loader(ragged_rows(8)), loader(ragged_rows(4)))
    text = capsys.readouterr().out
    assert "8 optimizer steps" in text
    assert f"{trainer.callback_metrics['val/loss'].item():.4g}" in text
    paths = dict(line.strip().rsplit("  ", 1) for line in text.splitlines() if "/" in line.split("  ")[-1])
    paths = {name.strip(): path.strip() for name, path in paths.items() if path.strip().startswith(str(tmp_path))}
    assert set(paths) == {"metrics", "plot", "Lightning checkpoint", "Hugging Face last", "Hugging Face best"}
    from pathlib import Path

    for path in paths.values():
        assert Path(path).exists(), path
    assert Path(paths["plot"]).read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in report.history["train/loss"]] == list(range(1, 9))
    assert [step for step, _ in report.history["val/loss"]] == [4, 8]
    assert len(report.history["learning_rate"]) == 8


def test_report_of_any_module_without_logger(quiet_trainer, tmp_path, capsys):
    data = DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3)), batch_size=2)
    quiet_trainer(max_epochs=1, callbacks=[TrainingReport("plain.svg")]).fit(Plain(), data)
    assert (tmp_path / "plain.svg").exists()
    assert "4 optimizer steps" in capsys.readouterr().out


def test_noise_scale_with_its_interval_batch_learning_rate_and_loss_are_in_one_picture(
    tiny_gpt2, quiet_trainer, tmp_path, monkeypatch
):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (figures.append(figure), save(figure, path)))
    report = TrainingReport()
    callbacks = [TokenWeightedAccumulation(), GradientNoiseScale(), TokenThroughput(), LearningRateScaling(), report]
    trainer = quiet_trainer(max_epochs=2, accumulate_grad_batches=4, callbacks=callbacks)
    torch.manual_seed(0)
    ids = [torch.arange(4 + number % 5) for number in range(64)]  # much alike, so that a signal shows in every step
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer.fit(LLMModule(tiny_gpt2, warmup=0, lr_schedule="linear"), loader(rows))
    panels = {axes.get_title(loc="left"): axes for axes in figures[0].axes}
    batch, rate = panels["global batch (label tokens)"], panels["learning rate"]
    assert [line.get_label() for line in rate.get_lines()] == ["learning_rate", "train/learning_rate"]
    assert len(batch.get_lines()[0].get_xdata()) == trainer.global_step == 16
    noise = panels["noise scale (label tokens)"]
    low, high = (dict(report.history[f"train/noise_scale_tokens_{end}"]) for end in ("low", "high"))
    corners = {(int(x), float(y)) for x, y in noise.collections[0].get_paths()[0].vertices}
    assert {(step, low[step]) for step in low.keys() & high.keys()} <= corners
    assert {(step, high[step]) for step in low.keys() & high.keys()} <= corners
    assert low.keys() & high.keys()


def test_history_survives_a_resume(tiny_gpt2, quiet_trainer, tmp_path):
    trainer = quiet_trainer(max_epochs=1, callbacks=[TrainingReport()])
    trainer.fit(LLMModule(tiny_gpt2), loader(ragged_rows(8)))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    report = TrainingReport()
    trainer = quiet_trainer(max_epochs=2, callbacks=[report])
    trainer.fit(LLMModule(tiny_gpt2), loader(ragged_rows(8)), ckpt_path=tmp_path / "one.ckpt")
    assert [step for step, _ in report.history["train/loss"]] == list(range(1, 9))


def test_yardstick_stands_beside_the_bits_per_byte(quiet_trainer, tiny_llama, tmp_path, capsys):
    from lightning_llm.datamodules import TextDataModule

    (tmp_path / "text").mkdir()
    for index in range(12):
        (tmp_path / "text" / f"{index}.txt").write_text(f"some words of text number {index}. " * 20)
    data = TextDataModule(
        str(tmp_path / "text"), "bytes", 64, validation_fraction=0.3, cache_dir=str(tmp_path / "cache")
    )
    trainer = quiet_trainer(max_steps=2, val_check_interval=1, callbacks=[TrainingReport()])
    trainer.fit(LLMModule(tiny_llama), data)
    text = capsys.readouterr().out
    assert f"(zlib -9 on the same text: {data.zlib_bits_per_byte():.2f})" in text


@pytest.mark.parametrize("num_panels", [0, 1, 2, 3, 4, 5, 6])
def test_any_number_of_panels_fits_the_picture(tmp_path, num_panels):
    names = [
        "train/loss",
        "val/bits_per_byte",
        "train/tokens_per_s",
        "train/global_batch_tokens",
        "learning_rate",
    ]
    names.append("train/mfu")
    history = {name: [(step, 1.0 / step) for step in range(1, 50)] for name in names[:num_panels]}
    plot_history(history, tmp_path / "plot.png", zlib_bits_per_byte=0.5)
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("value", "text"),
    [(12000, "12k"), (1.5e6, "1.5M"), (0.002, "2e-3"), (0, "0"), (2.5, "2.5"), (0.25, "0.25")],
)
def test_axis_labels_are_short(value, text):
    assert _tick(value) == text
