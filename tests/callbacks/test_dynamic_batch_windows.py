"""A row that does not fit is tried again in shorter windows along the sequence: weights are those without errors."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from scarce_windows import LENGTH, GlobalBatches, ScarceInWindows, batches, big_batch_loop, train, weights_of
from windowed_models import full_float64

from lightning_llm import LLMModule
from lightning_llm.callbacks import DynamicBatchScaler
from lightning_llm.tasks import base

EXACT = 1e-12
ROUNDING_FLOAT = torch.Tensor.float  # before tests replace it


@pytest.fixture(autouse=True)
def short_windows_in_float64(monkeypatch):
    """Rows here have a few tens of tokens."""
    full_float64(monkeypatch)
    monkeypatch.setattr(base, "SHORTEST_WINDOW", 4)


def difference(module, truth):
    return float((weights_of(module) - truth).norm() / truth.norm())


@pytest.fixture
def truth(monkeypatch):
    full_float64(monkeypatch)
    return big_batch_loop()


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("where", ["first pass", "second pass", "backward"])
def test_shorter_windows_after_an_error_change_no_weight(quiet_trainer, truth, caplog, where, when):
    """Rows are cut first, as they cost nothing; then the window is halved until a row fits."""
    module, scaler = ScarceInWindows(where=where, limit=10, when=when), DynamicBatchScaler()
    with caplog.at_level(logging.WARNING):
        trainer = train(quiet_trainer, module, scaler)
    assert difference(module, truth) < EXACT
    assert module.num_failed > 0
    assert module.sequence_window == scaler.window.tokens == 8
    assert trainer.callback_metrics["train/sequence_window"] == 8
    told = [record.getMessage() for record in caplog.records if "the sequence window is" in record.getMessage()]
    assert len(told) == 2  # once per change
    assert told[-1].endswith("the sequence window is 8 tokens now, was 16.")


class Scaler(torch.amp.GradScaler):
    """As float16 has it; its kernel wants the factor in float32, whatever these tests do to ``Tensor.float``."""

    def unscale_(self, optimizer):
        patched, torch.Tensor.float = torch.Tensor.float, ROUNDING_FLOAT
        try:
            super().unscale_(optimizer)
        finally:
            torch.Tensor.float = patched


@pytest.mark.parametrize("where", ["second pass", "backward"])
def test_losses_scaled_for_float16_are_unscaled_whatever_the_windows(quiet_trainer, truth, where):
    """A gradient scaler around float64, with the form of backward that serves it."""
    plugin = MixedPrecision("16-mixed", "cpu", Scaler("cpu", init_scale=1024.0))
    plugin.forward_context = plugin.train_step_context = torch.enable_grad
    module, scaler = ScarceInWindows(where=where, limit=10, when="backward").double(), DynamicBatchScaler()
    train(quiet_trainer, module, scaler, precision=None, plugins=[plugin])
    assert difference(module, truth) < EXACT
    assert module.num_failed > 0
    assert module.sequence_window == 8


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_real_allocation_failures_shorten_windows_and_change_no_weight(tmp_path):
    """A process whose address space is cut to little more than it has: torch's own allocator fails."""
    worker = Path(__file__).parents[1] / "workers" / "address_space_windows.py"
    command = [sys.executable, str(worker), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["fails without"]  # control: the scaler is what makes it pass
    assert result["failed"] >= 1
    assert 64 <= result["window"] < result["first window"]
    assert result["difference"] < EXACT


def test_rows_are_cut_before_windows(quiet_trainer, truth):
    """Control: with memory for a row of whole windows none is shortened."""
    module, scaler = ScarceInWindows(where="backward", limit=LENGTH), DynamicBatchScaler()
    train(quiet_trainer, module, scaler)
    assert difference(module, truth) < EXACT
    assert module.num_failed > 0
    assert module.sequence_window == 32
    assert scaler.window.tokens is None


def test_a_row_that_does_not_fit_in_the_shortest_windows_is_an_error_that_says_so(quiet_trainer):
    module = ScarceInWindows(where="backward", limit=1)
    with pytest.raises(torch.OutOfMemoryError, match="and its windows of 4 tokens cannot be shorter. Use shorter rows"):
        train(quiet_trainer, module, DynamicBatchScaler())


def test_a_resumed_run_begins_with_the_window_that_fitted_and_ends_like_one_without_a_stop(
    quiet_trainer, tmp_path, truth
):
    saved = ModelCheckpoint(tmp_path, "half", every_n_train_steps=2)
    module = ScarceInWindows(where="backward", limit=10)
    options = {"callbacks": [saved], "max_steps": 2, "enable_checkpointing": True}
    train(quiet_trainer, module, DynamicBatchScaler(), **options)
    assert module.sequence_window == 8
    resumed = ScarceInWindows(where="backward", limit=10)
    assert resumed.sequence_window == 32
    trainer = train(quiet_trainer, resumed, DynamicBatchScaler(), ckpt_path=tmp_path / "half.ckpt")
    assert trainer.global_step == 4
    assert resumed.num_failed == 0
    assert resumed.sequence_window == 8
    assert difference(resumed, truth) < EXACT


def test_a_batch_that_cannot_be_cut_is_run_in_shorter_windows(quiet_trainer, truth):
    """Nothing says how an object in the batch is cut; the window says it for the sequence."""
    module, scaler = ScarceInWindows(where="backward", limit=2 * 10), DynamicBatchScaler()
    train(quiet_trainer, module, scaler, data=[{**batch, "note": object()} for batch in batches()])
    assert difference(module, truth) < EXACT
    assert module.sequence_window == 4


def test_evaluation_is_run_in_shorter_windows_with_the_same_result(quiet_trainer):
    expected, module = (ScarceInWindows(where="first pass", limit=limit) for limit in (None, 10))
    trainer = quiet_trainer(precision="64-true")
    (whole,) = trainer.validate(expected, GlobalBatches(batches()), verbose=False)
    scaler = DynamicBatchScaler()
    trainer = quiet_trainer(precision="64-true", callbacks=[scaler])
    (cut,) = trainer.validate(module, GlobalBatches(batches()), verbose=False)
    assert module.num_failed > 0
    assert scaler.window.tokens == module.sequence_window == 8
    assert cut["val/loss"] == pytest.approx(whole["val/loss"], rel=EXACT)


def test_two_ranks_one_of_which_shrinks_its_window_step_alike(run_ranks, truth):
    """Rows cut, windows shortened on rank 1 alone, weights by token, accumulation, a schedule, clipping, DDP."""
    found = run_ranks("scarce_windows", 2)
    assert all(difference_of(result["weights"], truth) < EXACT for result in found)
    assert [result["window"] for result in found] == [32, 8]
    assert found[0]["failed"] == 0 < found[1]["failed"]
    assert all(result["fired"] == 1 for result in found)  # each parameter's hook once in an optimizer step


def difference_of(weights, truth):
    return float((torch.tensor(weights, dtype=torch.float64) - truth).norm() / truth.norm())


def test_a_module_tells_and_halves_its_window(monkeypatch):
    monkeypatch.undo()
    model = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    module = LLMModule(model, sequence_window=4096)
    windows = [module.shrink_sequence_window(600) for _ in range(5)]  # a row of 600 was in one window
    assert windows == [300, 150, 75, 64, None]
    assert module.sequence_window == 64
    whole = LLMModule(model)
    assert whole.sequence_window is whole.shrink_sequence_window(600) is None
    with pytest.raises(ValueError, match="does not train in windows"):
        whole.sequence_window = 64
