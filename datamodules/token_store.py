"""All documents' token ids in one flat file, memory-mapped, with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lightning_llm.datamodules.sources import Document
from lightning_llm.datamodules.windows import Int64Array

FORMAT_VERSION = 1

_BATCH_CHARACTERS = 1 << 22

Encode = Callable[[Sequence[str]], list[npt.NDArray[np.int64]]]


@dataclass(frozen=True)
class TokenStore:
    """Token ids of all documents, end to end.

    Attributes:
        tokens: (num_tokens,) uint16 or uint32, memory-mapped.
        offsets: (num_documents + 1,) int64; document d is ``tokens[offsets[d]:offsets[d + 1]]``.
        num_bytes: (num_documents,) int64, UTF-8 bytes of each document's text.
        token_bytes: (vocab,) float64, bytes of text behind each token id, scaled so that the whole store adds up
            to the bytes of the text (a factor of exactly 1 for byte-level tokenizers).
        folder: Where the files are; None for a store in memory.
    """

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    offsets: Int64Array
    num_bytes: Int64Array
    token_bytes: npt.NDArray[np.float64]
    folder: Path | None = None

    def __reduce__(self) -> Any:
        """Send worker processes the place of the files, not the tokens."""
        if self.folder is not None:
            return TokenStore.open, (self.folder,)
        return super().__reduce__()

    @property
    def num_documents(self) -> int:
        """Documents in the store, empty ones included."""
        return len(self.num_bytes)

    @property
    def lengths(self) -> Int64Array:
        """(num_documents,) int64, tokens in each document."""
        return np.diff(self.offsets)

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Map a finished store into memory.

        Raises:
            ValueError: If the files do not fit each other: the store was damaged after it was written.
        """
        facts = json.loads((folder / "store.json").read_text())
        tokens = folder / "tokens.bin"
        expected = facts["num_tokens"] * np.dtype(facts["dtype"]).itemsize
        if tokens.stat().st_size != expected:
            raise ValueError(
                f"The token cache {folder} is damaged: tokens.bin has {tokens.stat().st_size} bytes, expected "
                f"{expected}. Delete that folder; it will be built again."
            )
        return cls(
            tokens=np.asarray(np.memmap(tokens, facts["dtype"], mode="r", shape=(facts["num_tokens"],)))
            if expected
            else np.empty(0, facts["dtype"]),
            offsets=np.load(folder / "offsets.npy", mmap_mode="r"),
            num_bytes=np.load(folder / "num_bytes.npy", mmap_mode="r"),
            token_bytes=np.load(folder / "token_bytes.npy"),
            folder=folder,
        )


def build_store(
    folder: Path, documents: Iterable[Document], encode: Encode, token_bytes: npt.NDArray[np.float64]
) -> None:
    """Write a store.

    Args:
        folder: An empty folder.
        documents: Read once, one by one.
        encode: Texts to token ids, one int64 array each.
        token_bytes: (vocab,) bytes of text behind each token id.
    """
    dtype = np.uint16 if len(token_bytes) <= 1 << 16 else np.uint32
    lengths: list[int] = []
    num_bytes: list[int] = []
    counted = 0.0
    # Written, not memory-mapped: a full disk is then an error and not a signal that kills the process.
    with (folder / "tokens.bin").open("wb") as file, _progress() as progress:
        for texts in _batches(documents):
            for text, ids in zip(texts, encode(texts), strict=True):
                file.write(ids.astype(dtype).tobytes())
                lengths.append(len(ids))
                num_bytes.append(len(text.encode()))
                counted += float(token_bytes[ids].sum())
                progress.update(num_bytes[-1])
        _sync(file)
    scale = sum(num_bytes) / counted if counted else 1.0
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))
    np.save(folder / "num_bytes.npy", np.array(num_bytes, np.int64))
    np.save(folder / "token_bytes.npy", token_bytes * scale)
    facts = {"version": FORMAT_VERSION, "num_tokens": sum(lengths), "dtype": np.dtype(dtype).name}
    with (folder / "store.json").open("w") as last:
        last.write(json.dumps(facts))
        _sync(last)


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _progress() -> Any:
    return tqdm(desc="Tokenizing", unit="B", unit_scale=True, leave=False, delay=2.0)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
