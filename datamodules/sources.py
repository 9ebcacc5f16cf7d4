"""Where documents come from: files and folders, jsonl, parquet, `datasets`, the standard library.

A source yields documents one by one, in an order that only depends on the data, and never holds them all.
"""

from __future__ import annotations

import json
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_llm.datamodules.cache import fingerprint
from lightning_llm.datamodules.corpus import manual_topics, stdlib_files
from lightning_llm.datamodules.files import (
    file_identity,
    is_saved_dataset,
    lines_of,
    load_hub_dataset,
    load_saved_dataset,
    looks_like_path,
    suffix_of,
)

log = logging.getLogger(__name__)

STDLIB = "python-stdlib"

_TEXT_SUFFIXES = frozenset(
    [
        ".txt",
        ".text",
        ".md",
        ".markdown",
        ".rst",
        ".tex",
        ".html",
        ".xml",
        ".css",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".cfg",
        ".sql",
        ".sh",
        ".py",
        ".pyi",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".cxx",
        ".hpp",
        ".cu",
        ".cs",
        ".java",
        ".kt",
        ".scala",
        ".go",
        ".rs",
        ".js",
        ".jsx",
        ".ts",
        ".tsx",
        ".rb",
        ".php",
        ".pl",
        ".lua",
        ".r",
        ".jl",
        ".swift",
        ".hs",
        ".ml",
        ".ex",
        ".erl",
        ".clj",
        ".lisp",
        ".el",
        ".vim",
        ".f90",
        ".m",
        ".asm",
        ".s",
        ".proto",
        ".cmake",
    ]
)
_TABLE_SUFFIXES = frozenset({".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"})


class Document(NamedTuple):
    """A text and what to call it in messages.

    Attributes:
        name: For messages.
        text: All of it.
        num_bytes: Its share of the source's ``total_bytes``, for progress bars.
    """

    name: str
    text: str
    num_bytes: float = 0.0


class CorruptDataError(ValueError):
    """A record that cannot be read, named by file and line."""


class DocumentSource(ABC):
    """Documents, and an identity that changes when they do."""

    name: str

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield all documents, in a fixed order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identify the data: another value for other documents or another order."""

    @property
    @abstractmethod
    def total_bytes(self) -> int:
        """How much there is to read, as it lies on disk: the sum of all documents' ``num_bytes``."""


class StdlibSource(DocumentSource):
    """The running Python's standard library: its source without tests, and its manual."""

    name = STDLIB

    def documents(self) -> Iterator[Document]:
        """Yield each module's source, then each topic of the manual."""
        for path in stdlib_files():
            yield Document(str(path), path.read_text(encoding="utf-8", errors="replace"), path.stat().st_size)
        for topic, text in manual_topics():
            yield Document(f"manual: {topic}", text, len(text.encode()))

    def fingerprint(self) -> str:
        """The Python version and its files."""
        return fingerprint([sys.version, *map(file_identity, stdlib_files())])

    @property
    def total_bytes(self) -> int:
        """Bytes of the files and the manual."""
        files = sum(path.stat().st_size for path in stdlib_files())
        return files + sum(len(text.encode()) for _, text in manual_topics())


