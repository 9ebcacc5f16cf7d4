"""Documents are read from what users have; what cannot be read is named."""

import gzip
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_llm.datamodules.sources import STDLIB, CorruptDataError, open_source

TEXTS = ["first text", "zweiter Text: äöü", "третий"]


def texts(data, **options):
    return [document.text for document in open_source(data, **options).documents()]


def write_jsonl(path, records, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_stdlib_has_hundreds_of_documents_and_no_tests():
    source = open_source(STDLIB)
    documents = list(source.documents())
    assert len(documents) > 500
    assert sum(len(document.text) for document in documents) > 8e6
    assert not any("/test/" in document.name or "site-packages" in document.name for document in documents)
    assert source.fingerprint() == open_source(STDLIB).fingerprint()


def test_folder_of_text_markdown_and_source_is_read_in_sorted_order(tmp_path):
    (tmp_path / "b.md").write_text(TEXTS[1])
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.py").write_text(TEXTS[2])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    assert texts(str(tmp_path)) == TEXTS


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_is_read_plain_and_compressed(tmp_path, ending):
    path = tmp_path / f"data{ending}"
    plain = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    if ending.endswith("gz"):
        plain = gzip.compress(plain)
    elif ending.endswith("zst"):
        plain = pa.compress(plain, "zstd", asbytes=True)
    path.write_bytes(plain)
    assert texts(str(path)) == TEXTS


def test_parquet_and_saved_datasets_are_read(tmp_path):
    import datasets

    table = pa.table({"body": TEXTS, "other": [1, 2, 3]})
    pq.write_table(table, tmp_path / "data.parquet")
    assert texts(str(tmp_path / "data.parquet"), text_column="body") == TEXTS
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.save_to_disk(tmp_path / "one")
    assert texts(str(tmp_path / "one")) == TEXTS
    datasets.DatasetDict({"train": dataset, "validation": dataset.select([0])}).save_to_disk(tmp_path / "splits")
    assert texts(str(tmp_path / "splits"), split="validation") == TEXTS[:1]
    with pytest.raises(ValueError, match=r"no split 'tets'; its splits are \['train', 'validation'\]"):
        open_source(str(tmp_path / "splits"), split="tets")


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", "dataset"])
def test_shares_of_the_documents_add_up_to_the_size_of_the_data(tmp_path, ending):
    """For progress bars; corrupt and empty lines have no document, a decompressor reads ahead."""
    import datasets

    path = tmp_path / f"data{ending}"
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS * 500).encode()
    if ending == "dataset":
        datasets.Dataset.from_dict({"text": TEXTS * 500}).select(range(100)).save_to_disk(path)
    elif ending == ".parquet":
        pq.write_table(pa.table({"text": TEXTS * 500}), path)
    else:
        compress = {".jsonl.gz": gzip.compress, ".jsonl.zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
        path.write_bytes(compress.get(ending, bytes)(lines))
    source = open_source(str(path))
    if path.is_file():
        assert source.total_bytes == path.stat().st_size
    read = sum(document.num_bytes for document in source.documents())
    assert read == pytest.approx(source.total_bytes, rel=1e-9)


def test_stdlib_knows_its_size():
    source = open_source(STDLIB)
    assert sum(document.num_bytes for document in source.documents()) == source.total_bytes > 8e6


def test_half_of_a_surrogate_pair_is_no_text(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good \\ud83d\\ude42"}\n{"text": "bad \\ud83d"}\n')
    with pytest.raises(CorruptDataError, match=r"line 2: column 'text' holds half of a surrogate pair at character 4"):
        texts(str(path))
    assert texts(str(path), skip_corrupt=True) == ["good 🙂"]
    assert "Skipped 1 corrupt" in caplog.text


def test_several_files_are_read_in_the_order_given(tmp_path):
    paths = []
    for index, text in enumerate(TEXTS):
        path = tmp_path / f"{3 - index}.txt"
        path.write_text(text)
        paths.append(str(path))
    assert texts(paths) == TEXTS


def test_fingerprint_changes_with_content_and_column(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "body": "y"}])
    before = open_source(path).fingerprint()
    assert before == open_source(path).fingerprint()
    assert before != open_source(path, text_column="body").fingerprint()
    write_jsonl(tmp_path / "a.jsonl", [{"text": "xx", "body": "y"}])
    assert before != open_source(path).fingerprint()


