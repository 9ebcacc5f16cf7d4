"""DynamicBatchScaler beside the rest: evaluation, checkpoints, other callbacks, gradient scalers, what it shows."""

import inspect
import itertools
import logging
import random
from typing import NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult, _AutomaticOptimization
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from scarce_memory import MESSAGE, Scarce
from support import Plain, Positions, pad_rows
from token_training import GLOBAL_BATCH, big_batch, difference, loader, rows, weights
from torchmetrics import MeanMetric

from lightning_llm import LLMModule
from lightning_llm.callbacks import (
    AccumulationSchedule,
    DynamicBatchScaler,
    TokenThroughput,
    TokenWeightedAccumulation,
)

TOLERANCE = 1e-12


# ---- an error in any attempt -------------------------------------------------------------------------------------


def campaign():
    for accumulate, optimizer, where in itertools.product([1, 2, 4], ["sgd", "adamw"], ["forward", "backward"]):
        yield from ((accumulate, optimizer, where, attempt) for attempt in range(23))  # of 23 or 24 pieces


ATTEMPTS = list(campaign())


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(random.Random(0).sample(ATTEMPTS, 24), id="sample"),
        pytest.param(ATTEMPTS, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_an_error_in_any_attempt_of_any_micro_batch_does_not_change_the_training(tiny_gpt2, quiet_trainer, cases):
    """Pieces of 40 tokens; the n-th attempt fails whatever its size, also where as much has fitted before."""
    data = rows(32)
    truths = {optimizer: big_batch(tiny_gpt2, optimizer, 0.3, data, 1)[0] for optimizer in ("sgd", "adamw")}
    for accumulate, optimizer, where, attempt in cases:
        module = Scarce(tiny_gpt2, optimizer, fail_at=(attempt, where))
        trainer = quiet_trainer(
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.3,
            callbacks=[TokenWeightedAccumulation(), DynamicBatchScaler(max_piece=40, grow_every=0)],
        )
        trainer.fit(module, loader(data, GLOBAL_BATCH // accumulate))
        assert module.num_failed == 1, "an attempt that never came"
        assert difference(module, truths[optimizer]) < TOLERANCE, (accumulate, optimizer, where, attempt)


# ---- what peers promise ------------------------------------------------------------------------------------------


class Lengths(L.LightningModule):
    """Rows of one number; notes how many rows each attempt had, and fails as it is told."""

    def __init__(self, room=None, error=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.room, self.error, self.tried = room, error or torch.OutOfMemoryError(MESSAGE), []

    def training_step(self, batch, batch_idx):
        self.tried.append(len(batch))
        if self.room is not None and len(batch) > self.room:
            raise self.error
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA out of memory."), RuntimeError("XPU out of memory"), RuntimeError("CUDNN_STATUS_ALLOC_FAILED")],
)
def test_the_batch_is_halved_until_it_fits(quiet_trainer, error):
    module = Lengths(room=16, error=error)
    trainer = quiet_trainer(max_steps=1, callbacks=[DynamicBatchScaler()])
    trainer.fit(module, Positions([torch.ones(128, 1)]))
    assert module.tried == [128, 64, 32] + [16] * 8


def test_it_gives_up_at_one_row(quiet_trainer):
    module = Lengths(room=0)
    with pytest.raises(torch.OutOfMemoryError, match="single row"):
        quiet_trainer(max_steps=1, callbacks=[DynamicBatchScaler()]).fit(module, Positions([torch.ones(16, 1)]))
    assert module.tried == [16, 8, 4, 2, 1]


def test_what_was_found_is_used_for_the_next_batches_and_grows_back(quiet_trainer):
    module = Lengths(room=32)
    trainer = quiet_trainer(max_steps=9, callbacks=[DynamicBatchScaler(grow_every=3)])
    trainer.fit(module, Positions([torch.ones(128, 1)] * 9))
    tried, first = module.tried, [128, 64] + [32] * 4
    assert tried[:6] == first
    assert tried[6:14] == [32] * 8  # nothing fails, nothing is tried
    assert 43 in tried[14:]  # a probe between what fitted and what did not: 48, as 3 pieces of 42 or 43


# ---- evaluation --------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    number: torch.Tensor
    names: list


class Evaluated(Plain):
    def __init__(self, room=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1).double()
        self.room, self.sizes, self.metric, self.ends = room, [], MeanMetric(), []

    def _values(self, batch):
        self.sizes.append(len(batch["x"]))
        self.metric.update(batch["x"].mean())
        if self.room is not None and len(batch["x"]) > self.room:
            raise torch.OutOfMemoryError(MESSAGE)
        return self.layer(batch["x"])[:, 0]

    def training_step(self, batch, batch_idx):
        return self._values(batch).square().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        values = self._values(batch)
        self.log("mean", values.mean(), batch_size=len(values))
        self.log("sum", values.sum(), reduce_fx="sum")
        return {"values": values, "mean": values.mean()}

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return {"values": self._values(batch), "out": Output(batch["x"][:, 0], batch["names"])}

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.ends.append((len(outputs["values"]), float(outputs["mean"])))


def evaluation_batches(sizes=(10, 7, 1)):
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(n, 3, generator=generator, dtype=torch.float64)} for n in sizes]
    return [{**batch, "names": [f"row {i}" for i in range(len(batch["x"]))]} for batch in batches]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_in_pieces_gives_the_same_values(quiet_trainer, stage):
    results = []
    for room in (None, 3):
        module, scaler = Evaluated(room), DynamicBatchScaler()
        trainer = quiet_trainer(callbacks=[scaler])
        (logged,) = getattr(trainer, stage)(module, Positions(evaluation_batches()), verbose=False)
        results.append((logged, module.ends, module.metric.weight.item()))
        assert (scaler.inference_limits.num_failed > 0) == (room is not None)
        assert scaler.limits.num_failed == 0
    (whole, whole_ends, _), (pieces, pieces_ends, _) = results
    assert whole == pytest.approx(pieces)
    assert [n for n, _ in pieces_ends] == [n for n, _ in whole_ends]
    assert [mean for _, mean in pieces_ends] == pytest.approx([mean for _, mean in whole_ends])


def test_predictions_in_pieces_are_those_of_the_whole_batch_in_order(quiet_trainer):
    class Writer(BasePredictionWriter):
        def __init__(self):
            super().__init__("batch")
            self.rows = []

        def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
            self.rows.append(len(prediction["values"]))

    writer = Writer()
    whole = quiet_trainer(callbacks=[DynamicBatchScaler()]).predict(Evaluated(), Positions(evaluation_batches()))
    pieces = quiet_trainer(callbacks=[DynamicBatchScaler(), writer]).predict(
        Evaluated(room=3), Positions(evaluation_batches())
    )
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a["values"], b["values"])
        assert isinstance(b["out"], Output)
        assert torch.equal(a["out"].number, b["out"].number)
        assert a["out"].names == b["out"].names
    assert writer.rows == [10, 7, 1]


