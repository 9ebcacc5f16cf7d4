"""The data side against what people use: tokenisation, packing, collation, loading, resuming, opening a large store.

Each comparison runs in one process on the same documents; the methods take turns and the best of ``--repeats`` counts.
Speeds are for each second of a core at work, where nothing else is said.
What is compared against: ``datasets.map(batched=True)`` as language-model scripts call it, the ``group_texts`` recipe,
`TRL <https://github.com/huggingface/trl>`_ (optional: its rows are left out where it is not installed), the collators
of transformers and TRL, and a plain ``torch.utils.data.DataLoader``.

    OMP_NUM_THREADS=1 python benchmarks/data.py
    OMP_NUM_THREADS=1 python benchmarks/data.py --only tokenise --megabytes 60
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening

from lightning_llm.datamodules.batches.plan import Cursor, RowPlan
from lightning_llm.datamodules.loader import RowLoader
from lightning_llm.datamodules.order import TableOrder
from lightning_llm.datamodules.packing import best_fit_decreasing
from lightning_llm.datamodules.rows import RowDataset, RowTable, make_rows
from lightning_llm.datamodules.sources import STDLIB, DatasetSource, Document, open_source
from lightning_llm.datamodules.store_builder import build_store
from lightning_llm.datamodules.token_store import TokenStore
from lightning_llm.datamodules.tokenizer import byte_tokenizer, encoder, load_tokenizer, token_bytes, train_bpe

OURS = "**lightning_llm**"
VOCAB = 8192
MICRO_BATCH = 8

Table = list[tuple[str, ...]]


def main() -> None:
    """Print a markdown table per comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="run the comparisons whose name holds this")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--documents", type=int, default=20_000, help="of packing, collation and loading")
    parser.add_argument("--items", type=int, default=1_000_000, help="that are packed without their tokens")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--megabytes", type=float, default=60, help="of text that is tokenised")
    parser.add_argument("--large_documents", type=int, default=10_000_000, help="of resuming and opening")
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    print(describe_machine())
    for name, compare in COMPARISONS.items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            header, rows, remark = compare(options, Path(folder))
        print(f"\n### {name}\n\n" + markdown(header, rows) + (f"\n\n{remark}" if remark else ""), flush=True)


def describe_machine() -> str:
    """Processor, cores and versions."""
    names = ("torch", "transformers", "datasets", "tokenizers", "trl", "numpy", "pyarrow")
    versions = []
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {', '.join(versions)}"


def markdown(header: Sequence[str], rows: Table) -> str:
    """A table that a README can take."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def take_turns(
    methods: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Best seconds of each method; they run one after the other, ``repeats`` times around.

    Seconds are of one core at work, so that other processes count little, unless another clock is given.
    """
    best = dict.fromkeys(methods, float("inf"))
    for _ in range(repeats):
        for name, run in methods.items():
            begin = clock()
            run()
            best[name] = min(best[name], clock() - begin)
    return best


def rates(seconds: dict[str, float], amount: float) -> Table:
    """Millions per second, and how much faster we are."""
    ours = seconds[OURS]
    return [(name, f"{amount / s / 1e6:,.2f}", f"{s / ours:,.1f}") for name, s in seconds.items()]


def import_trl() -> Any:
    """TRL's packing and its collator; None where it is not installed."""
    try:
        from trl import pack_dataset
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Collator
    except ImportError as error:
        print(f"(TRL's rows are left out, for it cannot be imported: {error}. `pip install trl` brings it.)")
        return None
    return pack_dataset, Collator


def random_documents(num_documents: int, seed: int = 0) -> TokenStore:
    """Documents of log-normal length (median 665 tokens, 16 to 8192), random tokens."""
    rng = np.random.default_rng(seed)
    offsets = np.append(0, np.cumsum(random_lengths(num_documents, rng)))
    tokens = rng.integers(2, VOCAB, int(offsets[-1]), dtype=np.uint16)
    return TokenStore(tokens, offsets, np.diff(offsets) * 4, np.full(VOCAB, 4.0))


def random_lengths(num_documents: int, rng: np.random.Generator) -> np.ndarray:
    """As :func:`random_documents` has them."""
    return rng.lognormal(6.5, 1.0, num_documents).astype(np.int64).clip(16, 8192)


def rows_of(store: TokenStore, max_length: int) -> RowTable:
    """All documents, packed."""
    return make_rows(store.offsets, np.arange(store.num_documents), max_length, "packed")


