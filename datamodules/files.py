"""Files and data sets as users name them: what a path is, lines of compressed files, `datasets` on disk or hub."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa


def suffix_of(path: Path) -> str:
    """The suffix in lower case; of a compressed file with what it compresses (``.jsonl.gz``)."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        return "".join(suffixes[-2:])
    return suffixes[-1] if suffixes else ""


def lines_of(path: Path) -> Iterator[tuple[bytes, int]]:
    """Lines, and how many bytes of the file were read for each.

    Arrow's decompressors notice a file that was cut short; they read ahead, so that many lines come with none.
    """
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    with path.open("rb") as file:
        if compression is None:
            yield from ((line, len(line)) for line in file)
            return
        at = 0
        with io.BufferedReader(pa.input_stream(file, compression=compression), 1 << 20) as lines:
            for line in lines:
                before, at = at, file.tell()
                yield line, at - before


def looks_like_path(data: str | Path, suffixes: Collection[str]) -> bool:
    """Hub ids are 'name' or 'owner/name'; anything with a known ending or more separators is meant as a path."""
    text = str(data)
    return (
        isinstance(data, Path)
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or "\\" in text
        or suffix_of(Path(text)) in suffixes
    )


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by ``Dataset.save_to_disk``."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def load_saved_dataset(path: Path, split: str) -> Any:
    """A split of what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    import datasets

    return choose_split(datasets.load_from_disk(str(path)), str(path), split)


def load_hub_dataset(name: str, config: str | None, split: str) -> Any:
    """A split of a data set on the hub.

    Raises:
        FileNotFoundError: If the hub has none of that name, or cannot be reached.
        ValueError: If it has no such split.
    """
    import datasets

    try:
        found = datasets.load_dataset(name, config)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a file or folder here nor a data set that the hub gives ({error}). Check the "
            f"spelling, the path, and the connection."
        ) from error
    return choose_split(found, name, split)


def choose_split(found: Any, name: str, split: str) -> Any:
    """A split of a mapping of splits; what is no such mapping is a split itself.

    Raises:
        ValueError: If there is no such split.
    """
    if not isinstance(found, Mapping):
        return found
    if split not in found:
        raise ValueError(f"{name} has no split {split!r}; its splits are {sorted(found)}.")
    return found[split]


def file_identity(path: Path) -> str:
    """A file's path, size and time of change."""
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