def test_predictions_that_cannot_be_joined_ask_for_merge_fn(quiet_trainer):
    class Ragged(Evaluated):
        def predict_step(self, batch, batch_idx):
            self._values(batch)
            return torch.zeros(len(batch["x"]), len(batch["x"]))

    with pytest.raises(ValueError, match="predict_step.*merge_fn"):
        quiet_trainer(callbacks=[DynamicBatchScaler()]).predict(Ragged(room=3), Positions(evaluation_batches()))
    scaler = DynamicBatchScaler(merge_fn=lambda outputs: [len(output) for output in outputs])
    first, *_ = quiet_trainer(callbacks=[scaler]).predict(Ragged(room=3), Positions(evaluation_batches()))
    assert sum(first) == 10


def test_training_and_evaluation_have_limits_of_their_own(quiet_trainer):
    class Both(Evaluated):
        def training_step(self, batch, batch_idx):
            if len(batch["x"]) > 2:
                raise torch.OutOfMemoryError(MESSAGE)
            return super().training_step(batch, batch_idx)

    module, scaler = Both(room=6), DynamicBatchScaler()
    trainer = quiet_trainer(max_epochs=2, callbacks=[scaler])
    batches = evaluation_batches((12, 12))
    trainer.fit(module, Positions(batches), [Positions(batches), Positions(batches)])  # two validation loaders
    assert max(limit.good for limit in scaler.limits.buckets.values()) <= 2 * 3
    assert max(limit.good for limit in scaler.inference_limits.buckets.values()) > 2 * 3
    assert "mean/dataloader_idx_1" in trainer.callback_metrics


