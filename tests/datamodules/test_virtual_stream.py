"""Virtual streams: every row once, in an order that nothing but the seed decides, resumed at any row."""

import json
import threading
from functools import partial

import datasets
import numpy as np
import pytest
import torch

from lightning_llm.datamodules.streams.batch import collate_stream_rows
from lightning_llm.datamodules.streams.loader import LOOK_AHEAD, StreamLoader, check_num_streams
from lightning_llm.datamodules.streams.shard_sources import open_shards
from lightning_llm.datamodules.streams.shards import ShardError
from lightning_llm.datamodules.streams.virtual_stream import StreamSettings, VirtualStream

MAX_LENGTH = 16


def encode(texts):
    """The text is a list of token ids: the first of a document is its number + 100."""
    return [np.array([int(word) for word in text.split()], dtype=np.int64) for text in texts]


def corpus(first, count, seed=0):
    rng = np.random.default_rng(seed)
    return [f"{100 + first + n} " + " ".join(["7"] * int(rng.integers(1, 30))) for n in range(count)]


def source_of(first=0, count=200, num_shards=3, seed=0):
    dataset = datasets.Dataset.from_dict({"text": corpus(first, count, seed)})
    return open_shards(dataset.to_iterable_dataset(num_shards=num_shards) if num_shards else dataset)


def make_settings(*sources, weights=None, **options):
    sources = sources or (source_of(),)
    defaults = {"num_streams": 8, "encode": encode, "max_length": MAX_LENGTH, "pool_tokens": 150}
    return StreamSettings(sources, weights or [1.0] * len(sources), **{**defaults, **options})


def document_starts(rows):
    """Numbers of the documents that begin in the rows."""
    tokens = [
        int(segment.tokens[0]) - 100 for row in rows if row for segment in row.segments if not segment.num_context
    ]
    return [number for number in tokens if number >= 0]


def read(stream, count=None):
    rows = []
    while (count is None or len(rows) < count) and (row := stream.next_row()) is not None:
        rows.append(row)
    return rows


