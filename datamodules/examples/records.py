"""Rows of a table by their number: jsonl, csv, parquet, `datasets`, or a list; each has a name for messages."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from lightning_llm.datamodules.cache import fingerprint
from lightning_llm.datamodules.files import (
    choose_split,
    file_identity,
    is_saved_dataset,
    lines_of,
    load_hub_dataset,
    load_saved_dataset,
    looks_like_path,
    suffix_of,
)

RECORD_SUFFIXES = frozenset({".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".tsv", ".parquet"})

Record = dict[str, Any]

UNKNOWN: Any = object()  # in the place of a target, in rows of data that have none and are to be predicted

_CSV_BLOCK = 1 << 26  # bytes; no row may be longer


class RecordError(ValueError):
    """A row that cannot be used, named by file and row."""


class Records(ABC):
    """Rows, each a mapping of columns to values."""

    name: str
    folder: Path | None = None  # that paths in the rows start from

    @abstractmethod
    def __len__(self) -> int:
        """How many rows there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """A row."""

    @abstractmethod
    def row_name(self, index: int) -> str:
        """What to call a row in messages."""

    @abstractmethod
    def identity(self) -> str:
        """Another value for other data."""

    @property
    def columns(self) -> list[str]:
        """Names of the columns, where they are the same for all rows; else those of the first row."""
        return list(self[0]) if len(self) else []

    def class_names(self, column: str) -> list[str] | None:
        """Names of a column's classes, where the data set itself says them (``datasets.ClassLabel``)."""
        return None

    def folder_of(self, index: int) -> Path | None:
        """The folder that a path in a row starts from; None: where the process runs."""
        return self.folder


class JsonLines(Records):
    """A jsonl file: an index of its lines, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self._lines: list[bytes] | None = None
        if path.suffix.lower() in (".gz", ".zst"):  # no line of these can be read alone
            found = [(line, number) for number, (line, _) in enumerate(lines_of(path), 1) if line.strip()]
            self._lines = [line for line, _ in found]
            self._numbers = np.array([number for _, number in found], np.int64)
            return
        begins, sizes, numbers, at = [], [], [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    begins.append(at)
                    sizes.append(len(line))
                    numbers.append(number)
                at += len(line)
        self._begins, self._sizes = np.array(begins, np.int64), np.array(sizes, np.int64)
        self._numbers = np.array(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        if self._lines is not None:
            line = self._lines[index]
        else:
            with self.path.open("rb") as file:
                file.seek(int(self._begins[index]))
                line = file.read(int(self._sizes[index]))
        name = self.row_name(index)
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:  # of the JSON, or of the UTF-8
            raise RecordError(f"{name} is not valid JSON ({error}). Mend the line.") from error
        if not isinstance(record, dict):
            raise RecordError(f"{name} is not a JSON object with columns, but a {type(record).__name__}.")
        return record

    def row_name(self, index: int) -> str:
        """File and line, counted from 1."""
        return f"{self.path}, line {self._numbers[index]}"

    def identity(self) -> str:
        """Path, size and time of change."""
        return file_identity(self.path)


class Table(Records):
    """An Arrow table, of a csv or a parquet file.

    Args:
        table: The rows.
        name: For messages.
        identity: See :meth:`Records.identity`.
        first: What the first row is called.
    """

    def __init__(self, table: pa.Table, name: str, identity: str, first: int = 0) -> None:
        self.table = table
        self.name = name
        self._identity = identity
        self._first = first

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Record:
        record: Record = self.table.slice(index, 1).to_pylist()[0]
        return record

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.table.column_names)

    def row_name(self, index: int) -> str:
        """File and row."""
        return f"{self.name}, row {index + self._first}"

    def identity(self) -> str:
        """That of the file."""
        return self._identity


class ListedRecords(Records):
    """Rows in memory."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], name: str = "the data", identity: str | None = None) -> None:
        wrong = next((number for number, row in enumerate(rows) if not isinstance(row, Mapping)), None)
        if wrong is not None:
            raise RecordError(
                f"{name}, row {wrong} should be a mapping of columns to values, but is a {type(rows[wrong]).__name__}."
            )
        self.rows = rows
        self.name = name
        self._identity = identity

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        return dict(self.rows[index])

    def row_name(self, index: int) -> str:
        """Its number, counted from 0."""
        return f"{self.name}, row {index}"

    def identity(self) -> str:
        """What the rows hold."""
        return self._identity or fingerprint(map(_content, self.rows))


