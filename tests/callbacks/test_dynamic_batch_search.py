"""The search before training: the worst batch, the optimizer's state, a margin, and nothing left behind."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from scarce_memory import Scarce
from support import Plain, Positions, dataset_of, pad_rows, ragged_rows
from token_training import big_batch, difference, rows, weights
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from lightning_llm import LLMModule
from lightning_llm.callbacks import DynamicBatchScaler, TokenWeightedAccumulation
from lightning_llm.callbacks.pieces import search
from lightning_llm.datamodules.batches.plan import RowPlan
from lightning_llm.datamodules.loader import RowLoader
from lightning_llm.datamodules.order import TableOrder


class Stateful(Scarce):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.norm = torch.nn.BatchNorm1d(1).double()
        self.mean = MeanMetric()
        self.draws = []

    def training_step(self, batch, batch_idx):
        self.norm(batch["labels"][:, None].double())
        self.mean(batch["labels"].float().mean())
        self.log("logged", 1.0, reduce_fx="sum", on_epoch=True)
        self.draws.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
        return super().training_step(batch, batch_idx)


def train(make_trainer, config, loader, find, steps=4, epochs=None, seed=7, **limits):
    L.seed_everything(seed, verbose=False)
    module = Stateful({**config, "resid_pdrop": 0.2}, "adamw", **limits)
    scaler = DynamicBatchScaler(find=find, max_piece=48, grow_every=0)
    trainer = make_trainer(
        max_steps=steps, max_epochs=epochs, callbacks=[TokenWeightedAccumulation(), scaler], gradient_clip_val=0.3
    )
    trainer.fit(module, loader)
    return module, scaler, trainer


def shuffled_loader(workers=0, **options):
    generator = torch.Generator().manual_seed(1)
    options |= {"shuffle": True, "generator": generator, "num_workers": workers}
    return DataLoader(rows(), batch_size=8, collate_fn=pad_rows, **options)


def persistent_loader():
    return shuffled_loader(workers=1, persistent_workers=True)


@pytest.mark.parametrize(
    "make_loader",
    [
        shuffled_loader,
        lambda: shuffled_loader(workers=1),
        persistent_loader,
        lambda: Positions([pad_rows(rows()[:16])] * 9),
    ],
    ids=["shuffled", "shuffled, a worker", "a worker that stays", "stateful"],
)
def test_the_search_restores_everything_bit_for_bit(tiny_gpt2, quiet_trainer, make_loader):
    """With ``max_piece`` both runs cut alike, so that whatever the search left behind would show."""
    searched, _, searched_trainer = train(quiet_trainer, tiny_gpt2, make_loader(), "start")
    plain, _, plain_trainer = train(quiet_trainer, tiny_gpt2, make_loader(), "run")
    num_probes = len(searched.draws) - len(plain.draws)
    assert num_probes >= 2
    assert searched.draws[num_probes:] == plain.draws
    assert torch.equal(weights(searched), weights(plain))
    for (name, a), b in zip(searched.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(searched.mean.compute(), plain.mean.compute())
    a, b = (trainer.optimizers[0].state_dict() for trainer in (searched_trainer, plain_trainer))
    assert str(a) == str(b)
    assert float(searched_trainer.callback_metrics["logged"]) == float(plain_trainer.callback_metrics["logged"])
    assert not searched.model.transformer.wte.weight.grad.isnan().any()


def test_it_finds_the_largest_piece_of_the_longest_rows_less_the_margin(tiny_gpt2, quiet_trainer):
    data = [pad_rows(rows()[begin : begin + 8]) for begin in range(0, 40, 8)]
    longest = max(batch["input_ids"].shape[1] for batch in data)
    for margin in (0.0, 0.25):
        module = Scarce(tiny_gpt2, backward_limit=5 * longest)
        scaler = DynamicBatchScaler(find="start", margin=margin, grow_every=0)
        trainer = quiet_trainer(max_epochs=1, callbacks=[TokenWeightedAccumulation(), scaler])
        trainer.fit(module, Positions(data))
        limit = scaler.limits.of(longest)
        assert limit.limit == int(5 * (1 - margin)) * longest
        probes = len(module.shapes)
        failed = module.num_failed
        assert failed >= 1
        assert probes > failed
        assert scaler.limits.num_failed == 0  # none while training


def test_a_batch_that_fits_with_the_margin_is_not_cut(tiny_gpt2, quiet_trainer):
    module = Scarce(tiny_gpt2, forward_limit=10_000)
    scaler = DynamicBatchScaler(find="start")
    trainer = quiet_trainer(max_epochs=1, callbacks=[TokenWeightedAccumulation(), scaler])
    trainer.fit(module, Positions([pad_rows(rows()[:8])] * 3))
    assert scaler.limits.of(24).limit is None
    assert module.shapes[-3:] == [(8, 24)] * 3
    assert (9, 24) not in module.shapes[-3:]


def test_the_margin_is_proven_by_a_larger_batch(tiny_gpt2, quiet_trainer):
    """A batch of 10 rows that fits, but not with a fifth more."""
    batch = pad_rows([row for row in ragged_rows(200, seed=8) if len(row["input_ids"]) == 24][:10])
    module = Scarce(tiny_gpt2, forward_limit=11 * 24)
    scaler = DynamicBatchScaler(find="start", margin=0.2)
    quiet_trainer(max_steps=2, callbacks=[TokenWeightedAccumulation(), scaler]).fit(module, Positions([batch] * 3))
    assert max(rows for rows, _ in module.shapes) == 12
    assert 7 * 24 <= scaler.limits.of(24).limit <= 9 * 24


def test_the_state_of_the_optimizer_is_in_memory_during_the_probes(tiny_gpt2, quiet_trainer):
    class Watched(Scarce):
        def training_step(self, batch, batch_idx):
            self.states = [*getattr(self, "states", []), len(self.trainer.optimizers[0].state)]
            return super().training_step(batch, batch_idx)

    module = Watched(tiny_gpt2)
    trainer = quiet_trainer(max_steps=1, callbacks=[TokenWeightedAccumulation(), DynamicBatchScaler(find="start")])
    trainer.fit(module, Positions([pad_rows(rows()[:8])]))
    assert module.states[0] == 0
    assert all(number > 0 for number in module.states[1:-1])
    assert module.states[-1] == 0  # the first real step


def test_training_after_a_search_is_that_of_the_big_batch(tiny_gpt2, quiet_trainer):
    truth, _ = big_batch(tiny_gpt2, "adamw", 0.3)
    module = Scarce(tiny_gpt2, backward_limit=100)
    scaler = DynamicBatchScaler(find="start")
    trainer = quiet_trainer(max_epochs=2, callbacks=[TokenWeightedAccumulation(), scaler], gradient_clip_val=0.3)
    trainer.fit(module, DataLoader(rows(), batch_size=16, collate_fn=pad_rows))
    assert difference(module, truth) < 1e-12


def test_an_optimizer_without_room_stops_the_search_with_advice(tiny_gpt2, quiet_trainer):
    class Greedy(torch.optim.SGD):
        def step(self, closure=None):
            raise torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB")

    class Module(Scarce):
        def configure_optimizers(self):
            return Greedy(self.parameters(), lr=0.1)

    module = Module(tiny_gpt2)
    before = weights(module).clone()
    trainer = quiet_trainer(max_steps=1, callbacks=[DynamicBatchScaler(find="start")])
    with pytest.raises(torch.OutOfMemoryError, match="optimizer made its state"):
        trainer.fit(module, Positions([pad_rows(rows()[:4])]))
    assert torch.equal(weights(module), before)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_loader_that_can_be_read_only_once_is_refused(tiny_gpt2, quiet_trainer):
    class Once:
        def __iter__(self):
            return self

        def __next__(self):
            return pad_rows(rows()[:4])

    class Stream(IterableDataset):
        def __init__(self):
            self.stream = iter(rows())

        def __iter__(self):
            return self.stream

    for loader in (Once(), DataLoader(Stream(), batch_size=4, collate_fn=pad_rows)):
        trainer = quiet_trainer(max_steps=1, callbacks=[DynamicBatchScaler(find="start")])
        with pytest.raises(ValueError, match="iterated once only.*find='run'"):
            trainer.fit(Scarce(tiny_gpt2), loader)


def test_flattened_rows_and_optimizers_with_a_closure_are_searched(quiet_trainer):
    class Module(Plain):
        def training_step(self, batch, batch_idx):
            return self.layer(batch["input_ids"].float().reshape(-1, 3)).square().mean()

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1)

    batch = {"input_ids": torch.ones(1, 12), "cu_seq_lens_q": torch.tensor([0, 6, 12]), "max_length_q": 6}
    scaler = DynamicBatchScaler(find="start", margin=0.0)
    quiet_trainer(max_steps=1, callbacks=[scaler]).fit(Module(), Positions([batch]))
    assert scaler.limits.cost(6) is None


def test_our_loader_tells_its_longest_rows():
    dataset = dataset_of([3, 12, 5, 9, 1, 7], max_length=16, windowing="documents")
    loader = RowLoader(dataset, RowPlan(TableOrder(len(dataset)), 2))
    assert sorted(loader.longest_batch()["num_input_tokens"].tolist()) == [9, 12]
    assert loader.state_dict()["cursor"]["rows"] == 0
    assert dataset.table.row_lengths.tolist() == [3, 12, 5, 9, 1, 7]


def test_a_known_limit_is_not_searched_again(tiny_gpt2, quiet_trainer, tmp_path):
    def run(scaler, steps, **options):
        module = Scarce(tiny_gpt2, backward_limit=100)
        trainer = quiet_trainer(max_steps=steps, callbacks=[TokenWeightedAccumulation(), scaler])
        trainer.fit(module, Positions([pad_rows(rows()[:8])] * 9), **options)
        return module, trainer

    first = DynamicBatchScaler(find="start", grow_every=0)
    _, trainer = run(first, 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = DynamicBatchScaler(find="start", grow_every=0)
    module, _ = run(second, 4, ckpt_path=tmp_path / "a.ckpt")
    assert second.limits.buckets == first.limits.buckets
    assert module.num_failed == 0


def test_the_search_works_with_our_module_and_loader(tiny_gpt2, quiet_trainer):
    dataset = dataset_of([30, 41, 12, 50, 22, 33, 20, 20], max_length=24, windowing="windows")
    module = LLMModule(tiny_gpt2, lr_schedule="constant", warmup=0)
    scaler = DynamicBatchScaler(find="start")
    trainer = quiet_trainer(max_epochs=1, callbacks=[TokenWeightedAccumulation(), scaler])
    trainer.fit(module, RowLoader(dataset, RowPlan(TableOrder(len(dataset), 0), 4)))
    assert trainer.global_step == -(-len(dataset) // 4)
    assert module.tokens_seen == dataset.table.num_label_tokens


class _Meter:
    def __init__(self, per_row, capacity):
        self.per_row, self.total, self.used = per_row, capacity, 0

    def reset(self):
        self.used = 0

    def peak(self):
        return 1000 + self.used

    def capacity(self):
        return self.total


@pytest.mark.parametrize(("capacity", "expected"), [(1_900, 7), (10_000, None), (1_150, 1)])
def test_prediction_stays_below_the_wall(capacity, expected):
    """A row takes 100 bytes beside 1000; a tenth is left free; memory that a probe would need is never exceeded."""
    meter = _Meter(100, capacity)
    tried = []

    class Probe:
        num_rows = 16

        class runner:  # noqa: N801
            class trainer:  # noqa: N801
                class strategy:  # noqa: N801
                    root_device = torch.device("cpu")

                    @staticmethod
                    def reduce(value, reduce_op):
                        return value

        def piece(self, number):
            return type("Piece", (), {"cost": number, "number": number})

        def run(self, piece):
            tried.append(piece.number)
            meter.used = max(meter.used, 100 * piece.number)

        def step(self):
            pass

    assert search._by_measuring(Probe(), 0.1, meter) == expected
    assert 1000 + 100 * max(tried) <= max(0.9 * capacity, 1100)
