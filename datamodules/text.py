"""Text for language models: documents to token ids, once; token ids to rows of a batch, on demand."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.batches.settings import Batching, BatchSettings
from lightning_llm.datamodules.mixed_rows import MixedOrder, MixedRowDataset, mixture_weights
from lightning_llm.datamodules.order import RowOrder
from lightning_llm.datamodules.row_data_module import STAGE_SPLITS, RowDataModule, Split
from lightning_llm.datamodules.rows import RowDataset, RowTable, Windowing
from lightning_llm.datamodules.shorter_rows import cut_rows
from lightning_llm.datamodules.sources import STDLIB
from lightning_llm.datamodules.summary import describe_source, plot_lengths, zlib_bits_per_byte
from lightning_llm.datamodules.text_settings import (
    check_numbers,
    check_shares,
    check_weights,
    check_windowing,
    named_sources,
    part_of,
)
from lightning_llm.datamodules.text_source import SplitRows, TextSource, prepare_tokenizer
from lightning_llm.datamodules.token_store import TokenStore
from lightning_llm.schedule import Schedule


class TextDataModule(RowDataModule):
    """Train a language model on long texts, cut and packed into rows of ``max_length`` tokens.

    Tokens are written to disk once and memory-mapped; rows are an index over them, so changing ``max_length``,
    ``windowing`` or the batch costs nothing. Every rank yields equally many batches and every row counts once. A run
    that is resumed, on any number of ranks, workers or micro-batches, trains on the rows that it would have trained on.

    Args:
        data: ``python-stdlib`` (the embedded corpus); a file or folder of text, markdown or source code, ``.jsonl``
            (also ``.gz``, ``.zst``) or ``.parquet``, or several; a folder written by ``Dataset.save_to_disk``; or the
            id of a data set on the hub. A mapping of names to these is a mixture.
        tokenizer: A tokenizer, its hub id or local folder; ``bytes``; or ``bpe`` to train one on the training
            documents.
        max_length: Tokens in a row.
        windowing: ``packed``: long documents are cut, all pieces packed best-fit, documents do not see each other,
            no token is lost. ``wrapped``: documents end to end, cut wherever a row is full. ``windows``: one window
            of a document a row. ``documents``: one document a row, cut to ``max_length`` with a warning that says what
            is lost.
        batching: ``rows``: ``micro_batch_size`` rows. ``padded``, ``padding_free``: rows by their tokens, each padded
            to the longest, or all end to end in one row.
        micro_batch_size: Rows in a training batch of one rank.
        micro_batch_tokens: For ``padded`` and ``padding_free``: tokens in a training batch of one rank, padding
            included.
        global_batch_size: Rows in an optimizer step over all ranks, or a schedule of them: ``{"0 samples": 32, "2M
            tokens": 64}``, or the name of a ramp (:mod:`lightning_llm.ramps`). The loader cuts a step into as many
            micro-batches as the Trainer accumulates.
        global_batch_tokens: Likewise in label tokens.
        eval_micro_batch_size: Rows in a validation, test or predict batch of one rank; ``micro_batch_size`` if None.
        stride: For ``windows`` and ``packed``: new tokens in each window of a long document; the others are context
            and no targets. None: all but one.
        eval_windowing: How validation and test documents are cut; None: as those of training.
        eval_context: For ``eval_windowing="windows"``: tokens that each scored token has before it at least, where the
            document has them.
        validation_data: Like ``data``; None takes a share of the documents of ``data``.
        validation_fraction: That share, 0..1; 0 for no validation.
        test_data: Like ``data``; None tests on the validation documents.
        weights: Of a mixture's sources: their share of the rows. None: by their number of rows.
        temperature: Without ``weights``: shares in proportion to rows^(1/temperature).
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
        data: str | list[str] | dict[str, str | list[str]] = STDLIB,
        tokenizer: str | Any = "bpe",  # Any: a PreTrainedTokenizerBase; the help would list every subclass
        max_length: int = 1024,
        windowing: Windowing = "packed",
        batching: Batching = "rows",
        micro_batch_size: int = 8,
        micro_batch_tokens: int | None = None,
        global_batch_size: int | dict[str, float] | Schedule | str | None = None,
        global_batch_tokens: int | dict[str, float] | Schedule | str | None = None,
        eval_micro_batch_size: int | None = None,
        stride: int | None = None,
        eval_windowing: Windowing | None = None,
        eval_context: int | None = None,
        validation_data: str | list[str] | dict[str, str | list[str]] | None = None,
        validation_fraction: float = 0.05,
        test_data: str | list[str] | dict[str, str | list[str]] | None = None,
        weights: dict[str, float] | None = None,
        temperature: float = 1.0,
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
        super().__init__(
            tokenizer,
            BatchSettings(batching, micro_batch_size, micro_batch_tokens, global_batch_size, global_batch_tokens),
            eval_micro_batch_size=eval_micro_batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            num_workers=num_workers,
            pin_memory=pin_memory,
            cache_dir=cache_dir,
        )
        check_numbers(max_length=max_length, min_length=min_length)
        check_shares(validation_fraction=validation_fraction, temperature=temperature)
        check_windowing("windowing", windowing, "stride", stride, max_length)
        eval_stride = None if eval_context is None else max_length - eval_context
        check_windowing("eval_windowing", eval_windowing or windowing, "eval_context", eval_stride, max_length)
        if batching == "padded" and windowing in ("packed", "wrapped"):
            raise ValueError(
                f"batching='padded' is for rows of unequal length, but those of windowing={windowing!r} are full. Use "
                f"batching='rows' or 'padding_free'."
            )
        self.max_length = max_length
        self.windowing: Windowing = windowing
        self.eval_windowing: Windowing = eval_windowing or windowing
        self.stride = stride
        self.eval_stride = stride if eval_context is None and eval_windowing in (None, windowing) else eval_stride
        self.weights = weights
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.append_eos = append_eos
        self.trust_remote_code = trust_remote_code
        self.sources = {
            name: TextSource(
                data=each,
                validation_data=part_of(validation_data, name, data, "validation_data"),
                validation_fraction=validation_fraction,
                test_data=part_of(test_data, name, data, "test_data"),
                split=split,
                validation_split=validation_split,
                seed=seed,
                min_length=max(min_length, 1),
                open_options={
                    "text_column": text_column,
                    "dataset_config": dataset_config,
                    "skip_corrupt": skip_corrupt,
                },
            )
            for name, each in named_sources(data).items()
        }
        check_weights(weights, self.sources)
        self._rows: dict[Split, dict[str, SplitRows]] = {}
        self._summarized = False

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Train the tokenizer and write the token cache, where they are missing; one process per machine."""
        for source in self.sources.values():
            for split in source.stored_splits:
                self._open_store(source, split)

    def setup(self, stage: str | None = None) -> None:
        """Map the tokens into memory and lay out the rows that the stage needs."""
        super().setup(stage)
        self._lay_out_stage(stage)

    def _lay_out_stage(self, stage: str | None) -> None:
        for split in STAGE_SPLITS.get(stage, ("train", "validation", "test")):
            exists = split == "train" or self._has_validation or (split == "test" and (stage or self._has_test))
            if split not in self._rows and exists:
                self._rows[split] = self._lay_out(split)
        if "train" in self._rows and not self._summarized:
            rank_zero_info(self.summary())
            self._summarized = True

    # ---- what others may ask -------------------------------------------------------------------------------------

    @property
    def source_names(self) -> list[str]:
        """Names of a mixture's sources, in the order of a batch's ``source_ids``; of a single source, its own."""
        return list(self.sources)

    @property
    def packs_documents(self) -> bool:
        """Whether rows hold several documents, which the model must keep apart."""
        several = ("packed", "wrapped")
        is_flat = self.batch_settings.batching == "padding_free"
        return is_flat or self.windowing in several or self.eval_windowing in several

    def cut_batch(self, batch: Mapping[str, Any], length: int) -> Mapping[str, Any]:
        """A training batch in rows of ``length`` tokens at most, every target in one of them; for callbacks.

        See :func:`~lightning_llm.datamodules.shorter_rows.cut_rows`; a batch without longer rows comes back as it is.
        """
        layout = self.batch_settings.layout or ("packed" if self.windowing in ("packed", "wrapped") else "padded")
        return cut_rows(batch, length, layout=layout, pad_token_id=self._pad_token_id())

    def store(self, split: Split = "train", source: str | None = None) -> TokenStore:
        """The tokens that a split's documents are in."""
        return self._split_rows(split)[source or self.source_names[0]].store

    def table(self, split: Split = "train", source: str | None = None) -> RowTable:
        """The rows of a split."""
        return self._split_rows(split)[source or self.source_names[0]].table

    def row_text(self, row_id: int, split: Split = "train") -> str:
        """The text of a row, as a batch's ``row_ids`` name it, for a look at what went wrong."""
        number = row_id
        for store, _, table in self._split_rows(split).values():
            if 0 <= row_id < len(table):
                pieces = [store.tokens[start : start + length] for start, length, _ in table.segments(row_id)]
                return str(self.tokenizer.decode(np.concatenate(pieces).tolist()))
            row_id -= len(table)
        raise IndexError(f"The {split} split has no row {number}.")

    def summary(self) -> str:
        """One screen on the documents, the rows made of them, and what a pipeline that truncates would lose."""
        parts = []
        for name, train in self._split_rows("train").items():
            title = self.sources[name].title(name)
            parts.append(describe_source(title, train, self._rows.get("validation", {}).get(name)))
        if len(self.sources) > 1:
            shares = self._mixture_weights()
            parts.append("mixture: " + ", ".join(f"{share:.1%} {name}" for name, share in shares.items()))
        return "\n".join(parts)

    def plot_lengths(self, split: Split = "train") -> Any:
        """Draw how long the documents are, which exceed ``max_length``, and what cutting them would lose.

        Returns:
            A matplotlib figure; ``figure.savefig(path)`` writes it.
        """
        rows = self._split_rows(split)
        lengths = {self.sources[n].title(n): r.store.lengths[r.documents] for n, r in rows.items()}
        return plot_lengths(lengths, self.max_length)

    def zlib_bits_per_byte(self) -> float:
        """What zlib (level 9) needs for the validation text, at most 32 MiB of it: a yardstick for bits per byte."""
        return zlib_bits_per_byte(self._split_rows("validation").values(), self.tokenizer)

    # ---- details -------------------------------------------------------------------------------------------------

    @property
    def _has_validation(self) -> bool:
        return any(source.has_validation for source in self.sources.values())

    @property
    def _has_test(self) -> bool:
        return any(source.test_data is not None for source in self.sources.values())

    def _split_rows(self, split: Split) -> dict[str, SplitRows]:
        if split not in self._rows:
            self._lay_out_stage({"train": "fit", "validation": "validate", "test": "test"}[split])
        return self._rows[split]

    def _open_store(self, source: TextSource, split: Split) -> TokenStore:
        return source.store(split, self.cache_dir, self.tokenizer, append_eos=self.append_eos)

    def _lay_out(self, split: Split) -> dict[str, SplitRows]:
        windowing, stride = self.windowing, self.stride
        if split != "train":
            windowing, stride = self.eval_windowing, self.eval_stride
        return {
            name: source.rows(split, partial(self._open_store, source), self.max_length, windowing, stride)
            for name, source in self.sources.items()
            if split != "validation" or source.has_validation
        }

    def _dataset(self, split: Split) -> RowDataset | MixedRowDataset:
        is_train = split == "train"
        datasets = {name: self._row_dataset(split, rows) for name, rows in self._split_rows(split).items()}
        if len(self.sources) == 1:
            return next(iter(datasets.values()))
        numbers = [self.source_names.index(name) for name in datasets]
        return MixedRowDataset(datasets, numbers, list(self._mixture_weights().values()) if is_train else None)

    def _row_dataset(self, split: Split, rows: SplitRows) -> RowDataset:
        is_train = split == "train"
        return RowDataset(
            rows.store,
            rows.table,
            self._pad_token_id(),
            None if is_train else rows.store.token_bytes,
            layout=self.batch_settings.layout if is_train else None,
        )

    def _order(self, dataset: RowDataset | MixedRowDataset) -> RowOrder:
        if isinstance(dataset, MixedRowDataset):
            return MixedOrder(dataset.sizes, list(self._mixture_weights().values()), self.seed, self.shuffle)
        return super()._order(dataset)

    def _mixture_weights(self) -> dict[str, float]:
        sizes = {name: len(rows.table) for name, rows in self._rows["train"].items()}
        return mixture_weights(sizes, self.weights, self.temperature)

    def _training_identity(self) -> dict[str, Any] | None:
        if "train" not in self._rows:
            return None
        settings: dict[str, Any] = {
            "max_length": self.max_length,
            "windowing": self.windowing,
            "stride": self.stride,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "batches": self.batch_settings.counts,
        }
        if len(self.sources) > 1:
            settings |= {"sources": self.source_names, "weights": self._mixture_weights()}
        for name, (store, documents, table) in self._rows["train"].items():
            prefix = f"{name}: " if len(self.sources) > 1 else ""
            settings |= {
                f"{prefix}documents": len(documents),
                f"{prefix}tokens": len(store.tokens),
                f"{prefix}content": store.digest,
                f"{prefix}rows": len(table),
            }
        return settings

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        return prepare_tokenizer(
            self._tokenizer,
            self.sources.values(),
            self.cache_dir,
            vocab_size=self.vocab_size,
            trust_remote_code=self.trust_remote_code,
        )
