"""Seq2SeqDataModule: sources and targets, from columns and from translations."""

import pytest
import torch
from example_training import batches_of_ranks, largest_difference, row_ids_of, step_gradients
from transformers import BertTokenizerFast

from lightning_llm import LLMModule
from lightning_llm.datamodules import Seq2SeqDataModule
from lightning_llm.datamodules.tokenizer import byte_tokenizer

BART = {
    "model_type": "bart",
    "vocab_size": 258,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
COLOURS = {"red": "rot", "green": "gruen", "blue": "blau", "white": "weiss"}
PAIRS = [(f"{a} {b}", f"{COLOURS[a]} {COLOURS[b]}") for a in COLOURS for b in COLOURS] * 2
ROWS = [{"source": source, "target": target} for source, target in PAIRS]
TRANSLATIONS = [{"translation": {"en": source, "de": target}} for source, target in PAIRS]
END = byte_tokenizer().eos_token_id


@pytest.fixture
def make(tmp_path):
    def make(data=ROWS, **options):
        defaults = {"tokenizer": "bytes", "max_source_length": 48, "max_target_length": 24, "micro_batch_size": 4}
        return Seq2SeqDataModule(data, **{**defaults, "cache_dir": str(tmp_path / "cache"), **options})

    return make


def test_sources_have_their_prefix_and_targets_their_end(make):
    data = make(source_prefix="to German: ", validation_fraction=0)
    data.setup("fit")
    batch = data._dataset("train")[[0, 1, -1]]
    assert data.tokenizer.decode(batch["input_ids"][1][batch["attention_mask"][1] == 1]) == "to German: red green"
    labels = batch["labels"][1]
    assert data.tokenizer.decode(labels[labels != -100]) == "rot gruen<|endoftext|>"
    assert batch["labels"][0].tolist()[-2:] == [-100, -100]  # a shorter target
    assert (batch["labels"][2] == -100).all()
    assert set(batch) == {"input_ids", "attention_mask", "labels", "num_input_tokens", "row_ids"}


def test_translations_give_the_same_rows_in_either_direction(make):
    columns, mapped = (
        make(),
        make(TRANSLATIONS, translation_column="translation", source_column="en", target_column="de"),
    )
    back = make(TRANSLATIONS, translation_column="translation", source_column="de", target_column="en")
    for data in (columns, mapped, back):
        data.setup("fit")
    one, two, three = (data._dataset("train")[[0, 5]] for data in (columns, mapped, back))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert three["labels"].tolist() != one["labels"].tolist()


def test_what_is_cut_is_said_and_a_cut_target_still_ends(make):
    data = make(max_source_length=6, max_target_length=5, validation_fraction=0)
    with pytest.warns(
        UserWarning, match="32 of 32 rows .* longer than max_source_length=6 or max_target_length=5, and"
    ):
        data.setup("fit")
    batch = data._dataset("train")[[0]]
    assert batch["input_ids"].shape == (1, 6)
    assert data.tokenizer.decode(batch["labels"][0]) == "rot <|endoftext|>"


def test_tokenizers_that_end_a_text_themselves_are_left_alone(make, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"), eos_token="[SEP]")
    data = make([{"source": "a b", "target": "b"}], tokenizer=tokenizer, validation_fraction=0)
    data.setup("fit")
    batch = data._dataset("train")[[0]]
    assert batch["labels"].tolist() == [[2, 6, 3]]
    assert "token_type_ids" not in batch


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_row_comes_once_within_a_budget(make, num_ranks):
    def budget():
        return make(batching="padded", micro_batch_tokens=128)

    per_rank = batches_of_ranks(budget, num_ranks)
    data = budget()
    data.setup("fit")
    rows = [row for batches in per_rank for row in row_ids_of(batches)]
    assert sorted(rows) == list(range(len(data._dataset("train"))))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"source": "a", "target": ""}], {}, "row 32: column 'target' should hold a text, but holds nothing"),
        ([{"source": 3, "target": "a"}], {}, "row 32: column 'source' should hold a text, but holds int"),
        ([{"target": "a"}], {}, "row 32: column 'source' should hold a text, but holds nothing"),
    ],
)
def test_bad_rows_are_named(make, rows, options, message):
    with pytest.raises(ValueError, match=message):
        make([*ROWS, *rows], **options).setup("fit")


@pytest.mark.parametrize(
    ("translation", "message"),
    [
        ({"en": "a"}, r"should hold texts in 'en' and 'de', but holds the languages \['en'\]"),
        ("a", "should hold texts in 'en' and 'de', but holds 'a'. Name the languages with source_column"),
        ({"en": "a", "de": None}, "column 'de' should hold a text, but holds nothing"),
    ],
)
def test_bad_translations_are_named(make, translation, message):
    rows = [*TRANSLATIONS, {"translation": translation}]
    data = make(rows, translation_column="translation", source_column="en", target_column="de")
    with pytest.raises(ValueError, match=f"the data, row 32: .*{message}"):
        data.setup("fit")


def test_missing_columns_are_named(make):
    with pytest.raises(
        ValueError, match=r"no column 'source' and no column 'target'; its columns are \['translation'\]"
    ):
        make(TRANSLATIONS).setup("fit")


def test_a_model_trains_on_them_and_writes_in_validation(make, quiet_trainer):
    torch.manual_seed(0)
    data = make(validation_data=ROWS[:4], eval_micro_batch_size=2)
    options = {"generate": {"max_new_tokens": 12}}
    module = LLMModule(BART, "seq2seq", learning_rate=1e-2, warmup=5, task_options=options, weight_decay=0.0)
    trainer = quiet_trainer(max_steps=150, val_check_interval=150, check_val_every_n_epoch=None)
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/accuracy"] > 0.9
    assert trainer.callback_metrics["val/chrf"] > 0.5
    written = trainer.predict(module, data)[0]["texts"]
    assert len(written) == 2


def test_a_ragged_cut_of_the_global_batch_does_not_change_the_gradient(make, tmp_path):
    def gradients(micro_batches, weighted=True, **options):
        torch.manual_seed(0)
        module = LLMModule(BART, "seq2seq")
        return step_gradients(tmp_path, module, make(global_batch_size=10, **options), micro_batches, weighted=weighted)

    whole = gradients(1)
    assert largest_difference(gradients(3), whole) < 1e-12
    assert largest_difference(gradients(3, batching="padded"), whole) < 1e-12
    assert largest_difference(gradients(3, weighted=False), whole) > 1e-3