def test_our_module_validates_the_same_in_pieces(tiny_gpt2, quiet_trainer):
    class Short(LLMModule):
        room = None

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)  # counts first, then fails: must not be counted twice
            if self.room is not None and batch["input_ids"].numel() > self.room:
                raise torch.OutOfMemoryError(MESSAGE)

    values = []
    for room in (None, 60):
        torch.manual_seed(0)
        module = Short(tiny_gpt2)
        module.room = room
        trainer = quiet_trainer(callbacks=[DynamicBatchScaler()])
        (logged,) = trainer.validate(module, Positions([pad_rows(rows()[:12]), pad_rows(rows()[12:20])]), verbose=False)
        values.append(logged["val/loss"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)


# ---- checkpoints -------------------------------------------------------------------------------------------------


def test_a_resumed_run_starts_with_what_is_known_and_ends_bitwise_the_same(tiny_gpt2, quiet_trainer, tmp_path):
    def run(steps, **options):
        module = Scarce({**tiny_gpt2, "resid_pdrop": 0.2}, backward_limit=100)
        scaler = DynamicBatchScaler(grow_every=2)
        callbacks = [TokenWeightedAccumulation(), AccumulationSchedule({"0 steps": 1, "2 steps": 2}), scaler]
        trainer = quiet_trainer(max_steps=steps, callbacks=callbacks, gradient_clip_val=0.3)
        L.seed_everything(5, verbose=False)
        trainer.fit(module, Positions([pad_rows(rows()[n : n + 8]) for n in range(0, 40, 8)] * 3), **options)
        return module, scaler, trainer

    whole, scaler, _ = run(6)
    _, first, trainer = run(3)
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    second, resumed, _ = run(6, ckpt_path=tmp_path / "3.ckpt")
    assert first.limits.num_failed > 0
    assert resumed.limits.buckets == scaler.limits.buckets
    assert torch.equal(weights(second), weights(whole))


def test_a_second_fit_goes_on_with_what_is_known(quiet_trainer):
    scaler, module = DynamicBatchScaler(grow_every=0), Lengths(room=16)
    for _ in range(2):
        quiet_trainer(max_steps=1, callbacks=[scaler]).fit(module, Positions([torch.ones(32, 1)]))
    assert module.tried == [32, 16, 16, 16, 16]


# ---- other callbacks ---------------------------------------------------------------------------------------------


def test_an_accumulation_schedule_counts_micro_batches_not_pieces(tiny_gpt2, quiet_trainer):
    class Watch(L.Callback):
        seen = ()

        def on_train_batch_end(self, trainer, *args):
            self.seen = (*self.seen, float(trainer.callback_metrics.get("train/micro_batches", 0)))

    for weighting in ([TokenWeightedAccumulation()], []):
        watch = Watch()
        truth, module = Scarce(tiny_gpt2, "sgd"), Scarce(tiny_gpt2, "sgd", forward_limit=50)
        data = [{key: value[:, :4] for key, value in pad_rows(rows()[n : n + 4]).items()} for n in range(0, 40, 4)]
        for batch in data:
            batch["labels"] = batch["input_ids"]  # as many tokens in each row
        for model, extra in ((truth, []), (module, [DynamicBatchScaler(), watch])):
            model.forward_limit = 8 if extra else None
            schedule = AccumulationSchedule({"0 steps": 2, "2 steps": 3})
            quiet_trainer(max_epochs=1, callbacks=[*weighting, schedule, *extra]).fit(model, Positions(data))
        assert module.num_failed > 0
        assert watch.seen[-1] == 3
        assert difference(module, weights(truth)) < TOLERANCE


def test_the_throughput_counts_each_token_once(tiny_gpt2, quiet_trainer):
    totals = []
    for limit in (None, 70):
        throughput = TokenThroughput(every_n_steps=1)
        module = Scarce(tiny_gpt2, forward_limit=limit)
        callbacks = [TokenWeightedAccumulation(), DynamicBatchScaler(), throughput]
        quiet_trainer(max_epochs=1, callbacks=callbacks).fit(module, loader(rows(), GLOBAL_BATCH))
        totals.append(throughput.total_tokens)
    assert totals[0] == totals[1] > 0


def test_our_module_counts_tokens_and_losses_once(tiny_gpt2, quiet_trainer):
    seen = []
    for limit in (None, 60):
        torch.manual_seed(0)
        module = LLMModule({**tiny_gpt2}, lr_schedule="constant", warmup=0)
        scaler = DynamicBatchScaler(max_piece=limit)
        trainer = quiet_trainer(max_epochs=1, callbacks=[TokenWeightedAccumulation(), scaler])
        trainer.fit(module, loader(rows(), GLOBAL_BATCH))
        seen.append((module.tokens_seen, float(trainer.callback_metrics["train/loss"])))
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] == pytest.approx(seen[1][1], rel=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
        lambda: WeightAveraging(avg_fn=lambda average, current, number: 0.5 * average + 0.5 * current),
        lambda: ModelCheckpoint(every_n_train_steps=1),
    ],
    ids=["SWA", "EMA", "checkpoints"],
)
def test_other_callbacks_see_the_run_they_would_have_seen(tiny_gpt2, quiet_trainer, tmp_path, other):
    found = []
    for limit in (None, 90):
        module = Scarce(tiny_gpt2, "sgd", backward_limit=limit)
        callbacks = [TokenWeightedAccumulation(), DynamicBatchScaler(), other()]
        trainer = quiet_trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(module, loader(rows(), GLOBAL_BATCH))
        found.append(module)
    assert difference(found[1], weights(found[0])) < TOLERANCE


