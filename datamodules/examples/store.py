"""Encoded examples in memory-mapped columns: written once, opened by every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_llm.datamodules.cache import build_once
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX

Example = Mapping[str, Any]  # columns: a number, or a NumPy array of one dimension

FORMAT_VERSION = 2


@dataclass(frozen=True, eq=False)
class ExampleStore:
    """Columns of examples, each with a number or a list of numbers for every example.

    Attributes:
        values: The numbers of each column, all examples end to end; int32, or float64.
        offsets: For columns of lists: (num_examples + 1,) int64, where each example's begin.
        digest: Of all that is stored.
        folder: Where the files are.
    """

    values: Mapping[str, npt.NDArray[Any]]
    offsets: Mapping[str, Int64Array]
    digest: str
    folder: Path

    def __len__(self) -> int:
        name = next(iter(self.values))
        return len(self.offsets[name]) - 1 if name in self.offsets else len(self.values[name])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An example: views of its lists, and its numbers."""
        example = {}
        for name, values in self.values.items():
            offsets = self.offsets.get(name)
            example[name] = values[index] if offsets is None else values[offsets[index] : offsets[index + 1]]
        return example

    def __reduce__(self) -> Any:
        """Send worker processes the place of the files, not the numbers."""
        return ExampleStore.open, (self.folder,)

    def lengths(self, column: str) -> Int64Array:
        """(num_examples,) int64, how long the lists of a column are; 1 each for a column of numbers."""
        if column not in self.offsets:
            return np.ones(len(self), np.int64)
        lengths: Int64Array = np.diff(self.offsets[column])
        return lengths

    def num_targets(self, column: str = "labels") -> Int64Array:
        """(num_examples,) int64, targets in a column of labels; 1 each where there is no such column."""
        if column not in self.values:
            return np.ones(len(self), np.int64)
        is_target = np.asarray(self.values[column]) != IGNORE_INDEX
        if column not in self.offsets:
            numbers: Int64Array = is_target.astype(np.int64)
            return numbers
        sums = np.concatenate([[0], np.cumsum(is_target)])[self.offsets[column]]
        counts: Int64Array = np.diff(sums)
        return counts

    @classmethod
    def build(cls, folder: Path, examples: Iterable[Example]) -> ExampleStore:
        """Write examples, all with the same columns, unless the folder is there already; one process does it.

        Args:
            folder: Named after a fingerprint of everything that decides the content.
            examples: Only looked at where they are to be written.
        """
        return cls.open(build_once(folder, lambda path: _write(path, examples)))

    @classmethod
    def open(cls, folder: Path) -> ExampleStore:
        """Map a folder that :meth:`build` wrote.

        Raises:
            ValueError: If something of it is missing or damaged.
        """
        try:
            facts = json.loads((folder / "examples.json").read_text())
            if facts["version"] != FORMAT_VERSION:
                raise ValueError(f"it has format {facts['version']}, expected {FORMAT_VERSION}")
            values = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in facts["columns"]}
            offsets = {name: np.load(folder / f"{name}.offsets.npy") for name in facts["lists"]}
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(
                f"The cache of examples {folder} cannot be read ({error}). Delete that folder; it is built again."
            ) from error
        return cls(values, offsets, facts["digest"], folder)


def _write(folder: Path, examples: Iterable[Example]) -> None:
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    is_list: dict[str, bool] = {}
    for number, example in enumerate(examples):
        arrays = {name: np.asarray(value) for name, value in example.items()}
        if not parts:
            parts = {name: [] for name in arrays}
            is_list = {name: array.ndim == 1 for name, array in arrays.items()}
        if arrays.keys() != parts.keys():
            raise ValueError(f"Example {number} has the columns {sorted(arrays)}, those before it {sorted(parts)}.")
        for name, array in arrays.items():
            parts[name].append(array.astype(np.float64 if array.dtype.kind == "f" else np.int32))
    if not parts:
        raise ValueError("There is no example to write.")
    digest = hashlib.blake2b(digest_size=16)
    for name, arrays_of_column in parts.items():
        values = np.concatenate(arrays_of_column) if is_list[name] else np.stack(arrays_of_column)
        np.save(folder / f"{name}.npy", values)
        digest.update(name.encode() + values.tobytes())
        if is_list[name]:
            offsets = np.cumsum([0, *map(len, arrays_of_column)]).astype(np.int64)
            np.save(folder / f"{name}.offsets.npy", offsets)
            digest.update(offsets.tobytes())
    lists = [name for name in parts if is_list[name]]
    facts = {"version": FORMAT_VERSION, "columns": list(parts), "lists": lists, "digest": digest.hexdigest()}
    (folder / "examples.json").write_text(json.dumps(facts))
