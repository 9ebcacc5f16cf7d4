"""The token store holds every token, knows what it holds, and never lets damage pass for data."""

import faulthandler
import json
import os
import pickle
import resource
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from support import store_of

from lightning_llm.datamodules import store_builder
from lightning_llm.datamodules.cache import build_once
from lightning_llm.datamodules.sources import Document, open_source
from lightning_llm.datamodules.store_builder import build_store
from lightning_llm.datamodules.token_store import TokenStore
from lightning_llm.datamodules.tokenizer import byte_tokenizer, encoder, token_bytes

TEXTS = ["one two  three\n", "", "äöü 日本 \t 🙂", "x" * 1000, " "]


def built(folder, texts=TEXTS, encode=None, sizes=None, **options):
    tokenizer = byte_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    documents = [Document(f"document {number}", text) for number, text in enumerate(texts)]
    encode = encode or encoder(tokenizer, append_eos=True)
    build_store(folder, documents, encode, token_bytes(tokenizer) if sizes is None else sizes, **options)
    return TokenStore.open(folder)


def test_store_gives_back_every_text_with_its_bytes_and_words(tmp_path, monkeypatch):
    """In batches of every size, so also with several batches under way at once."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    for characters in (1, 500, 1 << 20):
        monkeypatch.setattr("lightning_llm.datamodules.store_builder._BATCH_CHARACTERS", characters)
        store = built(tmp_path / str(characters), TEXTS * 7)
        tokenizer = byte_tokenizer()
        for number, text in enumerate(TEXTS * 7):
            ids = store.tokens[store.offsets[number] : store.offsets[number + 1]]
            assert tokenizer.decode(ids.tolist(), skip_special_tokens=True) == text
            assert store.num_bytes[number] == len(text.encode())
            assert store.num_words[number] == len(text.split())
        assert store.tokens.dtype == np.uint16
        assert store.max_token_id == store.tokens.max() == tokenizer.eos_token_id
        assert not store.tokens.flags.writeable


def test_bytes_of_all_tokens_add_up_to_the_text(tmp_path):
    """A tokenizer whose bytes are estimates is scaled: here each token is said to stand for two bytes."""
    store = built(tmp_path / "s", sizes=np.full(258, 2.0))
    assert store.token_bytes[store.tokens].sum() == pytest.approx(store.num_bytes.sum(), rel=1e-12)
    exact = built(tmp_path / "e")
    assert exact.token_bytes[store.tokens].sum() == exact.num_bytes.sum()


def test_digest_names_the_content_and_nothing_else(tmp_path):
    store = built(tmp_path / "a")
    assert store.digest == built(tmp_path / "elsewhere").digest
    in_memory = TokenStore(np.array(store.tokens), np.array(store.offsets), store.num_bytes, store.token_bytes)
    assert in_memory.digest == store.digest
    assert in_memory.max_token_id == store.max_token_id
    others = [[*TEXTS[:-1], "y"], TEXTS[::-1], TEXTS[:-1]]
    # The same tokens end to end, cut into documents at another place:
    pair = [
        built(tmp_path / f"p{i}", texts, encoder(byte_tokenizer(), append_eos=False))
        for i, texts in enumerate((["ab", "c"], ["a", "bc"]))
    ]
    np.testing.assert_array_equal(pair[0].tokens, pair[1].tokens)
    digests = {store.digest, *(built(tmp_path / f"o{i}", texts).digest for i, texts in enumerate(others))}
    assert len(digests | {one.digest for one in pair}) == 6


def test_store_in_memory_needs_no_more_than_its_tokens():
    store = store_of([3, 0, 5])
    store.check()
    assert store.num_words is None
    assert store.digest == store_of([3, 0, 5]).digest != store_of([3, 5, 0]).digest
    assert pickle.loads(pickle.dumps(store)).digest == store.digest


def test_pickled_store_carries_no_token(tmp_path):
    store = built(tmp_path / "s", ["word " * 100_000])
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    received = pickle.loads(sent)
    np.testing.assert_array_equal(received.tokens, store.tokens)
    received.check()


@pytest.mark.parametrize(("bad", "vocab"), [(300, 258), (-1, 258), (65_536, 258), (70_000, 65_536), (1 << 33, 70_000)])
def test_id_beyond_the_vocabulary_is_named_and_never_wrapped(tmp_path, bad, vocab):
    def encode(texts):
        return [np.array([5, bad if "here" in text else 6]) for text in texts]

    with pytest.raises(
        ValueError, match=rf"gives the id {bad} in document 2, .* has {vocab} tokens: ids lie in 0..{vocab - 1}"
    ):
        built(tmp_path / "s", ["a", "b", "here", "here"], encode, np.ones(vocab))
    assert built(tmp_path / "t", ["a", "b"], encode, np.ones(vocab)).tokens.tolist() == [5, 6] * 2


def test_ids_of_a_large_vocabulary_keep_their_value(tmp_path):
    def encode(texts):
        return [np.array([70_000, 3]) for _ in texts]

    store = built(tmp_path / "s", ["a"], encode, np.ones(70_001))
    assert (store.tokens.dtype, store.tokens.tolist()) == (np.uint32, [70_000, 3])


@pytest.mark.parametrize(("texts", "what"), [([], "no document"), (["", ""], "2 documents, all of them empty")])
def test_data_without_text_is_refused(tmp_path, texts, what):
    with pytest.raises(ValueError, match=f"nothing to train on: my data holds {what}. Add documents"):
        built(tmp_path / "s", texts, name="my data")


def test_error_of_a_tokenizer_or_source_is_its_own(tmp_path):
    def encode(texts):
        raise KeyError("unknown word")

    with pytest.raises(KeyError, match="unknown word"):
        built(tmp_path / "s", encode=encode)


# ---- damage --------------------------------------------------------------------------------------------------------


def shorten(path, share=0.5):
    os.truncate(path, int(path.stat().st_size * share))


def rewrite_facts(folder, **changes):
    facts = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**facts, **changes}))


def save_offsets(folder, change):
    np.save(folder / "offsets.npy", change(np.load(folder / "offsets.npy")))


DAMAGES = {
    "no json": (lambda f: (f / "store.json").unlink(), FileNotFoundError, "has no store.json"),
    "no tokens": (lambda f: (f / "tokens.bin").unlink(), FileNotFoundError, "has no tokens.bin"),
    "no words": (lambda f: (f / "num_words.npy").unlink(), FileNotFoundError, "has no num_words.npy"),
    "half json": (lambda f: shorten(f / "store.json"), ValueError, "store.json cannot be read"),
    "json list": (lambda f: (f / "store.json").write_text("[1]"), ValueError, "store.json cannot be read"),
    "no digest": (
        lambda f: (f / "store.json").write_text('{"version": 2, "dtype": "uint16"}'),
        ValueError,
        r"store.json does not say \['digest', 'max_token_id', 'num_documents', 'num_tokens', 'vocab_size'\]",
    ),
    "version": (lambda f: rewrite_facts(f, version=1), ValueError, "has format 1, expected 2: another version"),
    "half tokens": (lambda f: shorten(f / "tokens.bin"), ValueError, r"tokens.bin has \d+ bytes, expected \d+"),
    "no token": (lambda f: shorten(f / "tokens.bin", 0), ValueError, r"tokens.bin has 0 bytes, expected \d+"),
    "half offsets": (lambda f: shorten(f / "offsets.npy", 0.9), ValueError, "offsets.npy cannot be read"),
    "empty offsets": (lambda f: shorten(f / "offsets.npy", 0), ValueError, "offsets.npy cannot be read"),
    "few offsets": (lambda f: save_offsets(f, lambda o: o[:-1]), ValueError, "offsets.npy has 5 entries, expected 6"),
    "wrong end": (lambda f: save_offsets(f, lambda o: o - (o > 99)), ValueError, r"offsets.npy runs from 0 to \d+"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_named_with_what_to_do(tmp_path, damage):
    folder = tmp_path / "tokens-abc"
    built(folder)
    change, kind, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(kind, match=rf"tokens-abc.*{message}.*Delete that folder; it will be built again"):
        TokenStore.open(folder)


def test_missing_folder_is_no_damage(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no token cache in .*nowhere"):
        TokenStore.open(tmp_path / "nowhere")


def read_after_cut(folder, is_checked):
    faulthandler.disable()
    store = TokenStore.open(folder)
    store.check()
    os.truncate(folder / "tokens.bin", 8192)
    if is_checked:
        try:
            store.check()
        except ValueError as error:
            (folder / "error").write_text(str(error))
            os._exit(7)
    os._exit(int(store.tokens[-1] > 0))


def test_file_cut_short_in_use_is_an_error_where_reading_it_would_kill(tmp_path):
    """The control reads without the check: SIGBUS."""
    folder = tmp_path / "s"
    exits = []
    for is_checked in (True, False):
        built(folder, ["x" * 1_000_000])
        process = get_context("fork").Process(target=read_after_cut, args=(folder, is_checked))
        process.start()
        process.join(timeout=60)
        exits.append(process.exitcode)
    assert exits == [7, -signal.SIGBUS]
    message = (folder / "error").read_text()
    for part in (f"{folder}/tokens.bin was cut short", "has 8192 bytes, expected 2000002", "Delete the folder"):
        assert part in message


def test_deleted_or_replaced_cache_stays_readable_while_it_is_open(tmp_path):
    folder = tmp_path / "s"
    store = built(folder)
    before = store.tokens.tolist()
    (folder / "new.bin").write_bytes(b"xx")
    (folder / "new.bin").rename(folder / "tokens.bin")
    store.check()
    assert store.tokens.tolist() == before


def tokenize_and_hang(folder, is_written):
    store_builder._BATCH_CHARACTERS = 10_000

    def documents():
        for number in range(100):
            yield Document(str(number), "text " * 10_000)
        is_written.set()
        time.sleep(60)

    def encode(texts):
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    build_once(folder, lambda path: build_store(path, documents(), encode, np.ones(256)))


def test_killed_tokenisation_is_never_believed_and_the_next_run_completes(tmp_path):
    folder = tmp_path / "tokens-abc"
    context = get_context("fork")
    is_written = context.Event()
    process = context.Process(target=tokenize_and_hang, args=(folder, is_written))
    process.start()
    assert is_written.wait(timeout=60)
    process.kill()
    process.join(timeout=30)
    assert (tmp_path / "tokens-abc.unfinished" / "tokens.bin").stat().st_size > 1_000_000
    assert not folder.exists()
    build_once(folder, built)
    assert TokenStore.open(folder).digest == built(tmp_path / "undisturbed").digest
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["tokens-abc", "undisturbed"]


def test_ten_gigabytes_take_little_memory(tmp_path):
    """5e9 tokens (a sparse file) of 3 million documents."""
    folder, num_tokens, num_documents = tmp_path / "large", 5_000_000_000, 3_000_000
    built(folder, ["x"])
    os.truncate(folder / "tokens.bin", 2 * num_tokens)
    np.save(folder / "offsets.npy", np.linspace(0, num_tokens, num_documents + 1).astype(np.int64))
    for column in ("num_bytes", "num_words"):
        np.save(folder / f"{column}.npy", np.ones(num_documents, np.int64))
    rewrite_facts(folder, num_tokens=num_tokens, num_documents=num_documents)

    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident_bytes()
    store = TokenStore.open(folder)
    store.check()
    assert int(store.tokens[:: num_tokens // 100].sum()) == store.tokens[0]
    assert resident_bytes() - before < 50e6
    assert (len(store.tokens), store.num_documents) == (num_tokens, num_documents)


# ---- progress ------------------------------------------------------------------------------------------------------


class Recorded:
    """Stands for the progress bar."""

    def __init__(self, **options):
        self.options, self.updates = options, []
        Recorded.last = self

    def update(self, amount):
        self.updates.append(amount)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_progress_runs_over_the_bytes_of_the_files_to_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_llm.datamodules.store_builder.tqdm", Recorded)
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("text äöü " * 50)
    (data / "b.jsonl").write_text("".join(json.dumps({"text": f"line {i}", "id": i}) + "\n" for i in range(30)))
    source = open_source(str(data))
    tokenizer = byte_tokenizer()
    build_store(
        tmp_path,
        source.documents(),
        encoder(tokenizer, append_eos=True),
        token_bytes(tokenizer),
        name=source.name,
        total_bytes=source.total_bytes,
    )
    assert Recorded.last.options["total"] == sum(path.stat().st_size for path in data.iterdir())
    assert sum(Recorded.last.updates) == Recorded.last.options["total"]
    assert str(data) in Recorded.last.options["desc"]


def test_no_bar_is_drawn_where_nobody_looks(tmp_path, capfd, monkeypatch):
    """Standard error is no terminal here; without that, and without the delay, a bar would be drawn."""
    original = store_builder.tqdm
    monkeypatch.setattr(store_builder, "tqdm", lambda **options: original(**{**options, "delay": 0}))
    built(tmp_path / "s")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(store_builder, "tqdm", lambda **options: original(**{**options, "delay": 0, "disable": False}))
    built(tmp_path / "t")
    assert "Tokenizing the data" in capfd.readouterr().err
