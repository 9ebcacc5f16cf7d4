"""Tokenizers: any Hugging Face one, plain bytes, or a byte-level BPE trained on the documents at hand."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_llm.datamodules.cache import fingerprint

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"

_OFF = {"off", "false", "f", "no", "n", "0", ""}  # what `tokenizers` takes for no


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder or the hub.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(name).expanduser()
    source = str(folder) if folder.exists() else str(name)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no tokenizer in {source!r} ({error}). Expected a folder that `tokenizer.save_pretrained(...)` "
            f"wrote, a hub id, 'bytes', or 'bpe' to train one on the data."
        ) from error


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per UTF-8 byte (256), an end-of-text token and a padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    return _wrap(_byte_level(models.BPE(vocab=vocabulary, merges=[]), split_words=False))


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE; it can encode any text, and decoding gives the text back byte for byte.

    Args:
        texts: Documents to learn from; read once.
        vocab_size: Tokens in all: the 256 bytes, the merges, end-of-text and padding.

    Raises:
        ValueError: If ``vocab_size`` cannot hold every byte and the two special tokens.
    """
    special = [END_OF_TEXT, PADDING]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise ValueError(f"A byte-level BPE needs `vocab_size` of {smallest} at least, but got {vocab_size}.")
    tokenizer = _byte_level(models.BPE(), split_words=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return _wrap(tokenizer)


def encoder(tokenizer: PreTrainedTokenizerBase, *, append_eos: bool, special_tokens: bool = True) -> _Encoder:
    """Make the function that turns texts into token ids.

    Args:
        tokenizer: A truncation length or padding that it carries is ignored: no token is lost here.
        append_eos: End each document with the end-of-text token, if the tokenizer has one and did not add it.
        special_tokens: Add the tokenizer's own special tokens.
    """
    return _Encoder(tokenizer, append_eos, special_tokens)


class _Encoder:
    """Encodes batches of texts on all cores (``encode_batch_fast`` keeps no offsets)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, append_eos: bool, special_tokens: bool) -> None:
        self.special_tokens = special_tokens
        self.eos_token_id = tokenizer.eos_token_id if append_eos else None
        self._slow = tokenizer
        self._fast: Tokenizer | None = None
        if tokenizer.is_fast:
            self._fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._fast.no_truncation()
            self._fast.no_padding()

    def __call__(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        if self._fast is not None:
            encodings = self._fast.encode_batch_fast(texts, add_special_tokens=self.special_tokens)
            return [self._finish(encoding.ids) for encoding in encodings]
        options = {"add_special_tokens": self.special_tokens, "padding": False, "truncation": False, "verbose": False}
        documents = self._slow(list(texts), **options)["input_ids"]
        return [self._finish(ids) for ids in documents]

    @property
    def is_parallel(self) -> bool:
        """Whether it may be called from several threads at once, and gains by it."""
        return self._fast is not None and os.environ.get("TOKENIZERS_PARALLELISM", "true").lower() not in _OFF

    def _finish(self, ids: list[int]) -> npt.NDArray[np.int64]:
        if self.eos_token_id is not None and ids and ids[-1] != self.eos_token_id:
            ids.append(self.eos_token_id)
        return np.asarray(array("q", ids))  # faster than NumPy's own reading of a list

    def fingerprint(self) -> str:
        """Identify what the encoder does to a text."""
        if self._fast is not None:
            identity = self._fast.to_str()
        else:
            vocabulary: dict[str, Any] = self._slow.get_vocab()
            identity = json.dumps([type(self._slow).__name__, sorted(vocabulary.items(), key=lambda item: item[1])])
        return fingerprint([identity, str(self.eos_token_id), *([] if self.special_tokens else ["bare"])])


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.float64]:
    """UTF-8 bytes of text behind each token id, shape (len(tokenizer),); special tokens stand for none.

    Exact for byte-level tokenizers. Others drop or merge white space, so their counts are estimates, which
    :class:`~lightning_llm.datamodules.token_store.TokenStore` scales to the true size of the text.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    byte_level = _is_byte_level(tokenizer)
    return np.array(
        [0 if token is None or token in special else _num_bytes(token, byte_level) for token in tokens],
        np.float64,
    )


def _num_bytes(token: str, byte_level: bool) -> int:
    if byte_level:
        return len(token)  # the byte-level alphabet has one character per byte
    if token.startswith("<0x") and token.endswith(">"):
        return 1  # SentencePiece's byte fallback
    return len(token.removeprefix("##").replace("\u2581", " ").encode())


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer.is_fast and "ByteLevel" in str(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]))


def _byte_level(model: models.Model, *, split_words: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING
    )
