"""The loader: the same rows for any number of ranks, each exactly once, equally many batches everywhere."""

from itertools import chain

import pytest
from support import dataset_of

from lightning_llm import Schedule
from lightning_llm.datamodules.batches.budget_plan import BudgetPlan
from lightning_llm.datamodules.batches.global_batch_plan import GlobalBatchPlan
from lightning_llm.datamodules.batches.plan import RowPlan
from lightning_llm.datamodules.loader import RowLoader
from lightning_llm.datamodules.order import TableOrder
from lightning_llm.datamodules.rows import EMPTY_ROW


def make_loader(dataset, micro_batch_size=2, *, seed=None, drop_last=False, **options):
    return RowLoader(dataset, RowPlan(TableOrder(len(dataset), seed), micro_batch_size, drop_last), **options)


def rows_of(loader):
    return [batch["row_ids"].tolist() for batch in loader]


def batches(num_rows, num_ranks, micro_batch_size=2, epoch=0, **options):
    dataset = dataset_of([4] * num_rows, 4, "windows")
    loaders = [
        make_loader(dataset, micro_batch_size, rank=rank, num_ranks=num_ranks, **options) for rank in range(num_ranks)
    ]
    for loader in loaders:
        loader.sampler.set_epoch(epoch)
    return [rows_of(loader) for loader in loaders]


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_row_comes_once_and_ranks_have_equally_many_batches(num_rows, num_ranks):
    ranks = batches(num_rows, num_ranks, seed=0)
    assert len({len(rank) for rank in ranks}) == 1
    rows = [row for rank in ranks for batch in rank for row in batch if row != EMPTY_ROW]
    assert sorted(rows) == list(range(num_rows))
    assert all(batch for rank in ranks for batch in rank)


def test_rows_of_a_global_batch_do_not_depend_on_the_number_of_ranks():
    one = batches(24, 1, micro_batch_size=4, seed=5)[0]
    two = batches(24, 2, micro_batch_size=2, seed=5)
    joined = [first + second for first, second in zip(*two, strict=True)]
    assert joined == one


def test_epochs_differ_and_evaluation_keeps_the_order():
    assert batches(20, 1, seed=0, epoch=0) != batches(20, 1, seed=0, epoch=1)
    flat = [row for batch in batches(20, 1)[0] for row in batch]
    assert flat == list(range(20))


def test_short_last_batch_can_be_dropped():
    assert len(batches(9, 2, drop_last=True)[0]) == 2
    assert len(batches(9, 2)[0]) == 3


def test_worker_processes_give_the_same_batches():
    assert batches(10, 1, seed=0, num_workers=2) == batches(10, 1, seed=0)


def test_asking_for_an_iterator_changes_nothing():
    loader = make_loader(dataset_of([7] * 12, 8, "documents"), seed=1)
    seen = iter(loader)
    first = next(seen)["row_ids"].tolist()
    for _ in range(3):
        iter(loader)  # as Lightning does, to see whether it can
    assert [first, *rows_of(seen)] == rows_of(loader)


def test_a_loaded_position_continues_the_epoch_with_the_rows_not_yet_seen():
    dataset = dataset_of([7] * 30, 8, "documents")
    for num_workers in (0, 2):
        whole, stopped, resumed = (make_loader(dataset, 4, seed=3, num_workers=num_workers) for _ in range(3))
        for loader in (whole, stopped):
            loader.set_epoch(2)
        iterator = iter(stopped)
        seen = [next(iterator)["row_ids"].tolist() for _ in range(3)]
        resumed.load_state_dict(stopped.state_dict())
        assert resumed.state_dict() == stopped.state_dict()
        assert len(resumed) == len(whole) == 8
        assert seen + rows_of(resumed) == rows_of(whole)
        assert rows_of(resumed) == rows_of(whole)  # the epoch after it is a whole one