def same(left, right):
    return len(left) == len(right) and all(
        a.source == b.source
        and len(a.segments) == len(b.segments)
        and all(
            np.array_equal(x.tokens, y.tokens) and x.num_context == y.num_context
            for x, y in zip(a.segments, b.segments, strict=True)
        )
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("windowing", ["packed", "wrapped", "windows", "documents"])
def test_every_document_is_in_exactly_one_stream_and_every_token_a_target_once(windowing):
    settings = make_settings(windowing=windowing)
    rows = [row for stream in range(8) for row in read(VirtualStream(settings, stream, 0))]
    assert sorted(document_starts(rows)) == list(range(200))
    targets = sum(len(s.tokens) - max(s.num_context, 1) for row in rows for s in row.segments)
    lengths = [len(text.split()) for text in corpus(0, 200)]
    expected = (
        sum(min(length, MAX_LENGTH) - 1 for length in lengths) if windowing == "documents" else sum(lengths) - 200
    )
    assert targets == expected


@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_a_stream_goes_on_exactly_from_the_state_after_any_row(num_shards):
    settings = make_settings(source_of(num_shards=num_shards), num_streams=2)
    whole = read(VirtualStream(settings, 1, 5))
    assert len(whole) > 60
    for taken in range(0, len(whole) + 1, 7):
        stream = VirtualStream(settings, 1, 5)
        read(stream, taken)
        state = json.loads(json.dumps(stream.state))  # plain data only
        assert same(read(VirtualStream(settings, 1, 5, state)), whole[taken:])


@pytest.mark.parametrize("stop", ["all_exhausted", "first_exhausted", "each_once"])
def test_a_mixture_goes_on_exactly_too(stop):
    sources = source_of(0, 100), source_of(1000, 40, num_shards=2), source_of(2000, 3, num_shards=1)
    settings = make_settings(*sources, weights=[0.5, 0.3, 0.2], num_streams=4, stop=stop)
    for index in range(4):
        whole = read(VirtualStream(settings, index, 0))
        for taken in range(0, len(whole) + 1, 13):
            stream = VirtualStream(settings, index, 0)
            assert len(read(stream, taken)) == taken
            assert same(read(VirtualStream(settings, index, 0, stream.state)), whole[taken:])


def test_a_mixture_keeps_its_proportions_and_repeats_what_ends_early_in_another_order():
    settings = make_settings(source_of(0, 400), source_of(1000, 30), weights=[0.75, 0.25], num_streams=1)
    stream = VirtualStream(settings, 0, 0)
    rows = read(stream)
    drawn = np.array([row.source for row in rows])
    assert abs(drawn[:400].mean() - 0.25) < 0.04
    large = [number for number in document_starts(rows) if number < 1000]
    small = [number for number in document_starts(rows) if number >= 1000]
    assert sorted(large) == list(range(400))  # ended last: once
    assert small[:30] != small[30:60]
    assert sorted(small[:30]) == sorted(small[30:60]) == list(range(1000, 1030))
    assert stream.has_ended


def test_what_ends_a_mixture_is_chosen():
    sources = source_of(0, 100), source_of(1000, 20)
    first = make_settings(*sources, num_streams=1, stop="first_exhausted")
    numbers = document_starts(read(VirtualStream(first, 0, 0)))
    assert sorted(number for number in numbers if number >= 1000) == list(range(1000, 1020))
    assert 10 < sum(number < 1000 for number in numbers) < 40
    once = make_settings(*sources, num_streams=1, stop="each_once")
    numbers = document_starts(read(VirtualStream(once, 0, 0)))
    assert sorted(numbers) == [*range(100), *range(1000, 1020)]


@pytest.mark.parametrize("stop", ["all_exhausted", "first_exhausted", "each_once"])
def test_a_stream_whose_share_of_a_source_is_empty_draws_from_the_others(stop):
    settings = make_settings(source_of(0, 100), source_of(1000, 1, num_shards=1), num_streams=4, stop=stop)
    streams = [document_starts(read(VirtualStream(settings, stream, 0))) for stream in range(4)]
    numbers = [number for stream in streams for number in stream if number < 1000]
    if stop == "first_exhausted":
        assert sum(len(stream) > 15 for stream in streams) == 3
    else:
        assert sorted(numbers) == list(range(100))
    assert any(1000 in stream for stream in streams)


def test_rows_are_shuffled_anew_in_each_epoch_and_in_order_if_asked():
    shuffled = make_settings()
    orders = [document_starts(read(VirtualStream(shuffled, 0, epoch))) for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    other = document_starts(read(VirtualStream(make_settings(seed=1), 0, 0)))
    assert other != orders[0]
    in_order = make_settings(source_of(num_shards=0), shuffle=False, windowing="documents")
    assert document_starts(read(VirtualStream(in_order, 0, 3))) == list(range(25))


@pytest.mark.parametrize("num_shards", [0, 1])
def test_epochs_that_are_cut_short_read_other_documents(num_shards):
    settings = make_settings(source_of(0, 800, num_shards=num_shards), num_streams=2, pool_tokens=64)
    seen = set()
    for epoch in range(10):
        seen |= set(document_starts(read(VirtualStream(settings, 0, epoch), 20)))
    whole = len(document_starts(read(VirtualStream(settings, 0, 0))))
    if num_shards:  # an iterable data set has no other way in than its beginning
        assert len(seen) < whole / 8
    else:
        assert len(seen) > whole / 3


def test_the_order_of_a_mixture_in_validation_is_that_of_every_epoch():
    settings = make_settings(source_of(0, 60), source_of(1000, 60), shuffle=False, stop="each_once", num_streams=1)
    first, second = ([row.source for row in read(VirtualStream(settings, 0, epoch))] for epoch in (0, 3))
    assert first == second


def test_what_windowing_documents_leaves_out_is_said_once(monkeypatch, recwarn):
    monkeypatch.setattr("lightning_llm.datamodules.streams.virtual_stream._has_warned_of_cut_tokens", False)
    read(VirtualStream(make_settings(windowing="packed"), 0, 0))
    assert not recwarn
    read(VirtualStream(make_settings(windowing="documents"), 0, 0))
    (warning,) = recwarn
    assert "leaves out what is beyond max_length=16: " in str(warning.message)


def test_token_ids_beyond_the_vocabulary_are_refused_with_their_document():
    stream = VirtualStream(make_settings(source_of(num_shards=0), vocab_size=299, shuffle=False), 7, 0)
    with pytest.raises(ValueError, match=r"gives the id 299 in Dataset, row 199, but its vocabulary has 299 tokens"):
        read(stream)


def test_a_pool_is_no_larger_than_asked_for():
    """Streams hold pools, not sources: what a reader has read when the first row comes is bounded."""
    settings = make_settings(source_of(0, 5000), num_streams=1, pool_tokens=500)
    stream = VirtualStream(settings, 0, 0)
    for _ in range(50):
        stream.next_row()
        (part,) = stream._parts
        assert len(part._pool.tokens) < 500 + 500  # the last batch of texts may run over by its characters


def test_bytes_and_words_behind_the_targets_add_up():
    token_bytes = np.full(10_000, 3.0)
    for windowing in ("packed", "windows", "wrapped"):
        settings = make_settings(windowing=windowing, token_bytes=token_bytes, num_streams=1)
        counts = np.concatenate([row.counts for row in read(VirtualStream(settings, 0, 0))])
        texts = corpus(0, 200)
        words = sum(len(text.split()) for text in texts)
        num_bytes = sum(len(text) for text in texts)
        assert counts[:, 1].sum() == words
        share = (words - 200) / words  # a document's first token is no target
        assert counts[:, 0].sum() == pytest.approx(num_bytes * share, rel=0.03)


# ---- the loader: several ranks in one process ------------------------------------------------------------------------


class Ranks:
    """Loaders of all ranks, each in a thread; they meet where real ranks would."""

    def __init__(self, settings, num_ranks, micro_batch_size, **options):
        self.reports = [None] * num_ranks
        self.barrier = threading.Barrier(num_ranks, timeout=30)
        collate = partial(collate_stream_rows, pad_token_id=0, layout="packed", max_length=MAX_LENGTH)
        self.loaders = [
            StreamLoader(
                settings,
                micro_batch_size,
                collate,
                rank=rank,
                num_ranks=num_ranks,
                agree=partial(self._agree, rank),
                **options,
            )
            for rank in range(num_ranks)
        ]

    def _agree(self, rank, report):
        self.reports[rank] = report
        self.barrier.wait()
        reports = list(self.reports)
        self.barrier.wait()
        return reports

    def run(self, num_batches=None, state=None):
        """Batches of each rank, and its state afterwards; an exception is its result."""
        results = [None] * len(self.loaders)

        def work(rank):
            loader = self.loaders[rank]
            try:
                if state is not None:
                    loader.load_state_dict(state)
                batches = []
                for batch in loader:
                    batches.append(batch)
                    if len(batches) == num_batches:
                        break
                results[rank] = (batches, loader.state_dict())
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(self.loaders))]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
        assert not any(thread.is_alive() for thread in threads), "ranks hang"
        return results


