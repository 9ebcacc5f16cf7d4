"""MaskedTextDataModule: which tokens are hidden, by what, and that nothing but seed, epoch and row decides it."""

import json

import lightning as L
import numpy as np
import pytest
import torch
from example_training import Probe, batches_of_ranks, largest_difference, row_ids_of, step_gradients
from transformers import BertTokenizerFast

from lightning_llm import LLMModule
from lightning_llm.datamodules import MaskedTextDataModule
from lightning_llm.datamodules.masking import Masking, word_begins
from lightning_llm.datamodules.tokenizer import byte_tokenizer

BERT = {
    "model_type": "bert",
    "vocab_size": 259,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
WORDS = ["red", "green", "blue", "white", "black"]


@pytest.fixture
def data_file(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(random.choice(WORDS, 3 + n % 20))}) + "\n" for n in range(40)))
    return str(path)


@pytest.fixture
def make(tmp_path, data_file):
    def make(**options):
        defaults = {"tokenizer": "bytes", "max_length": 32, "micro_batch_size": 4, "validation_fraction": 0.2}
        return MaskedTextDataModule(data_file, **{**defaults, "cache_dir": str(tmp_path / "cache"), **options})

    return make


@pytest.fixture
def word_pieces(tmp_path):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "gr", "##een", "b", "##lue", "##lack", "white"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"))


def by_row(batches):
    """Inputs and labels of each row, by epochs if it comes again."""
    rows = {}
    for batch in batches:
        for index, row in enumerate(batch["row_ids"].tolist()):
            length = int(batch["num_input_tokens"][index])
            pair = [batch[name][index, :length].tolist() for name in ("input_ids", "labels")]
            if row >= 0:
                rows.setdefault(row, []).append(pair)
    return rows


def masking(**options):
    return Masking(**{"mask_token_id": 100, "random_ids": np.arange(50), **options})


def test_so_many_tokens_are_targets_and_so_many_of_them_hidden():
    tokens = np.arange(50, 70)
    counts = {"hidden": 0, "kept": 0, "random": 0}
    for row in range(2000):
        inputs, labels = masking(probability=0.25).hide(tokens, np.ones(20, bool), row, epoch=0)
        targets = labels != -100
        assert targets.sum() == 5
        assert (labels[targets] == tokens[targets]).all()
        assert (inputs[~targets] == tokens[~targets]).all()
        counts["hidden"] += int((inputs[targets] == 100).sum())
        counts["kept"] += int((inputs[targets] == labels[targets]).sum())
        counts["random"] += int((inputs[targets] < 50).sum())
    total = sum(counts.values())
    assert total == 10_000
    for name, share in (("hidden", 0.8), ("kept", 0.1), ("random", 0.1)):  # 5 standard deviations
        assert abs(counts[name] / total - share) < 5 * (share * (1 - share) / total) ** 0.5


def test_every_token_is_chosen_as_often_as_others():
    counts = sum((masking().hide(np.arange(20), np.ones(20, bool), row, 0)[1] != -100) for row in range(4000))
    assert np.abs(counts / 4000 - 0.15).max() < 5 * (0.15 * 0.85 / 4000) ** 0.5


def test_what_is_hidden_follows_from_seed_epoch_and_row():
    def labels(row=3, epoch=0, **options):
        return masking(**options).hide(np.arange(40), np.ones(40, bool), row, epoch)[1].tolist()

    assert labels() == labels()
    others = [labels(row=4), labels(epoch=1), labels(seed=1), labels(epoch=None), labels(row=0, epoch=3)]
    assert all(labels() != other for other in others)


def test_only_what_may_be_hidden_is():
    may_hide = np.zeros(30, bool)
    may_hide[[4, 9]] = True
    for row in range(20):
        labels = masking().hide(np.arange(30), may_hide, row, 0)[1]
        assert (labels != -100).sum() == 1
        assert set(np.flatnonzero(labels != -100)) <= {4, 9}
    assert (masking().hide(np.arange(30), np.zeros(30, bool), 0, 0)[1] == -100).all()


def test_whole_words_are_hidden_together():
    begins = word_begins(["a", "##b", "##c", "d"])
    tokens = np.array([0, 1, 2, 3, 0, 1, 3, 3, 0, 1, 2, 3])
    words = [[0, 1, 2], [3], [4, 5], [6], [7], [8, 9, 10], [11]]
    hidden = set()
    for row in range(200):
        labels = masking(probability=0.3, begins_word=begins).hide(tokens, np.ones(12, bool), row, 0)[1]
        targets = set(np.flatnonzero(labels != -100).tolist())
        found = [word for word in words if set(word) <= targets]
        assert sum(map(len, found)) == len(targets) <= 4
        hidden |= targets
    assert hidden == set(range(12))


def test_rows_have_their_special_tokens_and_hide_none(make, word_pieces, tmp_path):
    data = make(tokenizer=word_pieces, max_length=12, validation_fraction=0)
    data.setup("fit")
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    seen = []
    for inputs, labels in (pair for pairs in by_row(data.train_dataloader()).values() for pair in pairs):
        tokens = [label if label != -100 else token for token, label in zip(inputs, labels, strict=True)]
        assert (tokens[0], tokens[-1]) == (word_pieces.cls_token_id, word_pieces.sep_token_id)
        assert (labels[0], labels[-1]) == (-100, -100)
        assert len(tokens) <= 12
        seen.append(tokens[1:-1])
    for text in texts:
        assert any(word_pieces(text, add_special_tokens=False)["input_ids"][:10] == tokens for tokens in seen)


