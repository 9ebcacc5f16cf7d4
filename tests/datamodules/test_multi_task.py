"""MultiTaskDataModule: shares that every step keeps, whole rounds of each task, the same steps on every layout."""

from collections import Counter

import numpy as np
import pytest
import torch
from multi_task_training import Seen, data, module, trained

from lightning_llm.callbacks import SequenceLengthSchedule, TokenWeightedAccumulation
from lightning_llm.datamodules import MaskedTextDataModule, MultiTaskDataModule, StreamingTextDataModule, TextDataModule
from lightning_llm.datamodules.batches.plan import Cursor, Layout
from lightning_llm.datamodules.multi_task.order import EvenOrder, TaskOrder, rows_in_block
from lightning_llm.datamodules.multi_task.plan import MultiTaskPlan, TaskByTaskPlan, share_slots
from lightning_llm.datamodules.multi_task.rows import MultiTaskRows
from lightning_llm.datamodules.order import TableOrder
from lightning_llm.datamodules.rows import RowIds

SIZES = [50, 23, 7]


def plan(counts=SIZES, global_batch=10, **options):
    order = TaskOrder([TableOrder(size, seed) for seed, size in enumerate(SIZES)], counts)
    costs = np.random.default_rng(0).integers(1, 20, sum(SIZES))
    return MultiTaskPlan(SIZES, costs, order, global_batch, **options)


def task_of(rows):
    return np.searchsorted(np.cumsum(SIZES), rows, side="right")


def steps(made, num_ranks=1, micro_batches=3, cursor=None):
    """The rows of each optimizer step over all ranks; empty rows are left out."""
    per_rank = [
        list(made.batches(cursor or Cursor(), Layout(rank, num_ranks, micro_batches))) for rank in range(num_ranks)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    found = []
    for begin in range(0, len(per_rank[0]), micro_batches):
        mine = [batch.rows for batches in per_rank for batch in batches[begin : begin + micro_batches]]
        found.append(sorted(row for rows in mine for row in rows.tolist() if row >= 0))
    return found


# ---- the order ---------------------------------------------------------------------------------------------------


def test_every_stretch_holds_each_tasks_share_give_or_take_one():
    order = EvenOrder([50, 30, 20])
    kinds, _ = order(np.arange(1000))
    for begin in range(0, 900, 7):
        for length in (10, 33, 100):
            counts = np.bincount(kinds[begin : begin + length], minlength=3)
            assert (np.abs(counts - length * np.array([0.5, 0.3, 0.2])) <= 1.5).all()


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        ("size", [50 / 80, 23 / 80, 7 / 80]),
        ({"temperature": 2.0}, np.sqrt(SIZES) / np.sqrt(SIZES).sum()),
        ({"temperature": 1e9}, [1 / 3] * 3),
        ({"a": 1, "b": 2, "c": 5}, [1 / 8, 2 / 8, 5 / 8]),
    ],
)
def test_shares_are_those_asked_for(sampling, shares):
    counts = list(rows_in_block(dict(zip("abc", SIZES, strict=True)), sampling).values())
    made = TaskOrder([TableOrder(size) for size in SIZES], counts)
    rows = np.concatenate([made.rows(np.arange(80), epoch) for epoch in range(50)])
    assert np.bincount(task_of(rows)) / len(rows) == pytest.approx(shares, abs=2e-3)


def test_by_size_an_epoch_has_each_row_once():
    for made in (plan(), plan(global_batch=7)):
        for epoch in range(3):
            rows = [row for step in steps(made, cursor=Cursor(epoch=epoch)) for row in step]
            assert sorted(rows) == list(range(80))


def test_a_task_is_gone_through_entirely_before_any_of_its_rows_comes_again():
    made = TaskOrder([TableOrder(size, seed) for seed, size in enumerate(SIZES)], [1, 1, 1])
    rows = np.concatenate([made.rows(np.arange(80), epoch) for epoch in range(4)])
    orders = set()
    for task, size in enumerate(SIZES):
        mine = rows[task_of(rows) == task]
        rounds = [mine[begin : begin + size] for begin in range(0, len(mine) - size + 1, size)]
        assert rounds
        assert all(len(set(each.tolist())) == size for each in rounds)
        orders |= {tuple(each.tolist()) for each in rounds if task == 2}
    assert len(orders) > 10  # a new order each time


# ---- the plan ----------------------------------------------------------------------------------------------------


def test_a_step_holds_the_same_rows_on_every_layout():
    one = steps(plan())
    for num_ranks, micro_batches in ((1, 5), (2, 3), (3, 4), (4, 8)):
        assert steps(plan(), num_ranks, micro_batches) == one
    balanced = plan(lengths=np.random.default_rng(1).integers(1, 20, sum(SIZES)), padded=True)
    assert steps(balanced, 2, 5) == one


