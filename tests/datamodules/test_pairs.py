"""PairDataModule: groups of columns for each text of a row, and scores where there are any."""

import pytest
import torch

from lightning_llm.datamodules import PairDataModule
from lightning_llm.datamodules.examples.records import RecordError

ROWS = [
    {"anchor": f"question {n}" + "?" * (n % 4), "positive": f"answer {n}", "no1": f"wrong {n}", "no2": f"false {n}"}
    for n in range(7)
]


def pairs(folder, rows=None, **options):
    defaults = {"max_length": 32, "micro_batch_size": 3, "validation_fraction": 0.0}
    return PairDataModule(rows or ROWS, "bytes", cache_dir=str(folder / "cache"), **{**defaults, **options})


def texts(data, *names):
    data.setup("fit")
    found = []
    for batch in data.train_dataloader():
        for row in range(len(batch["row_ids"])):
            masked = [batch[f"{name}_input_ids"][row][batch[f"{name}_attention_mask"][row].bool()] for name in names]
            found.append(tuple(data.tokenizer.decode(ids) for ids in masked))
    return sorted(found)


def test_each_text_has_its_columns(tmp_path):
    assert texts(pairs(tmp_path), "anchor", "positive") == sorted((r["anchor"], r["positive"]) for r in ROWS)
    one = pairs(tmp_path, negative_column="no1")
    assert texts(one, "anchor", "positive", "negative") == sorted((r["anchor"], r["positive"], r["no1"]) for r in ROWS)
    two = pairs(tmp_path, negative_column=["no1", "no2"])
    expected = sorted((r["anchor"], r["positive"], r["no1"], r["no2"]) for r in ROWS)
    assert texts(two, "anchor", "positive", "negative_1", "negative_2") == expected
    assert "labels" not in two._dataset("train")[[0]]


def test_prefixes_stand_before_the_texts(tmp_path):
    data = pairs(tmp_path, anchor_prefix="query: ", positive_prefix="passage: ", negative_column="no1")
    found = texts(data, "anchor", "positive", "negative")
    assert found == sorted((f"query: {r['anchor']}", f"passage: {r['positive']}", f"passage: {r['no1']}") for r in ROWS)


def test_scores_are_labels(tmp_path):
    rows = [{"sentence1": r["anchor"], "sentence2": r["positive"], "score": n / 4} for n, r in enumerate(ROWS)]
    columns = {"anchor_column": "sentence1", "positive_column": "sentence2", "score_column": "score"}
    data = pairs(tmp_path, rows, **columns, shuffle=False, micro_batch_size=7)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [n / 4 for n in range(7)]
    assert data._dataset("train")[[-1]]["labels"].isnan().all()


def test_positives_of_several_rows_are_counted(tmp_path):
    data = pairs(tmp_path, [*ROWS, {**ROWS[0], "anchor": "another"}])
    with pytest.warns(UserWarning, match="2 of 8 training pairs of the data have a positive that another pair has too"):
        data.setup("fit")


def test_long_texts_are_cut_with_a_warning(tmp_path):
    data = pairs(tmp_path, max_length=8)
    with pytest.warns(UserWarning, match="7 of 7 rows of the data are longer than max_length=8"):
        found = texts(data, "anchor", "positive")
    assert found == sorted((r["anchor"][:8], r["positive"][:8]) for r in ROWS)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"positive": ""}, {}, "row 1: column 'positive' should hold a text"),
        ({"no2": 3}, {"negative_column": ["no1", "no2"]}, "row 1: column 'no2' should hold a text, but holds int"),
        ({"score": "near"}, {"score_column": "score"}, "row 1: column 'score' should hold a number, but holds 'near'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, change, options, message):
    rows = [{**ROWS[0], "score": 1.0}, {**ROWS[1], **change}]
    with pytest.raises(RecordError, match=message):
        pairs(tmp_path, rows, **options).setup("fit")


def test_missing_columns_and_contradictions_are_said(tmp_path):
    with pytest.raises(RecordError, match=r"has no column 'no3'.*negative_column\[1\]="):
        pairs(tmp_path, negative_column=["no1", "no3"]).setup("fit")
    with pytest.raises(ValueError, match="Leave one out"):
        pairs(tmp_path, negative_column="no1", score_column="score")
