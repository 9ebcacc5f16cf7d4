"""TextDataModule, from documents to batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_llm.datamodules import TextDataModule
from lightning_llm.datamodules.tokenizer import byte_tokenizer
from lightning_llm.loss import shift_labels


def write_documents(path, sizes, seed=0):
    rng = np.random.default_rng(seed)
    words = np.array(["the", "a", "model", "token", "batch", "window", "row", "data", "train", "loss"])
    with path.open("w") as file:
        for size in sizes:
            file.write(json.dumps({"text": " ".join(rng.choice(words, size))}) + "\n")
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write_documents(tmp_path / "data.jsonl", [3, 40, 7, 120, 15] * 8)


@pytest.fixture
def make(tmp_path, data):
    def make(**options):
        defaults = {"data": data, "tokenizer": "bytes", "max_length": 64, "micro_batch_size": 4}
        return TextDataModule(**{**defaults, "cache_dir": str(tmp_path / "cache"), **options})

    return make


def all_batches(loader):
    return list(loader)


@pytest.mark.parametrize("windowing", ["packed", "windows"])
def test_train_and_validation_hold_every_token_once_and_share_no_document(make, data, windowing):
    module = make(windowing=windowing, validation_fraction=0.2)
    module.prepare_data()
    module.setup("fit")
    texts = [json.loads(line)["text"] for line in Path(data).open()]
    targets = 0
    for loader in (module.train_dataloader(), module.val_dataloader()):
        assert len(loader) > 0
        targets += sum(int((shift_labels(batch["labels"]) != -100).sum()) for batch in loader)
    assert targets == sum(len(text.encode()) for text in texts)  # end-of-text is predicted, the first byte is not
    train, held_out = (set(module._rows[split][""].documents.tolist()) for split in ("train", "validation"))
    assert not train & held_out
    assert train | held_out == set(range(len(texts)))


def test_batches_train_a_model_and_validate_bits_per_byte(make, tiny_llama, quiet_trainer):
    from lightning_llm import LLMModule

    torch.manual_seed(0)
    trainer = quiet_trainer(max_steps=60, val_check_interval=30, check_val_every_n_epoch=None)
    trainer.fit(LLMModule(tiny_llama, learning_rate=1e-2, warmup=5), make())
    assert trainer.callback_metrics["val/bits_per_byte"] < 4
    assert trainer.callback_metrics["val/loss"] < 3.5


def test_bits_per_byte_counts_the_bytes_of_the_targets(make):
    module = make(validation_fraction=0.2)
    module.setup("validate")
    store, documents, _ = module._rows["validation"][""]
    counted = sum(float(batch["num_bytes"].sum()) for batch in module.val_dataloader())
    assert counted == store.num_bytes[documents].sum() - len(documents)  # each first byte is no target
    assert "num_bytes" not in next(iter(make().train_dataloader()))


def test_cache_is_reused_and_a_change_of_settings_makes_another(make, tmp_path):
    make().prepare_data()
    folders = sorted((tmp_path / "cache").glob("tokens-*[0-9a-f]"))
    stamp = (folders[0] / "tokens.bin").stat().st_mtime_ns
    again = make(max_length=32, windowing="windows")
    again.prepare_data()
    assert sorted((tmp_path / "cache").glob("tokens-*[0-9a-f]")) == folders
    assert (folders[0] / "tokens.bin").stat().st_mtime_ns == stamp
    make(append_eos=False).prepare_data()
    assert len(list((tmp_path / "cache").glob("tokens-*[0-9a-f]"))) == 2


def test_damaged_cache_is_refused(make, tmp_path):
    make().prepare_data()
    (folder,) = (tmp_path / "cache").glob("tokens-*[0-9a-f]")
    with (folder / "tokens.bin").open("ab") as file:
        file.write(b"xx")
    with pytest.raises(ValueError, match=r"is damaged: tokens.bin has \d+ bytes, expected \d+. Delete"):
        make().setup("fit")


def test_trained_bpe_is_kept_and_sees_no_validation_document(make, tmp_path):
    data = tmp_path / "split.jsonl"
    secret = "zyxwvutsrqponmlkjihgfedcba " * 50
    with data.open("w") as file:
        for index in range(40):
            file.write(json.dumps({"text": f"plain words {index} " * 30}) + "\n")
    probe = make(data=str(data), validation_fraction=0.2)
    probe.setup("fit")
    held_out = set(probe._rows["validation"][""].documents.tolist())
    with data.open("w") as file:
        for index in range(40):
            text = secret if index in held_out else f"plain words {index} " * 30
            file.write(json.dumps({"text": text}) + "\n")
    module = make(data=str(data), tokenizer="bpe", vocab_size=300, validation_fraction=0.2)
    module.setup("fit")
    assert len(module.tokenizer) <= 300
    assert not any("zyx" in token for token in module.tokenizer.get_vocab())
    (folder,) = (tmp_path / "cache").glob("bpe-*[0-9a-f]")
    stamp = (folder / "tokenizer.json").stat().st_mtime_ns
    make(data=str(data), tokenizer="bpe", vocab_size=300, validation_fraction=0.2).setup("fit")
    assert (folder / "tokenizer.json").stat().st_mtime_ns == stamp


def test_own_validation_and_test_data(make, tmp_path):
    other = write_documents(tmp_path / "val.jsonl", [10, 20], seed=1)
    module = make(validation_data=other, test_data=other)
    module.setup("fit")
    module.setup("test")
    assert module.store("validation").num_documents == 2
    assert module.store("train").num_documents == 40
    assert len(module._rows["train"][""].documents) == 40
    assert module.store("test").num_documents == 2


def test_no_validation_if_none_is_wanted(make, tiny_llama, quiet_trainer):
    from lightning_llm import LLMModule

    module = make(validation_fraction=0.0)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(LLMModule(tiny_llama), module)
    assert "val/loss" not in trainer.callback_metrics


def test_no_test_documents_is_an_error_and_not_the_training_score(make):
    module = make(validation_fraction=0.0)
    with pytest.raises(ValueError, match="no test documents: all are trained on. Pass test_data="):
        module.setup("test")


def test_workers_get_the_place_of_the_tokens_and_not_the_tokens(make):
    import pickle

    module = make()
    module.setup("fit")
    dataset = module.train_dataloader().dataset
    sent = pickle.dumps(dataset.store)
    assert len(sent) < 500
    assert np.array_equal(pickle.loads(sent).tokens, dataset.store.tokens)


def test_documents_windowing_says_what_it_leaves_out(make):
    with pytest.warns(
        UserWarning, match=r"leaves out [\d,]+ of [\d,]+ tokens \(\d+%\).*'packed' and 'windows' lose none"
    ):
        make(windowing="documents").setup("fit")


def test_no_document_long_enough_is_explained(make):
    with pytest.raises(
        ValueError, match=r"No document is left for train: of 40 .* 100000 tokens or more .*the longest has \d+"
    ):
        make(min_length=100_000).setup("fit")


def test_no_validation_document_is_explained(make, tmp_path):
    data = write_documents(tmp_path / "one.jsonl", [10])
    with pytest.raises(
        ValueError,
        match=r"for (train|validation): of 1 .*none was drawn .*0.05 .*validation_fraction=0 to train",
    ):
        make(data=data).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "`max_length` must be 2 at least"),
        ({"micro_batch_size": 0}, "`micro_batch_size` must be 1 at least"),
        ({"validation_fraction": 1.0}, "`validation_fraction` lies in 0..1"),
        (
            {"windowing": "sliding"},
            "`windowing` must be 'packed', 'wrapped', 'windows' or 'documents', but got 'sliding'",
        ),
        ({"windowing": "documents", "stride": 8}, "`stride` has a meaning for windowing='windows' and 'packed' only"),
        ({"windowing": "windows", "stride": 65}, "lies in 1..max_length=64, but got 65"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_row_text_shows_what_a_batch_holds(make):
    module = make(tokenizer=byte_tokenizer())
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    row = int(batch["row_ids"][0])
    length = int(batch["num_input_tokens"][0])
    assert module.row_text(row) == module.tokenizer.decode(batch["input_ids"][0, :length].tolist())


def test_summary_and_yardstick(make):
    module = make()
    module.setup("fit")
    assert "40 documents" in module.summary()
    assert "rows of 64 (packed, " in module.summary()
    import zlib

    store, documents, _ = module._rows["validation"][""]
    text = b"".join(
        module.tokenizer.decode(
            store.tokens[store.offsets[d] : store.offsets[d + 1]].tolist(), skip_special_tokens=True
        ).encode()
        for d in documents
    )
    assert module.zlib_bits_per_byte() == pytest.approx(8 * len(zlib.compress(text, 9)) / len(text), rel=0.01)


def test_two_ranks_see_each_row_once_in_a_real_fit(run_ranks, tmp_path):
    data = write_documents(tmp_path / "data.jsonl", [30] * 23)
    first, second = run_ranks("ddp_data", 2, data=data, cache=str(tmp_path / "cache"))
    for epoch in ("0", "1"):
        rows = first["train"][epoch] + second["train"][epoch]
        assert sorted(row for row in rows if row >= 0) == list(range(first["num_rows"]))
    assert first["train"]["0"] != first["train"]["1"]
    assert first["val/loss"] == second["val/loss"]
    assert first["val/loss"] == pytest.approx(first["single"], rel=1e-12)
