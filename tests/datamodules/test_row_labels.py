"""Labels of rows: names and numbers of classes, several classes, numbers; each bad one with its row."""

import datasets
import numpy as np
import pytest

from lightning_llm.datamodules.examples.class_names import ClassNames
from lightning_llm.datamodules.examples.labels import RowLabels
from lightning_llm.datamodules.examples.records import RecordError, open_records

SINGLE, SEVERAL = "single_label_classification", "multi_label_classification"


def labels_of(values, problem_type=SINGLE, columns="label", **options):
    """Learn and encode a column of labels."""
    rows = [value if isinstance(value, dict) else {"label": value} for value in values]
    records = open_records(rows)
    labels = RowLabels(columns, problem_type, **options)
    labels.learn(records)
    encoded = [labels.encode(records[number], records.row_name(number)) for number in range(len(records))]
    return labels.names, [np.asarray(value).tolist() for value in encoded]


@pytest.mark.parametrize(
    ("values", "names", "numbers"),
    [
        (["good", " bad ", "good"], ["bad", "good"], [1, 0, 1]),
        ([2, 0, 1], ["0", "1", "2"], [2, 0, 1]),
        (["2", "0", "10"], [str(n) for n in range(11)], [2, 0, 10]),  # a csv file's, in the order of numbers
        ([True, False], ["0", "1"], [1, 0]),
        ([np.int64(1), np.int32(0)], ["0", "1"], [1, 0]),
        ([1.0, 0.0], ["0", "1"], [1, 0]),  # of a table that had gaps
    ],
)
def test_classes_are_found_in_the_rows(values, names, numbers):
    assert labels_of(values) == (names, numbers)


def test_names_that_are_given_decide_the_order():
    assert labels_of(["good", "bad", 0], names=["good", "bad"]) == (["good", "bad"], [0, 1, 0])


def test_a_number_of_classes_numbers_them_from_0():
    assert labels_of([2, "0", 1], names=3) == (["0", "1", "2"], [2, 0, 1])
    with pytest.raises(RecordError, match="holds 3, which is none of the 3 classes"):
        labels_of([3], names=3)


@pytest.mark.parametrize("names", ["good,bad", 0, True])
def test_names_that_are_no_list_are_refused(names):
    with pytest.raises(ValueError, match="`labels` are the names of the classes, a list, or how many"):
        labels_of(["good"], names=names)


def test_numbers_are_names_where_all_names_are_numbers():
    """Ratings from 1 to 5: a csv file's text and a parquet file's number are the same class."""
    stars = ["1", "2", "3", "4", "5"]
    assert labels_of([1, 5, "3"], names=stars)[1] == labels_of(["1", "5", "3"], names=stars)[1] == [0, 4, 2]
    with pytest.raises(RecordError, match=r"the data, row 0: column 'label' holds 0, which is none of the 5 classes"):
        labels_of([0], names=stars)


def test_a_data_sets_own_numbers_are_positions_whatever_the_names():
    features = datasets.Features({"label": datasets.ClassLabel(names=["1", "0"])})
    records = open_records(datasets.Dataset.from_dict({"label": [0, 1]}, features=features))
    labels = RowLabels("label", SINGLE)
    labels.learn(records)
    assert labels.names == ["1", "0"]
    assert [labels.encode(records[n], "") for n in range(2)] == [0, 1]


def test_several_classes_are_lists_texts_or_columns():
    expected = (["a", "b", "c"], [[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    assert labels_of([["a", "c"], [], ["b"]], SEVERAL) == expected
    assert labels_of(["a, c", "", "b"], SEVERAL) == expected
    assert labels_of(["a|c", "", "b"], SEVERAL, separator="|") == expected
    columns = [{"a": "1", "b": 0, "c": True}, {"a": 0, "b": 0, "c": 0}, {"a": "false", "b": "true", "c": "0"}]
    assert labels_of(columns, SEVERAL, ["a", "b", "c"]) == expected
    assert labels_of([["b"]], SEVERAL, names=["a", "b"])[1] == [[0, 1]]


def test_regression_reads_numbers_and_lists_of_them():
    assert labels_of(["1.5", 2, -3], "regression") == (["label"], [1.5, 2, -3])
    assert labels_of([[1, "2"]], "regression", names=["x", "y"]) == (["x", "y"], [[1, 2]])
    assert labels_of([{"x": 1, "y": "2"}], "regression", ["x", "y"]) == (["x", "y"], [[1, 2]])


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (["a", None], {}, "row 1: column 'label' should hold the name or the number of a class, but holds None"),
        (["a", " "], {}, "row 1: column 'label' should hold the name or the number .* holds ' '"),
        (["a", ["b"]], {}, "row 1: column 'label' should hold the name or the number"),
        ([1, 0.5], {}, "row 1: column 'label' .* holds 0.5"),
        ([0, -1], {}, "row 1: column 'label' should hold a class from 0 on, but holds -1"),
        (["a", 1], {}, "row 1: column 'label' holds 1, which is a number, unlike the label of the data, row 0"),
        ([1, "a"], {}, "row 1: column 'label' holds 'a', which is a name, unlike the label of the data, row 0"),
        (
            ["a", "c"],
            {"names": ["a", "b"]},
            r"row 1: column 'label' holds 'c', which is none of the 2 classes \(a, b\)",
        ),
        ([2], {"names": ["a", "b"]}, "row 0: column 'label' holds 2, which is none of the 2 classes"),
        (["²"], {"names": ["a", "b"]}, "row 0: column 'label' holds '²', which is none"),
        (
            [["a"], 3],
            {"problem_type": SEVERAL},
            "row 1: .* should hold the classes of the row, a list or a text with ','",
        ),
        ([["a"], ["b", "x"]], {"problem_type": SEVERAL, "names": ["a", "b"]}, "row 1: .* holds 'x'"),
        ([1, "many"], {"problem_type": "regression"}, "row 1: column 'label' should hold a number, but holds 'many'"),
        ([1, float("nan")], {"problem_type": "regression"}, "row 1: .* should hold a number, but holds nan"),
        ([[1, 2], [3]], {"problem_type": "regression", "names": ["x", "y"]}, "row 1: expected 2 numbers"),
        ([{"a": 1, "b": 2}], {"problem_type": SEVERAL, "columns": ["a", "b"]}, "row 0: column 'b' should hold 0 or 1"),
        (
            [{"a": 1, "b": None}],
            {"problem_type": SEVERAL, "columns": ["a", "b"]},
            "row 0: column 'b' should hold .*holds None",
        ),
        ([{"a": 1, "b": "x"}], {"problem_type": "regression", "columns": ["a", "b"]}, "row 0: column 'b' .* holds 'x'"),
    ],
)
def test_bad_labels_are_named_with_their_row(values, options, message):
    with pytest.raises(RecordError, match=message):
        labels_of(values, **options)


def test_numbers_that_would_make_millions_of_classes_are_refused():
    with pytest.raises(ValueError, match="holds the number 20240131. Classes are numbered from 0 on"):
        labels_of([20240131])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b"], SINGLE), r"A row has one class, in one column, but `label_column` names \['a', 'b'\]"),
        (("label", "ranking"), "`problem_type` must be one of"),
        (("label", SINGLE, ["a", "a"]), "must have names that differ"),
        ((["a", "b"], "regression", ["a"]), "`labels` must name all of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RowLabels(*arguments)


def test_found_names_are_in_order_whatever_the_rows_order():
    found = ClassNames.found_in([(label, "") for label in "cab"], "label")
    assert found.names == ["a", "b", "c"]
