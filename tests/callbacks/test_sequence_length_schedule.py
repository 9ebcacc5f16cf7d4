"""Short rows first: the tokens of each step stay, the length changes between steps, a resumed run is the same."""

import warnings

import lightning as L
import pytest
import torch
from length_training import MAX_LENGTH, STEPS, Module, SaveAt, Seen, bare_loop, data_module, difference, weights
from support import Plain, Positions, pad_rows, ragged_rows
from torch import nn
from torch.utils.data import DataLoader

from lightning_llm import Progress, Schedule
from lightning_llm.callbacks import (
    AccumulationSchedule,
    AdaptiveAccumulation,
    DynamicBatchScaler,
    GradientNoiseScale,
    SequenceLengthSchedule,
    TokenThroughput,
    TokenWeightedAccumulation,
)
from lightning_llm.callbacks.pieces.columns import truncate
from lightning_llm.callbacks.sequence_length_schedule import length_at

EXACT = 1e-12


@pytest.fixture
def train(quiet_trainer, tmp_path):
    """A run of six optimizer steps; returns its module, what was seen, and the trainer."""

    def run(*callbacks, module=None, data=None, checkpoint=None, **options):
        seen = Seen()
        module = module or Module()
        options = {"max_steps": 6, "max_epochs": -1, "limit_val_batches": 0, **options}
        trainer = quiet_trainer(callbacks=[seen, *callbacks], **options)
        trainer.fit(module, data or data_module(tmp_path), ckpt_path=checkpoint)
        return module, seen, trainer

    return run


# ---- what a step is trained on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_micro_batch_keeps_its_targets_in_rows_of_the_scheduled_length(train, accumulate):
    _, whole, _ = train(accumulate_grad_batches=accumulate)
    _, short, _ = train(SequenceLengthSchedule(STEPS), accumulate_grad_batches=accumulate)
    assert [(step, targets) for step, _, _, targets in short.train] == [
        (s, targets) for s, _, _, targets in whole.train
    ]
    schedule = Schedule(STEPS)
    for step, _, columns, _ in short.train:  # the same in all micro-batches of a step
        assert columns == schedule(Progress(steps=step))
    assert short.train[-accumulate:] == whole.train[-accumulate:]  # full length: the batch as it was
    assert set(whole.widths.values()) == {MAX_LENGTH}


@pytest.mark.parametrize(
    ("accumulate", "micro_batch_size", "schedule"), [(1, 6, False), (3, 2, False), (3, 2, True), (6, 1, True)]
)
def test_the_gradient_of_a_step_is_the_mean_over_its_label_tokens(
    train, tmp_path, accumulate, micro_batch_size, schedule
):
    """Against a bare loop that cuts each row by itself; the step's six rows are cut into any micro-batches."""
    truth = bare_loop(tmp_path, micro_batch_size=6)
    callbacks = [SequenceLengthSchedule(STEPS), TokenWeightedAccumulation()]
    callbacks += [AccumulationSchedule(accumulate)] * schedule
    data = data_module(tmp_path, micro_batch_size=micro_batch_size)
    module, _, _ = train(*callbacks, data=data, accumulate_grad_batches=1 if schedule else accumulate)
    assert difference(module, truth) < EXACT
    assert (
        difference(train(TokenWeightedAccumulation(), data=data_module(tmp_path, micro_batch_size=6))[0], truth) > 1e-4
    )


@pytest.mark.parametrize("accumulation", [AccumulationSchedule(3), None])
def test_tokens_are_counted_as_the_steps_have_them(train, accumulation):
    """Milestones in label tokens are reached at the first step that begins with as many done."""
    milestones = {"0 tokens": 8, "350 tokens": 16, "900 tokens": 32}
    schedule = SequenceLengthSchedule(milestones)
    callbacks = [schedule, *([accumulation] if accumulation else [])]
    _, seen, _ = train(*callbacks, accumulate_grad_batches=1 if accumulation else 3)
    expected, done, last = [], 0, None
    for step, _, columns, targets in seen.train:
        if step != last:
            last, expected = step, [*expected, int(Schedule(milestones)(Progress(tokens=done)))]
        assert columns == expected[-1]
        done += len(targets)
    assert len(set(expected)) == 3
    assert schedule.state_dict()["tokens"] >= 900