def contents(batch):
    """Each row's position and tokens."""
    return {
        int(row_id): tuple(ids.tolist())
        for row_id, ids in zip(batch["row_ids"], batch["input_ids"], strict=True)
        if row_id >= 0
    }


def steps(results, micro_batches):
    """What each optimizer step holds over all ranks."""
    batches = []
    for parts in zip(*(batches for batches, _ in results), strict=True):
        batches.append({})
        for part in parts:
            rows = contents(part)
            assert not set(rows) & set(batches[-1])
            batches[-1].update(rows)
    grouped = [batches[n : n + micro_batches] for n in range(0, len(batches), micro_batches)]
    return [{key: value for batch in group for key, value in batch.items()} for group in grouped]


def run_steps(settings, num_ranks, micro_batch_size, micro_batches, count=None, state=None, **options):
    ranks = Ranks(settings, num_ranks, micro_batch_size, **options)
    results = ranks.run(None if count is None else count * micro_batches, state)
    for result in results:
        if isinstance(result, Exception):
            raise result
    assert all(result[1] == results[0][1] for result in results)  # the state is the same on every rank
    return steps(results, micro_batches), results[0][1]


LAYOUTS = [(1, 16, 1), (1, 2, 8), (2, 4, 2), (4, 4, 1), (8, 1, 2), (8, 2, 1)]  # ranks, rows, micro-batches: 16 rows


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_a_step_holds_the_same_rows_for_any_number_of_ranks_and_micro_batches(layout):
    settings = make_settings()
    expected, _ = run_steps(settings, *LAYOUTS[0])
    found, _ = run_steps(settings, *layout)
    running = len(expected) - 4  # in the last few steps streams end, and micro-batches without a row are left out
    assert found[:running] == expected[:running]
    together = [{}, {}]
    for all_rows, part in zip(together, (found, expected), strict=True):
        for step in part:
            assert not set(step) & set(all_rows)
            all_rows.update(step)
    assert together[0] == together[1]
    if layout[0] * layout[1] >= settings.num_streams:
        assert found == expected  # to the last row