def test_a_micro_batch_holds_one_task_the_same_on_all_ranks():
    made = plan()
    for micro_batches in (3, 5):
        ranks = [list(made.batches(Cursor(), Layout(rank, 4, micro_batches))) for rank in range(4)]
        for together in zip(*ranks, strict=True):
            tasks = [task_of(batch.rows) if batch.rows[0] >= 0 else -1 - batch.rows for batch in together]
            assert len(np.unique(np.concatenate(tasks))) == 1
        assert made.num_batches(Cursor(), Layout(0, 4, micro_batches)) == len(ranks[0])


def test_expensive_tasks_get_more_micro_batches():
    assert share_slots([1.0, 1.0, 8.0], 6) == [1, 1, 4]
    assert share_slots([5.0], 3) == [3]


def test_too_few_micro_batches_for_the_tasks_are_refused():
    with pytest.raises(ValueError, match=r"rows of 3 tasks.*accumulate_grad_batches=2. Set it to 3 or more"):
        steps(plan(), micro_batches=2)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_evaluation_sees_each_row_once_and_resumes_anywhere(num_ranks):
    made = TaskByTaskPlan(SIZES, [4, 3, 2], [0, 1, 3])
    layouts = [Layout(rank, num_ranks) for rank in range(num_ranks)]
    ranks = [list(made.batches(Cursor(), layout)) for layout in layouts]
    rows = [row for batches in ranks for batch in batches for row in batch.rows.tolist()]
    assert sorted(row for row in rows if row >= 0) == list(range(80))
    assert {row for row in rows if row < 0} <= {-1, -2, -4}
    for batches, layout in zip(ranks, layouts, strict=True):
        assert made.num_batches(Cursor(), layout) == len(batches)
        for number, batch in enumerate(batches, 1):
            assert len(np.unique(task_of(batch.rows[batch.rows >= 0]))) <= 1
            assert made.num_batches(batch.after, layout) == len(batches) - number
            assert made.batches_before(batch.after, layout) == number
            assert made.after(Cursor(), layout, number) == batch.after


# ---- in training -------------------------------------------------------------------------------------------------


def rows_of(seen):
    return [sorted(step) for step in seen.steps]


def test_batches_say_the_targets_of_their_step(tmp_path, quiet_trainer):
    seen = Seen()
    made, trainer = trained(tmp_path, quiet_trainer, 4, [seen], max_epochs=1)
    parts = {name: part._dataset("train") for name, part in trainer.datamodule.tasks.items()}
    for rows, targets in zip(seen.steps, seen.targets, strict=True):
        for name, part in parts.items():
            mine = [row for task, row in rows if task == name]
            number = int(made.num_targets({**part[mine], "task": name})) if mine else 0
            assert targets[name] == number
    assert Counter(task for step in seen.steps for task, _ in step) == {"topic": 19, "grade": 13, "lm": 7}


@pytest.mark.parametrize("micro_batches", [3, 6])
def test_a_run_resumed_on_other_micro_batches_goes_on_with_the_same_steps(tmp_path, quiet_trainer, micro_batches):
    from lightning.pytorch.callbacks import ModelCheckpoint

    whole, first, rest = Seen(), Seen(), Seen()
    sampling = {"topic": 1.0, "grade": 1.0, "lm": 2.0}
    trained(tmp_path, quiet_trainer, 4, [whole], loaded=data(tmp_path, sampling))
    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    options = {"enable_checkpointing": True, "max_steps": 3}
    trained(tmp_path, quiet_trainer, 4, [first, keep], loaded=data(tmp_path, sampling), **options)
    path = tmp_path / "ckpt" / "step=3.ckpt"
    trained(
        tmp_path, quiet_trainer, micro_batches, [rest], loaded=data(tmp_path, sampling, num_workers=1), ckpt_path=path
    )
    assert rows_of(first) + rows_of(rest) == rows_of(whole)
    assert len(whole.steps) == 8


def test_a_checkpoint_over_other_tasks_or_shares_is_refused(tmp_path, quiet_trainer):
    _, trainer = trained(tmp_path, quiet_trainer, max_steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="sampling was 'size' and is"):
        other = data(tmp_path, {"temperature": 3.0})
        trained(tmp_path, quiet_trainer, loaded=other, ckpt_path=tmp_path / "last.ckpt", max_steps=4)


