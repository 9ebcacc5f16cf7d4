"""Shards: every document in exactly one piece, and a reader that goes on where another stood."""

import gzip
import json
import zlib
from contextlib import contextmanager
from itertools import chain

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.datamodules.sources import CorruptDataError
from lightning_llm.datamodules.streams.shard_sources import open_shards
from lightning_llm.datamodules.streams.shards import Piece, ShardError, begin_within, deal, is_in_share


def texts(begin, end):
    return [f"document {number} " + "x" * (number * 7 % 40) for number in range(begin, end)]


def write_jsonl(path, documents, opener=open):
    with opener(path, "wt") as file:
        for number, text in enumerate(documents):
            file.write(json.dumps({"text": text, "id": number}) + ("\n\n" if number % 5 == 4 else "\n"))


def write_zst(path, documents):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(lines)


def write_parquet(path, documents, rows_in_group=7):
    pq.write_table(pa.table({"id": list(range(len(documents))), "text": documents}), path, row_group_size=rows_in_group)


def write(folder, kind):
    folder.mkdir(exist_ok=True)
    for number, (begin, end) in enumerate([(0, 30), (30, 33), (33, 80)]):
        path = folder / f"part-{number}.{kind}"
        if kind == "jsonl":
            write_jsonl(path, texts(begin, end))
        elif kind == "jsonl.gz":
            write_jsonl(path, texts(begin, end), gzip.open)
        elif kind == "jsonl.zst":
            write_zst(path, texts(begin, end))
        else:
            write_parquet(path, texts(begin, end))
    return str(folder)


def generate(shards):
    for begin, end in shards:
        for text in texts(begin, end):
            yield {"text": text, "id": 0}