def test_the_learning_rate_finder_runs_in_pieces_too(tiny_gpt2, quiet_trainer):
    class Rated(Scarce):
        learning_rate = 1e-3

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    module = Rated(tiny_gpt2, forward_limit=70)
    finder = LearningRateFinder(num_training_steps=8)
    callbacks = [TokenWeightedAccumulation(), finder, DynamicBatchScaler()]
    trainer = quiet_trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, loader(rows(), GLOBAL_BATCH))
    assert len(finder.optimal_lr.results["loss"]) == 8
    assert module.num_failed > 0
    assert trainer.global_step == 9


def test_the_batch_size_finder_sees_the_errors_itself(quiet_trainer):
    class Sized(Lengths):
        batch_size = 2

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.ones(256, 1), batch_size=self.batch_size)

    module = Sized(room=32, error=RuntimeError("CUDA out of memory."))
    callbacks = [BatchSizeFinder(mode="power", steps_per_trial=1, init_val=2), DynamicBatchScaler()]
    quiet_trainer(max_steps=1, callbacks=callbacks, enable_checkpointing=True).fit(module)
    assert module.batch_size == 32


def attributes(trainer):
    owners = (trainer.strategy, trainer.fit_loop.epoch_loop.automatic_optimization, trainer.strategy.lightning_module)
    names = (
        "_make_closure",
        "optimizer_step",
        "batch_to_device",
        "validation_step",
        "backward",
        "training_step",
        "log",
    )
    return [name for owner in owners for name in names if name in owner.__dict__]


def test_the_trainer_is_as_before_after_the_run_and_after_an_exception(quiet_trainer):
    class Broken(Lengths):
        def on_train_batch_end(self, *args):
            raise KeyError("user")

    for module, error in ((Lengths(room=4), None), (Broken(), KeyError)):
        trainer = quiet_trainer(max_steps=2, callbacks=[DynamicBatchScaler(), TokenWeightedAccumulation("samples")])
        if error is None:
            trainer.fit(module, Positions([torch.ones(8, 1)] * 2))
        else:
            with pytest.raises(error):
                trainer.fit(module, Positions([torch.ones(8, 1)] * 2))
        assert attributes(trainer) == []
        assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())
        assert "log" not in trainer.fit_loop.epoch_loop._results.__dict__


def test_a_step_that_takes_the_iterator_is_left_alone(quiet_trainer):
    class Iterating(Lengths):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return super().training_step(batch, 0)

    module = Iterating()
    quiet_trainer(max_steps=2, callbacks=[DynamicBatchScaler(max_piece=2)]).fit(
        module, Positions([torch.ones(8, 1)] * 2)
    )
    assert module.tried == [8, 8]


def test_a_step_that_skips_a_batch_still_may(quiet_trainer):
    class Skipping(Lengths):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Skipping()
    quiet_trainer(max_epochs=1, callbacks=[DynamicBatchScaler(max_piece=4)]).fit(
        module, Positions([torch.ones(8, 1)] * 3)
    )
    assert module.tried == [4, 4, 4, 4]


# ---- gradient scalers --------------------------------------------------------------------------------------------


def test_pieces_are_scaled_and_unscaled_as_the_whole_batch_is(tiny_gpt2, quiet_trainer):
    """A gradient scaler as float16 has it, on the CPU, around float64."""
    found = []
    for limit in (None, 90):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        plugin.forward_context = plugin.train_step_context = torch.enable_grad
        module = Scarce(tiny_gpt2, "sgd", backward_limit=limit)
        callbacks = [TokenWeightedAccumulation(), DynamicBatchScaler()]
        trainer = quiet_trainer(max_epochs=2, callbacks=callbacks, plugins=[plugin], gradient_clip_val=0.3)
        trainer.fit(module, loader(rows(), GLOBAL_BATCH))
        assert (module.num_failed > 0) == (limit is not None)
        found.append(module)
    truth, _ = big_batch(tiny_gpt2, "sgd", 0.3)
    assert difference(found[0], truth) < TOLERANCE
    assert difference(found[1], truth) < TOLERANCE