def test_shares_of_the_run_and_epochs_are_milestones_too(train):
    _, seen, _ = train(SequenceLengthSchedule({"0%": 8, "50%": 32}))
    assert list(seen.widths.values()) == [8, 8, 8, 32, 32, 32]
    _, seen, trainer = train(SequenceLengthSchedule({"0 epochs": 8, "1 epoch": 16}), max_steps=-1, max_epochs=2)
    steps = trainer.num_training_batches
    assert list(seen.widths.values()) == [8] * steps + [16] * steps


def test_a_ramp_takes_few_lengths(train):
    ramp = SequenceLengthSchedule({"0 steps": 6, "5 steps": 32}, interpolation="linear", round_to=8)
    assert list(train(ramp)[1].widths.values()) == [6, 8, 16, 16, 24, 32]
    geometric = Schedule({"0 steps": 10, "4 steps": 1000}, interpolation="geometric")
    assert [length_at(geometric, Progress(steps=step), 32) for step in range(6)] == [10, 10, 96, 288, 1000, 1000]


def test_validation_is_not_cut(train):
    _, seen, trainer = train(
        SequenceLengthSchedule(8), limit_val_batches=2, val_check_interval=2, num_sanity_val_steps=2
    )
    assert set(seen.widths.values()) == {8}
    assert seen.evaluated == {MAX_LENGTH}
    assert trainer.callback_metrics["train/sequence_length"] == 8


@pytest.mark.parametrize("options", [{"windowing": "windows"}, {"batching": "padding_free", "micro_batch_tokens": 70}])
def test_other_layouts_keep_their_targets_too(train, tmp_path, options):
    _, whole, _ = train(data=data_module(tmp_path, **options))
    _, short, _ = train(SequenceLengthSchedule(8), data=data_module(tmp_path, **options))
    assert [targets for *_, targets in short.train] == [targets for *_, targets in whole.train]
    if "windowing" in options:
        assert max(short.widths.values()) == 8


def test_a_stream_is_cut_as_well(train, tmp_path):
    from length_training import corpus

    from lightning_llm.datamodules import StreamingTextDataModule

    def stream():
        return StreamingTextDataModule(corpus(tmp_path), "bytes", max_length=32, micro_batch_size=2, num_streams=2)

    _, whole, _ = train(data=stream())
    _, short, _ = train(SequenceLengthSchedule(STEPS), data=stream())
    assert [targets for *_, targets in short.train] == [targets for *_, targets in whole.train]
    assert list(short.widths.values()) == [8, 8, 13, 13, 32, 32]


# ---- beside the other cuts ---------------------------------------------------------------------------------------


class Scarce(Module):
    """Runs out of memory with more than so many tokens at once, or in rows of more than so many columns."""

    def __init__(self, limit=10**9, columns=10**9, **options):
        super().__init__(**options)
        self.limit, self.columns, self.num_failed, self.shapes = limit, columns, 0, []

    def training_step(self, batch, batch_idx):
        self.shapes.append(tuple(batch["input_ids"].shape))
        output = super().training_step(batch, batch_idx)
        if batch["input_ids"].numel() > self.limit or batch["input_ids"].shape[1] > self.columns:
            self.num_failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return output