def test_missing_file_is_named(tmp_path):
    for missing in (str(tmp_path / "none"), "./none.txt", "corpus.jsonl"):
        with pytest.raises(FileNotFoundError, match="no file or folder at .*(none|corpus)"):
            open_source(missing)


def test_empty_file_and_folder_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty.txt is empty. Expected text and source files"):
        open_source(str(tmp_path / "empty.txt"))
    with pytest.raises(FileNotFoundError, match="holds nothing to read. Expected text"):
        open_source(str(tmp_path))


def test_file_of_unknown_kind_is_refused(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"Cannot tell what .*data.bin holds"):
        open_source(str(tmp_path / "data.bin"))


def corrupt_jsonl(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"\n{"text": "three"}\n{"text": null}\n')
    return str(path)


def test_corrupt_line_is_named_by_its_number(tmp_path):
    with pytest.raises(CorruptDataError, match=r"bad.jsonl, line 3 is not valid JSON .*skip_corrupt=True"):
        texts(corrupt_jsonl(tmp_path))


def test_corrupt_lines_are_skipped_only_if_asked_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert texts(corrupt_jsonl(tmp_path), skip_corrupt=True) == ["one", "three"]
    assert "Skipped 2 corrupt records" in caplog.text
    assert "line 3" in caplog.text


def test_wrong_column_is_named_with_those_there_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "id": 3}])
    with pytest.raises(ValueError, match=r"line 1 has no column 'text'; its columns are \['body', 'id'\]"):
        texts(path)
    with pytest.raises(ValueError, match="no column 'text'"):  # a wrong column is no corrupt line
        texts(path, skip_corrupt=True)
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text'; its columns are \['body'\]"):
        texts(str(tmp_path / "a.parquet"))


def test_column_of_another_type_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": 3}])
    with pytest.raises(CorruptDataError, match="line 1: column 'text' should hold text, but holds int"):
        texts(path)
    path = write_jsonl(tmp_path / "b.jsonl", [["text"]])
    with pytest.raises(CorruptDataError, match="line 1 is not a JSON object with a field 'text', but a list"):
        texts(path)


def test_data_set_rows_without_text_are_named(caplog):
    import datasets

    from lightning_llm.datamodules.sources import DatasetSource

    dataset = datasets.Dataset.from_dict({"text": ["one", None, "three"], "id": [1, 2, 3]})
    with pytest.raises(CorruptDataError, match="set, row 1: column 'text' should hold text, but holds NoneType"):
        list(DatasetSource(dataset, "set", "text", skip_corrupt=False).documents())
    with pytest.raises(CorruptDataError, match="row 0: column 'id' should hold text, but holds int"):
        list(DatasetSource(dataset, "set", "id", skip_corrupt=False).documents())
    assert len(list(DatasetSource(dataset, "set", "text", skip_corrupt=True).documents())) == 2


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(CorruptDataError, match=r"latin.txt is not UTF-8 text \(byte 0"):
        texts(str(tmp_path))
    (tmp_path / "good.txt").write_text("good")
    assert texts(str(tmp_path), skip_corrupt=True) == ["good"]


@pytest.mark.parametrize("ending", [".jsonl.gz", ".parquet", ".jsonl.zst"])
def test_truncated_file_is_never_taken_for_a_short_one(tmp_path, ending):
    whole = tmp_path / f"whole{ending}"
    records = [{"text": f"document {index} " * 50} for index in range(2000)]
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), whole)
    elif ending == ".jsonl.gz":
        write_jsonl(whole, records, gzip.open)
    else:
        whole.write_bytes(pa.compress("".join(json.dumps(r) + "\n" for r in records).encode(), "zstd", asbytes=True))
    cut = tmp_path / f"cut{ending}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert len(texts(str(whole))) == 2000
    with pytest.raises(ValueError, match=r"cut.* is damaged or cut short .*Copy or download it again"):
        texts(str(cut), skip_corrupt=True)


def test_hub_data_set_that_cannot_be_had_is_explained():
    with pytest.raises(FileNotFoundError, match="neither a file or folder here nor a data set that the hub gives"):
        open_source("no-such-owner/no-such-data")
