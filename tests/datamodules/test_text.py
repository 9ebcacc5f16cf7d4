"""TextDataModule, from documents to batches."""

import json
from pathlib import Path

import lightning as L
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
    module = make(validation_data=other, test_data=Path(other))
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
    dataset = module.train_dataloader().rows
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
        ({"max_length": 1}, "`max_length` must be a whole number, 2 or more, but got 1"),
        ({"micro_batch_size": 0}, "`micro_batch_size` must be a whole number, 1 or more, but got 0"),
        ({"eval_micro_batch_size": 2.5}, "`eval_micro_batch_size` must be a whole number, 1 or more, but got 2.5"),
        ({"num_workers": -1}, "`num_workers` must be a whole number, 0 or more, but got -1"),
        ({"temperature": 0.0}, "`temperature` must be above 0, but got 0.0"),
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


# ---- batches by tokens, global batches ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batching": "tokens"}, "`batching` must be 'rows', 'padded' or 'padding_free', but got 'tokens'"),
        ({"batching": "padding_free"}, "needs `micro_batch_tokens` .* or `global_batch_tokens`"),
        ({"micro_batch_tokens": 64}, "micro_batch_tokens=64 needs batching='padded' or 'padding_free'"),
        ({"batching": "padded", "micro_batch_tokens": 64}, "batching='padded' is for rows of unequal length"),
        ({"global_batch_size": 4, "global_batch_tokens": 99}, "in rows or in tokens, but got global_batch_size=4"),
        (
            {"global_batch_size": 4, "batching": "padding_free", "micro_batch_tokens": 64},
            "A global batch is cut into as many micro-batches .*: leave `micro_batch_tokens` out",
        ),
        ({"global_batch_size": 0}, "`global_batch_size` must be 1 at least, but got 0"),
        ({"global_batch_tokens": {"0 samples": -3}}, "`global_batch_tokens` must be 1 at least, but got -3"),
        (
            {"global_batch_size": {"0 steps": 2, "50%": 4}},
            "in samples, tokens, steps or epochs, .*not in shares of",
        ),
        ({"seed": -1}, "`seed` must be a whole number, 0 or more, but got -1"),
        ({"eval_context": 8}, "`eval_context` has a meaning for eval_windowing='windows' only, but .* is 'packed'"),
        ({"eval_windowing": "windows", "eval_context": 64}, "lies in 1..max_length-1=63, but got 64"),
        ({"weights": {"a": 1.0}}, "`weights` names every source of a mixture, but got .* of a single `data`"),
        ({"data": {}}, "`data` is a mixture without a source"),
    ],
)
def test_batches_that_contradict_themselves_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_row_above_the_budget_is_refused_when_the_loader_is_made(make):
    small = make(batching="padding_free", micro_batch_tokens=63)
    with pytest.raises(ValueError, match="holds 63 tokens at most .*one row alone has 64"):
        small.train_dataloader()


def test_a_global_batch_beside_an_accumulation_schedule_is_refused(make, tiny_llama, quiet_trainer):
    from lightning_llm import LLMModule
    from lightning_llm.callbacks import AccumulationSchedule

    trainer = quiet_trainer(max_steps=1, callbacks=[AccumulationSchedule(2)])
    with pytest.raises(ValueError, match="global batch and AccumulationSchedule would both decide"):
        trainer.fit(LLMModule(tiny_llama), make(global_batch_size=4))


def test_padding_free_batches_train_to_the_same_weights_as_padded_ones(make, tiny_gpt2, quiet_trainer):
    """The same global batch in three layouts: only rounding differs."""
    from lightning_llm import LLMModule
    from lightning_llm.callbacks import TokenWeightedAccumulation

    weights = {}
    for batching in ("rows", "padded", "padding_free"):
        data = make(windowing="windows", batching=batching, global_batch_size=8, validation_fraction=0.0)
        torch.manual_seed(0)
        trainer = quiet_trainer(
            max_steps=5, accumulate_grad_batches=3, precision="64-true", callbacks=[TokenWeightedAccumulation()]
        )
        module = LLMModule({**tiny_gpt2, "vocab_size": 258}, learning_rate=1e-2, warmup=0, eps=1e-4)
        trainer.fit(module, data)
        weights[batching] = torch.cat([p.detach().flatten() for p in module.parameters()])
    for batching in ("padded", "padding_free"):
        assert (weights[batching] - weights["rows"]).norm() <= 1e-12 * weights["rows"].norm()


