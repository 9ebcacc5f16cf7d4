"""Rows of every kind of file, each with its name; and what is said of damaged ones."""

import gzip
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_llm.datamodules.examples.records import RecordError, check_columns, open_records

ROWS = [{"text": "one, two", "label": "x"}, {"text": 'a "quoted"\nline', "label": "y"}, {"text": "é", "label": ""}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_of(delimiter=","):
    cells = [[f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row.values()] for row in ROWS]
    return "".join(delimiter.join(row) + "\n" for row in [["text", "label"], *cells])


@pytest.fixture
def files(tmp_path):
    """The same rows in every kind of file."""
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return {
        "jsonl": write(tmp_path / "rows.jsonl", LINES),
        "gz": write(tmp_path / "rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        "blank lines and a mark": write(tmp_path / "marked.jsonl", "\ufeff" + LINES.replace("\n", "\n\n")),
        "json lines": write(tmp_path / "lines.json", LINES),
        "json list": write(tmp_path / "list.json", json.dumps(ROWS, indent=1)),
        "csv": write(tmp_path / "rows.csv", csv_of()),
        "csv with a mark": write(tmp_path / "marked.csv", "\ufeff" + csv_of()),
        "csv of another system": write(tmp_path / "returns.csv", csv_of().replace('\n"', '\r\n"')),
        "tsv": write(tmp_path / "rows.tsv", csv_of("\t")),
        "parquet": tmp_path / "rows.parquet",
    }


def all_of(records):
    return [records[index] for index in range(len(records))]


def test_every_kind_of_file_gives_the_same_rows(files):
    for kind, path in files.items():
        records = open_records(str(path))
        assert all_of(records) == ROWS, kind
        assert records.columns == ["text", "label"], kind
        assert str(path) in records.row_name(0), kind


def test_data_sets_lists_and_mappings_of_splits_give_the_same_rows(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data.select([2]), "dev": data}).save_to_disk(tmp_path / "splits")
    assert all_of(open_records(ROWS)) == all_of(open_records(data)) == all_of(open_records(tmp_path / "saved")) == ROWS
    assert all_of(open_records(tmp_path / "splits", split="dev")) == ROWS
    assert all_of(open_records(datasets.DatasetDict({"train": data}))) == ROWS
    assert all_of(open_records({"train": [], "dev": ROWS}, split="dev")) == ROWS
    with pytest.raises(ValueError, match=r"no split 'test'; its splits are \['dev', 'train'\]"):
        open_records(tmp_path / "splits", split="test")


def test_several_files_and_folders_follow_each_other_and_name_their_own_rows(tmp_path, files):
    folder = tmp_path / "folder"
    write(folder / "b" / "2.jsonl", LINES)
    write(folder / "a.csv", csv_of())
    write(folder / "empty.jsonl", "")
    write(folder / "notes.txt", "not for reading")
    records = open_records([str(folder), str(files["parquet"])])
    assert all_of(records) == ROWS * 3
    assert records.row_name(2) == f"{folder}/a.csv, row 3"
    assert records.row_name(3) == f"{folder}/b/2.jsonl, line 1"
    assert records.row_name(8) == f"{files['parquet']}, row 2"
    assert records.identity() != open_records([str(folder)]).identity()


def test_row_names_count_lines_of_jsonl_and_rows_of_tables(files):
    assert open_records(files["blank lines and a mark"]).row_name(2).endswith("line 5")
    assert open_records(files["csv"]).row_name(1).endswith("row 2")  # the third has a line break in it
    assert open_records(files["parquet"]).row_name(1).endswith("row 1")
    assert open_records(ROWS).row_name(1) == "the data, row 1"


def test_a_long_cell_of_a_csv_file_is_read(tmp_path):
    write(tmp_path / "long.csv", "text,label\n" + "x" * 3_000_000 + ",y\n")
    assert len(open_records(tmp_path / "long.csv")[0]["text"]) == 3_000_000


def test_identity_follows_the_content_of_rows_in_memory():
    long = np.zeros(5000)
    other = long.copy()
    other[2500] = 1  # where `repr` shows dots
    assert repr(long) == repr(other)
    assert open_records([{"a": long}]).identity() != open_records([{"a": other}]).identity()
    assert open_records([{"a": [long]}]).identity() != open_records([{"a": [other]}]).identity()
    assert open_records([{"a": long}]).identity() == open_records([{"a": long.copy()}]).identity()


def test_names_of_classes_come_with_a_data_set():
    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"label": names, "tags": datasets.Sequence(names), "text": datasets.Value("string")})
    records = open_records(datasets.Dataset.from_dict({"label": [0], "tags": [[1]], "text": ["a"]}, features=features))
    assert records.class_names("label") == records.class_names("tags") == ["no", "yes"]
    assert records.class_names("text") is None


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', RecordError, r"a.jsonl, line 2 is not valid JSON .* Mend the line"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', RecordError, r"line 2 is not valid JSON .*can't decode byte 0xff"),
        ("a.jsonl", '{"a": 1}\n[1]\n', RecordError, "line 2 is not a JSON object with columns, but a list"),
        ("a.jsonl", "\n\n", ValueError, "a.jsonl has no row; expected one at least"),
        ("a.jsonl", "", ValueError, "a.jsonl is empty"),
        (
            "a.json",
            '[{"a": 1}, 2]',
            RecordError,
            "a.json, row 1 should be a mapping of columns to values, but is a int",
        ),
        ("a.json", '[{"a": 1}, ', ValueError, "a.json cannot be read"),
        ("a.csv", "a,b\n1,2\n3\n", ValueError, "a.csv cannot be read: .*Row #3: Expected 2 columns, got 1"),
        ("a.csv", "a,b\n1,2\n3,4,5\n", ValueError, "Row #3: Expected 2 columns, got 3"),
        ("a.csv", "a,a\n1,2\n", ValueError, r"header \['a', 'a'\] names a column twice"),
        ("a.csv", "a,b\n", ValueError, "a.csv has no row"),
        ("a.csv", b"a,b\n\xff,2\n", ValueError, "a.csv cannot be read: .*utf-8"),
        ("a.parquet", "PAR1 and no more", ValueError, "a.parquet cannot be read: .*magic bytes"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], ValueError, "a.jsonl.gz cannot be read"),
        ("a.xlsx", "a", ValueError, r"Cannot tell what .*a.xlsx holds from its name. Expected .csv, .json"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, error, message):
    with pytest.raises(error, match=message):
        all_of(open_records(write(tmp_path / name, content)))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "There is no data: expected files"),
        (None, ValueError, "There is no data"),
        ("missing.csv", FileNotFoundError, "no file or folder at missing.csv"),
        ([{"a": 1}, "b"], RecordError, "the data, row 1 should be a mapping"),
        ({"train": ROWS}, ValueError, r"no split 'dev'; its splits are \['train'\]"),
        (
            datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
            TypeError,
            "Load a streamed data set without streaming",
        ),
        ((row for row in ROWS), TypeError, "but got a generator"),
        (datasets.Dataset.from_list([]), ValueError, "the data set has no row"),
    ],
)
def test_what_is_no_data_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        open_records(data, split="dev")


def test_a_folder_without_rows_is_refused(tmp_path):
    write(tmp_path / "notes.txt", "a")
    with pytest.raises(FileNotFoundError, match="holds nothing to read"):
        open_records(tmp_path)


def test_missing_columns_are_named_with_those_that_there_are(files):
    with pytest.raises(
        RecordError, match=r"row 1 has no column 'body' and no column 'tag'; its columns are .*'text'.* Say"
    ):
        check_columns(open_records(files["csv"]), ["text", "body", "tag"], "Say which.")
