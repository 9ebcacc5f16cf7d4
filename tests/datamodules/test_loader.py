"""The loader: the same rows for any number of ranks, each exactly once, equally many batches everywhere."""

import pytest
from support import dataset_of

from lightning_llm.datamodules.loader import RowLoader
from lightning_llm.datamodules.rows import EMPTY_ROW


def batches(num_rows, world_size, micro_batch_size=2, epoch=0, **options):
    dataset = dataset_of([4] * num_rows, 4, "windows")
    loaders = [
        RowLoader(dataset, micro_batch_size, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]
    for loader in loaders:
        loader.sampler.set_epoch(epoch)
    return [[batch["row_ids"].tolist() for batch in loader] for loader in loaders]


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_row_comes_once_and_ranks_have_equally_many_batches(num_rows, world_size):
    ranks = batches(num_rows, world_size, shuffle=True)
    assert len({len(rank) for rank in ranks}) == 1
    rows = [row for rank in ranks for batch in rank for row in batch if row != EMPTY_ROW]
    assert sorted(rows) == list(range(num_rows))
    assert all(batch for rank in ranks for batch in rank)


def test_rows_of_a_global_batch_do_not_depend_on_the_number_of_ranks():
    one = batches(24, 1, micro_batch_size=4, shuffle=True, seed=5)[0]
    two = batches(24, 2, micro_batch_size=2, shuffle=True, seed=5)
    joined = [first + second for first, second in zip(*two, strict=True)]
    assert joined == one


def test_epochs_differ_and_evaluation_keeps_the_order():
    assert batches(20, 1, shuffle=True, epoch=0) != batches(20, 1, shuffle=True, epoch=1)
    flat = [row for batch in batches(20, 1)[0] for row in batch]
    assert flat == list(range(20))


def test_short_last_batch_can_be_dropped():
    assert len(batches(9, 2, drop_last=True)[0]) == 2
    assert len(batches(9, 2)[0]) == 3


def test_worker_processes_give_the_same_batches():
    assert batches(10, 1, shuffle=True, num_workers=2) == batches(10, 1, shuffle=True)


def test_a_loaded_position_continues_the_epoch_with_the_rows_not_yet_seen():
    dataset = dataset_of([7] * 30, 8, "documents")

    def rows(loader):
        return [batch["row_ids"].tolist() for batch in loader]

    for num_workers in (0, 2):
        options = {"shuffle": True, "seed": 3, "num_workers": num_workers}
        whole, stopped, resumed = (RowLoader(dataset, 4, **options) for _ in range(3))
        for loader in (whole, stopped, resumed):
            loader.set_epoch(2)
        iterator = iter(stopped)
        seen = [next(iterator)["row_ids"].tolist() for _ in range(3)]
        resumed.load_state_dict(stopped.state_dict())
        assert resumed.state_dict() == {"position": 3, "global_batch": 4}
        assert seen + rows(resumed) == rows(whole)
        assert rows(resumed) == rows(whole)  # the epoch after it is a whole one


def test_a_position_saved_on_other_ranks_is_found_in_rows():
    dataset = dataset_of([7] * 32, 8, "documents")
    loader = RowLoader(dataset, 4, world_size=2, rank=0)
    loader.load_state_dict({"position": 4, "global_batch": 4})
    assert loader.position == 2
    with pytest.warns(UserWarning, match="4 rows are seen again"):
        loader.load_state_dict({"position": 3, "global_batch": 4})
