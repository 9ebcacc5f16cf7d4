"""Text for language models: documents to token ids, once; token ids to rows of a batch, on demand."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.cache import build_once, default_cache_dir, fingerprint
from lightning_llm.datamodules.loader import RowLoader
from lightning_llm.datamodules.order import selected
from lightning_llm.datamodules.rows import RowDataset, RowTable, Windowing, make_rows
from lightning_llm.datamodules.sources import STDLIB, DocumentSource, open_source
from lightning_llm.datamodules.token_store import FORMAT_VERSION, TokenStore, build_store
from lightning_llm.datamodules.tokenizer import (
    byte_tokenizer,
    encoder,
    load_tokenizer,
    token_bytes,
    train_bpe,
)
from lightning_llm.datamodules.windows import Int64Array

_MAX_REFERENCE_BYTES = 1 << 25

Split = Literal["train", "validation", "test"]


class TextDataModule(L.LightningDataModule):
    """Train a language model on long texts, cut and packed into rows of ``max_length`` tokens.

    Tokens are written to disk once and memory-mapped; rows are an index over them, so changing ``max_length``,
    ``windowing`` or the batch costs nothing. Every rank yields equally many batches and every row counts once.

    Args:
        data: ``python-stdlib`` (the embedded corpus); a file or folder of text, markdown or source code, ``.jsonl``
            (also ``.gz``, ``.zst``) or ``.parquet``, or several; a folder written by ``Dataset.save_to_disk``; or the
            id of a data set on the hub.
        tokenizer: A tokenizer, its hub id or local folder; ``bytes``; or ``bpe`` to train one on the training
            documents.
        max_length: Tokens in a row.
        windowing: ``packed``: long documents are cut, all pieces packed best-fit, documents do not see each other,
            no token is lost. ``windows``: one window of a document a row. ``documents``: one document a row, cut to
            ``max_length`` with a warning that says what is lost.
        micro_batch_size: Rows in a training batch of one rank.
        eval_micro_batch_size: Rows in a validation, test or predict batch of one rank; ``micro_batch_size`` if None.
        stride: For ``windows``: new tokens in each window; the others are context and no targets. None: all but one.
        validation_data: Like ``data``; None takes a share of the documents of ``data``.
        validation_fraction: That share, 0..1; 0 for no validation.
        test_data: Like ``data``; None tests on the validation documents.
        vocab_size: Size of the tokenizer that ``bpe`` trains, special tokens included.
        text_column: Which field of jsonl, parquet or a data set holds the text.
        split: Of a data set: the split to train on.
        validation_split: Of ``validation_data``, if it is a data set: the split to validate on.
        dataset_config: Configuration of a hub data set.
        append_eos: End each document with the tokenizer's end-of-text token.
        min_length: Documents with fewer tokens are left out; a single token has nothing to predict.
        skip_corrupt: Leave out unreadable lines and files with a warning, instead of stopping at the first.
        shuffle: A new order of the training rows each epoch.
        seed: Of that order and of the choice of validation documents.
        drop_last: Leave out the last training batch of an epoch if it is short.
        num_workers: Loader processes; 0 is fastest for local data.
        pin_memory: Page-lock batches for copies to a GPU; None does so where there is one.
        cache_dir: Where tokens are kept; ``$LIGHTNING_LLM_CACHE`` or ``~/.cache/lightning_llm`` if None.
        trust_remote_code: Run tokenizer code that comes with the hub repository or folder. Off unless asked for.

    Raises:
        ValueError: For settings that do not fit each other.
    """

    def __init__(
        self,
        data: str | list[str] = STDLIB,
        tokenizer: str | Any = "bpe",  # Any: a PreTrainedTokenizerBase; the help would list every subclass
        max_length: int = 1024,
        windowing: Windowing = "packed",
        micro_batch_size: int = 8,
        eval_micro_batch_size: int | None = None,
        stride: int | None = None,
        validation_data: str | list[str] | None = None,
        validation_fraction: float = 0.05,
        test_data: str | list[str] | None = None,
        vocab_size: int = 8192,
        text_column: str = "text",
        split: str = "train",
        validation_split: str = "validation",
        dataset_config: str | None = None,
        append_eos: bool = True,
        min_length: int = 2,
        skip_corrupt: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if max_length < 2:
            raise ValueError(f"`max_length` must be 2 at least (a token and its prediction), but got {max_length}.")
        for name, size in {
            "micro_batch_size": micro_batch_size,
            "eval_micro_batch_size": eval_micro_batch_size,
        }.items():
            if size is not None and size < 1:
                raise ValueError(f"`{name}` must be 1 at least, but got {size}.")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"`validation_fraction` lies in 0..1, 1 excluded, but got {validation_fraction}.")
        if windowing not in ("packed", "windows", "documents"):
            raise ValueError(f"`windowing` must be 'packed', 'windows' or 'documents', but got {windowing!r}.")
        if stride is not None and windowing != "windows":
            raise ValueError(f"`stride` has a meaning for windowing='windows' only, but windowing is {windowing!r}.")
        if stride is not None and not 1 <= stride <= max_length:
            raise ValueError(f"`stride` (new tokens in a window) lies in 1..max_length={max_length}, but got {stride}.")
        self.data = data
        self.max_length = max_length
        self.windowing: Windowing = windowing
        self.micro_batch_size = micro_batch_size
        self.eval_micro_batch_size = eval_micro_batch_size or micro_batch_size
        self.stride = stride
        self.validation_data = validation_data
        self.validation_fraction = validation_fraction
        self.test_data = test_data
        self.vocab_size = vocab_size
        self.text_column = text_column
        self.split = split
        self.validation_split = validation_split
        self.dataset_config = dataset_config
        self.append_eos = append_eos
        self.min_length = max(min_length, 1)
        self.skip_corrupt = skip_corrupt
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.trust_remote_code = trust_remote_code
        self._tokenizer = tokenizer
        self._ready: PreTrainedTokenizerBase | None = None
        self._rows: dict[Split, tuple[TokenStore, RowTable]] = {}
        self._summarized = False

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Train the tokenizer and write the token cache, where they are missing; one process per machine."""
        for split in self._splits():
            self._store(split)

    def setup(self, stage: str | None = None) -> None:
        """Map the tokens into memory and lay out the rows that the stage needs."""
        wanted: dict[str | None, tuple[Split, ...]] = {
            "fit": ("train", "validation"),
            "validate": ("validation",),
            "test": ("test",),
            "predict": ("test",),
        }
        for split in wanted.get(stage, ("train", "validation", "test")):
            if split not in self._rows and (split != "validation" or self._has_validation):
                self._rows[split] = self._lay_out(split)
        if "train" in self._rows and not self._summarized:
            rank_zero_info(self.summary())
            self._summarized = True

    def train_dataloader(self) -> RowLoader:
        """Rows of the training documents, in a new order each epoch."""
        return self._loader("train", shuffle=self.shuffle, drop_last=self.drop_last)

    def val_dataloader(self) -> RowLoader | list[Any]:
        """Rows of the validation documents; nothing where there are none."""
        return self._loader("validation") if self._has_validation else []

    def test_dataloader(self) -> RowLoader:
        """Rows of the test documents."""
        return self._loader("test")

    def predict_dataloader(self) -> RowLoader:
        """Rows of the test documents, to be scored."""
        return self._loader("test")

    # ---- what others may ask -------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded or trained on first use."""
        if self._ready is None:
            self._ready = self._make_tokenizer()
        return self._ready

    def row_text(self, row_id: int, split: Split = "train") -> str:
        """The text of a row, as a batch's ``row_ids`` name it, for a look at what went wrong."""
        store, table = self._rows[split]
        pieces = [store.tokens[start : start + length] for start, length, _ in table.segments(row_id)]
        return str(self.tokenizer.decode(np.concatenate(pieces).tolist()))

    def summary(self) -> str:
        """One line on the data and the rows made of it."""
        store, table = self._rows["train"]
        parts = [
            f"{_name(self.data)}: {store.num_documents:,} documents, {store.num_bytes.sum() / 1e6:.1f} MB, "
            f"{len(store.tokens):,} tokens",
            f"training on {len(table):,} rows of {self.max_length} ({self.windowing}, {table.fill:.1%} full)",
        ]
        if "validation" in self._rows:
            parts.append(f"validating on {len(self._rows['validation'][1]):,}")
        return "; ".join(parts) + "."

    def zlib_bits_per_byte(self) -> float:
        """What zlib (level 9) needs for the validation text, at most 32 MiB of it: a yardstick for bits per byte."""
        store, _ = self._rows["validation"]
        compressor = zlib.compressobj(9)
        num_bytes = compressed = 0
        for document in self._documents("validation", store):
            ids = store.tokens[store.offsets[document] : store.offsets[document + 1]].tolist()
            text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).encode()
            num_bytes += len(text)
            compressed += len(compressor.compress(text))
            if num_bytes > _MAX_REFERENCE_BYTES:
                break
        return 8 * (compressed + len(compressor.flush())) / max(num_bytes, 1)

    # ---- details -------------------------------------------------------------------------------------------------

    @property
    def _has_validation(self) -> bool:
        return self.validation_data is not None or self.validation_fraction > 0

    def _splits(self) -> list[Split]:
        splits: list[Split] = ["train"]
        if self.validation_data is not None:
            splits.append("validation")
        if self.test_data is not None:
            splits.append("test")
        return splits

    def _source(self, split: Split) -> DocumentSource:
        if split == "test" and self.test_data is not None:
            data, part = self.test_data, "test"
        elif split != "train" and self.validation_data is not None:
            data, part = self.validation_data, self.validation_split
        else:
            data, part = self.data, self.split
        return open_source(
            data,
            text_column=self.text_column,
            split=part,
            dataset_config=self.dataset_config,
            skip_corrupt=self.skip_corrupt,
        )

    def _store(self, split: Split) -> TokenStore:
        """Open a split's token cache; write it first where it is missing."""
        source = self._source(split)
        encode = encoder(self.tokenizer, append_eos=self.append_eos)
        name = fingerprint([str(FORMAT_VERSION), source.fingerprint(), encode.fingerprint()])
        folder = build_once(
            self.cache_dir / f"tokens-{name}",
            lambda path: build_store(path, source.documents(), encode, token_bytes(self.tokenizer)),
        )
        return TokenStore.open(folder)

    def _documents(self, split: Split, store: TokenStore) -> Int64Array:
        """Documents of the split, by number; those of validation are chosen by number and seed alone."""
        numbers = np.arange(store.num_documents)
        shared = self.validation_data is None and self.validation_fraction > 0
        if shared and (split != "test" or self.test_data is None):
            held_out = self._held_out(numbers)
            numbers = numbers[~held_out] if split == "train" else numbers[held_out]
        return numbers[store.lengths[numbers] >= self.min_length]

    def _held_out(self, numbers: Any) -> Any:
        return selected(numbers, self.validation_fraction if self.validation_data is None else 0.0, self.seed)

    def _lay_out(self, split: Split) -> tuple[TokenStore, RowTable]:
        if split == "test" and self.test_data is None and not self._has_validation:
            raise ValueError(
                "There are no test documents: all are trained on. Pass test_data=..., or hold some out with "
                "validation_fraction or validation_data."
            )
        store = self._store(split)
        documents = self._documents(split, store)
        if not len(documents):
            name, longest = self._source(split).name, int(store.lengths.max(initial=0))
            if longest >= self.min_length:
                raise ValueError(
                    f"No document is left for {split}: of {store.num_documents} in {name}, none was drawn for it with "
                    f"validation_fraction={self.validation_fraction} and seed={self.seed}. Change those, pass "
                    f"validation_data=..., or validation_fraction=0 to train without validation."
                )
            raise ValueError(
                f"No document is left for {split}: of {store.num_documents} in {name}, none has {self.min_length} "
                f"tokens or more (min_length); the longest has {longest}. Lower min_length or add documents."
            )
        table = make_rows(store.offsets, documents, self.max_length, self.windowing, self.stride)
        if table.num_cut_tokens:
            total = table.num_cut_tokens + table.num_tokens
            rank_zero_warn(
                f"windowing='documents' leaves out {table.num_cut_tokens:,} of {total:,} tokens "
                f"({table.num_cut_tokens / total:.0%}) of the {split} documents: what is beyond max_length="
                f"{self.max_length}. 'packed' and 'windows' lose none."
            )
        return store, table

    def _loader(self, split: Split, *, shuffle: bool = False, drop_last: bool = False) -> RowLoader:
        if split not in self._rows:
            self.setup({"train": "fit", "validation": "validate", "test": "test"}[split])
        store, table = self._rows[split]
        trainer = self.trainer
        layout = {"num_replicas": 1, "rank": 0}
        if trainer is not None:
            # The data-parallel layout, which is not the world where a strategy splits the model itself.
            layout.update(getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {})
        pin = self.pin_memory
        if pin is None:
            pin = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return RowLoader(
            RowDataset(store, table, self._pad_token_id(), None if split == "train" else store.token_bytes),
            self.micro_batch_size if split == "train" else self.eval_micro_batch_size,
            shuffle=shuffle,
            seed=self.seed,
            rank=layout["rank"],
            world_size=layout["num_replicas"],
            drop_last=drop_last,
            num_workers=self.num_workers,
            pin_memory=pin,
        )

    def _pad_token_id(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        if not isinstance(self._tokenizer, str):
            given: PreTrainedTokenizerBase = self._tokenizer
            return given
        if self._tokenizer == "bytes":
            return byte_tokenizer()
        if self._tokenizer == "bpe":
            return load_tokenizer(self._trained_bpe())
        return load_tokenizer(self._tokenizer, trust_remote_code=self.trust_remote_code)

    def _trained_bpe(self) -> Path:
        """Folder of the tokenizer trained on the training documents of ``data``, and on no other."""
        source = self._source("train")
        choice = [
            str(self.vocab_size),
            str(self.seed),
            str(self.validation_data),
            str(self.validation_fraction),
        ]

        def build(folder: Path) -> None:
            documents = enumerate(source.documents())
            texts = (document.text for number, document in documents if not self._held_out(number))
            train_bpe(texts, self.vocab_size).save_pretrained(str(folder))

        return build_once(self.cache_dir / f"bpe-{fingerprint([source.fingerprint(), *choice])}", build)


def _name(data: str | Sequence[str]) -> str:
    return data if isinstance(data, str) else f"{data[0]} and {len(data) - 1} more"