def test_the_learning_rate_ends_with_the_run_under_a_growing_global_batch(make, tiny_llama, quiet_trainer):
    from lightning_llm import LLMModule

    data = make(global_batch_size={"0 samples": 4, "60 samples": 16}, validation_fraction=0.0, max_length=32)
    module = LLMModule(tiny_llama, lr_schedule="linear", warmup=0)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, data)
    num_rows = len(data.table())
    assert trainer.global_step == 15 + -(-(num_rows - 60) // 16) + -(-num_rows // 16)
    assert module.lr_schedulers().get_last_lr()[0] == 0.0


def test_the_learning_rate_ends_with_a_run_whose_growing_epochs_are_cut(make, tiny_llama, quiet_trainer):
    from lightning_llm import LLMModule

    data = make(global_batch_size={"0 samples": 4, "40 samples": 16}, validation_fraction=0.0, max_length=32)
    module = LLMModule(tiny_llama, lr_schedule="linear", warmup=0)
    trainer = quiet_trainer(max_epochs=3, limit_train_batches=0.5)
    trainer.fit(module, data)
    assert module.lr_schedulers().get_last_lr()[0] == 0.0


def test_an_epoch_without_a_batch_and_overfitting_are_no_silent_failures(make, tiny_llama, quiet_trainer):
    from lightning_llm import LLMModule

    with pytest.raises(ValueError, match=r"Epoch 1 holds no batch: drop_last"):
        quiet_trainer(max_epochs=3).fit(
            LLMModule(tiny_llama),
            make(global_batch_size={"0 epochs": 8, "1 epoch": 10_000}, drop_last=True, validation_fraction=0.0),
        )
    rows = []

    class Rows(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rows.append(batch["row_ids"].tolist())

    quiet_trainer(max_epochs=3, overfit_batches=2, callbacks=[Rows()]).fit(LLMModule(tiny_llama), make())
    assert rows == rows[:2] * 3


# ---- mixtures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path):
    return {
        "large": write_documents(tmp_path / "large.jsonl", [40] * 60),
        "small": write_documents(tmp_path / "small.jsonl", [40] * 12, seed=1),
    }


def sources_of(loader):
    return np.concatenate([batch["source_ids"].numpy() for batch in loader])


@pytest.mark.parametrize(
    ("options", "share"),
    [({}, 12 / 72), ({"temperature": 1e9}, 0.5), ({"weights": {"large": 3.0, "small": 1.0}}, 0.25)],
)
def test_a_mixture_has_the_shares_that_were_asked_for(make, mixture, options, share):
    module = make(data=mixture, validation_fraction=0.0, windowing="documents", max_length=512, **options)
    module.setup("fit")
    assert module.source_names == ["large", "small"]
    found = sources_of(module.train_dataloader())
    assert len(found) == 72  # as many rows as all sources have
    assert found.mean() == pytest.approx(share, abs=0.1)
    assert f"{share:.1%} small" in module.summary()


def test_a_mixture_goes_through_each_source_before_it_repeats_a_row(make, mixture):
    weights = {"large": 1.0, "small": 1.0}
    module = make(data=mixture, weights=weights, validation_fraction=0.0, windowing="documents", max_length=512)
    loader = module.train_dataloader()
    rows = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        rows += [row for batch in loader for row in batch["row_ids"].tolist()]
    for begin, end in ((0, 60), (60, 72)):
        mine = [row for row in rows if begin <= row < end]
        for start in range(0, len(mine) - (end - begin) + 1, end - begin):
            assert sorted(mine[start : start + end - begin]) == list(range(begin, end))


def test_batches_of_a_mixture_are_those_of_their_sources(make, mixture):
    module = make(data=mixture, validation_fraction=0.2)
    module.setup("fit")
    for split, loader in (("train", module.train_dataloader()), ("validation", module.val_dataloader())):
        for batch in loader:
            for index, row in enumerate(batch["row_ids"].tolist()):
                if row < 0:
                    continue
                length = int(batch["num_input_tokens"][index])
                text = module.tokenizer.decode(batch["input_ids"][index, :length].tolist())
                assert module.row_text(row, split) == text
                name = module.source_names[int(batch["source_ids"][index])]
                first = 0 if name == "large" else len(module.table(split, "large"))
                assert first <= row < first + len(module.table(split, name))
    total = sum(int(batch["num_bytes"].sum()) for batch in module.val_dataloader())
    documents = [module._rows["validation"][name] for name in module.source_names]
    assert total == sum(int(rows.store.num_bytes[rows.documents].sum()) - len(rows.documents) for rows in documents)


def test_a_mixture_is_resumed_exactly_and_refused_with_other_weights(make, mixture):
    weights = {"large": 1.0, "small": 1.0}
    whole, stopped, rest = (
        make(data=mixture, weights=weights, validation_fraction=0.0).train_dataloader() for _ in range(3)
    )
    expected = [batch["row_ids"].tolist() for batch in whole]
    iterator = iter(stopped)
    seen = [next(iterator)["row_ids"].tolist() for _ in range(4)]
    rest.load_state_dict(stopped.state_dict())
    assert seen + [batch["row_ids"].tolist() for batch in rest] == expected
    other = make(data=mixture, weights={"large": 2.0, "small": 1.0}, validation_fraction=0.0).train_dataloader()
    with pytest.raises(ValueError, match="weights was .* and is .*"):
        other.load_state_dict(stopped.state_dict())


def test_a_mixture_in_another_order_of_its_sources_is_refused(make, mixture):
    saved = make(data=mixture, validation_fraction=0.0).train_dataloader().state_dict()
    other = make(data=dict(reversed(mixture.items())), validation_fraction=0.0).train_dataloader()
    with pytest.raises(ValueError, match=r"sources was \['large', 'small'\] and is \['small', 'large'\]"):
        other.load_state_dict(saved)


def test_a_global_batch_in_tokens_follows_the_shares_of_a_mixture(make, tmp_path):
    data = {
        "short": write_documents(tmp_path / "short.jsonl", [2] * 500),
        "long": write_documents(tmp_path / "long.jsonl", [60] * 500),
    }
    options = {"data": data, "validation_fraction": 0.0, "windowing": "documents", "max_length": 512}
    for weights in ({"short": 1.0, "long": 9.0}, {"short": 9.0, "long": 1.0}):
        loader = make(**options, weights=weights, global_batch_tokens=4000).train_dataloader()
        steps = [int((shift_labels(batch["labels"]) != -100).sum()) for batch in loader]
        assert np.mean(steps[:-1]) == pytest.approx(4000, rel=0.1)
        assert sum(steps) == pytest.approx(loader.tokens_per_epoch, rel=0.1)


def test_parts_of_a_mixture_are_named_alike(make, mixture):
    with pytest.raises(ValueError, match=r"`validation_data` names \['other'\], but the sources of `data` are"):
        make(data=mixture, validation_data={"other": mixture["small"]})
    with pytest.raises(ValueError, match="both a single source or both mappings"):
        make(data=mixture, validation_data=mixture["small"])
    with pytest.raises(ValueError, match="has no pools to cut by `micro_batch_tokens`"):
        make(data=mixture, batching="padding_free", micro_batch_tokens=64, validation_fraction=0.0).train_dataloader()


# ---- evaluation, summary, damage ---------------------------------------------------------------------------------


def test_evaluation_has_windows_of_its_own(make):
    module = make(eval_windowing="windows", eval_context=48, validation_fraction=0.2)
    module.setup("fit")
    assert module.table("train").windowing == "packed"
    table = module.table("validation")
    assert table.windowing == "windows"
    later = table.num_context > 0
    assert later.any()
    assert (table.num_context[later] >= 48).all()
    assert module.packs_documents
    assert not make(windowing="windows").packs_documents


def test_summary_says_what_truncating_would_lose(make):
    module = make(max_length=64, validation_fraction=0.0)
    module.setup("fit")
    lengths = module.store().lengths
    lost = int((lengths - np.minimum(lengths, 64)).sum())
    assert f"truncating would lose {lost:,} tokens ({lost / lengths.sum():.0%}), none is lost here" in module.summary()
    assert f"{(lengths > 64).sum()} documents ({(lengths > 64).mean():.0%}) exceed 64 tokens" in module.summary()


def test_plot_lengths_draws_documents_and_where_their_tokens_stand(make, mixture, tmp_path):
    figure = make(data=mixture, validation_fraction=0.0).plot_lengths()
    _, right = figure.axes
    assert right.get_ylabel() == "share of all tokens"
    kept = next(line for line in right.lines if line.get_label().endswith("kept if cut at this length"))
    assert kept.get_ydata()[-1] == pytest.approx(1.0)
    assert (np.diff(kept.get_ydata()) >= 0).all()
    figure.savefig(tmp_path / "lengths.png")


def test_tokens_that_are_cut_short_in_mid_run_are_an_error_and_no_crash(make, tmp_path):
    module = make()
    loader = iter(module.train_dataloader())
    next(loader)
    (folder,) = (tmp_path / "cache").glob("tokens-*[0-9a-f]")
    with (folder / "tokens.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"tokens.bin"):
        next(loader)


def test_a_fit_begins_anew_after_a_checkpoint_was_only_evaluated_and_after_a_run_that_failed(
    make, tiny_llama, quiet_trainer, tmp_path
):
    from lightning_llm import LLMModule

    class Rows(L.Callback):
        def __init__(self, fail=False):
            self.rows, self.fail = [], fail

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.rows.append(batch["row_ids"].tolist())
            if self.fail:
                raise RuntimeError("stop here")

    data, first = make(), Rows()
    trainer = quiet_trainer(max_steps=3, limit_val_batches=1, callbacks=[first])
    trainer.fit(LLMModule(tiny_llama), data)
    trainer.save_checkpoint(tmp_path / "mid.ckpt")
    quiet_trainer(limit_val_batches=1).validate(LLMModule(tiny_llama), data, ckpt_path=tmp_path / "mid.ckpt")
    with pytest.raises(RuntimeError, match="stop here"):
        quiet_trainer(max_steps=9, callbacks=[Rows(fail=True)]).fit(
            LLMModule(tiny_llama), data, ckpt_path=tmp_path / "mid.ckpt"
        )
    again = Rows()
    quiet_trainer(max_steps=3, limit_val_batches=1, callbacks=[again]).fit(LLMModule(tiny_llama), data)
    assert again.rows == first.rows
