"""The names of a classifier's classes, from the argument or the data, into the model's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PretrainedConfig

Labels = Sequence[str] | int


def agreed_labels(given: Labels | None, from_data: Sequence[str] | None) -> list[str] | int | None:
    """The classes, as whoever names them says.

    Args:
        given: Names, or a number, as ``LLMModule(labels=...)`` has them.
        from_data: Names that the data module knows.

    Raises:
        ValueError: If both speak, and differ.

    Example:
        >>> agreed_labels(2, ["bad", "good"])
        ['bad', 'good']
    """
    if isinstance(given, str) or (isinstance(given, int) and (isinstance(given, bool) or given < 1)):
        raise ValueError(f"`labels` must be a list of names, or how many there are, but got {given!r}.")
    if given is not None and not isinstance(given, int):
        given = [str(name) for name in given]
        if not given or len(set(given)) < len(given):
            raise ValueError(f"`labels` must be names that differ, at least one, but got {given}.")
    if not from_data:
        return given
    names = [str(name) for name in from_data]
    if given is None or given == len(names) or given == names:
        return names
    raise ValueError(
        f"LLMModule(labels={given!r}) and the data module's label_names, {names}, differ: a label would mean another "
        f"class than the data says. Leave `labels` out, or give the same names in the same order."
    )


def set_labels(config: PretrainedConfig, labels: Labels, *, is_built: bool) -> None:
    """Write the classes into a configuration: ``num_labels``, ``id2label``, ``label2id``.

    Args:
        config: Changed in place.
        labels: Names, or a number; a number keeps names where there are as many.
        is_built: Whether the head stands already, so that its number of classes is given.

    Raises:
        ValueError: If a head that stands has another number of classes.
    """
    number = labels if isinstance(labels, int) else len(labels)
    any_config: Any = config
    if number != any_config.num_labels:
        if is_built:
            raise ValueError(
                f"The model has a head of {any_config.num_labels} classes, but there are {number} labels. Build it "
                f"with `num_labels={number}`, or pass LLMModule a folder, a hub id or a configuration."
            )
        any_config.num_labels = number
    if not isinstance(labels, int):
        own = [str(any_config.id2label.get(index)) for index in range(number)]
        if own != list(labels) and sorted(own) == sorted(labels):
            rank_zero_warn(
                f"The model has its classes in the order {own}, and the labels are {list(labels)}: a head that was "
                f"trained means another class by each number. Number the data's labels in the model's order to keep "
                f"what it knows."
            )
        any_config.id2label = dict(enumerate(labels))
        any_config.label2id = {name: index for index, name in enumerate(labels)}
