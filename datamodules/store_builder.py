"""Documents to token ids in a store: encoded on all cores, counted, checked and written as they come."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lightning_llm.datamodules.sources import Document
from lightning_llm.datamodules.token_store import FORMAT_VERSION
from lightning_llm.datamodules.windows import Int64Array

_BATCH_CHARACTERS = 1 << 22
_BATCHES_AT_ONCE = 2  # while the ids of one become numbers in Python, the tokenizer's own threads work at the next

Encode = Callable[[Sequence[str]], list[npt.NDArray[np.int64]]]


def build_store(
    folder: Path,
    documents: Iterable[Document],
    encode: Encode,
    token_bytes: npt.NDArray[np.float64],
    *,
    name: str = "the data",
    total_bytes: int | None = None,
) -> None:
    """Write a store.

    Args:
        folder: An empty folder.
        documents: Read once, one by one.
        encode: Texts to token ids, one int64 array each; called from two threads if ``encode.is_parallel``.
        token_bytes: (vocab,) bytes of text behind each token id.
        name: What the documents are called in messages and beside the progress bar.
        total_bytes: What the documents' sizes add up to, for the progress bar; None if that is not known.

    Raises:
        ValueError: If there is no document or no text, or a token id that the vocabulary does not have.
    """
    dtype = np.dtype(np.uint16 if len(token_bytes) <= 1 << 16 else np.uint32)
    digest = hashlib.blake2b(digest_size=16)
    counts = np.zeros(len(token_bytes), np.int64)
    per_document: list[Int64Array] = []
    # Written, not memory-mapped: a full disk is then an error and not a signal that kills the process.
    with (folder / "tokens.bin").open("wb") as file, _progress(name, total_bytes) as progress:
        for batch, encoded in _encoded(documents, encode):
            measured = _measure(batch, encoded)
            ids = np.concatenate(encoded)
            check_ids(ids, measured[0], batch, len(token_bytes))
            stored = ids.astype(dtype)
            file.write(stored.data)
            digest.update(stored.data)
            counts += np.bincount(ids, minlength=len(counts))
            per_document.append(measured)
            progress.update(sum(document.num_bytes for document in batch))
        _sync(file)
    lengths, num_bytes, num_words = np.concatenate([*per_document, np.empty((3, 0), np.int64)], axis=1)
    if not num_bytes.any():
        what = f"{len(num_bytes)} documents, all of them empty" if len(num_bytes) else "no document"
        raise ValueError(f"There is nothing to train on: {name} holds {what}. Add documents with text.")
    digest.update(lengths.data)
    _write_array(folder, "offsets", np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
    _write_array(folder, "num_bytes", num_bytes)
    _write_array(folder, "num_words", num_words)
    counted = float(counts @ token_bytes)
    _write_array(folder, "token_bytes", token_bytes * (num_bytes.sum() / counted if counted else 1.0))
    facts = {
        "version": FORMAT_VERSION,
        "num_documents": len(lengths),
        "num_tokens": int(lengths.sum()),
        "dtype": dtype.name,
        "vocab_size": len(token_bytes),
        "max_token_id": int(np.flatnonzero(counts).max(initial=-1)),
        "digest": digest.hexdigest(),
    }
    with (folder / "store.json").open("w") as last:
        last.write(json.dumps(facts, indent=1))
        _sync(last)


def _measure(batch: Sequence[Document], encoded: Sequence[npt.NDArray[np.int64]]) -> Int64Array:
    """Tokens, bytes and words of each document, (3, num_documents)."""
    texts = [document.text for document in batch]
    rows = [map(len, encoded), (len(text.encode()) for text in texts), (len(text.split()) for text in texts)]
    return np.array([np.fromiter(row, np.int64, len(batch)) for row in rows])


def _encoded(
    documents: Iterable[Document], encode: Encode
) -> Iterator[tuple[list[Document], list[npt.NDArray[np.int64]]]]:
    """Batches in order, with their token ids; the next ones are encoded while the caller has one in hand."""
    at_once = _BATCHES_AT_ONCE if getattr(encode, "is_parallel", False) else 1
    waiting: list[tuple[list[Document], Future[list[npt.NDArray[np.int64]]]]] = []
    with ThreadPoolExecutor(at_once) as threads:
        for batch in _batches(documents):
            if len(waiting) >= at_once:
                ready, ids = waiting.pop(0)
                yield ready, ids.result()
            waiting.append((batch, threads.submit(encode, [document.text for document in batch])))
        for ready, ids in waiting:
            yield ready, ids.result()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def check_ids(ids: npt.NDArray[np.int64], lengths: Int64Array, batch: Sequence[Document], vocab_size: int) -> None:
    """Refuse ids without a place in the vocabulary; in unsigned integers they would become others.

    Args:
        ids: Of all documents, end to end.
        lengths: (num_documents,) ids of each document.
        batch: The documents, for the message.
        vocab_size: Number of tokens.

    Raises:
        ValueError: Naming the first such id and its document.
    """
    if not len(ids) or (ids.max() < vocab_size and ids.min() >= 0):
        return
    at = int(np.argmax((ids >= vocab_size) | (ids < 0)))
    document = batch[int(np.searchsorted(np.cumsum(lengths), at, side="right"))]
    raise ValueError(
        f"The tokenizer gives the id {ids[at]} in {document.name}, but its vocabulary has {vocab_size} tokens: ids lie "
        f"in 0..{vocab_size - 1}. The tokenizer's files do not fit each other; save it again with save_pretrained, or "
        f"use another."
    )


def _progress(name: str, total_bytes: int | None) -> Any:
    """A bar over bytes, after two seconds, on terminals alone."""
    return tqdm(
        desc=f"Tokenizing {name}",
        total=total_bytes or None,
        unit="B",
        unit_scale=True,
        leave=False,
        delay=2.0,
        disable=None,
    )


def _write_array(folder: Path, name: str, array: npt.NDArray[Any]) -> None:
    with (folder / f"{name}.npy").open("wb") as file:
        np.save(file, array)
        _sync(file)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