def as_dataset(store: TokenStore, offsets: np.ndarray, **columns: Any) -> datasets.Dataset:
    """The tokens as a `datasets` column, as tokenising with it leaves them."""
    lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(store.tokens.astype(np.int32)))
    return datasets.Dataset(pa.table({"input_ids": lists, **columns}))


# ---- tokenisation --------------------------------------------------------------------------------------------------


def compare_tokenisation(options: argparse.Namespace, folder: Path) -> tuple[Sequence[str], Table, str]:
    """``build_store`` and ``datasets.map``, on one core and with the tokenizer's threads."""
    texts = list(varied_texts(options.megabytes))
    dataset = datasets.Dataset.from_dict({"text": texts})
    train_bpe((document.text for document in open_source(STDLIB).documents()), VOCAB).save_pretrained(folder / "bpe")
    tokenizer = load_tokenizer(folder / "bpe")
    numbers = itertools.count()

    def ours() -> None:
        path = folder / f"store-{next(numbers)}"
        path.mkdir()
        documents = DatasetSource(dataset, "texts", "text", skip_corrupt=False).documents()
        build_store(path, documents, encoder(tokenizer, append_eos=True), token_bytes(tokenizer))

    def mapped() -> None:
        dataset.map(
            lambda batch: tokenizer(batch["text"]),
            batched=True,
            remove_columns=["text"],
            cache_file_name=str(folder / f"map-{next(numbers)}.arrow"),
        )

    methods = {"`datasets.map(batched=True)`": mapped, OURS: ours}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with one_core():
        alone = take_turns(methods, options.repeats)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    threaded = take_turns(methods, options.repeats, time.perf_counter)
    tokens = len(TokenStore.open(next(folder.glob("store-*"))).tokens)
    rows: Table = []
    for name in methods:
        speeds = [f"{tokens / seconds[name] / 1e6:.2f}" for seconds in (alone, threaded)]
        gains = [f"{seconds[name] / seconds[OURS]:.2f}" for seconds in (alone, threaded)]
        rows.append((name, *speeds, *gains))
    size = sum(len(text.encode()) for text in texts) / 1e6
    remark = f"{len(texts):,} documents, {size:.1f} MB, {tokens / 1e6:.1f} M tokens; byte-level BPE of {VOCAB}."
    threads = f"{os.cpu_count()} threads, wall clock"
    return ("", "M tokens/s, 1 core", threads, "our gain, 1 core", threads), rows, remark


def varied_texts(megabytes: float) -> Iterator[str]:
    """The standard library over and over, with other names each time, so that no cache knows all words."""
    left = megabytes * 1e6
    documents = [document.text for document in open_source(STDLIB).documents()]
    for turn, text in ((turn, text) for turn in itertools.count() for text in documents):
        varied = text.replace("self", f"self{turn}").replace("def ", f"def x{len(text) % 97}_{turn}") if turn else text
        left -= len(varied)
        if left < 0:
            return
        yield varied


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this thread, and those it starts, on one core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# ---- packing -------------------------------------------------------------------------------------------------------


def compare_packing(options: argparse.Namespace, folder: Path) -> tuple[Sequence[str], Table, str]:
    """From tokenised documents to rows: speed, how full rows are, how many tokens are left."""
    store, size = random_documents(options.documents), options.max_length
    dataset = as_dataset(store, store.offsets)
    num_tokens, results = len(store.tokens), dict[str, Any]()
    numbers = itertools.count()

    def keep(name: str, method: Callable[[], Any]) -> tuple[str, Callable[[], None]]:
        return name, lambda: results.update({name: method()})

    def map_options(**more: Any) -> dict[str, Any]:
        return {"cache_file_name": str(folder / f"{next(numbers)}.arrow"), **more}

    def grouped() -> datasets.Dataset:
        with_mask = dataset.add_column("attention_mask", dataset.data.column("input_ids").combine_chunks())
        return with_mask.map(lambda batch: group_texts(batch, size), batched=True, **map_options())

    def collated() -> RowTable:
        table = rows_of(store, size)
        rows = RowDataset(store, table, 0)
        for begin in range(0, len(table), MICRO_BATCH):
            rows[range(begin, min(begin + MICRO_BATCH, len(table)))]
        return table

    methods = [keep("`group_texts` recipe", grouped)]
    if trl := import_trl():
        for strategy in ("wrapped", "bfd", "bfd_split"):
            pack = lambda strategy=strategy, **more: trl[0](dataset, size, strategy, map_options(**more))  # noqa: E731
            methods.append(keep(f"TRL `{strategy}`", pack))
        whole = lambda: trl[0](dataset, size, "bfd_split", map_options(batch_size=len(dataset)))  # noqa: E731
        methods.append(keep("TRL `bfd_split`, all documents at once", whole))
    methods.append(keep("lightning_llm, and every row collated", collated))
    methods.append(keep(OURS, lambda: rows_of(store, size)))
    seconds = take_turns(dict(methods), options.repeats)
    rows = []
    for name, taken in seconds.items():
        kept, num_rows = kept_tokens(results[name])
        speeds = [f"{len(dataset) / taken / 1e6:,.3f}", f"{num_tokens / taken / 1e6:,.0f}"]
        shares = [f"{kept / num_rows / size:.2%}", f"{kept / num_tokens:.2%}"]
        rows.append((name, *speeds, *shares, f"{taken / seconds[OURS]:,.1f}"))
    remark = f"{len(dataset):,} documents, {num_tokens / 1e6:.1f} M tokens, rows of {size}. " + pack_items(options)
    return ("", "M documents/s", "M tokens/s", "rows full", "tokens kept", "our gain"), rows, remark