class FileSource(DocumentSource):
    """Text, markdown and source files (a document each), jsonl and parquet files (a document a row).

    Args:
        files: In reading order.
        name: For messages.
        text_column: The field of a jsonl or parquet row that holds the text.
        skip_corrupt: Leave out what cannot be read, and warn how much that was, instead of raising.
    """

    def __init__(self, files: Sequence[Path], name: str, text_column: str, skip_corrupt: bool) -> None:
        self.files = list(files)
        self.name = name
        self.text_column = text_column
        self.skip_corrupt = skip_corrupt

    def fingerprint(self) -> str:
        """Each file's path, size and time of change, and how rows are read."""
        return fingerprint([*map(file_identity, self.files), self.text_column, str(self.skip_corrupt)])

    @property
    def total_bytes(self) -> int:
        """Sizes of the files, compressed ones as they are."""
        return sum(path.stat().st_size for path in self.files)

    def documents(self) -> Iterator[Document]:
        """Yield the documents file by file."""
        records = (record for path in self.files for record in self._records(path))
        return _read_all(records, self.name, self.skip_corrupt)

    def _records(self, path: Path) -> Iterator[_Record]:
        """Each record's name, how to read its text, and its share of the file."""
        suffix = suffix_of(path)
        try:
            if suffix == ".parquet":
                for row, (value, size) in enumerate(_parquet_column(path, self.text_column)):
                    yield f"{path}, row {row}", partial(check_text, self.text_column, value), size
            elif suffix in _TABLE_SUFFIXES:
                for number, (line, size) in enumerate(lines_of(path), start=1):
                    if line.strip():
                        yield f"{path}, line {number}", partial(json_field, self.text_column, line), size
            else:
                data = path.read_bytes()
                yield str(path), partial(decode, data), len(data)
        except (OSError, pa.ArrowInvalid) as error:
            if getattr(error, "errno", None) is not None:
                raise  # the disk's or the system's, not the file's
            raise ValueError(f"{path} is damaged or cut short ({error}). Copy or download it again.") from error


class DatasetSource(DocumentSource):
    """A `datasets` data set with random access.

    Args:
        dataset: One split.
        name: For messages.
        text_column: The column that holds the text.
        skip_corrupt: Leave out rows whose text is none, with a warning, instead of raising.
    """

    def __init__(self, dataset: Any, name: str, text_column: str, skip_corrupt: bool) -> None:
        if text_column not in dataset.column_names:
            raise no_column(name, text_column, dataset.column_names)
        self.dataset = dataset
        self.name = name
        self.text_column = text_column
        self.skip_corrupt = skip_corrupt

    def documents(self) -> Iterator[Document]:
        """Yield the text column, row by row."""
        batches = self.dataset.select_columns([self.text_column]).iter(batch_size=256)
        values = enumerate(value for batch in batches for value in batch[self.text_column])
        size = self.total_bytes / max(len(self.dataset), 1)
        records = (
            (f"{self.name}, row {row}", partial(check_text, self.text_column, value), size) for row, value in values
        )
        return _read_all(records, self.name, self.skip_corrupt)

    @property
    def total_bytes(self) -> int:
        """Bytes of the text column, where the data set is a part of its table in proportion to its rows."""
        table = self.dataset.data
        return int(table.column(self.text_column).nbytes * len(self.dataset) / max(table.num_rows, 1))

    def fingerprint(self) -> str:
        """The fingerprint that `datasets` keeps, and the column."""
        return fingerprint([self.dataset._fingerprint, self.text_column, str(self.skip_corrupt)])


_Record = tuple[str, Callable[[str], str], float]  # what to call it in messages, how to read its text, bytes on disk


def _read_all(records: Iterable[_Record], source: str, skip_corrupt: bool) -> Iterator[Document]:
    skipped: list[str] = []
    for name, read, num_bytes in records:
        try:
            yield Document(name, read(name), num_bytes)
        except CorruptDataError as error:
            if not skip_corrupt:
                raise
            skipped.append(str(error))
    if skipped:
        log.warning("Skipped %d corrupt records of %s. The first: %s", len(skipped), source, skipped[0])


