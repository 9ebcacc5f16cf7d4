"""TextClassificationDataModule and what every data module of examples shares: splits, ranks, workers, resume, cache."""

import itertools
import json

import numpy as np
import pytest
import torch
from example_training import batches_of_ranks, largest_difference, row_ids_of, run_steps, step_gradients
from torch.utils.data import get_worker_info

from lightning_llm import LLMModule
from lightning_llm.datamodules import TextClassificationDataModule
from lightning_llm.datamodules.examples.records import RecordError
from lightning_llm.datamodules.tokenizer import byte_tokenizer

BERT = {
    "model_type": "bert",
    "vocab_size": 258,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
WORDS = ["good ", "bad ", "fair "]
ROWS = [{"text": WORDS[n % 3] * (1 + n * 7 % 5), "label": WORDS[n % 3].strip(), "n": n} for n in range(50)]


@pytest.fixture
def make(tmp_path):
    def make(data=ROWS, **options):
        defaults = {"tokenizer": "bytes", "max_length": 32, "micro_batch_size": 4, "validation_fraction": 0.2}
        return TextClassificationDataModule(data, **{**defaults, "cache_dir": str(tmp_path / "cache"), **options})

    return make


def file_of(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_batch_holds_the_tokenizers_ids_and_the_numbers_of_the_labels(make):
    data = make()
    data.setup("fit")
    assert data.label_names == ["bad", "fair", "good"]
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    tokenizer = byte_tokenizer()
    dataset = data._dataset("train")
    for row_id in range(len(dataset)):
        batch = dataset[[row_id]]
        record = data.records()[int(data.row_name(row_id).split()[-1])]
        assert batch["input_ids"][0].tolist() == tokenizer(record["text"])["input_ids"][:32]
        assert data.label_names[batch["labels"][0]] == record["label"]
        assert int(batch["num_input_tokens"][0]) == batch["attention_mask"].sum()


def test_pairs_and_special_tokens_are_the_tokenizers_own(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]))
    tokenizer = transformers.BertTokenizerFast(str(vocab))
    rows = [{"one": "a b", "two": "c c c", "label": 0}, {"one": "b", "two": "a a a a a a a a a a", "label": 1}]
    data = TextClassificationDataModule(
        rows,
        tokenizer,
        8,
        text_column="one",
        text_pair_column="two",
        validation_fraction=0,
        shuffle=False,
        cache_dir=str(tmp_path),
    )
    with pytest.warns(UserWarning, match="1 of 2 rows of the data are longer than max_length=8, and 6 tokens are left"):
        data.setup("fit")
    batch = data._dataset("train")[[0, 1]]
    for name in ("input_ids", "token_type_ids"):
        expected = tokenizer(["a b", "b"], ["c c c", "a " * 10], truncation=True, max_length=8, padding=True)[name]
        assert batch[name].tolist() == expected


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2},
        {"batching": "padded", "micro_batch_tokens": 64},
        {"global_batch_size": 10},
        {"global_batch_size": 10, "batching": "padded"},
    ],
)
def test_every_row_comes_once_on_any_ranks_and_workers(make, num_ranks, options):
    data = make(**options)
    data.setup("fit")
    for split in ("train", "validation"):
        per_rank = batches_of_ranks(lambda: make(**options), num_ranks, split)
        assert len({len(batches) for batches in per_rank}) == 1
        rows = sorted(itertools.chain.from_iterable(map(row_ids_of, per_rank)))
        assert rows == list(range(len(data._dataset(split))))


def test_batches_within_a_budget_of_tokens(make):
    data = make(batching="padded", micro_batch_tokens=64)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert max(batch["input_ids"].numel() for batch in batches) <= 64
    assert max(len(batch["input_ids"]) for batch in batches) > 4


def test_validation_rows_follow_from_number_and_seed_alone(make):
    def held_out(**options):
        data = make(**options)
        data.setup("fit")
        return [data.row_name(row, "validation") for row in range(len(data._dataset("validation")))]

    assert held_out() == held_out(max_length=8, micro_batch_size=1, num_workers=1)
    assert held_out() != held_out(seed=1)
    data = make()
    data.setup("fit")
    train = {data.row_name(row) for row in range(len(data._dataset("train")))}
    assert len(train | set(held_out())) == len(ROWS)
    assert not train & set(held_out())


def test_splits_of_their_own_are_used_as_such(make):
    data = make(validation_data=ROWS[:5], test_data=ROWS[:7])
    data.setup("fit")
    data.setup("test")
    assert [len(data._dataset(split)) for split in ("train", "validation", "test")] == [50, 5, 7]
    shared = make()
    shared.setup("test")
    assert [row["row_ids"].tolist() for row in shared.test_dataloader()] == [
        row["row_ids"].tolist() for row in shared.val_dataloader()
    ]


