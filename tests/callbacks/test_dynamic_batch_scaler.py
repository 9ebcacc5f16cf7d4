"""DynamicBatchScaler: the gradient is that of the whole batch, whatever fits."""

import random
import weakref

import lightning as L
import numpy as np
import pytest
import torch
from scarce_memory import MESSAGE, Scarce
from support import Plain, Positions, pad_rows
from token_training import GLOBAL_BATCH, big_batch, difference, loader, rows, weights
from torchmetrics import CatMetric, MeanMetric

from lightning_llm.callbacks import (
    CannotSplit,
    DynamicBatchScaler,
    TokenWeightedAccumulation,
    dynamic_batch_scaler,
)
from lightning_llm.callbacks.pieces import training
from lightning_llm.callbacks.pieces.search import WeightsCopy
from lightning_llm.callbacks.pieces.undo import GradientGuard, _add
from lightning_llm.out_of_memory import is_out_of_memory

TOLERANCE = 1e-12


def fit(make_trainer, module, micro_batch=GLOBAL_BATCH, accumulate=1, clip=None, data=None, epochs=2, **options):
    scaler = DynamicBatchScaler(**{"grow_every": 2, **options})
    trainer = make_trainer(
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[TokenWeightedAccumulation(), scaler],
    )
    trainer.fit(module, loader(data or rows(), micro_batch))
    return scaler, trainer


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize(
    ("accumulate", "forward", "backward"),
    [
        (1, None, None),
        (1, 150, None),
        (1, None, 150),
        (1, 200, 90),
        (2, None, 90),
        (4, None, 40),
        (2, 100, 60),
        (1, 45, 41),
    ],
)
def test_running_out_of_memory_anywhere_does_not_change_the_training(
    tiny_gpt2, quiet_trainer, optimizer, sort, accumulate, forward, backward
):
    truth, _ = big_batch(tiny_gpt2, optimizer, 0.3)
    module = Scarce(tiny_gpt2, optimizer, forward, backward)
    scaler, trainer = fit(quiet_trainer, module, GLOBAL_BATCH // accumulate, accumulate, clip=0.3, sort_by_length=sort)
    assert trainer.global_step == 6
    assert (module.num_failed > 0) == (forward is not None or backward is not None)
    assert difference(module, truth) < TOLERANCE
    assert scaler.limits.num_failed == module.num_failed


DDP_CASES = {
    "nothing fails": {"accumulate": 1, "overlap": True},
    "forward": {"accumulate": 1, "forward": 100, "overlap": False},
    "forward, overlap": {"accumulate": 1, "forward": 100, "overlap": True},
    "backward": {"accumulate": 1, "backward": 60, "overlap": False},
    "backward, overlap": {"accumulate": 1, "backward": 60, "overlap": True, "optimizer": "adamw"},
    "both, K = 2": {"accumulate": 2, "forward": 60, "backward": 40, "overlap": False, "optimizer": "adamw"},
    "both, K = 2, overlap": {"accumulate": 2, "forward": 60, "backward": 40, "overlap": True},
    "bucket views": {"accumulate": 2, "backward": 40, "overlap": True, "ddp": {"gradient_as_bucket_view": True}},
    "bucket views, K = 1": {
        "accumulate": 1, "backward": 40, "overlap": False, "ddp": {"gradient_as_bucket_view": True},
    },
    "unused parameter": {
        "accumulate": 2, "backward": 40, "overlap": True, "optimizer": "adamw", "unused": True,
        "ddp": {"find_unused_parameters": True},
    },
    "communication hook": {"accumulate": 2, "backward": 40, "overlap": False, "ddp": {"hook": True}},
    "search": {"accumulate": 1, "backward": 60, "overlap": True, "find": "start", "grow_every": 0},
    "a trusted piece fails": {"accumulate": 2, "shrink_at": 2, "overlap": False},
    "a trusted piece fails while it is reduced": {"accumulate": 2, "shrink_at": 2, "overlap": True},
    "it fails while it is reduced, K = 1": {"accumulate": 1, "shrink_at": 2, "overlap": True},
    "it fails while it is reduced, bucket views": {
        "accumulate": 1, "shrink_at": 2, "overlap": True, "ddp": {"gradient_as_bucket_view": True},
    },
    "it fails while it is reduced, unused": {
        "accumulate": 1, "shrink_at": 2, "overlap": True, "unused": True, "optimizer": "adamw",
        "ddp": {"find_unused_parameters": True},
    },
}  # fmt: skip


def test_one_rank_out_of_memory_neither_hangs_nor_changes_the_others(run_ranks):
    ranks = run_ranks("dynamic_batch", 2, time_limit=300, cases=list(DDP_CASES.values()))
    for (name, case), *found in zip(DDP_CASES.items(), *ranks, strict=True):
        for rank, result in enumerate(found):
            assert result["error"] < TOLERANCE, (name, rank, result["error"])
            assert result["steps"] == 6, name
            assert result["logged"] == pytest.approx(result["expected"], rel=1e-6), (name, rank)
        fails = any(key in case for key in ("forward", "backward", "shrink_at"))
        assert found[0]["failed"] == 0
        assert (found[1]["failed"] > 0) == fails, name
        if case.get("find"):  # the scarcer rank decides
            assert found[0]["limits"]["5"] == found[1]["limits"]["5"] <= 60, name  # rows of 17 to 32 columns
        if case.get("unused"):  # never touched: no decay either
            assert found[0]["unused"] == found[1]["unused"] == [1.0, 1.0, 1.0], name


def test_sharded_ranks_run_equally_many_pieces_and_reduce_once_per_optimizer_step(run_ranks):
    ranks = run_ranks("dynamic_batch_sharded", 2, time_limit=200)
    for result in ranks:
        for name, run in result.items():
            assert run["error"] < TOLERANCE, name
            assert run["steps"] == 6, name
        assert result["pieces"]["largest"] <= 70
        assert result["pieces"]["gathers"] > 2 * result["no pieces"]["gathers"]
        # 6 steps, 3 groups of parameters; Lightning alone would reduce in each of the K = 2 micro-batches
        assert result["pieces"]["reductions"] == result["pieces, K = 2"]["reductions"] == 18
    first, second = ranks
    assert first["search"]["limit"] == second["search"]["limit"]
    # 20,000 bytes less a tenth less 1000, at 100 a token: 170 tokens, 7 rows of 24; never more, nothing failed
    assert first["search"]["limit"] == 7 * 24
    assert max(run["search"]["largest"] for run in ranks) <= 7 * 24


# ---- a failed attempt leaves no trace ----------------------------------------------------------------------------


class Guardless(GradientGuard):
    """Leaves what a failed backward has added."""

    def take_back(self):
        self._end()
        if self._earlier is not None:
            _add(self._earlier)
        self._earlier = None
        return frozenset()


def test_without_the_guard_gradients_count_twice(tiny_gpt2, quiet_trainer, monkeypatch):
    monkeypatch.setattr(training, "GradientGuard", Guardless)
    truth, _ = big_batch(tiny_gpt2, "sgd", None)
    module = Scarce(tiny_gpt2, "sgd", backward_limit=90)
    fit(quiet_trainer, module)
    assert difference(module, truth) > 1e-6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trusted_piece_that_fails_is_not_added_twice(tiny_gpt2, quiet_trainer, accumulate):
    """Memory shrinks in the middle of a batch: what fitted, beside gradients, does no longer."""

    class Shrinking(Scarce):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3 and len(self.shapes) % 3 == 0:
                self.backward_limit = 30
            return super().training_step(batch, batch_idx)

    truth, _ = big_batch(tiny_gpt2, "adamw", 0.3)
    module = Shrinking(tiny_gpt2, backward_limit=100)
    scaler, _ = fit(quiet_trainer, module, GLOBAL_BATCH // accumulate, accumulate, clip=0.3, grow_every=0)
    assert scaler.limits.num_failed >= 3
    assert difference(module, truth) < TOLERANCE


class Random(Scarce):
    """Dropout, batch statistics, metrics, logs of every kind."""

    def __init__(self, config, **options):
        super().__init__({**config, "resid_pdrop": 0.3, "embd_pdrop": 0.3}, **options)
        self.norm = torch.nn.BatchNorm1d(1).double()
        self.accuracy = MeanMetric()
        self.lengths = CatMetric()
        self.steps_seen = []

    def training_step(self, batch, batch_idx):
        used = batch["attention_mask"].sum(1)
        self.norm(used.double()[:, None])
        self.accuracy(used.float())
        self.lengths.update(used)
        output = super().training_step(batch, batch_idx)
        loss = output["loss"].detach() + random.random() + np.random.rand()  # noqa: NPY002
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("most", used.double().max(), reduce_fx="max", on_step=True, on_epoch=True)
        self.log("rows", float(len(used)), reduce_fx="sum", on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return output

    def on_train_batch_end(self, outputs, batch, batch_idx):
        metrics = self.trainer.callback_metrics
        self.steps_seen.append([float(metrics[f"{name}_step"]) for name in ("loss", "most", "rows")])


def equal_rows(number=32, length=16):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 97, (number, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def train_random(make_trainer, config, **options):
    limits = {name: options.pop(name) for name in ("forward_limit", "backward_limit") if name in options}
    L.seed_everything(3, verbose=False)
    module = Random(config, **limits)
    scaler, trainer = fit(make_trainer, module, data=equal_rows(), grow_every=0, **options)
    return module, scaler, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("where", ["forward_limit", "backward_limit"])
def test_a_run_that_met_errors_is_bitwise_the_run_that_knew_the_limit(tiny_gpt2, quiet_trainer, where):
    met, scaler, met_logs = train_random(quiet_trainer, tiny_gpt2, **{where: 64})
    knew, informed, knew_logs = train_random(quiet_trainer, tiny_gpt2, max_piece=64)
    assert scaler.limits.num_failed > 0
    assert informed.limits.num_failed == 0
    assert torch.equal(weights(met), weights(knew))
    for (name, a), b in zip(met.named_buffers(), knew.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(
        torch.cat([x.flatten() for x in met.lengths.value]), torch.cat([x.flatten() for x in knew.lengths.value])
    )
    assert met.steps_seen == knew.steps_seen
    met_logs.pop("train/out_of_memory"), knew_logs.pop("train/out_of_memory")
    assert met_logs == knew_logs


def test_logs_are_those_of_the_whole_batch(tiny_gpt2, quiet_trainer):
    class Logs(Scarce):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            used = batch["attention_mask"].sum(1).double()
            self.log("token_mean", output["loss"], on_step=True, on_epoch=True)
            self.log("row_mean", used.mean(), on_step=True, on_epoch=True, batch_size=len(used))
            self.log("most", used.max(), reduce_fx=max, on_step=True, on_epoch=True)
            self.log("least", used.min(), reduce_fx=torch.min, on_step=True, on_epoch=True)
            self.log("sum", used.sum(), reduce_fx="sum", on_step=True, on_epoch=True)
            return {**output, "used": used, "count": torch.tensor(len(used)), "mean": output["loss"].detach()}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.seen = getattr(self, "seen", [])
            self.seen.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})
            self.outputs = getattr(self, "outputs", [])
            self.outputs.append({name: value.clone() for name, value in outputs.items()})

    whole, pieces = Logs(tiny_gpt2), Logs(tiny_gpt2, forward_limit=70)
    _, whole_trainer = fit(quiet_trainer, whole)
    _, pieces_trainer = fit(quiet_trainer, pieces)
    names = [name for name in whole_trainer.callback_metrics if "/" not in name]
    assert len(names) == 15
    for name in names:
        a, b = whole_trainer.callback_metrics[name], pieces_trainer.callback_metrics[name]
        assert float(a) == pytest.approx(float(b), rel=1e-6), name
    for a, b in zip(whole.seen, pieces.seen, strict=True):
        for name in (name for name in a if "/" not in name):
            assert a[name] == pytest.approx(b[name], rel=1e-6), name
    for a, b in zip(whole.outputs, pieces.outputs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name])
            assert b[name].grad_fn is None


def test_what_a_failed_attempt_held_is_freed_before_the_next(tiny_gpt2, quiet_trainer):
    alive = []

    class Heavy(Scarce):
        def training_step(self, batch, batch_idx):
            alive.append([reference() is not None for reference in getattr(self, "earlier", [])])
            return super().training_step(batch, batch_idx)

        def _after_first_layer(self, layer, inputs, output):
            hidden = super()._after_first_layer(layer, inputs, output)
            tensor = hidden[0] if isinstance(hidden, tuple) else hidden
            self.earlier = [*getattr(self, "earlier", []), weakref.ref(tensor)]
            return hidden

    fit(quiet_trainer, Heavy(tiny_gpt2, backward_limit=50), epochs=1)
    assert len(alive) > 6
    assert not any(any(held) for held in alive)


# ---- what cannot be helped ---------------------------------------------------------------------------------------


def test_other_errors_propagate_untouched(tiny_gpt2, quiet_trainer):
    class Broken(Scarce):
        def training_step(self, batch, batch_idx):
            raise error

    error = RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")
    module = Broken(tiny_gpt2)
    with pytest.raises(RuntimeError) as raised:
        fit(quiet_trainer, module)
    assert raised.value is error


def test_a_single_row_that_does_not_fit_is_a_clear_error_and_no_endless_loop(tiny_gpt2, quiet_trainer):
    module = Scarce(tiny_gpt2, forward_limit=3)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"single row of \d+ columns.*cannot be cut.*checkpointing"
    ) as error:
        fit(quiet_trainer, module)
    assert "injected" in str(error.value.__cause__)
    assert len(module.shapes) < 10


def test_a_batch_that_cannot_be_cut_says_so_with_its_cause(tiny_gpt2, quiet_trainer):
    class Constant(Scarce):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

    batch = {**pad_rows(rows()[:4]), "shared": torch.zeros(1, 3)}
    trainer = quiet_trainer(max_steps=1, callbacks=[TokenWeightedAccumulation(), DynamicBatchScaler()])
    with pytest.raises(CannotSplit, match=r"batch\['shared'\]") as error:
        trainer.fit(Constant(tiny_gpt2, forward_limit=50), Positions([batch]))
    assert is_out_of_memory(error.value.__cause__)


def test_an_optimizer_that_does_not_fit_leaves_the_weights_as_they_were(tiny_gpt2, quiet_trainer):
    class Greedy(torch.optim.SGD):
        """Updates its first group, then has no room for the state of the second."""

        def step(self, closure=None):
            loss = closure() if closure else None
            for group in self.param_groups:
                if group is self.param_groups[1]:
                    raise torch.OutOfMemoryError(MESSAGE)
                for parameter in group["params"]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                    parameter.data.sub_(parameter.grad)
            return loss

    class Two(Scarce):
        def configure_optimizers(self):
            parameters = list(self.parameters())
            return Greedy([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=0.1)

    module = Two(tiny_gpt2)
    before = weights(module).clone()
    with pytest.raises(torch.OutOfMemoryError, match="optimizer made its state.*LoRA"):
        fit(quiet_trainer, module)
    assert torch.equal(weights(module), before)


def test_a_batch_that_does_not_fit_on_the_device_is_moved_in_pieces(tiny_gpt2, quiet_trainer):
    class Small(Scarce):
        moved = 0

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            if batch["input_ids"].numel() > 100:
                self.moved += 1
                raise RuntimeError("CUDA error: out of memory")
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    truth, _ = big_batch(tiny_gpt2, "adamw", None)
    module = Small(tiny_gpt2)
    _, trainer = fit(quiet_trainer, module, grow_every=100)
    assert trainer.global_step == 6
    assert difference(module, truth) < TOLERANCE
    assert max(a * b for a, b in module.shapes) <= 100
    assert 1 <= module.moved < 6  # remembered


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_piece": 0}, "`max_piece` must be 1"),
        ({"find": "binary"}, "`find` must be"),
        ({"margin": 1.0}, "`margin` is a share"),
        ({"grow_every": -1}, "`grow_every` must be 0"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicBatchScaler(**options)


def test_what_cannot_be_served_is_refused_with_the_reason(quiet_trainer):
    class Manual(Plain):
        automatic_optimization = False

    class Synchronized(Plain):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.SyncBatchNorm(3)

    data = [[torch.zeros(2, 3)]]
    with pytest.raises(ValueError, match="needs automatic optimization.*Manual"):
        quiet_trainer(max_steps=1, callbacks=[DynamicBatchScaler()]).fit(Manual(), data)
    with pytest.raises(ValueError, match="SyncBatchNorm communicates in forward"):
        quiet_trainer(max_steps=1, callbacks=[DynamicBatchScaler()]).fit(Synchronized(), data)
    twice = [DynamicBatchScaler(), DynamicBatchScaler()]
    with pytest.raises((ValueError, RuntimeError)):
        quiet_trainer(max_steps=1, callbacks=twice).fit(Plain(), data)


def test_static_graph_is_refused_with_the_reason(run_ranks):
    (result,) = run_ranks("dynamic_batch_refused", 1)
    assert "static_graph=True" in result["error"]
    assert "Set static_graph=False" in result["error"]


# ---- batches and modules that remember ---------------------------------------------------------------------------


def test_batch_statistics_of_earlier_pieces_survive_a_later_failure(quiet_trainer):
    """Native batch normalization updates its buffers without torch's notice."""

    class Normalized(L.LightningModule):
        def __init__(self, fail_at):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.layer = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)
            self.register_buffer("calls", torch.zeros(()))
            self.fail_at, self.attempts = fail_at, 0

        def training_step(self, batch, batch_idx):
            self.attempts += 1
            loss = self.layer(self.norm(batch)).square().mean()
            self.calls.data.add_(1)
            if self.attempts == self.fail_at:
                raise torch.OutOfMemoryError(MESSAGE)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    module = Normalized(fail_at=3)  # the second batch's first piece
    trainer = quiet_trainer(max_steps=2, callbacks=[DynamicBatchScaler(max_piece=12, grow_every=0)])
    trainer.fit(module, Positions([batch, batch]))
    reference = torch.nn.BatchNorm1d(3)
    for part in (batch[:4], batch[4:], batch[:2], batch[2:4], batch[4:6], batch[6:]):
        reference(part)
    assert module.calls == 6
    torch.testing.assert_close(module.norm.running_mean, reference.running_mean)
    torch.testing.assert_close(module.norm.running_var, reference.running_var)


def test_a_retry_sees_the_batch_as_it_was(quiet_trainer):
    class Popping(Plain):
        rows = 0

        def training_step(self, batch, batch_idx):
            target = batch.pop("y")
            if len(target) > 2:
                raise torch.OutOfMemoryError(MESSAGE)
            self.rows += len(target)
            return (self.layer(batch["x"])[:, 0] - target).square().mean()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.left = set(batch)

    module = Popping()
    batch = {"x": torch.ones(8, 3), "y": torch.ones(8)}
    quiet_trainer(max_steps=1, callbacks=[DynamicBatchScaler()]).fit(module, Positions([batch]))
    assert module.rows == 8


def test_a_batch_that_was_changed_in_place_is_not_tried_again(quiet_trainer):
    class Changing(Plain):
        def training_step(self, batch, batch_idx):
            batch[0].mul_(0.5)
            raise torch.OutOfMemoryError(MESSAGE)

    with pytest.raises(ValueError, match="changed the batch in place.*work on a copy"):
        quiet_trainer(max_steps=1, callbacks=[DynamicBatchScaler()]).fit(Changing(), Positions([[torch.ones(8, 3)]]))


def test_gradients_that_are_zeroed_in_place_are_guarded_too(tiny_gpt2, quiet_trainer):
    class InPlace(Scarce):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)

        def training_step(self, batch, batch_idx):
            if self.global_step >= 2:
                self.backward_limit = 60
            return super().training_step(batch, batch_idx)

    truth, _ = big_batch(tiny_gpt2, "sgd", None)
    module = InPlace(tiny_gpt2, "sgd")
    fit(quiet_trainer, module)
    assert module.num_failed > 0
    assert difference(module, truth) < TOLERANCE


def test_a_piece_may_be_skipped_by_its_step(quiet_trainer):
    class Skipping(Plain):
        def training_step(self, batch, batch_idx):
            if float(batch[0][0, 0]) == 1.0:
                return None
            return {"loss": self.layer(batch[0]).square().mean(), "rows": torch.tensor(len(batch[0]))}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.outputs = outputs

    module = Skipping()
    batch = torch.tensor([[1.0] * 3] * 2 + [[2.0] * 3] * 2 + [[3.0] * 3] * 2)
    quiet_trainer(max_steps=1, callbacks=[DynamicBatchScaler(max_piece=6)]).fit(module, Positions([[batch]]))
    assert module.outputs["rows"] == 4
    quiet_trainer(max_steps=1, callbacks=[DynamicBatchScaler(max_piece=6)]).fit(module, Positions([[batch.flip(0)]]))
    assert module.outputs["rows"] == 4


def test_a_step_value_of_a_metric_is_that_of_the_batch(quiet_trainer):
    class Measured(Plain):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()

        def training_step(self, batch, batch_idx):
            self.mean(batch[0])
            self.log("mean", self.mean, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    values = []
    for limit in (None, 6):
        trainer = quiet_trainer(max_steps=1, max_epochs=1, callbacks=[DynamicBatchScaler(max_piece=limit)])
        trainer.fit(Measured(), Positions([[torch.arange(24.0).reshape(8, 3)]]))
        values.append((float(trainer.callback_metrics["mean_step"]), float(trainer.callback_metrics["mean_epoch"])))
    assert values[0] == pytest.approx(values[1])


def test_split_fn_ends_where_it_can_cut_no_further(quiet_trainer):
    class Graph:
        def __init__(self, nodes):
            self.nodes = nodes

    class Nodes(Plain):
        def training_step(self, batch, batch_idx):
            self.sizes = [*getattr(self, "sizes", []), len(batch.nodes)]
            if len(batch.nodes) > 2:
                raise torch.OutOfMemoryError(MESSAGE)
            return self.layer(torch.tensor(batch.nodes)).square().mean()

    def split(batch, number):
        return [Graph(part.tolist()) for part in np.array_split(np.array(batch.nodes, dtype=np.float32), number)]

    module = Nodes()
    scaler = DynamicBatchScaler(split_fn=split, cost_fn=lambda batch: len(batch.nodes))
    quiet_trainer(max_steps=1, callbacks=[scaler]).fit(module, Positions([Graph([[1.0, 2.0, 3.0]] * 8)]))
    assert module.sizes == [8, 4, 2, 2, 2, 2]


def test_an_error_with_a_cause_keeps_no_activations(tiny_gpt2, quiet_trainer):
    alive = []

    class Wrapping(Scarce):
        def training_step(self, batch, batch_idx):
            alive.append(self.reference() is not None if hasattr(self, "reference") else False)
            try:
                hidden = torch.ones(len(batch["labels"]), 50, requires_grad=True) * 2
                self.reference = weakref.ref(hidden)
                if len(hidden) > 4:
                    raise RuntimeError("inner")
            except RuntimeError as error:
                raise torch.OutOfMemoryError(MESSAGE) from error
            return super().training_step(batch, batch_idx)

    fit(quiet_trainer, Wrapping(tiny_gpt2), epochs=1)
    assert len(alive) > 6
    assert not any(alive)


def test_an_optimizer_without_state_copies_the_weights_a_few_times_only(quiet_trainer, monkeypatch):
    copies = []
    monkeypatch.setattr(
        dynamic_batch_scaler, "WeightsCopy", lambda optimizer: copies.append(optimizer) or WeightsCopy(optimizer)
    )
    quiet_trainer(max_steps=12, callbacks=[DynamicBatchScaler()]).fit(Plain(), Positions([[torch.ones(4, 3)]] * 12))
    assert len(copies) == 8