def group_texts(batch: dict[str, list[list[int]]], size: int) -> dict[str, list[list[int]]]:
    """The common recipe: join a batch's documents, cut blocks, leave out the rest, repeat the ids as labels."""
    joined = {name: list(itertools.chain(*lists)) for name, lists in batch.items()}
    total = len(joined["input_ids"]) // size * size
    blocks = {name: [ids[at : at + size] for at in range(0, total, size)] for name, ids in joined.items()}
    return {**blocks, "labels": [list(ids) for ids in blocks["input_ids"]]}


def kept_tokens(result: Any) -> tuple[int, int]:
    """Tokens in the rows, each counted once, and how many rows there are."""
    if isinstance(result, RowTable):
        return result.num_tokens - int(result.num_context.sum()), len(result)
    return sum(len(chunk.flatten()) for chunk in result.data.column("input_ids").chunks), len(result)


def pack_items(options: argparse.Namespace) -> str:
    """Best-fit decreasing on lengths alone."""
    rng = np.random.default_rng(1)
    lengths = random_lengths(options.items, rng).clip(max=options.max_length)
    seconds = take_turns({"": lambda: best_fit_decreasing(lengths, options.max_length)}, options.repeats)[""]
    _, num_bins = best_fit_decreasing(lengths, options.max_length)
    fill = lengths.sum() / num_bins / options.max_length
    speed = options.items / seconds / 1e6
    return f"Best-fit decreasing of {options.items:,} lengths alone: {speed:.1f} M/s, {fill:.2%} full."


# ---- collation -----------------------------------------------------------------------------------------------------


def compare_collation(options: argparse.Namespace, folder: Path) -> tuple[Sequence[str], Table, str]:
    """From the documents of a micro-batch to its tensors, on one core."""
    store = random_documents(options.documents)
    table = rows_of(store, options.max_length)
    batches = [range(at, at + MICRO_BATCH) for at in range(0, min(len(table) - MICRO_BATCH, 800), MICRO_BATCH)]
    tokens = sum(int(table.row_lengths[batch.start : batch.stop].sum()) for batch in batches)
    parts = [[part for row in batch for part in table.segments(row)] for batch in batches]
    arrays = [[{"input_ids": segment(store, *part)} for part in batch] for batch in parts]
    lists = [[{"input_ids": piece["input_ids"].tolist()} for piece in batch] for batch in arrays]
    tokenizer = byte_tokenizer()

    def run(collate: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], None]:
        def loop() -> None:
            for batch in inputs:  # each is let go before the next is made, as in training
                collate(batch)

        return loop

    methods = {
        "transformers `DataCollatorForLanguageModeling` (padded)": run(
            quiet(DataCollatorForLanguageModeling(tokenizer, mlm=False)), lists
        ),
        "transformers `DataCollatorWithFlattening`": run(
            DataCollatorWithFlattening(return_flash_attn_kwargs=True), lists
        ),
    }
    if trl := import_trl():
        padding_free = trl[1](pad_token_id=0, padding_free=True)
        methods["TRL `DataCollatorForLanguageModeling(padding_free=True)`"] = run(padding_free, lists)
        methods["the same, given NumPy arrays"] = run(padding_free, arrays)
    free = RowDataset(store, table, 0, layout="padding_free")
    methods["lightning_llm, `padding_free`"] = run(free.__getitem__, batches)
    methods[OURS] = run(RowDataset(store, table, 0).__getitem__, batches)
    seconds = take_turns(methods, options.repeats)
    remark = f"{MICRO_BATCH} rows of {options.max_length} a micro-batch, {tokens / len(batches):,.0f} tokens."
    return ("", "M tokens/s", "our gain"), rates(seconds, tokens), remark + " Ours reads them from the store as well."


