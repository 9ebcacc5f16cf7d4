"""Plain and compressed jsonl and parquet files, at any address that fsspec knows, read in pieces."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from lightning_llm.datamodules.cache import fingerprint
from lightning_llm.datamodules.sources import check_text, json_field, no_column
from lightning_llm.datamodules.streams.shards import (
    MEND,
    Piece,
    PieceReader,
    Position,
    Record,
    ShardedSource,
    ShardError,
    is_in_share,
)

SHARD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

_BUFFER_BYTES = 1 << 20
_EDGE_BYTES, _SAMPLED_FILES = 1 << 16, 64  # that tell contents apart whose names and sizes are the same


class FileShards(ShardedSource):
    """A document a row; files that several streams share are read by each of them, from its piece on.

    Plain jsonl: the lines that begin in the piece, so that no byte is read twice. Parquet: the rows of the piece; a
    group of rows that two pieces share is decoded for both. Compressed jsonl has no way in but its beginning: every
    piece decompresses the whole file and takes its share of the lines, spread evenly over them.

    Args:
        urls: In reading order.
        sizes: Bytes of each file.
        name: For messages.
        text_column: The field of a row that holds the text.
        skip_corrupt: Leave out unreadable rows, with a warning, instead of raising.
        storage_options: For fsspec, credentials for instance.
    """

    def __init__(
        self,
        urls: Sequence[str],
        sizes: Sequence[int],
        name: str,
        text_column: str,
        skip_corrupt: bool = False,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.urls = list(urls)
        self.sizes = list(sizes)
        self.name = name
        self.text_column = text_column
        self.skip_corrupt = skip_corrupt
        self.storage_options = storage_options or {}
        paths = [url.rpartition("://")[2].lstrip("/") for url in urls]
        root = os.path.commonpath([path.rpartition("/")[0] for path in paths])  # the folder may move
        files = [f"{path.removeprefix(root)} {size}" for path, size in zip(paths, sizes, strict=True)]
        self.identity = {
            "number of files": len(urls),
            "bytes": sum(sizes),
            "names and sizes of files": fingerprint(files),
            "text_column": text_column,
            "skip_corrupt": skip_corrupt,
        }
        if not any("://" in url for url in urls):  # of others it would be many requests
            self.identity["edges of files"] = _sample(self.urls, self.sizes)

    def read(self, piece: Piece, position: Position = None) -> PieceReader:
        """Read a piece: plain jsonl by byte, parquet by row, compressed jsonl by number of the line."""
        url = self.urls[piece.shard]
        if url.endswith(".parquet"):
            records = self._rows(url, piece, position)
        elif url.endswith(".jsonl"):
            records = self._lines(url, piece, position)
        else:
            records = self._compressed_lines(url, piece, position)
        return PieceReader(records, position, self.name, self.skip_corrupt)

    def is_read_whole(self, shard: int) -> bool:
        """Compressed files are."""
        return self.urls[shard].endswith((".gz", ".zst"))

    @contextmanager
    def _open(self, url: str, size: int) -> Iterator[Any]:
        """Open a file of a size that it must still have; a process opens its own, for connections survive no fork."""
        system, path = fsspec.core.url_to_fs(url, **self.storage_options)
        system.invalidate_cache(path)
        found = system.size(path)
        if found != size:
            raise ShardError(
                f"{url} of {self.name} had {size} bytes when the run began and has {found} now: it was changed or cut "
                f"short. {MEND}"
            )
        is_local = isinstance(system, LocalFileSystem)
        with Path(path).open("rb") if is_local else system.open(path, "rb") as file:
            yield file

    def _lines(self, url: str, piece: Piece, position: int | None) -> Iterator[Record]:
        """Lines that begin within the piece."""
        with self._open(url, self.sizes[piece.shard]) as raw:
            file = io.BufferedReader(raw, _BUFFER_BYTES)
            at = piece.begin if position is None else position
            if position is None and at:
                file.seek(at - 1)
                at += len(file.readline()) - 1  # the rest of a line that began before; nothing if none did
            else:
                file.seek(at)
            while at < piece.end:
                line = file.readline()
                if not line:
                    raise ShardError(f"{url} of {self.name} ends at byte {at} of {piece.end}. {MEND}")
                name = f"{url}, the line at byte {at}"
                at += len(line)
                if line.strip():
                    yield name, self._parse(line), at

    def _compressed_lines(self, url: str, piece: Piece, position: int | None) -> Iterator[Record]:
        """The piece's share of the lines; to go on at a line, all before it are decompressed and passed over."""
        size = self.sizes[piece.shard]
        compression = "zstd" if url.endswith(".zst") else "gzip"
        with self._open(url, size) as file, pa.input_stream(file, compression=compression) as stream:
            for number, line in enumerate(_buffered_lines(stream)):
                if number >= (position or 0) and line.strip() and is_in_share(number, piece, size):
                    yield f"{url}, line {number + 1}", self._parse(line), number + 1

    def _rows(self, url: str, piece: Piece, position: int | None) -> Iterator[Record]:
        """Rows of the piece, a group of rows at a time."""
        size = self.sizes[piece.shard]
        with self._open(url, size) as file:
            table = pq.ParquetFile(file)
            if self.text_column not in table.schema_arrow.names:
                raise no_column(url, self.text_column, table.schema_arrow.names)
            total = table.metadata.num_rows
            end = total * piece.end // size
            at = total * piece.begin // size if position is None else position
            ends = np.cumsum([table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)])
            for group in range(int(np.searchsorted(ends, at, side="right")), table.num_row_groups):
                row = int(ends[group - 1]) if group else 0
                if row >= end:
                    return
                for batch in table.iter_batches(256, row_groups=[group], columns=[self.text_column]):
                    if row + len(batch) > at and row < end:
                        for value in batch.column(0).slice(max(at - row, 0), end - max(at, row)).to_pylist():
                            yield f"{url}, row {at}", self._check(value), at + 1
                            at += 1
                    row += len(batch)

    def _parse(self, line: bytes) -> Callable[[str], str]:
        return lambda name: json_field(self.text_column, line, name)

    def _check(self, value: Any) -> Callable[[str], str]:
        return lambda name: check_text(self.text_column, value, name)


def _sample(urls: Sequence[str], sizes: Sequence[int]) -> str:
    """Digest of the first and last bytes of local files; of many files, of some."""
    digest = hashlib.blake2b(digest_size=16)
    for number in np.unique(np.linspace(0, len(urls) - 1, _SAMPLED_FILES).astype(int)):
        with Path(urls[number]).open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(sizes[number] - _EDGE_BYTES, 0))
            digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()


def _buffered_lines(stream: Any) -> Iterator[bytes]:
    """Lines of an Arrow stream, which notices a file that was cut short; its own lines are slow."""
    rest = b""
    while block := stream.read(_BUFFER_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest
