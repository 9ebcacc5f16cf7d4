"""What a user may say of texts and their rows, and what is refused before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any


def named_sources(data: Any) -> dict[str, Any]:
    """The sources of ``data`` by name; a single one has the name ``""``."""
    if isinstance(data, Mapping):
        if not data:
            raise ValueError("`data` is a mixture without a source. Name one at least: {'code': 'code/', ...}.")
        return dict(data)
    return {"": data}


def part_of(other: Any, name: str, data: Any, argument: str) -> Any:
    """The entry of ``validation_data`` or ``test_data`` that belongs to a source of ``data``."""
    if other is None or isinstance(data, Mapping) != isinstance(other, Mapping):
        if other is not None:
            raise ValueError(
                f"`data` and `{argument}` are both a single source or both mappings with the same names, but got "
                f"{data!r} and {other!r}."
            )
        return None
    if not isinstance(other, Mapping):
        return other
    unknown = sorted(set(other) - set(data))
    if unknown:
        raise ValueError(f"`{argument}` names {unknown}, but the sources of `data` are {sorted(data)}.")
    return other.get(name)


_LEAST = {"max_length": 2, "num_workers": 0, "min_length": 0, "seed": 0, "doc_stride": 0}  # a token and its prediction


def check_numbers(**numbers: int | None) -> None:
    """Refuse what is no whole number, or too small for what it counts; None stands for a default."""
    for name, number in numbers.items():
        least = _LEAST.get(name, 1)
        is_whole = isinstance(number, Integral) and not isinstance(number, bool)
        if number is not None and not (is_whole and number >= least):
            raise ValueError(f"`{name}` must be a whole number, {least} or more, but got {number!r}.")


def check_shares(*, validation_fraction: float = 0.0, temperature: float = 1.0) -> None:
    """Refuse a part that is none, and a temperature that no mixture has."""
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"`validation_fraction` lies in 0..1, 1 excluded, but got {validation_fraction}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, but got {temperature}.")


def check_windowing(name: str, windowing: str, option: str, stride: int | None, max_length: int) -> None:
    """Refuse an unknown windowing, and a stride that it does not take."""
    kinds = ("packed", "wrapped", "windows", "documents")
    if windowing not in kinds:
        raise ValueError(f"`{name}` must be {', '.join(map(repr, kinds[:-1]))} or 'documents', but got {windowing!r}.")
    if stride is None:
        return
    meant = ("windows", "packed") if option == "stride" else ("windows",)
    if windowing not in meant:
        raise ValueError(
            f"`{option}` has a meaning for {name}={' and '.join(map(repr, meant))} only, but {name} is {windowing!r}."
        )
    if option == "eval_context" and not 1 <= stride < max_length:
        raise ValueError(
            f"`eval_context` (tokens before each scored one) lies in 1..max_length-1={max_length - 1}, but got "
            f"{max_length - stride}."
        )
    if not 1 <= stride <= max_length:
        raise ValueError(f"`stride` (new tokens in a window) lies in 1..max_length={max_length}, but got {stride}.")


def check_weights(weights: dict[str, float] | None, sources: Mapping[str, Any]) -> None:
    """Refuse weights that do not name every source of a mixture, or are not above 0."""
    if weights is None:
        return
    if set(weights) != set(sources) or "" in sources:
        raise ValueError(
            f"`weights` names every source of a mixture, but got {sorted(weights)} for the sources "
            f"{sorted(sources) if '' not in sources else 'of a single `data`'}."
        )
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(
                f"`weights` must be above 0 and finite, but got {weight} for {name!r}. Leave out a source that is not "
                f"to be drawn."
            )