def segment(store: TokenStore, start: int, length: int, num_context: int) -> np.ndarray:
    """A piece of a document as collators of others take it."""
    return store.tokens[start : start + length].astype(np.int64)


def quiet(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Without the advice that transformers gives once."""
    with contextlib.redirect_stderr(io.StringIO()):
        collate([{"input_ids": [1, 2]}])
    return collate


# ---- loading -------------------------------------------------------------------------------------------------------


class PlainRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """What people write over a memory map: a row as three tensors, to be stacked by ``default_collate``."""

    def __init__(self, store: TokenStore, table: RowTable) -> None:
        self.store, self.table = store, table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        size, parts = self.table.max_length, self.table.segments(row)
        ids = torch.zeros(size, dtype=torch.int64)
        joined = torch.from_numpy(np.concatenate([segment(self.store, *part) for part in parts]))
        ids[: len(joined)] = joined
        labels = ids.clone()
        labels[len(joined) :] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(size) < len(joined)).long()}


def compare_loading(options: argparse.Namespace, folder: Path) -> tuple[Sequence[str], Table, str]:
    """An epoch of shuffled micro-batches."""
    store = random_documents(options.documents)
    table = rows_of(store, options.max_length)
    order = np.concatenate([segment(store, *part) for row in range(len(table)) for part in table.segments(row)])
    joined = TokenStore(order.astype(np.uint16), store.offsets, store.num_bytes, store.token_bytes)
    ends = np.append(0, np.cumsum(table.row_lengths))
    packed = as_dataset(joined, ends).with_format("torch")

    def epoch(make: Callable[[], Any]) -> Callable[[], None]:
        loader = make()
        return lambda: [None for _ in loader] and None

    def plain(dataset: Any, workers: int, collate: Any = None) -> Callable[[], Any]:
        return lambda: torch.utils.data.DataLoader(
            dataset, MICRO_BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate
        )

    def ours(workers: int) -> Callable[[], Any]:
        plan = RowPlan(TableOrder(len(table), seed=0), MICRO_BATCH)
        return lambda: RowLoader(RowDataset(store, table, 0), plan, num_workers=workers)

    methods = {}
    for workers in (0, 2):
        tail = f"{workers} workers"
        methods[f"`datasets` and `DataLoader`, {tail}"] = epoch(plain(packed, workers, pad_rows))
        methods[f"memory map and `DataLoader`, {tail}"] = epoch(plain(PlainRows(store, table), workers))
    methods["lightning_llm, 2 workers"] = epoch(ours(2))
    methods[OURS] = epoch(ours(0))
    seconds = take_turns(methods, options.repeats, time.perf_counter)
    remark = f"{len(table):,} rows of {options.max_length}, {MICRO_BATCH} a micro-batch; ours without workers."
    return ("", "M tokens/s, wall clock", "our gain"), rates(seconds, table.num_tokens), remark


def pad_rows(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows of tensors."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [row["input_ids"] for row in rows]
    return {"input_ids": pad(ids, batch_first=True), "labels": pad(ids, batch_first=True, padding_value=-100)}


# ---- a large store -------------------------------------------------------------------------------------------------


def large_store(folder: Path, num_documents: int) -> Path:
    """A finished store of so many documents; its token file is sparse, so it takes no place on the disk."""
    path = folder / "large"
    path.mkdir()
    tokenizer = byte_tokenizer()
    build_store(path, [Document("x", "x")], encoder(tokenizer, append_eos=True), token_bytes(tokenizer))
    lengths = random_lengths(num_documents, np.random.default_rng(0)) // 2
    offsets = np.append(0, np.cumsum(lengths))
    os.truncate(path / "tokens.bin", 2 * int(offsets[-1]))
    np.save(path / "offsets.npy", offsets)
    np.save(path / "num_bytes.npy", 4 * lengths)
    np.save(path / "num_words.npy", lengths)
    facts = json.loads((path / "store.json").read_text())
    facts.update(num_documents=num_documents, num_tokens=int(offsets[-1]))
    (path / "store.json").write_text(json.dumps(facts))
    return path


def compare_opening(options: argparse.Namespace, folder: Path) -> tuple[Sequence[str], Table, str]:
    """Time and memory of opening a store in a fresh process, and of reading rows all over it."""
    path = large_store(folder, options.large_documents)
    script = """
import sys, time
from pathlib import Path
import numpy as np
from lightning_llm.datamodules.token_store import TokenStore

def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

before, begin = memory(), time.perf_counter()
store = TokenStore.open(Path(sys.argv[1]))
opened, after = time.perf_counter() - begin, memory()
places = np.random.default_rng(0).integers(0, len(store.tokens) - 2048, 1000)
begin = time.perf_counter()
for place in places:
    store.tokens[place : place + 2048].sum()
read = time.perf_counter() - begin
begin = time.perf_counter()
for _ in range(1000):
    store.check()
check = time.perf_counter() - begin
print(len(store.tokens), store.num_documents, opened, after - before, memory() - before, before, read, check)
"""
    run = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    tokens, documents, opened, grown, grown_later, before, read, check = map(float, run.stdout.split())
    rows = [
        ("open", f"{opened * 1e3:.1f} ms", f"{grown:.1f} MB"),
        ("read 1,000 random rows of 2048", f"{read * 1e3:.1f} ms", f"{grown_later:.1f} MB"),
        ("`check()`, once a micro-batch", f"{check * 1e3:.2f} µs", ""),
    ]
    size = f"{2 * tokens / 1e9:.1f} GB of tokens (a sparse file), {documents:,.0f} documents"
    return ("", "time", "memory added"), rows, f"{size}; the process has {before:.0f} MB after its imports."


def compare_resuming(options: argparse.Namespace, folder: Path) -> tuple[Sequence[str], Table, str]:
    """From a loaded position in the epoch to the first batch."""
    store = TokenStore.open(large_store(folder, options.large_documents))
    begin = time.perf_counter()
    table = rows_of(store, options.max_length)
    laid_out = time.perf_counter() - begin
    rows, plain = RowDataset(store, table, 0), PlainRows(store, table)
    plan = RowPlan(TableOrder(len(table), seed=0), MICRO_BATCH)
    loader = RowLoader(rows, plan)
    positions = np.random.default_rng(0).integers(len(table) // 4, len(table) * 3 // 4, 5).tolist()

    def resume(position: int) -> None:
        state = {"version": 1, "data": {}, "cursor": Cursor(rows=position).to_state(), "global_batch": None}
        loader.load_state_dict(state)
        next(iter(loader))

    def plain_loader() -> Any:
        generator = torch.Generator().manual_seed(0)
        return torch.utils.data.DataLoader(plain, MICRO_BATCH, shuffle=True, generator=generator)

    def skip_indices(position: int) -> None:
        from accelerate import skip_first_batches

        next(iter(skip_first_batches(plain_loader(), position // MICRO_BATCH)))

    ours = np.median([take_turns({"": lambda: resume(p)}, 1, time.perf_counter)[""] for p in positions])  # noqa: B023
    middle = int(np.median(positions))
    skipped = take_turns({"": lambda: skip_indices(middle)}, 1, time.perf_counter)[""]
    batches = iter(plain_loader())
    next(batches)
    some = 500
    forward = take_turns({"": lambda: next(itertools.islice(batches, some, None))}, 1, time.perf_counter)[""] / some
    forwarded = forward * middle / MICRO_BATCH
    table_rows = [
        (name, f"{seconds:,.4g} s", f"{seconds / ours:,.0f}")
        for name, seconds in {
            f"`DataLoader`, batches thrown away (from {some} batches: {forward * 1e3:.2f} ms each)": forwarded,
            "`DataLoader` and `accelerate.skip_first_batches`": skipped,
            OURS: float(ours),
        }.items()
    ]
    remark = (
        f"{store.num_documents:,} documents, {len(table):,} rows of {options.max_length} (made in {laid_out:.1f} s); "
        f"position {middle:,}, ours the median of {len(positions)} positions. The tokens are zeros of a sparse file."
    )
    return ("", "to the first batch", "our gain"), table_rows, remark


COMPARISONS = {
    "tokenise": compare_tokenisation,
    "pack": compare_packing,
    "collate": compare_collation,
    "load": compare_loading,
    "resume": compare_resuming,
    "open": compare_opening,
}

if __name__ == "__main__":
    main()