def test_each_token_of_a_document_may_be_hidden_in_one_window_only(make):
    data = make(max_length=16, validation_fraction=0)
    data.setup("fit")
    dataset = data._dataset("train")
    assert dataset.table.num_context.any()  # the last window of a document begins earlier
    for row in range(len(dataset)):
        labels = dataset[[row]]["labels"][0]
        assert (labels[: int(dataset.table.num_context[row])] == -100).all()
    assert (
        sum((dataset[[row]]["labels"] != -100).sum() for row in range(len(dataset))) == dataset.table.num_label_tokens
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 2}, {"micro_batch_size": 7}, {"batching": "padded", "micro_batch_tokens": 96}]
)
def test_no_cut_changes_what_is_hidden(make, num_ranks, options):
    data = make()
    data.setup("fit")
    for split in ("train", "validation"):
        loader = data.train_dataloader() if split == "train" else data.val_dataloader()
        expected = by_row(loader)
        per_rank = batches_of_ranks(lambda: make(**options), num_ranks, split)
        assert by_row([batch for batches in per_rank for batch in batches]) == expected
        assert len(row_ids_of(per_rank[0])) > 0


class Hidden(L.Callback):
    """What each optimizer step saw: rows, and the sum of what their labels are."""

    def __init__(self):
        self.steps = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        found = self.steps.setdefault(trainer.global_step, [])
        found += [[row, pair] for row, pairs in by_row([batch]).items() for pair in pairs]


def test_each_epoch_hides_others_and_a_resumed_run_hides_the_same(make, tmp_path, quiet_trainer):
    def run(steps, accumulate, resume=None, **options):
        seen = Hidden()
        data = make(global_batch_size=12, **options)
        trainer = quiet_trainer(
            max_steps=steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            callbacks=[seen],
            limit_val_batches=0,
        )
        trainer.fit(Probe(), data, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return {step: sorted(rows) for step, rows in seen.steps.items()}

    whole = run(14, 2)
    epochs = {}
    for rows in whole.values():
        for row, pair in rows:
            epochs.setdefault(row, []).append(pair)
    again = [pairs for pairs in epochs.values() if len(pairs) > 1 and sum(label != -100 for label in pairs[0][1]) > 2]
    assert len(again) > 10
    assert all(pairs[0] != pairs[1] for pairs in again)
    run(5, 2)
    rest = run(14, 3, resume=tmp_path / "5.ckpt", num_workers=2)
    assert rest == {step: rows for step, rows in whole.items() if step >= 5}


def test_evaluation_always_hides_the_same(make):
    first, second = make(), make()
    for data in (first, second):
        data.setup("validate")
    loader = first.val_dataloader()
    loader.set_epoch(3)
    assert by_row(loader) == by_row(second.val_dataloader())


def test_mixtures_are_masked_too(make, data_file, tmp_path):
    options = {"tokenizer": "bytes", "max_length": 32, "cache_dir": str(tmp_path / "cache")}
    data = MaskedTextDataModule({"one": data_file, "two": data_file}, weights={"one": 1, "two": 2}, **options)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch["source_ids"].tolist()) <= {0, 1}
    assert (batch["labels"] != -100).any(1).all()


def test_bytes_and_bpe_get_a_mask_token_and_keep_their_size(make):
    data = make()
    assert data.tokenizer.mask_token_id == 258
    data = make(tokenizer="bpe", vocab_size=300)
    assert len(data.tokenizer) <= 300
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert any((batch["input_ids"] == data.tokenizer.mask_token_id).any() for batch in batches)


def test_a_tokenizer_without_a_mask_token_is_refused(make):
    with pytest.raises(ValueError, match=r"no mask token. Take that of a masked model .*tokenizer.add_special_tokens"):
        make(tokenizer=byte_tokenizer()).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windowing": "packed"}, "`windowing` must be 'windows' or 'documents'"),
        ({"batching": "padding_free", "micro_batch_tokens": 64}, "the model would see them as one"),
        ({"stride": 4}, "`stride` has no meaning for masked texts"),
        ({"mask_probability": 0}, "`mask_probability` lies between 0 and 1, but got 0"),
        ({"mask_share": 0.9, "random_share": 0.2}, "1 together at most, but got 0.9 and 0.2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_rows_cannot_be_shortened_while_they_are_trained_on(make):
    with pytest.raises(ValueError, match="Rows of masked texts cannot be cut"):
        make().cut_batch({}, 8)


def test_a_model_trains_on_them_and_validates(make, quiet_trainer):
    torch.manual_seed(0)
    trainer = quiet_trainer(max_steps=60, val_check_interval=60, check_val_every_n_epoch=None)
    trainer.fit(LLMModule(BERT, "masked-lm", learning_rate=1e-2, warmup=5), make(whole_words=True))
    assert trainer.callback_metrics["val/loss"] < 4


def test_a_ragged_cut_of_the_global_batch_does_not_change_the_gradient(make, tmp_path):
    def gradients(micro_batches, weighted=True, **options):
        torch.manual_seed(0)
        data = make(global_batch_size=10, **options)
        return step_gradients(tmp_path, LLMModule(BERT, "masked-lm"), data, micro_batches, weighted=weighted)

    whole = gradients(1)
    assert largest_difference(gradients(3), whole) < 1e-12
    assert largest_difference(gradients(3, batching="padded"), whole) < 1e-12
    assert largest_difference(gradients(3, weighted=False), whole) > 1e-3