@pytest.mark.parametrize("accumulation", [1, 3])
def test_pieces_are_cut_from_the_short_rows(train, tmp_path, accumulation):
    truth = bare_loop(tmp_path, micro_batch_size=6)
    module, scaler = Scarce(limit=70), DynamicBatchScaler(grow_every=2)
    callbacks = [scaler, SequenceLengthSchedule(STEPS), TokenWeightedAccumulation(), AccumulationSchedule(accumulation)]
    train(*callbacks, module=module, data=data_module(tmp_path, micro_batch_size=6 // accumulation))
    assert module.num_failed > 0
    assert difference(module, truth) < EXACT
    assert {columns for _, columns in module.shapes} == {8, 13, 32}


def test_the_scalers_search_sees_whole_rows(train, tmp_path):
    module, scaler = Scarce(limit=70), DynamicBatchScaler(find="start")
    train(SequenceLengthSchedule(STEPS), scaler, module=module, data=data_module(tmp_path, micro_batch_size=6))
    begin = next(i for i, shape in enumerate(module.shapes) if shape[1] == 8)
    assert {columns for _, columns in module.shapes[:begin]} == {MAX_LENGTH}
    assert max(rows for rows, _ in module.shapes[:begin]) > 2
    assert module.num_failed == sum(rows * columns > 70 for rows, columns in module.shapes[:begin])  # none later


def test_windows_along_the_sequence_are_cut_from_the_short_rows(train, tmp_path):
    truth = bare_loop(tmp_path)
    module, seen, _ = train(SequenceLengthSchedule(STEPS), module=Module(sequence_window=5))
    assert difference(module, truth) < EXACT
    assert list(seen.widths.values()) == [8, 8, 13, 13, 32, 32]


def test_throughput_counts_the_short_rows(train, tmp_path):
    class Counted(TokenThroughput):
        counts = ()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.counts = (*self.counts, self.token_fn(batch, outputs))

    counted = Counted()
    _, seen, _ = train(SequenceLengthSchedule(8), counted)
    for count, (_, rows, columns, targets) in zip(counted.counts, seen.train, strict=True):
        assert (int(count.label), count.positions) == (len(targets), rows * columns)
        assert len(targets) < int(count.real) <= rows * columns


def test_two_ranks_train_as_one_and_resume_bit_for_bit(run_ranks, tmp_path):
    truth = bare_loop(tmp_path, {"0 steps": 8, "1 steps": 13, "3 steps": 32}, micro_batch_size=8, steps=5)
    results = run_ranks("sequence_lengths", 2, time_limit=180, corpus=str(tmp_path))
    assert results[0]["widths"] == results[1]["widths"] == [8] * 2 + [13] * 4 + [32] * 4
    for result in results:
        weights = torch.tensor(result["weights"], dtype=torch.float64)
        assert float((weights - truth).norm() / truth.norm()) < EXACT
        assert result["tokens"] == result["true tokens"]  # counted until nothing changes any more
        assert result["resumed"] == [True] * 2


# ---- resume ------------------------------------------------------------------------------------------------------

TOKENS = {"0 tokens": 8, "350 tokens": 16, "900 tokens": 32}


@pytest.mark.parametrize("milestones", [STEPS, TOKENS, {"0 epochs": 8, "0.1 epochs": 16, "0.2 epochs": 32}])
@pytest.mark.parametrize("owner", ["AccumulationSchedule", "data module"])
def test_a_run_resumed_at_any_micro_batch_is_bitwise_the_uninterrupted_one(train, tmp_path, milestones, owner):
    """Inside windows too; dropout's random numbers follow from the step."""
    owned = owner == "AccumulationSchedule"

    def fit(checkpoint=None, saves=()):
        callbacks = [SaveAt(tmp_path, saves), SequenceLengthSchedule(milestones), TokenWeightedAccumulation()]
        callbacks += [AccumulationSchedule(3)] * owned
        module = Module(dropout=0.2 if owned else 0.0)
        torch.manual_seed(5)
        module, seen, _ = train(
            *callbacks, module=module, checkpoint=checkpoint, accumulate_grad_batches=1 if owned else 3
        )
        return weights(module), seen.train

    saves = range(1, 18) if owned and milestones is TOKENS else (5, 6, 7)
    whole, batches = fit(saves=saves)
    assert len({columns for _, _, columns, _ in batches}) == 3
    assert len({(step, columns) for step, _, columns, _ in batches}) == 6  # no change inside a window
    for save in saves:
        resumed, later = fit(tmp_path / f"{save}.ckpt")
        assert later == batches[save - save % 3 :], save  # from the window's start, cut as before
        assert torch.equal(resumed, whole), save


def test_a_window_that_is_resumed_in_its_middle_keeps_its_length(train, tmp_path):
    """With Lightning's own accumulation and a loader that stands where it stood: the milestone is inside the window."""

    def widths(checkpoint=None, saves=()):
        schedule = SequenceLengthSchedule({"0 epochs": 8, "0.4 epochs": 12})
        data = Positions([pad_rows(ragged_rows(4, seed=number)) for number in range(12)])
        options = {"accumulate_grad_batches": 4, "max_epochs": 1, "max_steps": -1}
        _, seen, _ = train(SaveAt(tmp_path, saves), schedule, data=data, checkpoint=checkpoint, **options)
        return [columns for _, _, columns, _ in seen.train]

    assert widths(saves=[6]) == [8] * 8 + [12] * 4
    assert widths(tmp_path / "6.ckpt") == [8] * 2 + [12] * 4


def test_without_the_state_a_resumed_run_would_be_another(train, tmp_path):
    """Control: the state is needed where tokens are counted."""

    def fit(checkpoint=None, forgets=False):
        schedule = SequenceLengthSchedule(TOKENS)
        if forgets:
            schedule.load_state_dict = lambda state: None
        return weights(train(SaveAt(tmp_path, [4]), schedule, checkpoint=checkpoint, max_steps=10)[0])

    whole = fit()
    assert torch.equal(fit(tmp_path / "4.ckpt"), whole)
    assert not torch.equal(fit(tmp_path / "4.ckpt", forgets=True), whole)


def test_a_step_that_fails_has_trained_on_no_token(train, tmp_path):
    class Failing(Module):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            if self.global_step == 3 and self.fails:
                raise RuntimeError("on purpose")

    class Last(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            self.state, self.trainer = schedule.state_dict(), trainer

    schedule, seen, last, module = SequenceLengthSchedule({"0 tokens": 8, "1M tokens": 16}), Seen(), Last(), Failing()
    module.fails = True
    with pytest.raises(RuntimeError, match="on purpose"):
        train(last, seen, schedule, module=module)
    tokens = sum(len(targets) for step, *_, targets in seen.train if step < 3)
    assert last.state["tokens"] == tokens

    module.fails, seen.train = False, []
    last.trainer.fit(module, data_module(tmp_path))  # goes on at the fourth step
    assert {step for step, *_ in seen.train} == {3, 4, 5}
    assert schedule.state_dict()["tokens"] == tokens + sum(len(targets) for *_, targets in seen.train)


def test_a_checkpoint_loads_without_trusting_it_and_a_second_run_starts_anew(train, tmp_path):
    schedule = SequenceLengthSchedule({"0 tokens": 8, "200 tokens": 16, "1M tokens": 32})
    for _ in range(2):
        _, seen, trainer = train(schedule)
        assert seen.widths[0] == 8
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["SequenceLengthSchedule"]
    assert state == {"tokens": sum(len(batch[-1]) for batch in seen.train), "length": 16, "chosen_at": 5}
    with pytest.raises(RuntimeError, match="state"):
        L.Trainer(callbacks=[SequenceLengthSchedule(8), SequenceLengthSchedule(9)], logger=False)


# ---- memory at full length first ---------------------------------------------------------------------------------


class Statistics(Scarce):
    """Has buffers and draws random numbers."""

    def __init__(self):
        super().__init__(dropout=0.2)
        self.norm = nn.BatchNorm1d(1).double()
        self.gradients = []

    def training_step(self, batch, batch_idx):
        self.norm(batch["input_ids"].double().flatten()[:, None])
        self.gradients.append(any(parameter.grad is not None for parameter in self.parameters()))
        self.log("logged", 1.0, reduce_fx="sum", on_epoch=True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_rehearsal_at_full_length_leaves_no_trace(train, tmp_path, accumulate):
    def fit(reserve, checkpoint=None):
        torch.manual_seed(5)
        schedule = SequenceLengthSchedule(STEPS, reserve=reserve)
        saves = [] if checkpoint else [2 * accumulate]
        callbacks = [SaveAt(tmp_path, saves), schedule, AccumulationSchedule(accumulate, seed_steps=False)]
        callbacks += [TokenWeightedAccumulation()]
        module, seen, trainer = train(*callbacks, module=Statistics(), checkpoint=checkpoint)
        return module, seen, trainer

    (plain, seen, trainer), (reserved, seen_too, trainer_too) = fit(False), fit(True)
    assert reserved.shapes[:2] == [(2, MAX_LENGTH)] * 2  # the second beside gradients and the optimizer's state
    assert reserved.gradients[:3] == [False, True, False]
    assert reserved.shapes[2:] == plain.shapes
    assert seen.train == seen_too.train
    assert torch.equal(weights(reserved), weights(plain))
    assert all(torch.equal(a, b) for a, b in zip(reserved.buffers(), plain.buffers(), strict=True))
    states = [t.optimizers[0].state_dict()["state"] for t in (trainer, trainer_too)]
    assert all(torch.equal(states[0][i]["momentum_buffer"], states[1][i]["momentum_buffer"]) for i in states[0])
    assert trainer.callback_metrics["logged"] == trainer_too.callback_metrics["logged"]
    path = tmp_path / f"{2 * accumulate}.ckpt"  # with a state that must be put back
    assert torch.equal(weights(fit(True, path)[0]), weights(fit(False, path)[0]))


def test_what_would_not_fit_later_fails_at_the_start(train, tmp_path):
    before = Module()
    before.configure_model()
    module = Scarce(columns=20)
    with pytest.raises(
        torch.OutOfMemoryError, match="tried before the first step on rank 0.*Use smaller micro-batches"
    ):
        train(SequenceLengthSchedule(STEPS, reserve=True), module=module)
    assert torch.equal(weights(module), weights(before))
    assert module.shapes == [(2, MAX_LENGTH)]
    module = Scarce(columns=20)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):  # control: it would have failed in the fifth step
        train(SequenceLengthSchedule({"0 steps": 8, "4 steps": 32}), module=module)
    assert len(module.shapes) == 5


# ---- other loaders -----------------------------------------------------------------------------------------------


class Foreign(Module):
    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        self.log("columns", float(batch["input_ids"].shape[1]))
        return output


def foreign_loader(num_rows=24):
    return DataLoader(ragged_rows(num_rows), batch_size=4, collate_fn=pad_rows)


def test_other_loaders_are_truncated_with_one_warning(train):
    with pytest.warns(UserWarning, match=r"truncates rows: of \d+ columns 8 are kept.*dropped") as told:
        _, seen, _ = train(SequenceLengthSchedule({"0 steps": 8, "3 steps": 99}), data=foreign_loader())
    assert sum("truncates rows" in str(warning.message) for warning in told) == 1
    assert [seen.widths[step] for step in range(3)] == [8, 8, 8]
    batches = list(foreign_loader())
    for (step, _, columns, _), batch in zip(seen.train, batches, strict=True):
        assert columns == (8 if step < 3 else batch["input_ids"].shape[1])


def test_the_loaders_own_batches_are_not_touched(train):
    batches = [pad_rows(ragged_rows(4, seed=number)) for number in range(3)]
    shapes = [batch["input_ids"].shape for batch in batches]
    train(SequenceLengthSchedule(8), data=DataLoader(batches, batch_size=None), max_epochs=2)
    assert [batch["input_ids"].shape for batch in batches] == shapes


def test_a_function_cuts_what_nobody_else_can(quiet_trainer):
    class Sums(Plain):
        sizes = ()

        def training_step(self, batch, batch_idx):
            self.sizes = (*self.sizes, batch.shape[1])
            return self.layer(batch[:, :3]).square().mean()

    data = DataLoader(torch.ones(12, 9), batch_size=2)
    module = Sums()
    schedule = SequenceLengthSchedule({"0 tokens": 4, "30 tokens": 9}, cut_fn=lambda batch, length: batch[:, :length])
    schedule.token_fn = lambda batch: batch.numel()
    quiet_trainer(max_epochs=1, callbacks=[schedule]).fit(module, data)
    assert module.sizes == (4, 4, 4, 4, 9, 9)
    with pytest.raises(ValueError, match=r"mappings with `input_ids` \(batch, seq\), but got a Tensor.*Pass cut_fn"):
        quiet_trainer(max_epochs=1, callbacks=[SequenceLengthSchedule(4)]).fit(Sums(), data)


def test_truncating_refuses_what_it_would_break():
    ids = torch.ones(1, 6, dtype=torch.long)
    unclear = {
        "cu_seq_lens_q": torch.tensor([0, 6]),
        "attention_mask": torch.ones(1, 1, 6, 6),
        "document_ids": torch.tensor([0]),
    }
    for key, value in unclear.items():
        with pytest.raises(ValueError, match=f"Rows of 6 tokens are to have 4, but nobody says how to cut.*{key}"):
            truncate({"input_ids": ids, key: value}, 4)
        assert truncate({"input_ids": ids, key: value}, 6)[key] is value
    cut = truncate({"input_ids": ids, "num_input_tokens": torch.tensor([6]), "text": "a"}, 4)
    assert cut["num_input_tokens"].tolist() == [4]
    assert cut["text"] == "a"


# ---- refused, and left behind ------------------------------------------------------------------------------------


def test_settings_that_are_no_lengths_are_refused():
    for milestones in (1, {"0 steps": 8, "2 steps": 9.5}):
        with pytest.raises(ValueError, match="whole numbers of tokens, 2 at least; got"):
            SequenceLengthSchedule(milestones)
    with pytest.raises(ValueError, match="`round_to` is a number of tokens, 1 at least, but got 0"):
        SequenceLengthSchedule(8, round_to=0)


def test_what_cannot_be_served_is_refused(train, quiet_trainer):
    class Fetching(Plain):
        def training_step(self, dataloader_iter):
            raise AssertionError

    class Manual(Plain):
        automatic_optimization = False

    data = DataLoader(torch.ones(4, 3))
    with pytest.raises(ValueError, match="dataloader_iter"):
        quiet_trainer(callbacks=[SequenceLengthSchedule(8)]).fit(Fetching(), data)
    with pytest.raises(ValueError, match="Manual optimizes manually.*reserve=False"):
        quiet_trainer(callbacks=[SequenceLengthSchedule(8, reserve=True)]).fit(Manual(), data)
    with pytest.raises(ValueError, match=r"Set reserve=False and DynamicBatchScaler\(find='start'\)"):
        quiet_trainer(callbacks=[SequenceLengthSchedule(8, reserve=True), DynamicBatchScaler()]).fit(Plain(), data)
    with pytest.raises(ValueError, match="A share of the run"):
        train(SequenceLengthSchedule({"0%": 8, "50%": 16}), max_steps=-1)


def test_manual_optimization_changes_the_length_between_its_own_steps(train):
    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx)["loss"])
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    _, seen, _ = train(SequenceLengthSchedule(STEPS), module=Manual())
    assert [columns for *_, columns, _ in seen.train] == [8] * 4 + [13] * 4 + [32] * 4


def test_what_has_no_effect_or_an_unwanted_one_is_said(train):
    with pytest.warns(UserWarning, match=r"has no effect: its shortest length is 32.*max_length=32"):
        train(SequenceLengthSchedule({"0 steps": 32, "2 steps": 64}), max_steps=1)
    with pytest.warns(UserWarning, match=r"AccumulationSchedule\(target='sequences'\) counts rows.*target='tokens'"):
        train(SequenceLengthSchedule(8), AccumulationSchedule(4, target="sequences"), max_steps=1)
    follower = AdaptiveAccumulation((2, 8), unit="sequences")
    with pytest.warns(UserWarning, match=r"AdaptiveAccumulation\(unit='sequences'\) counts rows.*global_batch_tokens"):
        train(SequenceLengthSchedule(8), GradientNoiseScale(), follower, max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*SequenceLengthSchedule")
        train(SequenceLengthSchedule(8), AccumulationSchedule(400, target="tokens"), max_steps=1)


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_has_its_batches_back_after_a_run(train, fails):
    module = Scarce(columns=0 if fails else 32)
    if fails:
        with pytest.raises(torch.OutOfMemoryError):
            train(SequenceLengthSchedule(8), module=module)
    else:
        train(SequenceLengthSchedule(8), module=module)
    assert "_on_before_batch_transfer" not in module.__dict__
    assert set(train(module=Scarce())[1].widths.values()) == {MAX_LENGTH}


def test_lightnings_finders_see_whole_rows(train):
    from lightning.pytorch.callbacks import LearningRateFinder

    class Found(Scarce):
        lr = 0.01

    module = Found()
    _, seen, _ = train(
        LearningRateFinder(num_training_steps=5, update_attr=False), SequenceLengthSchedule(8), module=module
    )
    assert {columns for _, columns in module.shapes[:5]} == {MAX_LENGTH}
    assert set(seen.widths.values()) == {8}
