"""Outputs and logs of pieces become those of the batch, or are refused."""

import pytest
import torch

from lightning_llm.callbacks.pieces.merging import PieceLogs, merge_outputs, weighted_mean


def merge(outputs, rows, strict=True):
    return merge_outputs(outputs, rows, rows, strict=strict)


def test_rows_are_joined_in_order_numbers_are_averaged_and_counts_are_summed():
    outputs = [
        {"values": torch.arange(3.0), "mean": torch.tensor(1.0), "count": torch.tensor(3), "names": ["a", "b", "c"]},
        {"values": torch.arange(1.0), "mean": torch.tensor(5.0), "count": torch.tensor(1), "names": ["d"]},
    ]
    whole = merge(outputs, [3, 1])
    assert whole["values"].tolist() == [0, 1, 2, 0]
    assert float(whole["mean"]) == 2.0
    assert int(whole["count"]) == 4
    assert whole["names"] == ["a", "b", "c", "d"]


def test_a_tuple_is_joined_entry_by_entry_however_many_rows_a_piece_has():
    piece = (torch.zeros(2, 3), torch.zeros(2))
    assert [tuple(part.shape) for part in merge([piece, piece], [2, 2])] == [(4, 3), (4,)]


def test_a_list_that_could_be_joined_in_two_ways_is_refused():
    piece = [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(ValueError, match="merge_fn"):
        merge([piece, piece], [2, 2])
    assert merge([piece, [torch.zeros(1)]], [2, 1]) == [*piece, torch.zeros(1)]


def test_a_piece_without_an_output_is_refused_not_dropped():
    with pytest.raises(ValueError, match="merge_fn"):
        merge([None, torch.zeros(2)], [2, 2])
    assert merge([None, None], [2, 2]) is None


def test_row_counts_that_were_computed_are_rounded():
    assert len(merge([torch.zeros(1), torch.zeros(48)], [0.9999999999, 48.0000000001])) == 49


def test_what_has_no_weight_may_be_nan():
    values = [torch.tensor(float("nan")), torch.tensor(2.0)]
    assert float(weighted_mean(values, [0, 5])) == 2.0


class Results:
    """Stands in for Lightning's."""

    def __init__(self):
        self.seen = []

    def log(self, fx, name, value, **options):
        self.seen.append((fx, name, float(value), options.get("batch_size")))


def held_back(calls_per_piece, weights):
    results, logs = Results(), PieceLogs()
    with logs.hold_back(results):
        for calls, weight in zip(calls_per_piece, weights, strict=True):
            for name, value, options in calls:
                results.log("training_step", name, torch.tensor(value), **options)
            logs.discard() if weight is None else logs.keep(weight)
    assert "log" not in results.__dict__
    return results.seen


def test_logs_are_passed_on_once_weighted_and_without_those_of_failures():
    calls = [[("a", 1.0, {})], [("a", 100.0, {})], [("a", 4.0, {})]]
    assert held_back(calls, [1, None, 2]) == [("training_step", "a", 3.0, None)]
    given = [[("a", 1.0, {"batch_size": 3})], [("a", 5.0, {"batch_size": 1})]]
    assert held_back(given, [1, 1]) == [("training_step", "a", 2.0, 4)]


@pytest.mark.parametrize(
    ("reduce", "expected"), [("SUM", 5.0), ("max", 4.0), (min, 1.0), ("mean", 2.5), (torch.sum, 5.0)]
)
def test_reductions_are_what_they_say(reduce, expected):
    calls = [[("a", 1.0, {"reduce_fx": reduce})], [("a", 4.0, {"reduce_fx": reduce})]]
    assert held_back(calls, [1, 1])[0][2] == expected


def test_a_name_that_is_logged_twice_in_a_step_is_passed_on_twice():
    calls = [[("a", 1.0, {}), ("a", 10.0, {})], [("a", 3.0, {}), ("a", 30.0, {})]]
    assert [value for _, _, value, _ in held_back(calls, [1, 1])] == [2.0, 20.0]


def test_nothing_is_passed_on_after_an_error():
    results, logs = Results(), PieceLogs()
    with pytest.raises(KeyError), logs.hold_back(results):
        results.log("training_step", "a", torch.tensor(1.0))
        logs.keep(1)
        raise KeyError
    assert results.seen == []
    assert "log" not in results.__dict__