def test_no_test_is_made_on_training_rows(make):
    data = make(validation_fraction=0)
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="There are no test rows: all are trained on. Pass test_data"):
        data.setup("test")


@pytest.mark.parametrize("step", [2, 5, 9, 11])
def test_a_run_goes_on_with_the_same_rows_on_another_layout(make, tmp_path, step):
    options = {"global_batch_size": 8}
    whole = run_steps(tmp_path, "whole", make(**options), accumulate=2, save_steps=[step])
    assert len({epoch for epoch, _ in whole.values()}) > 2
    for accumulate, changed in [(2, {"num_workers": 2}), (1, {}), (4, {"num_workers": 1})]:
        data = make(**options, **changed)
        rest = run_steps(tmp_path, "rest", data, accumulate=accumulate, resume=tmp_path / f"step{step}.ckpt")
        assert rest == {number: rows for number, rows in whole.items() if number > step}


def test_a_run_does_not_go_on_over_other_rows(make, tmp_path):
    run_steps(tmp_path, "whole", make(), save_steps=[3])
    changed = [{**row, "text": row["text"] + "."} for row in ROWS]
    with pytest.raises(ValueError, match="saved over other data, and its position means nothing in this: content was"):
        run_steps(tmp_path, "rest", make(changed), resume=tmp_path / "step3.ckpt")