class DatasetRecords(Records):
    """A `datasets` data set with random access."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset = dataset
        self.name = name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record:
        return dict(self.dataset[int(index)])

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.dataset.column_names)

    def class_names(self, column: str) -> list[str] | None:
        """Names of a ``ClassLabel``, or of a list of them."""
        feature = self.dataset.features.get(column)
        feature = getattr(feature, "feature", feature)
        names = getattr(feature, "names", None)
        return None if names is None else [str(name) for name in names]

    def row_name(self, index: int) -> str:
        """Its number, counted from 0."""
        return f"{self.name}, row {index}"

    def identity(self) -> str:
        """The fingerprint that `datasets` keeps."""
        return str(self.dataset._fingerprint)


class JoinedRecords(Records):
    """Several files, one after the other."""

    def __init__(self, parts: Sequence[Records], name: str) -> None:
        self.parts = list(parts)
        self.name = name
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        part, inside = self._find(index)
        return part[inside]

    def row_name(self, index: int) -> str:
        """That of the file."""
        part, inside = self._find(index)
        return part.row_name(inside)

    def folder_of(self, index: int) -> Path | None:
        """That of the file."""
        part, inside = self._find(index)
        return part.folder_of(inside)

    def identity(self) -> str:
        """Those of the files."""
        return fingerprint(part.identity() for part in self.parts)

    def _find(self, index: int) -> tuple[Records, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[number], index - int(self._ends[number]) + len(self.parts[number])


def open_records(data: Any, *, split: str = "train", dataset_config: str | None = None) -> Records:
    """Find out what the user named.

    Args:
        data: A ``.jsonl`` (also ``.gz``, ``.zst``), ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, a folder of
            them, or several; a folder written by ``Dataset.save_to_disk``; the id of a data set on the hub; a
            `datasets` data set, or a mapping of splits to them; or a list of mappings.
        split: For data sets: which split.
        dataset_config: For data sets on the hub: which configuration.

    Raises:
        FileNotFoundError: If a file or folder does not exist, or a folder holds none of these.
        ValueError: If a file is empty, damaged or of an unknown kind, or a split does not exist.
        TypeError: If ``data`` is nothing of these, such as a data set that is only streamed.
    """
    if isinstance(data, Mapping):
        data = choose_split(data, "The mapping that is passed as data", split)
    if hasattr(data, "column_names") and hasattr(data, "__len__"):
        return _not_empty(DatasetRecords(data, "the data set"))
    if isinstance(data, Sequence) and not isinstance(data, str) and data and not isinstance(data[0], (str, Path)):
        return ListedRecords(data)
    if data is not None and not isinstance(data, (str, Path, Sequence)):
        raise TypeError(
            f"Expected files ({_kinds()}), a data set with random access, or a list of mappings, but got a "
            f"{type(data).__name__}. Load a streamed data set without streaming=True; write a generator's rows to a "
            f"file, or make a list of them."
        )
    if isinstance(data, (str, Path)):
        path = Path(data).expanduser()
        if path.is_dir() and is_saved_dataset(path):
            return _not_empty(DatasetRecords(load_saved_dataset(path, split), str(path)))
        if not path.exists() and not looks_like_path(data, RECORD_SUFFIXES):
            return _not_empty(DatasetRecords(load_hub_dataset(str(data), dataset_config, split), str(data)))
        data = [data]
    if not data:
        raise ValueError(f"There is no data: expected files ({_kinds()}), a data set or rows, but got {data!r}.")
    files = [file for entry in data for file in record_files(Path(entry).expanduser())]
    parts = [_open_file(file) for file in files]
    for part, file in zip(parts, files, strict=True):
        part.folder = file.parent
    return _not_empty(parts[0] if len(parts) == 1 else JoinedRecords(parts, f"{data[0]}"))


def check_columns(records: Records, columns: Iterable[str], advice: str) -> None:
    """Refuse a table that lacks columns.

    Args:
        records: The table.
        columns: That it must have.
        advice: Which arguments name them.

    Raises:
        RecordError: Naming the first row, and the columns that there are.
    """
    missing = [column for column in columns if column not in records.columns]
    if missing and len(records):
        raise RecordError(
            f"{records.row_name(0)} has no column {' and no column '.join(map(repr, missing))}; its columns are "
            f"{sorted(records.columns)}. {advice}"
        )


def record_files(path: Path) -> list[Path]:
    """A file, or the files of a folder, in order.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If the file is of an unknown kind, or empty.
    """
    if path.is_file():
        if suffix_of(path) not in RECORD_SUFFIXES:
            raise ValueError(f"Cannot tell what {path} holds from its name. Expected {_kinds()}.")
        if not path.stat().st_size:
            raise ValueError(f"The file {path} is empty. Expected {_kinds()}.")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder at {path}. Check the path, or pass a data set id.")
    files = sorted(file for file in path.rglob("*") if file.is_file() and suffix_of(file) in RECORD_SUFFIXES)
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise FileNotFoundError(f"The folder {path} holds nothing to read. Expected {_kinds()}.")
    return files


def _not_empty(records: Records) -> Records:
    if not len(records):
        raise ValueError(f"{records.name} has no row; expected one at least.")
    return records


def _content(value: Any) -> str:
    """All of a value, where ``repr`` would leave out the middle of an array or name a place in memory."""
    if isinstance(value, Mapping):
        return repr([(key, _content(entry)) for key, entry in value.items()])
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (str, int, float)):
        return repr([_content(entry) for entry in value])
    if hasattr(value, "tobytes"):  # an array, an image
        return f"{getattr(value, 'shape', getattr(value, 'size', ''))} {fingerprint([value.tobytes().hex()])}"
    return repr(value)


def _kinds() -> str:
    return ", ".join(sorted(RECORD_SUFFIXES))


def _open_file(path: Path) -> Records:
    suffix = suffix_of(path)
    try:
        if suffix == ".parquet":
            return Table(pq.read_table(path, memory_map=True), str(path), file_identity(path))
        if suffix in (".csv", ".tsv"):
            return _read_csv(path, "\t" if suffix == ".tsv" else ",")
        if suffix == ".json" and path.read_text(encoding="utf-8-sig").lstrip()[:1] == "[":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            return ListedRecords(rows, str(path), file_identity(path))
        return JsonLines(path)
    except RecordError:
        raise
    except (OSError, pa.ArrowInvalid, ValueError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the disk's or the system's, not the file's
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_csv(path: Path, delimiter: str) -> Records:
    """All columns as text: what a column means is said by whoever reads it."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=delimiter), [])
    if len(set(header)) < len(header):
        raise ValueError(f"its header {header} names a column twice.")
    table = pacsv.read_csv(
        path,
        read_options=pacsv.ReadOptions(block_size=_CSV_BLOCK, use_threads=False),  # one thread names a bad row
        parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(column_types={name: pa.string() for name in header}),
    )
    return Table(table, str(path), file_identity(path), first=1)
