"""From the texts of records to token ids, as the tokenizer makes inputs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.examples.records import Record, RecordError


def text_of(record: Record, column: str, row: str, *, may_be_empty: bool = False) -> str:
    """The text in a column.

    Raises:
        RecordError: If it holds none.
    """
    value = record.get(column)
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        holds = "nothing" if value is None or value == "" else f"{type(value).__name__} ({str(value)[:40]!r})"
        raise RecordError(
            f"{row}: column {column!r} should hold a text, but holds {holds}. Mend the row, or leave it out."
        )
    return value


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
) -> list[dict[str, Any]]:
    """Encode texts or pairs with the tokenizer's special tokens, cut to a length as the tokenizer cuts.

    Returns:
        For each text ``input_ids`` and, where the tokenizer makes them, ``token_type_ids``, (tokens,) int32 each, one
        token at least; and ``_num_cut``, how many tokens were left out.
    """
    inputs = (list(texts),) if pairs is None else (list(texts), list(pairs))
    encoding = tokenizer(*inputs, padding=False, truncation=False, return_attention_mask=False, verbose=False)
    examples = []
    for row, ids in enumerate(encoding["input_ids"]):
        columns = {name: encoding[name][row] for name in ("input_ids", "token_type_ids") if name in encoding}
        num_cut = max(len(ids) - max_length, 0)
        if num_cut:
            own = tuple(column[row] for column in inputs)
            columns = tokenizer(*own, padding=False, truncation=True, max_length=max_length, verbose=False)
            columns = {name: columns[name] for name in ("input_ids", "token_type_ids") if name in columns}
        if not ids:  # no special tokens, and no text
            columns = {name: [0] for name in columns} | {"input_ids": [_filler(tokenizer)]}
        example: dict[str, Any] = {name: np.asarray(value, np.int32) for name, value in columns.items()}
        examples.append({**example, "_num_cut": num_cut})
    return examples


def _filler(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
