"""The rows of an optimizer step follow from what was trained before, and from nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm import Schedule
from lightning_llm.datamodules.batches.budget import cost
from lightning_llm.datamodules.batches.budget_plan import BudgetPlan
from lightning_llm.datamodules.batches.global_batch_plan import GlobalBatchPlan
from lightning_llm.datamodules.batches.plan import Cursor, Layout, RowPlan
from lightning_llm.datamodules.order import TableOrder

LAYOUTS = [(1, 4), (2, 2), (4, 1)]  # ranks, micro-batches: four micro-batches an optimizer step
RNG = np.random.default_rng(0)


def lengths(num_rows):
    return np.random.default_rng(num_rows).integers(1, 33, num_rows)


def make(kind, num_rows):
    order = TableOrder(num_rows, 5)
    return {
        "rows": lambda: RowPlan(order, 8),
        "global": lambda: GlobalBatchPlan(order, 32),
        "ramp": lambda: GlobalBatchPlan(order, Schedule({"0 samples": 8, "60 samples": 32}, "linear")),
        "tokens": lambda: GlobalBatchPlan(
            order, 256, float(lengths(num_rows).mean()), counts_tokens=True, lengths=lengths(num_rows)
        ),
        "padding_free": lambda: GlobalBatchPlan(order, 32, lengths=lengths(num_rows), padded=False),
        "padded budget": lambda: BudgetPlan(lengths(num_rows), 96, padded=True, group=4, seed=5, pool_size=48),
        "free budget": lambda: BudgetPlan(lengths(num_rows), 96, padded=False, group=4, seed=5, pool_size=48),
    }[kind]()


KINDS = ["rows", "global", "ramp", "tokens", "padding_free", "padded budget", "free budget"]


def steps(kind, num_rows, num_ranks, micro_batches, cursor):
    """Rows and end of each optimizer step: over all ranks, as a Trainer groups micro-batches."""
    plans = [make(kind, num_rows) for _ in range(num_ranks)]
    layouts = [Layout(rank, num_ranks, micro_batches) for rank in range(num_ranks)]
    streams = [list(plan.batches(cursor, layout)) for plan, layout in zip(plans, layouts, strict=True)]
    counts = {plan.num_batches(cursor, layout) for plan, layout in zip(plans, layouts, strict=True)}
    assert counts == {len(stream) for stream in streams}  # foretold, and the same on every rank
    found = []
    for begin in range(0, len(streams[0]), micro_batches):
        planned = [batch for stream in streams for batch in stream[begin : begin + micro_batches]]
        rows = sorted(int(row) for batch in planned for row in batch.rows)
        assert len({stream[begin : begin + micro_batches][-1].after for stream in streams}) == 1
        found.append((rows, planned[-1].after))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 31, 128, 200])
def test_each_row_comes_once_an_epoch(kind, num_rows):
    for epoch in (0, 3):
        rows = [row for rows, _ in steps(kind, num_rows, 2, 2, Cursor(epoch=epoch)) for row in rows]
        assert sorted(rows) == list(range(num_rows))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_do_not_depend_on_ranks_and_micro_batches_from_any_point_on(kind):
    whole = steps(kind, 200, 1, 4, Cursor(epoch=1))
    assert len(whole) > 5
    assert whole[0][0] != steps(kind, 200, 1, 4, Cursor(epoch=2))[0][0]
    for done in range(len(whole)):
        cursor = whole[done - 1][1] if done else Cursor(epoch=1)
        cursor = Cursor.from_state(cursor.to_state())
        for num_ranks, micro_batches in LAYOUTS:
            rest = steps(kind, 200, num_ranks, micro_batches, cursor)
            assert [rows for rows, _ in rest] == [rows for rows, _ in whole[done:]], (done, num_ranks)


@pytest.mark.parametrize("kind", ["global", "ramp", "tokens", "padding_free"])
def test_a_global_batch_depends_on_no_number_of_micro_batches_at_all(kind):
    whole = steps(kind, 200, 1, 1, Cursor())
    for num_ranks, micro_batches in ((1, 3), (2, 5), (3, 2), (4, 1)):
        assert steps(kind, 200, num_ranks, micro_batches, Cursor()) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_batches_before_and_after_make_an_epoch(kind):
    for num_ranks, micro_batches in LAYOUTS:
        plan, layout = make(kind, 200), Layout(0, num_ranks, micro_batches)
        total = plan.num_batches(Cursor(), layout)
        for number, (_, after) in enumerate(plan.batches(Cursor(), layout), start=1):
            if number % (4 // num_ranks) == 0:
                assert plan.batches_before(after, layout) == number
                assert plan.num_batches(after, layout) == total - number


def test_a_schedule_of_samples_tokens_epochs_and_steps_is_followed_without_lag():
    order, layout = TableOrder(64, 0), Layout()

    def sizes(schedule, epoch_cursor=None, **options):
        plan = GlobalBatchPlan(order, Schedule(schedule), **options)
        return [len(batch.rows) for batch in plan.batches(epoch_cursor or Cursor(), layout)]

    assert sizes({"0 samples": 4, "16 samples": 8, "32 samples": 16}) == [4, 4, 4, 4, 8, 8, 16, 16]
    assert sizes({"0 steps": 4, "2 steps": 28}) == [4, 4, 28, 28]
    assert sizes({"0 epochs": 32, "1 epoch": 64}) == [32, 32]
    assert sizes({"0 epochs": 32, "1 epoch": 64}, Cursor(epoch=1, earlier_rows=64)) == [64]
    # ten label tokens a row: 16 rows are 160 tokens
    in_tokens = sizes({"0 tokens": 40, "160 tokens": 160}, tokens_per_row=10, counts_tokens=True)
    assert in_tokens == [4, 4, 4, 4, 16, 16, 16]
    # and rows are counted in tokens too
    assert sizes({"0 tokens": 4, "160 tokens": 16}, tokens_per_row=10) == [4, 4, 4, 4, 16, 16, 16]
    with pytest.raises(ValueError, match="share of the run"):
        sizes({"0 steps": 4, "50%": 8})


@given(
    st.integers(1, 300),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), max_size=4),
    st.sampled_from(["steps", "samples", "tokens"]),
    st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_steps_are_counted_at_once_as_one_by_one(num_rows, milestones, unit, drop_last):
    steps, at = {f"0 {unit}": 3.0}, 0
    for gap, size in milestones:
        at += gap
        steps[f"{at} {unit}"] = float(size)
    plan = GlobalBatchPlan(TableOrder(num_rows), Schedule(steps), tokens_per_row=1.7, drop_last=drop_last)
    cursor = Cursor(earlier_rows=7, earlier_steps=2)
    batches = list(plan.batches(cursor, Layout()))
    assert plan.num_batches(cursor, Layout()) == len(batches)
    for number in range(len(batches) + 1):
        after = plan.after(cursor, Layout(), number)
        assert after == (batches[number - 1].after if number else cursor)


def test_a_ramp_over_ten_million_rows_is_counted_without_walking_it():
    plan = GlobalBatchPlan(TableOrder(10_000_000, 0), Schedule({"0 samples": 32, "1 epoch": 64}))
    sizes = []
    plan.step_rows, counted = (lambda cursor, f=plan.step_rows: sizes.append(1) or f(cursor)), plan.num_batches
    assert counted(Cursor(), Layout()) == 312_500
    assert len(sizes) < 50


def test_drop_last_leaves_out_what_is_short():
    layout = Layout(0, 2, 2)
    assert RowPlan(TableOrder(13), 2, drop_last=True).num_batches(Cursor(), layout) == 3
    plan = GlobalBatchPlan(TableOrder(13), 4, drop_last=True)
    assert [len(batch.rows) for batch in plan.batches(Cursor(), layout)] == [1] * 6
    assert plan.num_batches(Cursor(), layout) == 6


@pytest.mark.parametrize("padded", [True, False])
def test_budget_is_kept_and_groups_are_alike(padded):
    sizes = np.clip(RNG.lognormal(3, 1, 3000), 1, 256).astype(np.int64)
    plan = BudgetPlan(sizes, 1024, padded=padded, group=4, seed=1, pool_size=1000)
    assert plan.num_batches(Cursor(), Layout()) % 4 == 0
    ranks = [list(plan.batches(Cursor(), Layout(rank, 4))) for rank in range(4)]
    costs = np.array([[cost(sizes[batch.rows], padded=padded) for batch in rank] for rank in ranks])
    assert costs.max() <= 1024
    # What ranks wait for each other: the most expensive of four beside their mean.
    assert (costs.max(0) / costs.mean(0)).mean() < 1.1
    at_random = np.array([sizes[part].max() * len(part) for part in np.array_split(RNG.permutation(3000), 400)])
    assert (at_random.reshape(4, -1).max(0) / at_random.reshape(4, -1).mean(0)).mean() > 1.2


@given(st.integers(1, 120), st.lists(st.tuples(st.integers(33, 200), st.integers(1, 4), st.integers(0, 9)), max_size=5))
@settings(deadline=None, max_examples=80)
def test_a_budget_changed_inside_a_pool_loses_and_repeats_no_row(num_rows, changes):
    cursor, seen = Cursor(epoch=1), []
    for budget, group, taken in changes:
        plan = BudgetPlan(lengths(num_rows), budget, padded=True, group=group, seed=3, pool_size=50)
        assert plan.num_batches(cursor, Layout()) == len(list(plan.batches(cursor, Layout())))
        for _, batch in zip(range(taken), plan.batches(cursor, Layout()), strict=False):
            assert cost(lengths(num_rows)[batch.rows], padded=True) <= budget
            seen += batch.rows.tolist()
            cursor = Cursor.from_state(batch.after.to_state())
    plan = BudgetPlan(lengths(num_rows), 64, padded=True, seed=3, pool_size=50)
    seen += [row for batch in plan.batches(cursor, Layout()) for row in batch.rows.tolist()]
    assert sorted(seen) == list(range(num_rows))


def test_epochs_of_a_budget_have_equally_many_batches_in_another_order():
    sizes = lengths(500)
    plan = BudgetPlan(sizes, 128, padded=True, group=2, seed=0, pool_size=200)
    epochs = [[batch.rows.tolist() for batch in plan.batches(Cursor(epoch=e), Layout())] for e in range(4)]
    assert len({len(epoch) for epoch in epochs}) == 1
    assert epochs[0] != epochs[1]


def test_a_budget_below_a_row_is_refused_at_once():
    with pytest.raises(ValueError, match="one row alone has 32"):
        BudgetPlan(lengths(200), 31, padded=False)


def test_the_plan_of_a_step_of_ten_million_rows_takes_no_array_of_them():
    """No timing: the largest array that planning a step allocates is as long as the step, not as the epoch."""
    import tracemalloc

    plan = GlobalBatchPlan(TableOrder(10_000_000, 0), 256)
    tracemalloc.start()
    cursor = Cursor(epoch=3, rows=9_000_000)
    batch = next(iter(plan.batches(cursor, Layout())))
    assert plan.num_batches(cursor, Layout()) == -(-1_000_000 // 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(batch.rows) == 256
    assert peak < 1_000_000
