"""What the classes of a column are called, and which number a row's label has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from lightning_llm.datamodules.examples.records import RecordError

_MOST_CLASSES = 1_000_000  # that numbers may stand for without names


class ClassNames:
    """The classes of a column, numbered in order.

    Args:
        names: Of the classes, all different.
        column: For messages.
        stores_numbers: Whether the data set itself numbers its classes (``datasets.ClassLabel``). Otherwise, where all
            names are numbers, a label that is a number is meant as a name.

    Raises:
        ValueError: If there is none, or two have the same name.

    Example:
        >>> classes = ClassNames(["bad", "good"], "label")
        >>> classes.number("good", "row 3"), classes.number(0, "row 4")
        (1, 0)
        >>> ClassNames(["1", "2", "3"], "stars").number(2, "row 0")
        1
    """

    def __init__(self, names: Sequence[str], column: str, *, stores_numbers: bool = False) -> None:
        self.names = [str(name) for name in names]
        self.column = column
        self._reads_names = not stores_numbers and all(name.isdecimal() for name in self.names)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        if not names or len(self._numbers) < len(self.names):
            raise ValueError(f"The classes of {column!r} must have names that differ, one at least, but got {names}.")

    @classmethod
    def found_in(cls, labels: Iterable[tuple[Any, str]], column: str) -> ClassNames:
        """The classes that rows have: numbers 0..n, or the names in order.

        Args:
            labels: Each with its row's name.
            column: For messages.

        Raises:
            RecordError: If a label is neither a name nor a number, or if both stand in the column.

        Example:
            >>> ClassNames.found_in([("b", "row 0"), ("a", "row 1")], "label").names
            ['a', 'b']
            >>> ClassNames.found_in([(2, "row 0"), (0, "row 1")], "label").names
            ['0', '1', '2']
        """
        names: dict[str, None] = {}
        highest, first_number, first_name = -1, "", ""
        for label, row in labels:
            label = _whole(label)
            if isinstance(label, str) and label.strip():
                names[label.strip()] = None
                first_name = first_name or row
            elif isinstance(label, int):
                if int(label) < 0:
                    raise RecordError(f"{row}: column {column!r} should hold a class from 0 on, but holds {label}.")
                highest = max(highest, int(label))
                first_number = first_number or row
            else:
                raise _no_label(label, row, column)
            if first_name and first_number:
                kind, other = ("name", first_number) if row == first_name else ("number", first_name)
                raise RecordError(
                    f"{row}: column {column!r} holds {label!r}, which is a {kind}, unlike the label of {other}. Use "
                    f"names for all rows, or numbers."
                )
        if all(name.isdecimal() for name in names) and names:  # numbers of a csv file
            highest = max(map(int, names))
        if highest >= _MOST_CLASSES:
            raise ValueError(
                f"Column {column!r} holds the number {highest}. Classes are numbered from 0 on, so that would make "
                f"{highest + 1:,} of them. Is it another column that holds the classes? Otherwise name them in "
                f"`labels`, or pass problem_type='regression' for numbers to be predicted as such."
            )
        if highest >= 0:
            return cls([str(number) for number in range(highest + 1)], column)
        return cls(sorted(names), column)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._numbers

    def number(self, label: Any, row: str) -> int:
        """The number of a label.

        Args:
            label: Its name, or its number.
            row: The row's name, for messages.

        Raises:
            RecordError: If it is no class.
        """
        label = _whole(label)
        if not isinstance(label, (str, int)) or (isinstance(label, str) and not label.strip()):
            raise _no_label(label, row, self.column)
        name = str(label if isinstance(label, str) else int(label)).strip()
        if name in self._numbers and (isinstance(label, str) or self._reads_names):
            return self._numbers[name]
        if name.isdecimal() and int(name) < len(self.names) and not self._reads_names:
            return int(name)
        shown = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
        raise RecordError(
            f"{row}: column {self.column!r} holds {label!r}, which is none of the {len(self.names)} classes ({shown}). "
            f"Mend the row, or name all classes in `labels`."
        )


def _whole(label: Any) -> Any:
    """NumPy's whole numbers, and those that a table with gaps made floats of, as plain ones."""
    if isinstance(label, Integral) or (isinstance(label, float) and label.is_integer()):
        return int(label)
    return label


def check_no_class_is_empty(numbers: Iterable[int], classes: ClassNames, source: str) -> None:
    """Refuse classes that no training row has: the model could not learn them.

    Args:
        numbers: The class of each training row.
        classes: All classes.
        source: Of the rows, for messages.

    Raises:
        ValueError: Naming the empty classes.
    """
    found = set(numbers)
    empty = [name for number, name in enumerate(classes.names) if number not in found]
    if empty:
        raise ValueError(
            f"No training row of {source} has the class {', '.join(map(repr, empty[:5]))}"
            f"{', ...' if len(empty) > 5 else ''} in its column {classes.column!r}. Add rows of it, name the classes "
            f"without it in `labels`, or pass allow_empty_classes=True where it is meant to be predicted never."
        )


def _no_label(label: Any, row: str, column: str) -> RecordError:
    return RecordError(
        f"{row}: column {column!r} should hold the name or the number of a class, but holds {label!r}. Give the row a "
        f"label, or leave it out."
    )