def open_source(
    data: str | Path | Sequence[str | Path],
    *,
    text_column: str = "text",
    split: str = "train",
    dataset_config: str | None = None,
    skip_corrupt: bool = False,
) -> DocumentSource:
    """Find out what the user named.

    Args:
        data: ``"python-stdlib"``; a file or a folder, or several; a folder written by ``Dataset.save_to_disk``; or
            the id of a data set on the hub.
        text_column: The field or column that holds the text, where there are several.
        split: For data sets: which split.
        dataset_config: For hub data sets: which configuration.
        skip_corrupt: Leave out unreadable records with a warning instead of raising.

    Raises:
        FileNotFoundError: If a file or folder does not exist, or nothing in a folder can be read.
        ValueError: If a file is empty or of an unknown kind, or a split does not exist.
    """
    if isinstance(data, (str, Path)):
        path = Path(data).expanduser()
        if str(data) == STDLIB:
            return StdlibSource()
        if path.is_dir() and is_saved_dataset(path):
            return DatasetSource(load_saved_dataset(path, split), str(path), text_column, skip_corrupt)
        if not path.exists() and not looks_like_path(data, _TEXT_SUFFIXES | _TABLE_SUFFIXES):
            return DatasetSource(
                load_hub_dataset(str(data), dataset_config, split), str(data), text_column, skip_corrupt
            )
        data = [data]
    files = [file for entry in data for file in _files(Path(entry).expanduser())]
    name = str(data[0]) if len(data) == 1 else f"{data[0]} and {len(data) - 1} more"
    return FileSource(files, name, text_column, skip_corrupt)


def _files(path: Path) -> list[Path]:
    kinds = (
        f"text and source files ({', '.join(sorted(_TEXT_SUFFIXES)[:6])}, ...) or {', '.join(sorted(_TABLE_SUFFIXES))}"
    )
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"The file {path} is empty. Expected {kinds}.")
        if suffix_of(path) not in _TEXT_SUFFIXES | _TABLE_SUFFIXES:
            raise ValueError(f"Cannot tell what {path} holds from its name. Expected {kinds}.")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder at {path}. Check the path, or pass a data set id.")
    visible = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
    files = sorted(file for file in visible if file.is_file() and suffix_of(file) in _TEXT_SUFFIXES | _TABLE_SUFFIXES)
    if not any(file.stat().st_size for file in files):
        raise FileNotFoundError(f"The folder {path} holds nothing to read. Expected {kinds}.")
    return files


def decode(data: bytes, name: str) -> str:
    """Text of UTF-8 bytes.

    Raises:
        CorruptDataError: If they are none.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptDataError(
            f"{name} is not UTF-8 text (byte {error.start}: {error.reason}). Convert it, or pass skip_corrupt=True to "
            f"leave it out."
        ) from error


def json_field(column: str, line: bytes, name: str) -> str:
    """The text in a field of a line of JSON.

    Raises:
        CorruptDataError: If the line is not an object of JSON, or the field no text.
        ValueError: If there is no such field.
    """
    try:
        record = json.loads(decode(line, name))
    except json.JSONDecodeError as error:
        raise CorruptDataError(
            f"{name} is not valid JSON ({error}). Mend the line, or pass skip_corrupt=True to leave it out."
        ) from error
    if not isinstance(record, dict):
        raise CorruptDataError(f"{name} is not a JSON object with a field {column!r}, but a {type(record).__name__}.")
    if column not in record:
        raise no_column(name, column, sorted(record))
    return check_text(column, record[column], name)


def check_text(column: str, value: Any, name: str) -> str:
    """The text itself; JSON can spell halves of characters, which are no text."""
    if not isinstance(value, str):
        raise CorruptDataError(
            f"{name}: column {column!r} should hold text, but holds {type(value).__name__}. Pass text_column=..., or "
            f"skip_corrupt=True to leave such rows out."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CorruptDataError(
            f"{name}: column {column!r} holds half of a surrogate pair at character {error.start}, which is no text. "
            f"Mend it, or pass skip_corrupt=True to leave such rows out."
        ) from error
    return value


def no_column(name: str, column: str, columns: Sequence[str]) -> ValueError:
    """The error for a column that is not there."""
    return ValueError(f"{name} has no column {column!r}; its columns are {list(columns)}. Pass text_column=...")


def _parquet_column(path: Path, column: str) -> Iterator[tuple[Any, float]]:
    file = pq.ParquetFile(path)
    if column not in file.schema_arrow.names:
        raise no_column(str(path), column, file.schema_arrow.names)
    size = path.stat().st_size / max(file.metadata.num_rows, 1)
    for batch in file.iter_batches(columns=[column]):
        yield from ((value, size) for value in batch.column(0).to_pylist())