@pytest.mark.parametrize("limit", [6, 2])
def test_an_epoch_that_the_trainer_limits_within_a_step_counts_that_step_right(tmp_path, quiet_trainer, limit):
    made = module()
    from lightning_llm.callbacks import TokenWeightedAccumulation

    seen = Seen()
    trainer = quiet_trainer(
        max_epochs=1, accumulate_grad_batches=4, limit_train_batches=limit, limit_val_batches=0,
        callbacks=[TokenWeightedAccumulation(), seen],
    )  # fmt: skip
    trainer.fit(made, data(tmp_path))
    assert len(seen.tasks) == limit
    assert trainer.global_step == -(-limit // 4)


def test_global_batch_on_a_schedule(tmp_path, quiet_trainer):
    seen = Seen()
    loaded = data(tmp_path, global_batch_size={"0 samples": 4, "16 samples": 8})
    trained(tmp_path, quiet_trainer, 3, [seen], loaded=loaded, max_epochs=1)
    assert [len(step) for step in seen.steps] == [4, 4, 4, 4, 8, 8, 7]


def test_longest_rows_make_a_batch_of_one_task(tmp_path, quiet_trainer):
    _, trainer = trained(tmp_path, quiet_trainer, max_steps=1)
    batch = trainer.train_dataloader.longest_batch()
    assert int(batch["num_input_tokens"].max()) == trainer.train_dataloader.rows.table.row_lengths.max()
    assert batch["step_targets"][batch["task"]] > 0
    assert torch.is_tensor(batch["input_ids"])


# ---- what is refused ---------------------------------------------------------------------------------------------


def parts(tmp_path, **options):
    (tmp_path / "a.txt").write_text("some text to be read " * 9)
    text = {"tokenizer": "bytes", "max_length": 32, "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.0}
    return {name: TextDataModule(str(tmp_path / "a.txt"), **{**text, **options}) for name in ("a", "b")}


@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        ("random", "`sampling` must be 'size', .*but got 'random'"),
        ({"a": 1.0}, "a share for each task, a, b, but has a"),
        ({"a": 1.0, "c": 1.0}, "but has a, c"),
        ({"a": 1.0, "b": -1.0}, "must be above 0"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
    ],
)
def test_bad_sampling_is_refused(tmp_path, sampling, text):
    with pytest.raises(ValueError, match=text):
        MultiTaskDataModule(parts(tmp_path), sampling)


def test_data_modules_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mapping of names to data modules, one at least, but got {}"):
        MultiTaskDataModule({})
    stream = StreamingTextDataModule(str(tmp_path / "a.txt"), tokenizer="bytes", max_length=32)
    with pytest.raises(TypeError, match="'s' needs a data module of rows .*but got StreamingTextDataModule"):
        MultiTaskDataModule({"s": stream})
    with pytest.raises(ValueError, match="'a' has a global batch of its own"):
        MultiTaskDataModule(parts(tmp_path, global_batch_size=4))
    both = parts(tmp_path)
    with pytest.raises(ValueError, match="Two tasks have the same data module"):
        MultiTaskDataModule({"a": both["a"], "b": both["a"]})
    with pytest.raises(ValueError, match="padding-free rows are a matter of each task's own"):
        MultiTaskDataModule(both, batching="padding_free")


def test_different_tokenizers_are_refused(tmp_path):
    both = parts(tmp_path)
    both["b"] = parts(tmp_path, tokenizer="bpe", vocab_size=270)["b"]
    loaded = MultiTaskDataModule(both)
    loaded.prepare_data()
    with pytest.raises(ValueError, match="'a' and 'b' have different tokenizers"):
        loaded.setup("fit")


def test_fewer_micro_batches_than_tasks_are_refused_before_training(tmp_path, quiet_trainer):
    with pytest.raises(ValueError, match=r"3 tasks need Trainer\(accumulate_grad_batches=3\) at least, but it is 2"):
        trained(tmp_path, quiet_trainer, 2)


def test_rows_that_would_be_cut_after_their_targets_were_counted_are_refused(tmp_path, quiet_trainer):
    callbacks = [TokenWeightedAccumulation(), SequenceLengthSchedule({0: 4, 2: 48})]
    trainer = quiet_trainer(max_steps=1, accumulate_grad_batches=4, callbacks=callbacks)
    with pytest.raises(ValueError, match="Rows of several tasks cannot be cut .*Choose a shorter `max_length`"):
        trainer.fit(module(), data(tmp_path))


def test_a_task_whose_rows_change_with_the_epoch_is_told_the_epoch(tmp_path):
    (tmp_path / "text.txt").write_text("Some words to hide, and some to show. " * 20)
    path = str(tmp_path / "text.txt")
    masked = MaskedTextDataModule(path, "bytes", max_length=32, validation_fraction=0.0, cache_dir=str(tmp_path))
    masked.setup("fit")
    part = masked._dataset("train")
    rows = MultiTaskRows({"lm": part})
    labels = [rows[RowIds([2, 5], epoch)]["labels"] for epoch in (0, 3)]
    assert not torch.equal(*labels)
    assert torch.equal(labels[1], part[RowIds([2, 5], 3)]["labels"])


def test_a_step_without_a_size_is_refused(tmp_path):
    parts = {"lm": TextDataModule("python-stdlib", "bytes", cache_dir=str(tmp_path))}
    with pytest.raises(ValueError, match="needs `global_batch_size`: rows of an optimizer step"):
        MultiTaskDataModule(parts, global_batch_size=None)