@pytest.mark.parametrize(("before", "after"), [(1, 4), (8, 2), (2, 1), (4, 8), (1, 1)])
@pytest.mark.parametrize("done", [1, 5, 11])
def test_a_run_goes_on_exactly_with_another_number_of_ranks(before, after, done):
    settings = make_settings(source_of(0, 400))
    expected, _ = run_steps(settings, 1, 16, 1)
    first, state = run_steps(settings, before, 16 // before, 1, count=done)
    assert first == expected[:done]
    rest, _ = run_steps(settings, after, 16 // after, 1, state=state)
    assert rest == expected[done:]


def test_a_run_is_resumed_again_and_again_on_changing_layouts():
    settings = make_settings(source_of(0, 300), source_of(1000, 100), weights=[2, 1], stop="each_once")
    expected, _ = run_steps(settings, 1, 16, 1)
    found, state = [], None
    for layout in [(1, 16, 1), (2, 2, 4), (8, 1, 2), (4, 4, 1), (2, 8, 1)] * 2:
        part, state = run_steps(settings, *layout, count=1, state=state)
        found += part
    assert found == expected[: len(found)]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(num_workers):
    settings = make_settings()
    expected, state = run_steps(settings, 1, 3, 1, count=20)
    found, same_state = run_steps(settings, 1, 3, 1, count=20, num_workers=num_workers)
    assert found == expected
    assert state == same_state
    rest = run_steps(settings, 1, 3, 1, state=state)[0]
    assert run_steps(settings, 1, 3, 1, state=state, num_workers=num_workers)[0] == rest


def test_a_rank_that_runs_dry_yields_empty_batches_until_all_have():
    """One rank's streams hold nothing, or end much earlier."""
    settings = make_settings(source_of(0, 60, num_shards=0), num_streams=2, shuffle=False)
    results = Ranks(settings, 2, 2).run()
    assert len(results[0][0]) == len(results[1][0])
    uneven = make_settings(open_shards(_uneven()), num_streams=2, shuffle=False)
    results = Ranks(uneven, 2, 2).run()
    filled = [[bool(contents(batch)) for batch in batches] for batches, _ in results]
    assert len(filled[0]) == len(filled[1])
    assert sum(filled[0]) < len(filled[0]) / 3
    assert all(filled[1])
    empty = results[0][0][-1]
    assert (empty["labels"] == -100).all()
    assert empty["input_ids"].shape == results[1][0][0]["input_ids"].shape
    starts = [number for batches, _ in results for batch in batches for number in _numbers(batch)]
    assert sorted(starts) == list(range(100))


def _uneven():
    documents = [f"{100 + n} 7 7" if n < 50 else f"{100 + n} " + "7 " * 14 for n in range(100)]
    return datasets.Dataset.from_dict({"text": documents})


def _numbers(batch):
    first = (batch["position_ids"] == 0) & (batch["input_ids"] >= 100)
    return (batch["input_ids"][first] - 100).tolist()


def test_a_rank_that_cannot_read_stops_all_ranks_at_once_and_says_why(tmp_path):
    for number in range(4):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in corpus(number * 50, 50))
        (tmp_path / f"{number}.jsonl").write_text(lines)
    settings = make_settings(open_shards(str(tmp_path)), num_streams=4, shuffle=False, pool_tokens=50)
    ranks = Ranks(settings, 2, 1)
    (tmp_path / "1.jsonl").unlink()
    first, second = ranks.run()
    assert isinstance(first, ShardError | ValueError)
    assert isinstance(second, ShardError)
    assert "Rank 0 cannot read on" in str(first) or "is gone" in str(first)
    assert "1.jsonl" in str(first)
    assert "1.jsonl" in str(second)
    assert "resume the run from its last checkpoint" in str(second)


def test_streams_without_any_row_are_an_error_on_all_ranks():
    """Without it, a run up to max_steps would begin one empty epoch after the other for ever."""
    for result in Ranks(make_settings(min_length=31), 2, 1).run():
        assert isinstance(result, ValueError)
        assert "IterableDataset gave no row in a whole epoch" in str(result)
        assert "min_length=31 tokens, or unreadable and left out by skip_corrupt=True, or a filter" in str(result)
    _, state = run_steps(make_settings(), 2, 1, 1)
    assert run_steps(make_settings(), 2, 1, 1, state=state)[0] == []  # an epoch that is over is none without rows


@pytest.mark.parametrize("what", ["collate", "workers", "pin"])
def test_whatever_fails_on_one_rank_stops_all(what, monkeypatch):
    ranks = Ranks(make_settings(), 2, 1, **({"num_workers": 1} if what == "workers" else {}))
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if what != "collate" or len(calls) > LOOK_AHEAD + 3:  # within a round
            raise RuntimeError("no memory is left")
        return {"row_ids": torch.tensor([0])}

    if what == "workers":
        ranks.loaders[0].num_workers = 0
        monkeypatch.setattr("lightning_llm.datamodules.streams.loader.DataLoader", fail)
    elif what == "collate":
        ranks.loaders[1].collate = fail
    else:
        ranks.loaders[1].pin_memory = True
        monkeypatch.setattr(torch.Tensor, "pin_memory", fail)
    first, second = ranks.run()
    assert isinstance(first, ShardError)
    assert "Rank 1 cannot read on, so all ranks stop. RuntimeError: no memory is left" in str(first)
    assert isinstance(second, RuntimeError)


def test_ranks_that_see_other_data_are_stopped():
    ranks = Ranks(make_settings(), 2, 1, identity={"bytes": 3})
    ranks.loaders[1].identity = {"bytes": 4}
    for result in ranks.run():
        assert "Rank 1 sees other data or settings than rank 0" in str(result)


def test_iterating_to_try_changes_nothing_and_saving_before_the_first_batch_does_not_lose_the_place():
    settings = make_settings()
    _, state = run_steps(settings, 1, 4, 1, count=7)
    (loader,) = Ranks(settings, 1, 4).loaders
    loader.load_state_dict(state)
    iter(loader)
    assert loader.state_dict() == state
    assert contents(next(iter(loader))) == run_steps(settings, 1, 4, 1, state=state)[0][0]


def test_streams_that_ranks_cannot_share_are_refused_with_numbers_that_would_do():
    with pytest.raises(ValueError, match=r"got num_streams=48 and 9 ranks. Pass num_streams=45 or 54. A run keeps"):
        check_num_streams(48, 9)
    with pytest.raises(ValueError, match=r"Pass num_streams=9\."):
        check_num_streams(8, 9)
    check_num_streams(48, 16)


def test_batches_name_rows_and_sources_and_empty_rows_have_neither():
    settings = make_settings(source_of(0, 20), source_of(1000, 20), num_streams=2)
    row = VirtualStream(settings, 0, 0).next_row()
    batch = collate_stream_rows(
        [row, None], [6, 7], pad_token_id=0, layout="packed", max_length=MAX_LENGTH, source_ids=[5, 3]
    )
    assert batch["row_ids"].tolist() == [6, -1]
    assert batch["source_ids"].tolist() == [[5, 3][row.source], 0]
    assert batch["source_ids"].dtype == torch.int64
    flat = collate_stream_rows(
        [row, None], [6, 7], pad_token_id=0, layout="padding_free", max_length=MAX_LENGTH, source_ids=[5, 3]
    )
    assert len(flat["row_ids"]) == len(flat["num_input_tokens"]) == len(row.segments)
    nothing = collate_stream_rows([None], [0], pad_token_id=0, layout="padding_free", max_length=MAX_LENGTH)
    assert nothing["row_ids"].tolist() == [-1]
    assert (nothing["labels"] == -100).all()
