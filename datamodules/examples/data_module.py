"""The base of data modules of examples: records are encoded once, and rows of them are batched in any order."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.batches.settings import Batching, BatchSettings
from lightning_llm.datamodules.cache import fingerprint
from lightning_llm.datamodules.examples.dataset import Collate, ExampleDataset, ExampleTable, PaddedColumns
from lightning_llm.datamodules.examples.records import UNKNOWN, Record, Records, check_columns, open_records
from lightning_llm.datamodules.examples.store import FORMAT_VERSION, Example, ExampleStore
from lightning_llm.datamodules.loader import Rows
from lightning_llm.datamodules.order import drawn
from lightning_llm.datamodules.row_data_module import STAGE_SPLITS, RowDataModule, Split
from lightning_llm.datamodules.text_settings import check_numbers, check_shares
from lightning_llm.datamodules.tokenizer import byte_tokenizer, encoder, load_tokenizer
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX
from lightning_llm.schedule import Schedule

_RECORDS_AT_ONCE = 1000


class ExampleRows(Rows, Protocol):
    """Rows made of the examples of a store."""

    @property
    def store(self) -> ExampleStore:
        """The encoded examples."""

    def examples_of(self, row_id: int) -> list[int]:
        """The examples that a row is made of, by their numbers in the store."""


class ExampleDataModule(RowDataModule):
    """Rows of a table, each encoded into one example or several.

    What is encoded is written to disk once and memory-mapped. A subclass says which columns it needs, how it encodes
    records, and what a label is; batches, order, global batch, resuming and ranks are dealt with here.

    Args:
        data: A ``.jsonl`` (also ``.gz``, ``.zst``), ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, a folder of
            them, or several; a folder written by ``Dataset.save_to_disk``; the id of a data set on the hub; a
            `datasets` data set, or a mapping of splits to them; or a list of mappings.
        tokenizer: A tokenizer, its hub id or local folder, or ``bytes``.
        max_length: Tokens in a row at most.
        validation_data: Like ``data``; None takes a share of the rows of ``data``.
        validation_fraction: That share, 0..1, but one record at least; 0 for no validation.
        test_data: Like ``data``; None tests on the validation rows. Without columns of targets it can be predicted.
        split: Of a data set: the split to train on.
        validation_split: Of ``validation_data``, if it is a data set.
        test_split: Of ``test_data``, if it is a data set.
        dataset_config: Configuration of a hub data set.
        batching: ``rows``: ``micro_batch_size`` rows. ``padded``: rows by their tokens, padding included.
        micro_batch_size: Rows in a training batch of one rank.
        micro_batch_tokens: For ``padded``: tokens in a training batch of one rank.
        global_batch_size: Rows in an optimizer step over all ranks, or a schedule of them. The loader cuts a step into
            as many micro-batches as the Trainer accumulates.
        global_batch_tokens: Likewise in targets.
        eval_micro_batch_size: Rows in a validation, test or predict batch of one rank; ``micro_batch_size`` if None.
        shuffle: A new order of the training rows each epoch.
        seed: Of that order and of the choice of validation rows.
        drop_last: Leave out the last training batch of an epoch if it is short.
        num_workers: Loader processes; 0 is fastest for tokens.
        pin_memory: Page-lock batches for copies to a GPU; None does so where there is one.
        cache_dir: Where encoded examples are kept; ``$LIGHTNING_LLM_CACHE`` or ``~/.cache/lightning_llm`` if None.
        trust_remote_code: Run tokenizer code that comes with the hub repository or folder. Off unless asked for.

    Raises:
        ValueError: For settings that do not fit each other, and for rows that cannot be used, naming the row.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: str | Any,
        max_length: int = 512,
        *,
        validation_data: Any = None,
        validation_fraction: float = 0.05,
        test_data: Any = None,
        split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        dataset_config: str | None = None,
        batching: Batching = "rows",
        micro_batch_size: int = 8,
        micro_batch_tokens: int | None = None,
        global_batch_size: int | dict[str, float] | Schedule | str | None = None,
        global_batch_tokens: int | dict[str, float] | Schedule | str | None = None,
        eval_micro_batch_size: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if batching == "padding_free" and not self._packs:
            raise ValueError(
                f"batching='padding_free' lays rows end to end, and the models that {type(self).__name__} is for would "
                f"see them as one. Use batching='padded'."
            )
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
        check_numbers(max_length=max_length)
        check_shares(validation_fraction=validation_fraction)
        self.max_length = max_length
        self.validation_fraction = validation_fraction
        self.trust_remote_code = trust_remote_code
        self._data: dict[Split, Any] = {"train": data, "validation": validation_data, "test": test_data}
        self._names: dict[Split, str] = {"train": split, "validation": validation_split, "test": test_split}
        self._dataset_config = dataset_config
        self._records: dict[Split, Records] = {}
        self._stores: dict[Split, ExampleStore] = {}
        self._datasets: dict[Split, ExampleRows] = {}

    # ---- what a subclass says ------------------------------------------------------------------------------------

    _packs = False  # whether rows may lie end to end
    _unit = "tokens"  # of a row's length
    _why_left_out = ""  # a sentence on records of which no example is made

    @abstractmethod
    def _columns(self) -> Mapping[str, str]:
        """The columns that every record must have, by the argument that names each."""

    def _target_columns(self) -> Collection[str]:
        """Those of them that ``test_data`` need not have; :meth:`_encode` then finds ``UNKNOWN`` there."""
        return ()

    @abstractmethod
    def _encode(self, records: Sequence[Record], names: Sequence[str]) -> list[list[Example]]:
        """The examples of each record; ``names`` are for messages. Columns named ``_...`` are not put into batches.

        ``_num_cut``, where given, is the number of tokens beyond ``max_length`` that an example leaves out.
        """

    def _empty(self) -> Example:
        """An example without a target, for a rank that has no row left: here, a token that is none."""
        return {"input_ids": np.array([self._pad_token_id()]), "labels": np.array([IGNORE_INDEX])}

    def _encoding(self) -> Mapping[str, Any]:
        """Whatever else decides what :meth:`_encode` makes, by name; simple values."""
        return {}

    def _open(self, split: Split) -> Records:
        """The records of a split that has data of its own."""
        return open_records(self._data[split], split=self._names[split], dataset_config=self._dataset_config)

    def _learn(self, records: Records) -> None:
        """Look through the training records before any is encoded, for instance for the names of classes."""

    def _check_rows(self, split: Split, store: ExampleStore, rows: Int64Array) -> None:
        """Look at the rows of a split when they are laid out."""

    def _collate(self) -> Collate:
        """How a batch is made of examples."""
        return PaddedColumns(self._pad_token_id())

    def _make_dataset(self, split: Split, store: ExampleStore, rows: Int64Array) -> ExampleRows:
        """The batches of a split's rows, by default a row for each example."""
        return ExampleDataset(store, rows, self._collate(), self._empty(), self._table(store, rows))

    def _table(self, store: ExampleStore, rows: Int64Array) -> ExampleTable:
        """Lengths and targets of the rows."""
        columns = [name for name in store.values if name.endswith("input_ids")]
        lengths = sum((store.lengths(name) for name in columns), np.zeros(len(store), np.int64))
        return ExampleTable(lengths[rows], store.num_targets()[rows])

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Encode the examples, where that has not been done; one process per machine."""
        for split, data in self._data.items():
            if data is not None:
                self._store(split)

    def setup(self, stage: str | None = None) -> None:
        """Map the examples into memory and choose the rows of each split."""
        super().setup(stage)
        if stage == "test":
            self.check_labelled("test")
        for split in STAGE_SPLITS.get(stage, ("train", "validation", "test")):
            if split == "train" or self._has_validation or (split == "test" and (stage or self._has_test)):
                self._dataset(split)
        if stage == "fit":
            rank_zero_info(self.summary())

    # ---- what others may ask -------------------------------------------------------------------------------------

    def records(self, split: Split = "train") -> Records:
        """The records that a split's rows are of, before the validation share is taken off."""
        split = self._source(split)
        if split not in self._records:
            records = self._open(split)
            if split != "train":
                records.name = {"the data": f"the {split} data", "the data set": f"the {split} data set"}.get(
                    records.name, records.name
                )
            arguments = [f"{argument}=..." for argument in self._columns() if "_column" in argument]
            advice = f"Name the columns with {', '.join(arguments)}."
            unknown = self._unknown(split, records)
            check_columns(records, [each for each in self._columns().values() if each not in unknown], advice)
            self._records[split] = records
        return self._records[split]

    def check_labelled(self, split: Split) -> None:
        """Refuse to measure on data that have no targets.

        Raises:
            ValueError: If a split's do not.
        """
        records = self.records(split)
        if missing := self._unknown(split, records):
            raise ValueError(
                f"{records.name} has no column {' and no column '.join(map(repr, missing))}, so there is nothing to "
                f"measure predictions by. It can be predicted: Trainer.predict, or lightning-llm predict."
            )

    def row_name(self, row_id: int, split: Split = "train") -> str:
        """What the records of a row are called, as a batch's ``row_ids`` name it: file and row."""
        dataset = self._dataset(split)
        numbers = dict.fromkeys(int(dataset.store.values["_record"][n]) for n in dataset.examples_of(row_id))
        return "; ".join(self.records(split).row_name(number) for number in numbers)

    def summary(self) -> str:
        """One line on each split: rows, tokens, targets."""
        lines = []
        for split, dataset in self._datasets.items():
            lengths = dataset.table.row_lengths
            text = f"{split:<10} {len(dataset):,} rows"
            if lengths.max(initial=0) > 1:
                text += (
                    f", {int(lengths.sum()):,} {self._unit}, {int(np.median(lengths))} in the middle, "
                    f"{lengths.max()} at most"
                )
            lines.append(text)
        return "\n".join(lines)

    # ---- details -------------------------------------------------------------------------------------------------

    @property
    def _limits(self) -> str:
        """What rows are cut to, for messages."""
        return f"max_length={self.max_length}"

    @property
    def _has_validation(self) -> bool:
        return self._data["validation"] is not None or self.validation_fraction > 0

    @property
    def _has_test(self) -> bool:
        return self._data["test"] is not None

    def _source(self, split: Split) -> Split:
        """The split that has data of its own, from which another's are taken."""
        if split == "test" and self._data["test"] is None:
            split = "validation"
        return "train" if self._data[split] is None else split

    def _store(self, split: Split) -> ExampleStore:
        split = self._source(split)
        if split not in self._stores:
            self._learn(self.records("train"))
            records = self.records(split)
            name = fingerprint(
                [str(FORMAT_VERSION), type(self).__name__, records.identity(), self._encoding_identity()]
            )
            examples = self._examples(records, self._unknown(split, records))
            self._stores[split] = ExampleStore.build(self.cache_dir / f"examples-{name}", examples)
        return self._stores[split]

    def _unknown(self, split: Split, records: Records) -> list[str]:
        """The columns of targets that test data lack: all or none."""
        targets = self._target_columns() if self._source(split) == "test" else ()
        return [] if set(targets) & set(records.columns) else list(targets)

    def _examples(self, records: Records, unknown: Sequence[str] = ()) -> Iterator[Example]:
        num_cut, num_rows_cut, num_rows = 0, 0, 0
        for first in range(0, len(records), _RECORDS_AT_ONCE):
            numbers = range(first, min(first + _RECORDS_AT_ONCE, len(records)))
            rows = [{**records[number], **dict.fromkeys(unknown, UNKNOWN)} for number in numbers]
            encoded = self._encode(rows, [records.row_name(number) for number in numbers])
            for number, examples in zip(numbers, encoded, strict=True):
                for example in examples:
                    num_rows += 1
                    cut = int(example.get("_num_cut", 0))
                    num_cut, num_rows_cut = num_cut + cut, num_rows_cut + (cut > 0)
                    yield {**{k: v for k, v in example.items() if k != "_num_cut"}, "_record": number}
        if not num_rows:
            raise ValueError(f"No row of {records.name} can be used; {len(records)} were read.{self._why_left_out}")
        if num_cut:
            rank_zero_warn(
                f"{num_rows_cut:,} of {num_rows:,} rows of {records.name} are longer than {self._limits}, and "
                f"{num_cut:,} {self._unit} are left out. {self._instead_of_cutting}"
            )

    @property
    def _instead_of_cutting(self) -> str:
        """What could be done about rows that are too long."""
        return "Raise that, where the model allows it."

    def _dataset(self, split: Split) -> ExampleRows:
        if split not in self._datasets:
            if split == "test" and not (self._has_test or self._has_validation):
                raise ValueError(
                    "There are no test rows: all are trained on. Pass test_data=..., or hold some out with "
                    "validation_fraction or validation_data."
                )
            store = self._store(split)
            rows = np.arange(len(store))
            if self._source(split) == "train" and self._data["validation"] is None and self.validation_fraction:
                draws = drawn(np.asarray(store.values["_record"]), self.seed)
                is_held_out = (draws < self.validation_fraction) | (draws == draws.min())  # one record at least
                rows = rows[~is_held_out] if split == "train" else rows[is_held_out]
            if not len(rows):
                raise ValueError(
                    f"No row is left for {split}: of {len(store)} in {self.records(split).name}, none was drawn for it "
                    f"with validation_fraction={self.validation_fraction} and seed={self.seed}. Change those, pass "
                    f"validation_data=..., or validation_fraction=0 to train without validation."
                )
            self._check_rows(split, store, rows)
            self._datasets[split] = self._make_dataset(split, store, rows)
        return self._datasets[split]

    def _encoding_identity(self) -> str:
        settings = {"max_length": self.max_length, **self._columns(), **self._encoding()}
        if self._tokenizer is not None:
            settings["tokenizer"] = encoder(self.tokenizer, append_eos=False).fingerprint()
        return json.dumps(settings, sort_keys=True, default=str)

    def _training_identity(self) -> dict[str, Any] | None:
        if "train" not in self._datasets:
            return None
        dataset = self._datasets["train"]
        return {
            "rows": len(dataset),
            "content": dataset.store.digest,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "batches": self.batch_settings.counts,
        }

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        if not isinstance(self._tokenizer, str):
            given: PreTrainedTokenizerBase = self._tokenizer
            return given
        if self._tokenizer == "bytes":
            return byte_tokenizer()
        return load_tokenizer(self._tokenizer, trust_remote_code=self.trust_remote_code)
