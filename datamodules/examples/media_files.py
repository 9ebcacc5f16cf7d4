"""Files that rows name: folders with one for each class, paths, bytes, and what `datasets` stores of them."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

from lightning_llm.datamodules.cache import fingerprint
from lightning_llm.datamodules.examples.records import DatasetRecords, Record, RecordError, Records, open_records


def check_package(package: str, extra: str, what: str) -> None:
    """Refuse to begin without a package that is not installed with this one.

    Raises:
        ImportError: Saying how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{what} need a further package: pip install 'lightning-llm[{extra}]'.")


class ClassFolders(Records):
    """Files in a folder for each class, ``cats/1.png``, ``dogs/1.png``: rows of a path and a class.

    Args:
        root: The folder of the folders.
        suffixes: Of the files, in lower case; others are passed over.
        columns: What the two columns are called.
    """

    def __init__(self, root: Path, suffixes: Collection[str], columns: tuple[str, str]) -> None:
        self.name = str(root)
        self._columns = columns
        self._classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
        self._files = [
            file
            for label in self._classes
            for file in sorted((root / label).rglob("*"))
            if file.is_file() and file.suffix.lower() in suffixes
        ]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        file = self._files[index]
        return dict(zip(self._columns, (str(file), file.relative_to(self.name).parts[0]), strict=True))

    def row_name(self, index: int) -> str:
        """The file."""
        return str(self._files[index])

    def identity(self) -> str:
        """Names, sizes and times of change of all files."""
        stats = [(file, file.stat()) for file in self._files]
        return fingerprint(f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats)

    def class_names(self, column: str) -> list[str] | None:
        """The names of the folders."""
        return self._classes if column == self._columns[1] else None


class WholePaths(Records):
    """Rows whose paths start from the folder of their file, written out whole.

    Args:
        records: The rows.
        column: Of the paths.
    """

    def __init__(self, records: Records, column: str) -> None:
        self.records = records
        self.name = records.name
        self._column = column

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        record = self.records[index]
        folder, value = self.records.folder_of(index), record.get(self._column)
        if folder is None:
            return record
        if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path"):
            value = value["path"]
        if isinstance(value, str) and value.strip():
            path = Path(value).expanduser()
            is_whole = path.exists() and not (folder / path).exists()
            record[self._column] = str(path if is_whole else folder / path)
        return record

    @property
    def columns(self) -> list[str]:
        """As they are."""
        return self.records.columns

    def class_names(self, column: str) -> list[str] | None:
        """As they are."""
        return self.records.class_names(column)

    def row_name(self, index: int) -> str:
        """As it is."""
        return self.records.row_name(index)

    def identity(self) -> str:
        """As it is."""
        return self.records.identity()


def open_media(
    data: Any,
    suffixes: Collection[str],
    columns: tuple[str, str],
    *,
    split: str = "train",
    dataset_config: str | None = None,
) -> Records:
    """Open a folder with a folder for each class, or what :func:`open_records` takes; files are not decoded.

    Args:
        data: As above. A folder that has a folder of the split's name is looked for in that.
        suffixes: Of the files.
        columns: Of the files, and of the labels.
        split: Which split.
        dataset_config: For data sets on the hub.
    """
    if isinstance(data, (str, Path)):
        root = Path(data).expanduser()
        root = root / split if (root / split).is_dir() else root
        if root.is_dir() and any(file.suffix.lower() in suffixes for file in root.glob("*/**/*")):
            return ClassFolders(root, suffixes, columns)
    records = open_records(data, split=split, dataset_config=dataset_config)
    if isinstance(records, DatasetRecords):
        feature = records.dataset.features.get(columns[0])
        if hasattr(feature, "decode"):  # every look at a label would decode its image or sound
            records.dataset = records.dataset.cast_column(columns[0], type(feature)(decode=False))
    return WholePaths(records, columns[0])


def open_binary(value: Any, row: str, column: str) -> tuple[IO[bytes], str]:
    """Open the file that a row names or holds.

    Args:
        value: A path, bytes, or a mapping with ``bytes`` or ``path``.
        row: Its name.
        column: Of the value.

    Returns:
        The file, and what to call it.

    Raises:
        RecordError: If there is none.
    """
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return io.BytesIO(value), f"{len(value)} bytes"
    if not isinstance(value, (str, Path)) or not str(value).strip():
        shown = "nothing" if value is None or value == "" else type(value).__name__
        raise RecordError(f"{row}: column {column!r} should hold a path or a file's bytes, but holds {shown}.")
    path = Path(value).expanduser()
    try:
        return path.open("rb"), str(path)
    except OSError as error:
        raise RecordError(
            f"{row}: the file {path} of column {column!r} cannot be opened ({error.strerror}). Mend the path, or "
            f"leave the row out."
        ) from error
