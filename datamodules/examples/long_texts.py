"""Texts longer than the model, kept whole: an example is a document, and its windows are made with its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.document_windows import collate_documents, document_window_table, surrounding_ids
from lightning_llm.datamodules.examples.store import Example
from lightning_llm.datamodules.windows import Int64Array


@dataclass(frozen=True)
class DocumentWindows:
    """How documents are cut into windows; makes the batch of some of them.

    Attributes:
        max_length: Tokens in a window, special tokens counted.
        overlap: Tokens that a window shares with the one before it.
        max_windows: Windows of a document at most, from its beginning; None for all.
        pad_token_id: Fills the rest of a window.
        prefix_ids: Special tokens before each window.
        suffix_ids: Special tokens after each window.

    Raises:
        ValueError: If the overlap leaves no room for a new token, or for less than one window.

    Example:
        >>> windows = DocumentWindows(4, 1, None, 0, (1,), (2,))
        >>> batch = windows([{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8], "labels": 0}])
        >>> batch["input_ids"].tolist(), batch["document_ids"].tolist(), batch["labels"].tolist()
        ([[1, 5, 6, 2], [1, 6, 7, 2], [1, 8, 2, 0]], [0, 0, 1], [1, 0])
    """

    max_length: int
    overlap: int
    max_windows: int | None
    pad_token_id: int
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.max_windows is not None and self.max_windows < 1:
            raise ValueError(f"`max_windows` must be 1 at least, or None for all, but got {self.max_windows}.")
        document_window_table([1], self.max_length, self.overlap, num_special=self.num_special)

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        overlap: int,
        max_windows: int | None,
        pad_token_id: int,
    ) -> DocumentWindows:
        """With the special tokens of a fast tokenizer."""
        prefix, suffix = surrounding_ids(tokenizer)
        return cls(max_length, overlap, max_windows, pad_token_id, tuple(prefix), tuple(suffix))

    @property
    def num_special(self) -> int:
        """Special tokens in each window."""
        return len(self.prefix_ids) + len(self.suffix_ids)

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a document that ``max_windows`` hold; None for any."""
        room = self.max_length - self.num_special
        return None if self.max_windows is None else room + (self.max_windows - 1) * (room - self.overlap)

    def encode(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Encode texts as whole as ``max_windows`` allows.

        Returns:
            For each ``input_ids`` (tokens,) int32, without special tokens; and ``_num_cut``, how many were left out.
        """
        encoding = tokenizer(
            list(texts), add_special_tokens=False, truncation=False, padding=False, return_attention_mask=False,
            verbose=False,
        )  # fmt: skip
        examples = []
        for ids in encoding["input_ids"]:
            kept = np.asarray(ids[: self.max_tokens], np.int32)
            if not len(kept) and not self.num_special:
                kept = np.array([self.pad_token_id], np.int32)
            examples.append({"input_ids": kept, "_num_cut": len(ids) - len(kept) if len(ids) else 0})
        return examples

    def padded_tokens(self, lengths: Int64Array) -> Int64Array:
        """Tokens that documents take in a batch, (num_documents,): their windows, each as long as the longest.

        A batch of documents is never larger than their number times the largest of these: windows are full wherever a
        document has several.

        Args:
            lengths: (num_documents,) tokens, without special tokens.
        """
        table = document_window_table(lengths, self.max_length, self.overlap, num_special=self.num_special)
        counts = np.bincount(table.document, minlength=len(lengths))
        padded: Int64Array = counts * np.minimum(lengths + self.num_special, self.max_length)
        return padded

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """All windows of documents, as :func:`~lightning_llm.datamodules.document_windows.collate_documents` does."""
        batch = collate_documents(
            [example["input_ids"] for example in examples],
            self.max_length,
            self.overlap,
            pad_token_id=self.pad_token_id,
            prefix_ids=self.prefix_ids,
            suffix_ids=self.suffix_ids,
        )
        for name in examples[0]:
            if name != "input_ids":
                values = np.stack([np.asarray(example[name]) for example in examples])
                batch[name] = torch.from_numpy(values.astype(np.float32 if values.dtype.kind == "f" else np.int64))
        return batch
