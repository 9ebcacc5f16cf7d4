"""The base of data modules whose rows are windows of records, which predictions and metrics put together again."""

from __future__ import annotations

from lightning_llm.datamodules.examples.data_module import ExampleDataModule
from lightning_llm.datamodules.examples.dataset import ExampleDataset, WindowDataset
from lightning_llm.datamodules.examples.records import Record
from lightning_llm.datamodules.examples.store import ExampleStore
from lightning_llm.datamodules.row_data_module import Split
from lightning_llm.datamodules.windows import Int64Array

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class RecordWindowsDataModule(ExampleDataModule):
    """Rows that are windows of records, several of one record where it is long.

    Batches have ``example_ids`` (rows,), the number of the record that a window is of, -1 for an empty row. Records are
    numbered through all data that are given, those of ``data`` first, then ``validation_data`` and ``test_data``: a
    number means the same record in every split. Arguments are those of
    :class:`~lightning_llm.datamodules.examples.data_module.ExampleDataModule`.
    """

    def record_of(self, example: int) -> tuple[Record, str]:
        """The record of this number, and what to call it in messages.

        Raises:
            IndexError: If there is none.
        """
        number = example
        for split in _SPLITS:
            if self._data[split] is not None:
                records = self.records(split)
                if 0 <= number < len(records):
                    return records[number], records.row_name(number)
                number -= len(records)
        raise IndexError(f"There is no example {example} in the data.")

    def name_of(self, example: int) -> str:
        """The record's ``id``, else the name of its row."""
        record, row = self.record_of(example)
        return str(record.get("id", row))

    def _make_dataset(self, split: Split, store: ExampleStore, rows: Int64Array) -> ExampleDataset:
        before = _SPLITS[: _SPLITS.index(self._source(split))]
        first = sum(len(self.records(each)) for each in before if self._data[each] is not None)
        arguments = (store, rows, self._collate(), self._empty(), self._table(store, rows))
        return WindowDataset(*arguments, first_example=first)
