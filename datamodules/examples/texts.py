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


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not know which characters its tokens stand for.

    Raises:
        ValueError: If it is a slow one.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"Expected a fast tokenizer (one with a tokenizer.json), but got {type(tokenizer).__name__}.")


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int | None,
    *,
    offsets: bool = False,
    target: bool = False,
) -> list[dict[str, Any]]:
    """Encode texts or pairs with the tokenizer's special tokens, cut to a length as the tokenizer cuts.

    Args:
        tokenizer: Any; a fast one for offsets.
        texts: The texts.
        pairs: A second text for each.
        max_length: Tokens at most; None keeps all.
        offsets: Also say which characters a token stands for.
        target: Whether the texts are for a decoder, which some tokenizers encode differently.

    Returns:
        For each text ``input_ids`` and, where the tokenizer makes them, ``token_type_ids``, (tokens,) int32 each, one
        token at least; ``_num_cut``, how many tokens were left out; and ``offset_mapping`` (tokens, 2), if asked for.
    """
    texts = list(texts)
    inputs: dict[str, Any] = {"text_target": texts} if target else {"text": texts}
    inputs |= {} if pairs is None else {"text_pair": list(pairs)}
    options = {"padding": False, "return_attention_mask": False, "verbose": False}
    options |= {"return_offsets_mapping": True} if offsets else {}
    encoding = tokenizer(**inputs, truncation=False, **options)
    names = [name for name in ("input_ids", "token_type_ids", "offset_mapping") if name in encoding]
    examples = []
    for row, ids in enumerate(encoding["input_ids"]):
        columns = {name: encoding[name][row] for name in names}
        num_cut = 0 if max_length is None else max(len(ids) - max_length, 0)
        if num_cut:
            own = {name: column[row] for name, column in inputs.items()}
            columns = dict(tokenizer(**own, truncation=True, max_length=max_length, **options))
        if not ids:  # no special tokens, and no text
            columns = {name: np.zeros(1) for name in names} | {"input_ids": [_filler(tokenizer)]}
            columns |= {"offset_mapping": np.zeros((1, 2))} if offsets else {}
        example: dict[str, Any] = {name: np.asarray(columns[name], np.int32) for name in names}
        examples.append({**example, "_num_cut": num_cut})
    return examples


def _filler(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