class _StartMethod:
    """Say in each batch whether a worker made it."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, examples):
        return {**self.collate(examples), "in_worker": torch.tensor(get_worker_info() is not None)}


def test_workers_that_are_spawned_make_the_same_batches(make):
    data, plain = make(num_workers=1), make()
    data.setup("fit")
    plain.setup("fit")
    data._dataset("train").collate = _StartMethod(data._dataset("train").collate)
    loader = data.train_dataloader()
    loader._loader.multiprocessing_context = "spawn"
    batches = list(loader)
    assert all(bool(batch.pop("in_worker")) for batch in batches)
    for found, expected in zip(batches, plain.train_dataloader(), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_cache_is_shared_by_what_does_not_change_rows(make, tmp_path):
    def caches():
        return {folder for folder in (tmp_path / "cache").glob("examples-*") if folder.is_dir()}

    make().prepare_data()
    first = caches()
    assert len(first) == 1
    make(micro_batch_size=2, seed=4, validation_fraction=0.5, num_workers=1, shuffle=False).prepare_data()
    assert caches() == first
    for number, changed in enumerate(
        [{"max_length": 8}, {"labels": ["good", "bad", "fair"]}, {"text_column": "label"}]
    ):
        make(**changed).prepare_data()
        assert len(caches()) == 2 + number
    path = tmp_path / "rows.jsonl"
    make(file_of(path)).prepare_data()
    make(file_of(path, ROWS[:-1])).prepare_data()
    assert len(caches()) == 6


def test_a_damaged_cache_is_named(make, tmp_path):
    make().prepare_data()
    (folder,) = (path for path in (tmp_path / "cache").glob("examples-*") if path.is_dir())
    content = (folder / "input_ids.npy").read_bytes()
    for damage in (content[:40], content[:-8], None):
        (folder / "input_ids.npy").unlink(missing_ok=True)
        if damage is not None:
            (folder / "input_ids.npy").write_bytes(damage)
        with pytest.raises(ValueError, match=rf"The cache of examples {folder} cannot be read .* Delete that folder"):
            make().setup("fit")


def test_a_row_that_fails_leaves_no_cache(make, tmp_path):
    with pytest.raises(RecordError, match="row 50: column 'text' should hold a text, but holds nothing"):
        make([*ROWS, {"text": "", "label": "good"}]).prepare_data()
    assert not [folder for folder in (tmp_path / "cache").glob("examples-*") if folder.is_dir()]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            ROWS,
            {"text_column": "body"},
            r"row 0 has no column 'body'; .* Name the columns with text_column=..., label_c",
        ),
        (ROWS, {"label_column": ["a", "b"], "problem_type": "regression"}, "no column 'a' and no column 'b'"),
        ([{"text": 3, "label": "a"}], {}, r"row 0: column 'text' should hold a text, but holds int \('3'\)"),
        ([{"text": " ", "label": "a"}], {}, "row 0: column 'text' should hold a text"),
        ([*ROWS, {"label": "good"}], {}, "row 50: column 'text' should hold a text, but holds nothing"),
        (
            [*ROWS, {"text": "x"}],
            {},
            "row 50: column 'label' should hold the name or the number of a class, but holds None",
        ),
        (ROWS, {"labels": ["good", "bad"]}, r"row 2: column 'label' holds 'fair', which is none of the 2 classes"),
        (ROWS, {"labels": ["good", "bad", "fair", "odd"]}, "No training row of the data has the class 'odd'"),
        (
            [{"text": "a", "label": 1}, {"text": "b", "label": 2}],
            {"validation_fraction": 0},
            "has the class '0' in its c",
        ),
        (
            ROWS,
            {"validation_data": [{"text": "a", "label": "odd"}]},
            "the validation data, row 0: column 'label' holds 'odd', which is none",
        ),
        (ROWS[:1], {"validation_fraction": 0.01}, "No row is left for train: of 1 in the data, none was drawn for it"),
    ],
)
def test_bad_rows_are_named(make, rows, options, message):
    with pytest.raises(ValueError, match=message):
        make(rows, **options).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batching": "padding_free", "micro_batch_tokens": 64},
            "models that TextClassificationDataModule is for would see",
        ),
        ({"batching": "padded"}, "needs `micro_batch_tokens`"),
        ({"max_length": 0}, "`max_length` must be a whole number, 2 or more"),
        ({"validation_fraction": 1.5}, "`validation_fraction` lies in 0..1"),
        ({"problem_type": "ranking"}, "`problem_type` must be one of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_an_empty_class_is_allowed_where_it_is_meant(make):
    data = make(labels=["good", "bad", "fair", "odd"], allow_empty_classes=True)
    data.setup("fit")
    assert data.label_names == ["good", "bad", "fair", "odd"]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (ROWS, {}),
        (
            [{**row, "label": ["good", "long"][: 1 + row["n"] % 2]} for row in ROWS],
            {"problem_type": "multi_label_classification"},
        ),
        ([{**row, "label": row["n"] / 50} for row in ROWS], {"problem_type": "regression"}),
    ],
    ids=["one class", "several", "number"],
)
def test_a_model_trains_on_them_and_validates(make, quiet_trainer, rows, options):
    data = make(rows, **options)
    trainer = quiet_trainer(max_steps=20, val_check_interval=10, check_val_every_n_epoch=None)
    module = LLMModule(BERT, "sequence-classification", learning_rate=1e-2, warmup=0)
    trainer.fit(module, data)
    assert module.model.config.problem_type == options.get("problem_type", "single_label_classification")
    assert list(module.model.config.id2label.values()) == data.label_names
    assert np.isfinite(trainer.callback_metrics["val/loss"].item())
    if not options:
        assert trainer.callback_metrics["val/accuracy"] > 0.9


def test_a_ragged_cut_of_the_global_batch_does_not_change_the_gradient(make, tmp_path):
    def gradients(micro_batches, **options):
        torch.manual_seed(0)
        module = LLMModule(BERT, "sequence-classification", learning_rate=1e-3)
        data = make(global_batch_size=10, **options)
        return step_gradients(tmp_path, module, data, micro_batches)

    whole = gradients(1)
    assert largest_difference(gradients(3), whole) < 1e-12
    assert largest_difference(gradients(4, batching="padded"), whole) < 1e-12
    assert largest_difference(gradients(1, seed=1), whole) > 1e-3  # other rows: the comparison can fail


@pytest.mark.parametrize("number", [2, 3, 7])
def test_a_share_of_few_records_is_one_record_at_least(make, number):
    held_out = set()
    for seed in range(8):
        data = make(ROWS[:number], validation_fraction=0.01, seed=seed, allow_empty_classes=True)
        data.setup("fit")
        assert (len(data._dataset("train")), len(data._dataset("validation"))) == (number - 1, 1)
        assert data.row_name(0, "validation") not in {data.row_name(n) for n in range(number - 1)}
        held_out.add(data.row_name(0, "validation"))
    assert len(held_out) > 1  # the seed decides


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq"])
def test_a_forgotten_task_is_named(make, quiet_trainer, task):
    """`task="causal-lm"` is what LLMModule does by default."""
    model = {"causal-lm": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 258}}
    model["seq2seq"] = {"model_type": "t5", "vocab_size": 258, "d_model": 16, "d_ff": 32, "num_layers": 1}
    with (
        pytest.warns(UserWarning, match=f"TextClassificationDataModule has rows with classes, but the task '{task}'"),
        pytest.raises(ValueError, match=rf"`labels` of a {task} batch are .*but got \(4,\).*another task"),
    ):
        quiet_trainer(max_steps=1).fit(LLMModule(model[task], task=task), make())


def test_a_decoder_whose_tokenizer_has_no_padding_token_finds_the_end_of_each_row(make, quiet_trainer):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None  # as GPT-2's
    decoder = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 258}
    module = LLMModule(decoder, task="sequence-classification")
    data = make(tokenizer=tokenizer)
    quiet_trainer(max_steps=1).fit(module, data)
    batch = next(iter(data.val_dataloader()))
    module.eval()
    together = module.predict_step(batch, 0)["logits"]
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        alone = {"input_ids": batch["input_ids"][row : row + 1, :length], "row_ids": batch["row_ids"][row : row + 1]}
        assert torch.allclose(module.predict_step(alone, 0)["logits"][0], together[row], atol=1e-6)