def make_source(kind, tmp_path):
    if kind == "Dataset":
        return open_shards(datasets.Dataset.from_dict({"text": texts(0, 80)}))
    if kind == "IterableDataset":
        shards = [(0, 30), (30, 33), (33, 80)]
        return open_shards(datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": shards}))
    if kind == "IterableDataset of Arrow":
        return open_shards(datasets.Dataset.from_dict({"text": texts(0, 80)}).to_iterable_dataset(num_shards=3))
    return open_shards(write(tmp_path / "data", kind))


FILES = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"]
KINDS = [*FILES, "Dataset", "IterableDataset", "IterableDataset of Arrow"]


def read_all(source, num_streams, seed=None):
    return [
        [document.text for piece in pieces for document in source.read(piece)]
        for pieces in source.deal(num_streams, seed)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_streams", [1, 2, 5, 16])
def test_every_document_is_in_exactly_one_stream(kind, num_streams, tmp_path):
    source = make_source(kind, tmp_path)
    for seed in (None, 3):
        streams = read_all(source, num_streams, seed)
        assert len(streams) == num_streams
        assert sorted(chain(*streams)) == sorted(texts(0, 80))
    if num_streams == 1:
        assert read_all(source, 1)[0] == texts(0, 80)  # without a seed in order


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_streams", [1, 5])
def test_a_reader_goes_on_where_another_stood(kind, num_streams, tmp_path):
    source = make_source(kind, tmp_path)
    for pieces in source.deal(num_streams, seed=0):
        for piece in pieces:
            whole = [document.text for document in source.read(piece)]
            for taken in range(len(whole) + 1):
                reader = source.read(piece)
                assert [next(reader).text for _ in range(taken)] == whole[:taken]
                position = json.loads(json.dumps(reader.position))  # plain data, as in a checkpoint
                assert [document.text for document in source.read(piece, position)] == whole[taken:]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 20), st.one_of(st.none(), st.integers(0, 9))
)
def test_streams_get_equal_stretches_that_cover_every_shard_once(sizes, num_streams, seed):
    dealt = deal(sizes, num_streams, seed)
    shares = [sum(piece.end - piece.begin for piece in pieces) for pieces in dealt]
    assert max(shares) - min(shares) <= 1
    for shard, size in enumerate(sizes):
        pieces = sorted(piece for stream in dealt for piece in stream if piece.shard == shard)
        edges = [edge for piece in pieces for edge in (piece.begin, piece.end)]
        assert edges == sorted(edges)
        assert edges[::2] == [0, *edges[1:-1:2]] or not size
        assert (edges[-1] if edges else 0) == size


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.integers(2, 7), st.integers(1000, 10**12))
def test_shares_of_what_is_read_whole_are_even_for_any_number_of_records(num_records, num_pieces, size):
    cuts = [size * number // num_pieces for number in range(num_pieces + 1)]
    pieces = [Piece(0, begin, end) for begin, end in zip(cuts[:-1], cuts[1:], strict=True)]
    found = [[piece for piece in pieces if is_in_share(number, piece, size)] for number in range(num_records)]
    assert all(len(each) == 1 for each in found)
    counts = [sum(each[0] == piece for each in found) for piece in pieces]
    assert max(counts) - min(counts) <= 4 + num_records // 500


def test_reading_goes_straight_to_the_byte(tmp_path):
    path = tmp_path / "large.jsonl"
    write_jsonl(path, texts(0, 20000))
    source = open_shards(str(path))
    size = source.sizes[0]

    files = []
    open_file = source._open

    @contextmanager
    def remembered(url, size):
        with open_file(url, size) as file:
            files.append(file)
            yield file

    source._open = remembered
    reader = source.read(Piece(0, size - 300, size))
    first = next(reader).text
    assert files[0].tell() >= size - 300  # nothing before it is left to be read
    assert first in texts(19990, 20000)


@pytest.mark.parametrize("kind", FILES)
def test_files_in_memory_of_fsspec_are_read_as_local_ones(kind, tmp_path):
    folder = tmp_path / "data"
    write(folder, kind)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/streams-test/", recursive=True)
    try:
        for data in ("memory://streams-test/", f"memory://streams-test/data/part-*.{kind}"):
            source = open_shards(data)
            assert sorted(chain(*read_all(source, 4))) == sorted(texts(0, 80))
        local = open_shards(str(folder))
        edges = local.identity.pop("edges of files")  # of local files alone
        assert source.identity == local.identity  # the folder may move
        folder.rename(tmp_path / "moved")
        assert open_shards(str(tmp_path / "moved")).identity == {**local.identity, "edges of files": edges}
    finally:
        memory.rm("/streams-test", recursive=True)


def test_patterns_folders_and_lists_name_files(tmp_path):
    folder = tmp_path / "data"
    write(folder, "jsonl")
    (folder / "README.md").write_text("not for reading")
    (folder / ".hidden.jsonl").write_text("{}")
    assert len(open_shards(str(folder)).sizes) == 3
    assert len(open_shards(str(folder / "part-[01].jsonl")).sizes) == 2
    assert len(open_shards([str(folder / "part-0.jsonl"), str(folder / "part-2.jsonl")]).sizes) == 2
    with pytest.raises(FileNotFoundError, match="There is no file or folder at .*absent.jsonl. Check"):
        open_shards(str(folder / "absent.jsonl"))
    with pytest.raises(
        FileNotFoundError, match="holds nothing that can be streamed. Expected files that end in .jsonl"
    ):
        open_shards(str(folder / "*.md"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="All 1 files of .* are empty"):
        open_shards(str(tmp_path / "empty.jsonl"))


def test_hub_data_sets_are_streamed(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return datasets.Dataset.from_dict({"text": texts(0, 5)}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_shards("owner/name", dataset_config="en", split="train")
    assert asked == [("owner/name", "en", "train", True)]
    assert read_all(source, 1)[0] == texts(0, 5)

    def refuse(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("unknown")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(FileNotFoundError, match="'owner/name' is neither a file or folder here nor a data set"):
        open_shards("owner/name")


def test_saved_data_sets_are_read_by_row(tmp_path):
    datasets.Dataset.from_dict({"text": texts(0, 9)}).save_to_disk(str(tmp_path / "saved"))
    assert read_all(open_shards(str(tmp_path / "saved")), 2)[1] == texts(4, 9)


def test_a_shuffle_buffer_is_refused_because_it_cannot_be_resumed():
    dataset = datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": [(0, 5)]})
    with pytest.raises(ValueError, match=r"shuffles with a buffer, whose content `datasets` does not save"):
        open_shards(dataset.shuffle(seed=0, buffer_size=10))


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_gone_or_changed_stops_the_run_and_says_what_to_do(kind, tmp_path):
    source = make_source(kind, tmp_path)
    path = tmp_path / "data" / f"part-2.{kind}"
    pieces = [piece for piece in source.deal(1)[0] if piece.shard == 2]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ShardError, match=rf"part-2.{kind}.* had {len(content)} bytes .* has {len(content) // 2} now"):
        list(source.read(pieces[0]))
    path.unlink()
    with pytest.raises(ShardError, match=r"A shard of .* is gone: .*part-2.*Mend it, and resume the run from its last"):
        list(source.read(pieces[0]))


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_damaged_file_of_the_right_size_is_an_error(kind, tmp_path):
    source = make_source(kind, tmp_path)
    path = tmp_path / "data" / f"part-2.{kind}"
    content = bytearray(path.read_bytes())
    content[-12:] = bytes(12)
    path.write_bytes(content)
    with pytest.raises(ShardError, match="A shard of .* is damaged"):
        [list(source.read(piece)) for piece in source.deal(1)[0]]


def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, texts(0, 60000))
    reader = open_shards(str(path)).read(Piece(0, 0, path.stat().st_size))
    next(reader)
    with path.open("r+b") as file:
        file.truncate(2 << 20)
    with pytest.raises((ShardError, CorruptDataError), match="ends at byte|not valid JSON"):
        list(reader)


def test_corrupt_lines_stop_or_are_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n{bad\n{"text": "also good"}\n')
    with pytest.raises(CorruptDataError, match=r"the line at byte 17: column 'text' should hold text"):
        read_all(open_shards(str(path)), 1)
    source = open_shards(str(path), skip_corrupt=True)
    assert read_all(source, 1) == [["good", "also good"]]
    assert "Skipped 2 corrupt records" in caplog.text
    with pytest.raises(ValueError, match=r"has no column 'body'; its columns are \['text'\]. Pass text_column"):
        read_all(open_shards(str(path), text_column="body"), 1)


@given(st.lists(st.integers(1, 300), max_size=4), st.integers(0, 9))
def test_an_epoch_begins_elsewhere_in_the_same_stretches(lengths, key):
    pieces = [Piece(shard, 10, 10 + length) for shard, length in enumerate(lengths)]
    units = [(piece.shard, at) for piece in pieces for at in range(piece.begin, piece.end)]
    starts = []
    for epoch in range(8):
        found = begin_within(pieces, epoch, key)
        assert sorted((piece.shard, at) for piece in found for at in range(piece.begin, piece.end)) == units
        assert len(pieces) <= len(found) <= len(pieces) + 1
        starts += [piece.begin for piece in found[:1]]
    if lengths and lengths[0] >= 100:  # eight places, none of which is near another
        assert np.diff(sorted(starts)).min() > lengths[0] / 20


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "Dataset"])
def test_other_content_of_the_same_size_is_another_identity(kind, tmp_path):
    def identity(name, documents):
        if kind == "Dataset":
            return open_shards(datasets.Dataset.from_dict({"text": documents})).identity
        (tmp_path / name).mkdir()
        path = tmp_path / name / f"data.{kind}"
        write_jsonl(path, documents) if kind == "jsonl" else write_parquet(path, documents)
        return open_shards(str(path)).identity

    first, again, other = (
        identity("a", texts(0, 50)),
        identity("b", texts(0, 50)),
        identity("c", [*texts(0, 49), "y" * len(texts(49, 50)[0])]),
    )
    assert first == again
    assert sum(first[name] != other[name] for name in ("edges of files", "text of some rows") if name in first) == 1


def test_what_cannot_be_named_file_by_file_is_refused(tmp_path):
    path = write(tmp_path / "data", "jsonl")
    with pytest.raises(
        ValueError, match=r"'zip://\*.jsonl::/tmp/a.zip' is a chain of file systems.*Unpack the archive"
    ):
        open_shards("zip://*.jsonl::/tmp/a.zip")
    with pytest.raises(ValueError, match="part-1.jsonl is named twice by .*Name each file once"):
        open_shards([path + "/part-1.jsonl", path])
    with pytest.raises(ValueError, match="Dataset has no row, so there is nothing to train or validate on"):
        open_shards(datasets.Dataset.from_dict({"text": []}))
    (tmp_path / "data").rename(tmp_path / "w[1]")  # no pattern, since it is there
    assert len(open_shards(str(tmp_path / "w[1]")).sizes) == 3
    assert len(open_shards(str(tmp_path / "w[1]" / "part-1.jsonl")).sizes) == 1


def test_checksums_guard_the_test_itself():
    """Control: the documents differ, so that a lost or repeated one is noticed."""
    assert len({zlib.crc32(text.encode()) for text in texts(0, 80)}) == 80
