"""All documents' token ids in one flat file, memory-mapped, with an index."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lightning_llm.datamodules.windows import Int64Array

FORMAT_VERSION = 2

_DIGEST_TOKENS = 1 << 24


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Token ids of all documents, end to end.

    Attributes:
        tokens: (num_tokens,) uint16 or uint32, memory-mapped.
        offsets: (num_documents + 1,) int64; document d is ``tokens[offsets[d]:offsets[d + 1]]``.
        num_bytes: (num_documents,) int64, UTF-8 bytes of each document's text.
        token_bytes: (vocab,) float64, bytes of text behind each token id, scaled so that the whole store adds up
            to the bytes of the text (a factor of exactly 1 for byte-level tokenizers).
        folder: Where the files are; None for a store in memory.
        num_words: (num_documents,) int64, words of each document's text between white space; None if not counted.
        facts: What ``store.json`` says; empty for a store in memory.
        mapping: The memory map behind ``tokens``; None for a store in memory.
    """

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    offsets: Int64Array
    num_bytes: Int64Array
    token_bytes: npt.NDArray[np.float64]
    folder: Path | None = None
    num_words: Int64Array | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)
    mapping: mmap.mmap | None = field(default=None, repr=False)

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

    @cached_property
    def digest(self) -> str:
        """Identifies all token ids and where documents begin, whatever their path and their age; 32 digits.

        A store on disk knows it; for one in memory, all tokens are read.
        """
        if "digest" in self.facts:
            return str(self.facts["digest"])
        digest = hashlib.blake2b(digest_size=16)
        for begin in range(0, len(self.tokens), _DIGEST_TOKENS):
            digest.update(self.tokens[begin : begin + _DIGEST_TOKENS].data)
        digest.update(self.lengths.data)
        return digest.hexdigest()

    @cached_property
    def max_token_id(self) -> int:
        """The largest token id in the store; -1 if it holds none."""
        if "max_token_id" in self.facts:
            return int(self.facts["max_token_id"])
        return int(self.tokens.max()) if len(self.tokens) else -1

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Map a finished store into memory; takes the same time for any size.

        Raises:
            FileNotFoundError: If a file of the store, or the whole folder, is missing.
            ValueError: If the files do not fit each other (the store was damaged after it was written), or are of
                another version's format.
        """
        facts = _read_facts(folder)
        num_documents = facts["num_documents"]
        offsets = _read_array(folder, "offsets", num_documents + 1)
        tokens, mapping = _map_tokens(folder, np.dtype(facts["dtype"]), facts["num_tokens"])
        if (offsets[0], offsets[-1]) != (0, len(tokens)):
            raise _damaged(
                folder, f"offsets.npy runs from {offsets[0]} to {offsets[-1]}, expected 0 to {len(tokens)} tokens"
            )
        return cls(
            tokens=tokens,
            offsets=offsets,
            num_bytes=_read_array(folder, "num_bytes", num_documents),
            token_bytes=np.array(_read_array(folder, "token_bytes", facts["vocab_size"])),
            folder=folder,
            num_words=_read_array(folder, "num_words", num_documents),
            facts=facts,
            mapping=mapping,
        )

    def check(self) -> None:
        """Make sure that the token file is still whole; costs about a microsecond.

        Reading a memory map behind the end of its file kills the process with SIGBUS and no word why. A file that
        was deleted or renamed does no harm while it is mapped.

        Raises:
            ValueError: If the file was cut short since it was opened.
            FileNotFoundError: If the file system cannot reach it any more.
        """
        if self.mapping is None:
            return
        try:
            found = self.mapping.size()
        except OSError as error:
            raise FileNotFoundError(
                f"The token cache {self.folder} can no longer be reached ({error}). Mend the disk or the connection, "
                f"then resume from the last checkpoint."
            ) from error
        if found < self.tokens.nbytes:
            raise ValueError(
                f"{self.folder}/tokens.bin was cut short while it was in use: it has {found} bytes, expected "
                f"{self.tokens.nbytes}. Delete the folder {self.folder}, find out what writes to it, and resume from "
                f"the last checkpoint; the cache is then built again."
            )


def _read_facts(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no token cache in {folder}. It is built again when the data is set up.")
    try:
        facts = json.loads((folder / "store.json").read_text())
        version = facts["version"]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"The token cache {folder} has no store.json: it was copied or deleted in part. Delete that folder; it "
            f"will be built again."
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(folder, f"store.json cannot be read ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"The token cache {folder} has format {version}, expected {FORMAT_VERSION}: another version of "
            f"lightning_llm wrote it. Delete that folder; it will be built again."
        )
    missing = {"num_documents", "num_tokens", "dtype", "vocab_size", "max_token_id", "digest"} - facts.keys()
    if missing:
        raise _damaged(folder, f"store.json does not say {sorted(missing)}")
    return dict(facts)


def _map_tokens(
    folder: Path, dtype: np.dtype[Any], num_tokens: int
) -> tuple[npt.NDArray[np.unsignedinteger[Any]], mmap.mmap | None]:
    path = folder / "tokens.bin"
    expected = num_tokens * dtype.itemsize
    with _open(path) as file:
        found = os.fstat(file.fileno()).st_size
        if found != expected:
            raise _damaged(folder, f"tokens.bin has {found} bytes, expected {expected}")
        if not expected:
            return np.empty(0, dtype), None
        mapping = mmap.mmap(file.fileno(), expected, access=mmap.ACCESS_READ)
    return np.frombuffer(mapping, dtype), mapping


def _read_array(folder: Path, name: str, length: int) -> npt.NDArray[Any]:
    path = folder / f"{name}.npy"
    _open(path).close()
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise _damaged(folder, f"{path.name} cannot be read ({error})") from error
    if len(array) != length:
        raise _damaged(folder, f"{path.name} has {len(array)} entries, expected {length}")
    return np.asarray(array)


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"The token cache {path.parent} has no {path.name}: it was copied or deleted in part. Delete that folder; "
            f"it will be built again."
        ) from None


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"The token cache {folder} is damaged: {what}. Delete that folder; it will be built again.")
