"""How large a piece may be: halving, remembering, growing back, waiting longer after each failed probe."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.callbacks.pieces.limits import PieceLimit, PieceLimits


def test_a_failure_halves_and_never_goes_below_what_has_fitted():
    limit = PieceLimit()
    limit.failed(1000, grow_every=10)
    assert limit.limit == 500
    limit.failed(500, grow_every=10)
    assert limit.limit == 250
    limit.fitted(250, beside_gradients=True)
    limit.failed(400, grow_every=10)  # a probe
    assert limit.limit == 250
    limit.failed(250, grow_every=10)  # what had fitted does no longer
    assert limit.limit == 125


def test_each_failed_probe_waits_longer():
    limit, waits = PieceLimit(), []
    limit.failed(1000, grow_every=4)
    limit.fitted(500, True)
    for _ in range(4):
        calm = 1
        while not limit.step_done(grow_every=4):
            calm += 1
        waits.append(calm)
        limit.failed(limit.limit, grow_every=4)
    assert waits == [4, 8, 16, 32]


def test_after_a_probe_that_fitted_the_next_comes_soon():
    limit = PieceLimit(limit=500, good=500, bad=4000, wait=64)
    while not limit.step_done(grow_every=4):
        pass
    limit.fitted(limit.limit, True)
    assert sum(limit.step_done(grow_every=4) for _ in range(4)) == 1


def test_growing_saves_a_piece_or_is_left():
    limit = PieceLimit(limit=2700, good=2700, bad=4000)
    assert limit.step_done(grow_every=1, useful=4096)  # 3 pieces of 8192: between 2731 and 4095 nothing changes
    assert limit.limit == 4096


def test_growth_bisects_towards_what_failed_and_then_doubts_it():
    limit = PieceLimit(limit=500, good=500, bad=1000)
    grown = []
    for _ in range(6):
        assert limit.step_done(grow_every=1)
        grown.append(limit.limit)
    assert grown[:4] == [750, 875, 937, 1030]
    assert limit.bad is None


@given(capacity=st.integers(10, 10_000), wanted=st.integers(10, 10_000))
@settings(max_examples=100, deadline=None)
def test_the_limit_finds_the_capacity_and_follows_it(capacity, wanted):
    """A device that holds ``capacity``; pieces are as large as the limit allows."""
    limits = PieceLimits(grow_every=1)
    failures = 0
    for step in range(400):
        room = capacity if step < 200 else 2 * capacity  # someone else's memory is freed
        while True:
            cost = min(limits.cost(8) or wanted, wanted)
            if cost <= room or cost == 1:
                break
            assert cost > 1
            limits.of(8).failed(cost, limits.grow_every)
            failures += 1
        limits.of(8).fitted(cost, True)
        if limits.of(8).limit is not None and limits.of(8).limit < wanted:
            num_pieces = -(-wanted // cost)
            limits.of(8).step_done(limits.grow_every, useful=-(-wanted // max(num_pieces - 1, 1)))
        if step in (199, 399):
            assert cost >= 0.5 * min(room, wanted)
    assert failures < 60


def test_lengths_of_about_the_same_size_share_a_limit_and_new_ones_start_at_their_neighbours():
    limits = PieceLimits()
    limits.of(1000).failed(8192, grow_every=100)
    assert limits.of(1024) is limits.of(600)
    assert limits.cost(100) == 4096  # shorter rows: at least as much
    assert limits.cost(5000) == 4096  # longer ones: to be learned
    limits.of(5000).failed(4096, grow_every=100)
    assert limits.cost(5000) == 2048
    assert limits.cost(1024) == 4096


def test_the_ceiling_holds_whatever_is_learned():
    limits = PieceLimits(ceiling=100)
    assert limits.cost(8) == 100
    limits.of(8).failed(100, 10)
    assert limits.cost(8) == 50
    limits.of(8).limit = 400
    assert limits.cost(8) == 100


def test_pressure_takes_a_tenth_off():
    limit = PieceLimit()
    assert not limit.under_pressure()
    limit.fitted(1000, True)
    assert limit.under_pressure()
    assert limit.limit == 900


def test_trust_depends_on_gradients_that_are_there_already():
    limit = PieceLimit()
    limit.fitted(100, beside_gradients=False)
    assert limit.is_trusted(100, beside_gradients=False)
    assert not limit.is_trusted(100, beside_gradients=True)
    limit.fitted(80, beside_gradients=True)
    assert limit.is_trusted(80, beside_gradients=True)


def test_state_is_numbers_and_comes_back():
    limits = PieceLimits()
    limits.of(100).failed(64, 10)
    other = PieceLimits()
    other.load_state_dict(limits.state_dict())
    assert other.buckets == limits.buckets