def test_bfloat16_autocast_runs_in_pieces(tiny_gpt2, quiet_trainer):
    module = Scarce(tiny_gpt2, "sgd", forward_limit=90, dtype=torch.float32)
    callbacks = [TokenWeightedAccumulation(), DynamicBatchScaler()]
    trainer = quiet_trainer(max_epochs=2, callbacks=callbacks, precision="bf16-mixed")
    trainer.fit(module, loader(rows(), GLOBAL_BATCH))
    assert module.num_failed > 0
    assert trainer.global_step == 6


# ---- what is shown -----------------------------------------------------------------------------------------------


def test_what_was_done_is_logged_and_each_change_said_once(tiny_gpt2, quiet_trainer, caplog):
    module = Scarce(tiny_gpt2, forward_limit=100)
    trainer = quiet_trainer(max_epochs=6, callbacks=[TokenWeightedAccumulation(), DynamicBatchScaler(grow_every=2)])
    with caplog.at_level(logging.INFO, logger="lightning_llm"):
        trainer.fit(module, loader(rows(), GLOBAL_BATCH))
    metrics = trainer.callback_metrics
    assert metrics["train/out_of_memory"] == module.num_failed
    assert metrics["train/pieces"] >= 2
    assert 0 < metrics["train/piece_tokens"] <= 100
    assert "train/pieces" in trainer.progress_bar_metrics
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_llm")]
    assert sum("is run again in" in line for line in lines) == module.num_failed
    assert any("may have cost" in line for line in lines)


def test_unequal_tokens_without_weighting_are_warned_of_once(tiny_gpt2, quiet_trainer, caplog):
    module = Scarce(tiny_gpt2, forward_limit=100)
    quiet_trainer(max_epochs=2, callbacks=[DynamicBatchScaler()]).fit(module, loader(rows(), GLOBAL_BATCH))
    assert sum("Add TokenWeightedAccumulation()" in record.getMessage() for record in caplog.records) == 1


def test_allocation_retries_in_two_batches_running_are_pressure(quiet_trainer, monkeypatch):
    counts = iter([0, 0, 1, 2, 2, 2, 2])
    monkeypatch.setattr("lightning_llm.callbacks.pieces.training.allocation_retries", lambda device: next(counts))
    module, scaler = Lengths(), DynamicBatchScaler()
    quiet_trainer(max_steps=6, callbacks=[scaler]).fit(module, Positions([torch.ones(100, 1)] * 6))
    assert scaler.limits.of(1).limit == 90
    assert module.tried == [100, 100, 100, 50, 50, 50, 50, 50, 50]


# ---- Lightning's private parts -----------------------------------------------------------------------------------


def test_lightning_still_has_the_private_parts_that_are_used():
    """Whoever updates Lightning sees here what `callbacks/pieces` relies on."""
    assert list(inspect.signature(_AutomaticOptimization._make_closure).parameters) == [
        "self", "kwargs", "optimizer", "batch_idx",
    ]  # fmt: skip
    assert list(inspect.signature(_AutomaticOptimization._make_step_fn).parameters) == ["self", "kwargs"]
    assert list(inspect.signature(Closure.__init__).parameters) == ["self", "step_fn", "backward_fn", "zero_grad_fn"]
    source = inspect.getsource(Closure)
    assert all(name in source for name in ("_step_fn", "_backward_fn", "_zero_grad_fn", "def closure"))
    assert set(ClosureResult.__dataclass_fields__) == {"closure_loss", "loss", "extra"}
    log = inspect.signature(_ResultCollection.log).parameters
    assert list(log)[:4] == ["self", "fx", "name", "value"]
    assert {"enable_graph", "batch_size", "reduce_fx", "on_step", "sync_dist"} <= set(log)
    assert "_current_fx_name" in inspect.getsource(L.LightningModule)
    assert "results.log(" in inspect.getsource(L.LightningModule.log)
    assert callable(L.LightningModule._on_before_batch_transfer)
    assert "should_accumulate" in inspect.getsource(_AutomaticOptimization._optimizer_step)
    ddp = torch.nn.parallel.DistributedDataParallel
    assert callable(ddp._sync_buffers)
    assert callable(ddp.will_sync_module_buffers)
    metric = MeanMetric()
    assert {"_update_count", "_computed"} <= set(metric.__dict__)
    assert {"mean_value", "weight"} == set(metric.metric_state)
