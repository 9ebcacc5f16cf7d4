"""From what the user named to shards: addresses of files, data sets in hand, on disk or on the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec

from lightning_llm.datamodules.streams.dataset_shards import DatasetShards, IterableShards
from lightning_llm.datamodules.streams.file_shards import SHARD_SUFFIXES, FileShards
from lightning_llm.datamodules.streams.shards import ShardedSource


def open_shards(
    data: Any,
    *,
    text_column: str = "text",
    split: str = "train",
    dataset_config: str | None = None,
    skip_corrupt: bool = False,
    storage_options: dict[str, Any] | None = None,
) -> ShardedSource:
    """Find out what the user named.

    Args:
        data: A file, folder or pattern (``data/part-*.jsonl``), local or at any address that fsspec knows
            (``s3://bucket/folder``), or several; a folder written by ``Dataset.save_to_disk``; a `datasets` data set,
            iterable or not; or the id of one on the hub, which is then streamed.
        text_column: The field or column that holds the text.
        split: For data sets on the hub or on disk: which split.
        dataset_config: For data sets on the hub: which configuration.
        skip_corrupt: Leave out unreadable records with a warning instead of raising.
        storage_options: For fsspec, credentials for instance; never part of a checkpoint.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If what is there is empty or of an unknown kind, if a file is named twice, or if an address is a
            chain of file systems.
    """
    options: dict[str, Any] = {"text_column": text_column, "skip_corrupt": skip_corrupt}
    if not isinstance(data, (str, Path)) and hasattr(data, "column_names"):
        return _shards_of(data, type(data).__name__, split, options)
    entries = [str(entry) for entry in ([data] if isinstance(data, (str, Path)) else data)]
    name = entries[0] if len(entries) == 1 else f"{entries[0]} and {len(entries) - 1} more"
    if len(entries) == 1:
        found = _data_set(entries[0], split, dataset_config)
        if found is not None:
            return _shards_of(found, name, split, options)
    files = [file for entry in entries for file in _find_files(entry, storage_options or {})]
    urls, sizes = [url for url, _ in files], [size for _, size in files]
    if len(set(urls)) < len(urls):
        twice = next(url for number, url in enumerate(urls) if url in urls[:number])
        raise ValueError(f"{twice} is named twice by {entries}, so that it would be read twice. Name each file once.")
    if not sum(sizes):
        raise ValueError(f"All {len(urls)} files of {name} are empty.")
    return FileShards(urls, sizes, name, storage_options=storage_options, **options)


def _shards_of(dataset: Any, name: str, split: str, options: dict[str, Any]) -> ShardedSource:
    if isinstance(dataset, dict):
        if split not in dataset:
            raise ValueError(f"{name} has no split {split!r}; its splits are {sorted(dataset)}.")
        dataset = dataset[split]
    kind = DatasetShards if hasattr(dataset, "__len__") else IterableShards
    return kind(dataset, name, **options)


def _data_set(entry: str, split: str, config: str | None) -> Any:
    """The data set that a name stands for, None if it stands for files."""
    path = Path(entry).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        import datasets

        return datasets.load_from_disk(str(path))
    is_path = path.exists() or entry.startswith((".", "/", "~")) or any(mark in entry for mark in ("://", "::", *"*?["))
    if is_path or entry.count("/") > 1 or entry.endswith(SHARD_SUFFIXES):
        return None
    import datasets

    try:
        return datasets.load_dataset(entry, config, split=split, streaming=True)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{entry!r} is neither a file or folder here nor a data set that the hub gives ({error}). Check the "
            f"spelling, the path, and the connection."
        ) from error


def _find_files(entry: str, storage_options: dict[str, Any]) -> Iterable[tuple[str, int]]:
    """(address, bytes) of the files that a path, folder or pattern stands for, sorted."""
    kinds = ", ".join(SHARD_SUFFIXES)
    if "::" in entry:
        raise ValueError(
            f"{entry!r} is a chain of file systems, which streams do not read: its files cannot be named one by one. "
            f"Unpack the archive, or name the files by the address that stands behind the chain."
        )
    system, path = fsspec.core.url_to_fs(
        str(Path(entry).expanduser()) if entry.startswith("~") else entry, **storage_options
    )
    is_there = "://" not in entry and Path(entry).expanduser().exists()  # it may be called `part[1]`
    if any(mark in path for mark in "*?[") and not is_there:
        found = system.glob(path, detail=True)
    elif system.isdir(path):
        found = system.find(path, detail=True)
    elif system.isfile(path):
        found = {path: system.info(path)}
    else:
        raise FileNotFoundError(f"There is no file or folder at {entry}. Check the address.")
    files = sorted(
        (system.unstrip_protocol(file), int(info["size"]))
        for file, info in found.items()
        if info["type"] == "file" and file.endswith(SHARD_SUFFIXES) and not file.rpartition("/")[2].startswith(".")
    )
    if not files:
        raise FileNotFoundError(f"{entry} holds nothing that can be streamed. Expected files that end in {kinds}.")
    return [(url.removeprefix("file://"), size) for url, size in files]
