"""Labels of whole rows: one class of several, several classes at once, or numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from lightning_llm.datamodules.examples.class_names import ClassNames, check_no_class_is_empty
from lightning_llm.datamodules.examples.records import UNKNOWN, Record, RecordError, Records
from lightning_llm.datamodules.examples.store import ExampleStore
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

_PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


class RowLabels:
    """What the label of a row is, and how it becomes numbers.

    Args:
        columns: One column, or several: then each is a class that a row has or has not, or a number.
        problem_type: transformers' word for what the labels are.
        names: Of the classes, or how many there are: 0, 1, ...; None finds them in the training rows.
        separator: Between the classes of a row in one column of text.
        allow_empty_classes: Whether a class may have no training row.

    Raises:
        ValueError: For settings that do not fit each other.
    """

    def __init__(
        self,
        columns: str | Sequence[str],
        problem_type: ProblemType,
        names: Sequence[str] | int | None = None,
        *,
        separator: str = ",",
        allow_empty_classes: bool = False,
    ) -> None:
        self.columns = [columns] if isinstance(columns, str) else list(columns)
        if problem_type not in _PROBLEMS:
            raise ValueError(f"`problem_type` must be one of {', '.join(_PROBLEMS)}, but got {problem_type!r}.")
        if len(self.columns) > 1 and problem_type == "single_label_classification":
            raise ValueError(
                f"A row has one class, in one column, but `label_column` names {self.columns}. For a class in each "
                f"column pass problem_type='multi_label_classification', for numbers 'regression'."
            )
        self.problem_type: ProblemType = problem_type
        self.separator = separator
        self.allow_empty_classes = allow_empty_classes
        if isinstance(names, str) or (isinstance(names, int) and (isinstance(names, bool) or names < 1)):
            raise ValueError(
                f"`labels` are the names of the classes, a list, or how many there are, but got {names!r}."
            )
        given = range(names) if isinstance(names, int) else names
        self._given = None if given is None else [str(name) for name in given]
        self.classes: ClassNames | None = None
        if problem_type == "regression" or len(self.columns) > 1:
            self._given = self._given or self.columns
            if len(self._given) < len(self.columns):
                raise ValueError(f"`labels` must name all of {self.columns}, but got {self._given}.")
        if self._given is not None:
            self.classes = ClassNames(self._given, self.columns[0])

    @property
    def names(self) -> list[str]:
        """Names of the classes or numbers.

        Raises:
            RuntimeError: Before :meth:`learn`, where they are to be found in the data.
        """
        if self.classes is None:
            raise RuntimeError("The classes are found in the training rows: call `setup()` first, or name them.")
        return self.classes.names

    def learn(self, records: Records) -> None:
        """Find the classes in the training rows, where nobody named them."""
        if self.classes is not None:
            return
        column = self.columns[0]
        names = records.class_names(column)
        if names is not None:
            self.classes = ClassNames(names, column, stores_numbers=True)
            return
        found = ((records[index].get(column), records.row_name(index)) for index in range(len(records)))
        if self.problem_type == "multi_label_classification":
            found = ((each, row) for label, row in found for each in self._listed(label, row))
        self.classes = ClassNames.found_in(found, column)

    def encode(self, record: Record, row: str) -> Any:
        """The label of a record: a class's number, or (num_labels,) float64; :meth:`empty` where it is ``UNKNOWN``.

        Raises:
            RecordError: If it has none, or one that is no class or number.
        """
        values = [record.get(column) for column in self.columns]
        if values[0] is UNKNOWN:
            return self.empty()
        if self.problem_type == "regression":
            if len(values) == 1 and isinstance(values[0], (list, tuple)):
                values = list(values[0])
            if len(values) != len(self.names):
                raise RecordError(f"{row}: expected {len(self.names)} numbers ({self.names}), but got {len(values)}.")
            columns = self.columns if len(self.columns) == len(values) else self.columns * len(values)
            numbers = np.array([_number(value, row, column) for value, column in zip(values, columns, strict=True)])
            return numbers if len(numbers) > 1 else numbers[0]
        assert self.classes is not None
        if self.problem_type == "single_label_classification":
            return self.classes.number(values[0], row)
        has = np.zeros(len(self.classes), np.float64)
        if len(self.columns) > 1:
            for number, value in enumerate(values):
                has[number] = _share(value, row, self.columns[number])
        else:
            for label in self._listed(values[0], row):
                has[self.classes.number(label, row)] = 1.0
        return has

    def empty(self) -> Any:
        """A label that is no target."""
        if self.problem_type == "single_label_classification":
            return IGNORE_INDEX
        return np.full(len(self.names), np.nan) if len(self.names) > 1 or not self._is_number() else np.nan

    def check(self, store: ExampleStore, rows: Int64Array, source: str) -> None:
        """Refuse a class that no training row has.

        Raises:
            ValueError: Naming it.
        """
        if self.classes is None or self.problem_type == "regression" or self.allow_empty_classes:
            return
        labels = np.asarray(store.values["labels"])
        if self.problem_type == "multi_label_classification":
            present = np.flatnonzero(labels.reshape(len(store), -1)[rows].any(0))
        else:
            present = np.unique(labels[rows])
        check_no_class_is_empty(present.tolist(), self.classes, source)

    def _is_number(self) -> bool:
        return self.problem_type == "regression"

    def _listed(self, label: Any, row: str) -> list[Any]:
        if isinstance(label, str):
            return [part.strip() for part in label.split(self.separator) if part.strip()]
        if isinstance(label, (list, tuple)):
            return list(label)
        raise RecordError(
            f"{row}: column {self.columns[0]!r} should hold the classes of the row, a list or a text with "
            f"{self.separator!r} between them, but holds {label!r}."
        )


def _number(value: Any, row: str, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RecordError(f"{row}: column {column!r} should hold a number, but holds {value!r}.")
    return number


def _share(value: Any, row: str, column: str) -> float:
    number = {"true": 1.0, "false": 0.0}.get(str(value).strip().lower())
    if number is None:
        number = _number(value, row, column)
    if not 0 <= number <= 1:
        raise RecordError(f"{row}: column {column!r} should hold 0 or 1, but holds {value!r}.")
    return number