def test_a_position_saved_on_other_ranks_or_batches_is_found_in_rows():
    dataset = dataset_of([7] * 32, 8, "documents")
    saved = make_loader(dataset, 3, seed=1)
    iterator = iter(saved)
    seen = [row for _ in range(3) for row in next(iterator)["row_ids"].tolist()]
    ranks = [make_loader(dataset, 4, seed=1, rank=rank, num_ranks=2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(saved.state_dict())
    rest = [row for loader in ranks for batch in rows_of(loader) for row in batch if row != EMPTY_ROW]
    assert sorted(seen + rest) == list(range(32))


def test_a_state_at_the_end_of_an_epoch_begins_the_next_one():
    dataset = dataset_of([7] * 9, 8, "documents")
    loader = make_loader(dataset, 2, seed=0)
    first = rows_of(loader)
    other = make_loader(dataset, 2, seed=0)
    other.load_state_dict(loader.state_dict())
    other.set_epoch(1)
    assert len(other) == 5
    second = rows_of(other)
    assert sorted(chain(*second)) == sorted(chain(*first))
    assert second != first


def test_state_is_plain_numbers_and_small_at_any_position():
    import json

    dataset = dataset_of([5, 9, 30] * 40, 32, "documents")
    plan = BudgetPlan(dataset.table.row_lengths, 64, padded=True, group=2, seed=0, pool_size=50)
    loader = RowLoader(dataset, plan)
    for _ in loader:
        assert len(json.dumps(loader.state_dict())) < 400


def test_set_global_batch_holds_for_the_rest_of_the_run_also_behind_workers():
    dataset = dataset_of([4] * 64, 4, "windows")
    for num_workers in (0, 2):
        loader = RowLoader(dataset, GlobalBatchPlan(TableOrder(64, 0), 4), num_workers=num_workers)
        sizes, rows = [], []
        for number, batch in enumerate(loader):
            sizes.append(len(batch["row_ids"]))
            rows += batch["row_ids"].tolist()
            if number == 2:
                loader.set_global_batch(16)
        assert sizes == [4, 4, 4, 16, 16, 16, 4]
        assert sorted(rows) == list(range(64))
        loader.set_epoch(1)
        assert len(loader) == 4
        assert [len(batch["row_ids"]) for batch in loader] == [16] * 4


def test_set_global_batch_without_one_is_refused():
    loader = make_loader(dataset_of([4] * 8, 4, "windows"))
    with pytest.raises(TypeError, match=r"given one: the data module.s global_batch_size"):
        loader.set_global_batch(4)


def test_the_longest_batch_holds_the_longest_rows():
    dataset = dataset_of([3, 9, 5, 7, 2, 8], 16, "documents")
    loader = make_loader(dataset, 2)
    assert loader.longest_batch()["num_input_tokens"].tolist() == [9, 8]
    lengths = dataset.table.row_lengths
    for plan, expected in (
        (BudgetPlan(lengths, 20, padded=True), [9, 8]),
        (BudgetPlan(lengths, 25, padded=False), [9, 8, 7]),
        (GlobalBatchPlan(TableOrder(6), Schedule({0: 1, 2: 4})), [9, 8, 7, 5]),
    ):
        assert RowLoader(dataset, plan).longest_batch()["num_input_tokens"].tolist() == expected


def test_worker_processes_end_with_the_run_and_with_the_loader(quiet_trainer):
    """By Lightning, which looks for them as in a DataLoader; without a Trainer when the loader is gone."""
    import gc
    import multiprocessing
    import time

    from lightning.pytorch.utilities.combined_loader import CombinedLoader

    dataset = dataset_of([7] * 12, 8, "documents")
    loader = make_loader(dataset, 2, num_workers=2)
    combined = CombinedLoader(loader)
    next(iter(combined))
    assert len(multiprocessing.active_children()) == 2
    combined.reset()
    assert not multiprocessing.active_children()
    batches = iter(loader)
    next(batches)
    begin = time.perf_counter()
    del batches, loader, combined
    gc.collect()
    assert not multiprocessing.active_children()
    assert time.perf_counter() - begin < 4  # it was 5 s for each worker
